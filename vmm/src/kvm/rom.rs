//! Flash memory that the guest reads without exits: read-only memory slots.
#![allow(unsafe_code)] // Handing memory to KVM has no safe form.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use rackvisor_devices::firmware::{FlashArray, FlashMapping};

use super::{AddressSpace, KvmError};

/// Memory slots from here on are for flash memory; RAM has those below.
const FIRST_SLOT: u32 = 500;

/// What is in flash memory.
#[derive(Debug, Clone, Copy)]
pub enum Bank {
    /// The firmware.
    Code,
    /// Its variables.
    Vars,
}

/// Checks that `kvm` can do it.
///
/// # Errors
/// [`KvmError::Missing`].
pub fn check(kvm: &Kvm) -> Result<(), KvmError> {
    if kvm.check_extension(Cap::ReadonlyMem) { Ok(()) } else { Err(KvmError::Missing("KVM_CAP_READONLY_MEM")) }
}

/// A bank of flash memory in a slot of its own. The guest's writes leave KVM as accesses to device memory; its reads do, too,
/// while the slot is empty.
pub struct KvmRom {
    vm: Arc<VmFd>,
    slot: u32,
    base: u64,
    array: FlashArray,
}

impl KvmRom {
    /// `array` at the guest-physical address `base` of an address space of `vm`, not mapped yet.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, space: AddressSpace, bank: Bank, base: u64, array: FlashArray) -> Self {
        Self { vm, slot: space.slot(FIRST_SLOT + bank as u32), base, array }
    }
}

impl FlashMapping for KvmRom {
    fn set_readable(&self, readable: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: self.base,
            memory_size: if readable { self.array.size() as u64 } else { 0 },
            userspace_addr: self.array.as_ptr() as u64,
        };
        // SAFETY: the mapping belongs to `array`, which this value keeps until it has emptied the slot. KVM only reads it.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }
}

impl Drop for KvmRom {
    fn drop(&mut self) {
        // Refused where the slot is empty already.
        let _ = self.set_readable(false);
    }
}
