//! The device that says where the generation ID lies (Microsoft, "Virtual Machine Generation ID"; [`crate::generation`]).

use acpi_tables::aml::{Device, Method, Name, Notify, Package, Path, Scope};

use super::aml::{Raw, raw, uid};
use crate::generation::GPE;

/// `\_SB.VGEN` for an ID at `address`, and the event that tells of another one.
pub(super) fn device(address: u64) -> Raw {
    let low = (address & u64::from(u32::MAX)) as u32;
    let high = (address >> 32) as u32;
    let device = raw(&Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"RACK0001"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &uid(1),
                &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
            ],
        )],
    ));
    let handler = raw(&Scope::new(
        "_GPE".into(),
        vec![&Method::new(
            Path::new(&format!("_E{GPE:02X}")),
            0,
            false,
            vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)],
        )],
    ));
    Raw([device.0, handler.0].concat())
}
