//! Where things are: identity, capabilities, and the one BAR (virtio 1.2 §4.1.2, §4.1.4).

use crate::pci::BarKind;
use crate::pci::config::{ConfigError, ConfigSpace, Identity};
use crate::pci::msix::{CONTROL_ENABLE, CONTROL_FUNCTION_MASK, MSIX_CAPABILITY};
use crate::virtio::DeviceType;
use crate::virtio::pci::transport::common;

/// The only BAR: everything is in it, so that enumeration sizes and places one region per device.
pub(super) const BAR: u8 = 0;
/// Bytes of the BAR.
pub(super) const BAR_LENGTH: u64 = 0x1_0000;
/// 64-bit, so that it leaves the scarce space below 4 GiB alone.
pub(super) const BAR_KIND: BarKind = BarKind::Memory64 { prefetchable: true };

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DEVICE_LENGTH: u32 = 0x1000;
const NOTIFY: u64 = 0x4000;
const MSIX_TABLE: u64 = 0x8000;
const MSIX_PENDING: u64 = 0xc000;

/// Distance of two queues' notification registers.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// Queues whose notification registers and vectors (one more, for configuration changes) fit into their regions.
pub(super) const MAX_QUEUES: u16 = 1023;

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// virtio-win's drivers bind to this subsystem and revision only.
const SUBSYSTEM: u16 = 0x1100;
const REVISION: u8 = 1;

const VENDOR_CAPABILITY: u8 = 0x09;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;

/// A place in the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Region {
    Common(u64),
    Isr(u64),
    Device(u64),
    Notify(u64),
    MsixTable(u64),
    MsixPending(u64),
    Hole,
}

impl Region {
    pub(super) fn of(offset: u64) -> Self {
        match offset {
            COMMON..ISR => Self::Common(offset - COMMON),
            ISR..DEVICE => Self::Isr(offset - ISR),
            DEVICE..NOTIFY => Self::Device(offset - DEVICE),
            NOTIFY..MSIX_TABLE => Self::Notify(offset - NOTIFY),
            MSIX_TABLE..MSIX_PENDING => Self::MsixTable(offset - MSIX_TABLE),
            MSIX_PENDING..BAR_LENGTH => Self::MsixPending(offset - MSIX_PENDING),
            _ => Self::Hole,
        }
    }
}

/// Offset in the BAR of the register that kicks `queue`.
pub(super) fn notify_offset(queue: u16) -> u64 {
    NOTIFY + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER)
}

/// Configuration space, and where the capabilities that do something are in it.
pub(super) struct Layout {
    pub(super) config: ConfigSpace,
    /// Message control of MSI-X.
    pub(super) msix_control: u16,
    /// The PCI configuration access capability.
    pub(super) window: WindowRegisters,
}

/// The registers of the PCI configuration access capability (§4.1.4.9).
#[derive(Debug, Clone, Copy)]
pub(super) struct WindowRegisters {
    pub(super) bar: u16,
    pub(super) offset: u16,
    pub(super) length: u16,
    pub(super) data: u16,
}

impl WindowRegisters {
    fn at(capability: u16) -> Self {
        Self { bar: capability + 4, offset: capability + 8, length: capability + 12, data: capability + 16 }
    }
}

impl Layout {
    /// The configuration space of a device with `vectors` MSI-X vectors (1..=1024).
    pub(super) fn new(device: DeviceType, vectors: u16) -> Result<Self, ConfigError> {
        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + device as u16,
            revision: REVISION,
            class: match device {
                DeviceType::Net => 0x02_00_00,
                DeviceType::Block => 0x01_00_00,
                DeviceType::Rng | DeviceType::Balloon => 0x00_ff_00,
            },
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        config.add_bar(BAR, BAR_KIND, BAR_LENGTH)?;
        // First: drivers look for it most, and each step along the list is two exits.
        let mut msix = (vectors - 1).to_le_bytes().to_vec();
        msix.extend(dword(MSIX_TABLE | u64::from(BAR)).to_le_bytes());
        msix.extend(dword(MSIX_PENDING | u64::from(BAR)).to_le_bytes());
        let control = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;
        let msix = config.add_capability(MSIX_CAPABILITY, &msix, &control.to_le_bytes())?;
        for (kind, offset, length, extra) in [
            (TYPE_COMMON, COMMON, common::SIZE, None),
            (TYPE_ISR, ISR, 4, None),
            (TYPE_DEVICE, DEVICE, DEVICE_LENGTH, None),
            (TYPE_NOTIFY, NOTIFY, u32::from(vectors - 1) * NOTIFY_MULTIPLIER, Some(NOTIFY_MULTIPLIER)),
        ] {
            config.add_capability(VENDOR_CAPABILITY, &structure(kind, dword(offset), length, extra), &[])?;
        }
        let mut writable = structure(0, u32::MAX, u32::MAX, Some(u32::MAX));
        if let [length, _, bar, ..] = writable.as_mut_slice() {
            (*length, *bar) = (0, 0xff);
        }
        let window = config.add_capability(VENDOR_CAPABILITY, &structure(TYPE_PCI, 0, 0, Some(0)), &writable)?;
        Ok(Self { config, msix_control: msix + 2, window: WindowRegisters::at(window) })
    }
}

/// The body of a virtio structure capability (§4.1.4), after ID and next pointer.
fn structure(kind: u8, offset: u32, length: u32, extra: Option<u32>) -> Vec<u8> {
    let size = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![size, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra.iter().flat_map(|extra| extra.to_le_bytes()));
    body
}

fn dword(offset: u64) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}
