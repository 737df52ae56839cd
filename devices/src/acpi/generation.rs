//! The device that says where the generation ID lies (Microsoft, "Virtual Machine Generation ID"; [`crate::generation`]).

use acpi_tables::aml::{Add, Device, Index, Local, Method, Name, Notify, Package, Path, Return, Scope, Store, ZERO};

use super::aml::{Raw, raw, uid};
use crate::generation::{GPE, OFFSET};

/// The object that holds the address of the page, and the prefix of 32-bit numbers.
const PAGE: [u8; 4] = *b"PAGE";
const DWORD: u8 = 0x0c;

/// `\_SB.VGEN` for a page at `page`, and the event that tells of another ID.
pub(super) fn device(page: u32) -> Raw {
    // Always in this form: firmware changes the number.
    let number = Raw([&[DWORD][..], &page.to_le_bytes()].concat());
    let place = raw(&Add::new(&Index::new(&ZERO, &Local(0), &ZERO), &Path::new("PAGE"), &(OFFSET as u8)));
    let address = raw(&Method::new(
        "ADDR".into(),
        0,
        false,
        vec![&Store::new(&Local(0), &Package::new(vec![&ZERO, &ZERO])), &place, &Return::new(&Local(0))],
    ));
    let device = raw(&Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"RACK0001"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &uid(1),
                &Name::new("PAGE".into(), &number),
                &address,
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

/// Where in the DSDT the address of the page stands, 4 bytes.
pub(super) fn page_pointer(dsdt: &[u8]) -> Option<usize> {
    let number = [&PAGE[..], &[DWORD]].concat();
    let at = dsdt.windows(number.len()).position(|window| window == number)?;
    Some(at + number.len())
}
