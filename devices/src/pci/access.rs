//! The two ways to configuration space: ECAM (PCIe 5.0 §7.2.2) and ports 0xCF8/0xCFC (PCI 3.0 §3.2.2.3.2).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use super::config::CONFIG_SPACE_SIZE;
use super::{ConfigEffect, PciFunction, SLOT_COUNT};
use crate::bus::{BusDevice, VmRequest};

/// First port of the configuration mechanism.
pub const CONFIG_PORTS_BASE: u64 = 0xcf8;
/// Ports of the configuration mechanism.
pub const CONFIG_PORTS_LENGTH: u64 = 8;

/// CONFIG_ADDRESS: accesses to CONFIG_DATA reach configuration space.
const ADDRESS_ENABLE: u32 = 1 << 31;
/// CONFIG_ADDRESS: bits that exist.
const ADDRESS_MASK: u32 = 0x80ff_fffc;
/// First offset of CONFIG_DATA in the port range.
const DATA_OFFSET: u64 = 4;
/// Offset in the port range of the reset control register at 0xCF9.
const RESET_OFFSET: u64 = 1;

/// The functions of bus 0 and the address latch, shared by both access mechanisms.
#[derive(Default)]
pub(super) struct Slots {
    functions: RwLock<[Option<Arc<dyn PciFunction>>; SLOT_COUNT as usize]>,
    config_address: AtomicU32,
}

impl Slots {
    pub(super) fn get(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.get(usize::from(slot)).cloned().flatten()
    }

    /// Puts `function` into an empty slot; says whether it was one.
    pub(super) fn insert(&self, slot: u8, function: Arc<dyn PciFunction>) -> bool {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        match functions.get_mut(usize::from(slot)) {
            Some(place @ None) => {
                *place = Some(function);
                true
            }
            _ => false,
        }
    }

    pub(super) fn remove(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.get_mut(usize::from(slot)).and_then(Option::take)
    }

    pub(super) fn reset_latch(&self) {
        self.config_address.store(0, Ordering::Relaxed);
    }

    fn read(&self, target: Target, data: &mut [u8]) {
        match self.reach(target, data.len()) {
            Some(function) => function.config_read(target.register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, target: Target, data: &[u8]) -> Option<VmRequest> {
        let function = self.reach(target, data.len())?;
        match function.config_write(target.register, data) {
            ConfigEffect::None => None,
            ConfigEffect::BarsChanged => Some(VmRequest::BarsChanged(target.slot)),
        }
    }

    fn reach(&self, target: Target, length: usize) -> Option<Arc<dyn PciFunction>> {
        let end = usize::from(target.register).checked_add(length)?;
        if target.bus != 0 || target.function != 0 || end > usize::from(CONFIG_SPACE_SIZE) {
            return None;
        }
        self.get(target.slot)
    }
}

#[derive(Debug, Clone, Copy)]
struct Target {
    bus: u8,
    slot: u8,
    function: u8,
    register: u16,
}

/// Takes `bits` bits of `value` from bit `shift` on.
fn field(value: u64, shift: u32, bits: u32) -> u16 {
    let mask = (1u64 << bits) - 1;
    u16::try_from((value >> shift) & mask).unwrap_or(0)
}

fn byte_field(value: u64, shift: u32, bits: u32) -> u8 {
    field(value, shift, bits).to_le_bytes()[0]
}

/// The memory window onto configuration space.
pub(super) struct Ecam(pub(super) Weak<Slots>);

impl Ecam {
    fn target(offset: u64) -> Target {
        Target {
            bus: byte_field(offset, 20, 8),
            slot: byte_field(offset, 15, 5),
            function: byte_field(offset, 12, 3),
            register: field(offset, 0, 12),
        }
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.upgrade() {
            Some(slots) => slots.read(Self::target(offset), data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        self.0.upgrade()?.write(Self::target(offset), data)
    }
}

/// CONFIG_ADDRESS (a dword at 0xCF8), CONFIG_DATA (0xCFC–0xCFF), and the byte at 0xCF9 between them that is not PCI's.
pub(super) struct ConfigPorts {
    pub(super) slots: Weak<Slots>,
    pub(super) reset_control: Option<Arc<dyn BusDevice>>,
}

impl ConfigPorts {
    fn data_target(slots: &Slots, offset: u64) -> Option<Target> {
        let address = slots.config_address.load(Ordering::Relaxed);
        if address & ADDRESS_ENABLE == 0 {
            return None;
        }
        let address = u64::from(address);
        Some(Target {
            bus: byte_field(address, 16, 8),
            slot: byte_field(address, 11, 5),
            function: byte_field(address, 8, 3),
            register: field(address, 0, 8) | field(offset, 0, 2),
        })
    }

    fn is_reset_control(offset: u64, length: usize) -> bool {
        offset == RESET_OFFSET && length == 1
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if Self::is_reset_control(offset, data.len())
            && let Some(reset) = &self.reset_control
        {
            return reset.read(0, data);
        }
        let Some(slots) = self.slots.upgrade() else { return data.fill(0xff) };
        if offset >= DATA_OFFSET {
            match Self::data_target(&slots, offset) {
                Some(target) => slots.read(target, data),
                None => data.fill(0xff),
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&slots.config_address.load(Ordering::Relaxed).to_le_bytes());
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        if Self::is_reset_control(offset, data.len())
            && let Some(reset) = &self.reset_control
        {
            return reset.write(0, data);
        }
        let slots = self.slots.upgrade()?;
        if offset >= DATA_OFFSET {
            let target = Self::data_target(&slots, offset)?;
            return slots.write(target, data);
        }
        if offset == 0
            && let Ok(value) = <[u8; 4]>::try_from(data)
        {
            slots.config_address.store(u32::from_le_bytes(value) & ADDRESS_MASK, Ordering::Relaxed);
        }
        None
    }
}
