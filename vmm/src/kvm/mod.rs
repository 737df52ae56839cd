//! KVM: the only part of Rackvisor that speaks to `/dev/kvm`, with `cpu`.
#![allow(unsafe_code)] // Handing guest RAM to KVM, and an ioctl that kvm-ioctls lacks, have no safe form.

pub mod chipset;
pub mod hyperv;
pub mod interrupts;
pub mod ioevents;
pub mod rom;

use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;

use crate::memory::{Ram, layout};

/// Why KVM could not be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error(
        "cannot open /dev/kvm: {0}; load kvm_amd or kvm_intel, enable virtualisation in the firmware, and give the process \
         access to the device"
    )]
    Open(kvm_ioctls::Error),
    /// An ioctl failed.
    #[error("KVM refused {what}: {source}")]
    Ioctl {
        /// What was asked for.
        what: &'static str,
        /// What the kernel answered.
        source: kvm_ioctls::Error,
    },
    /// A capability is missing.
    #[error("this host's KVM lacks {0}: run `rackvisor doctor` for what to do")]
    Missing(&'static str),
}

/// Names what an ioctl was for.
pub(crate) fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Ioctl { what, source }
}

/// What a VM cannot do without, with the name that the KVM documentation uses.
pub const REQUIRED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens `/dev/kvm` and checks what no VM can do without.
///
/// # Errors
/// [`KvmError`] with what is missing.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(KvmError::Open)?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(KvmError::Missing("API version 12"));
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(KvmError::Missing(name)),
        None => Ok(kvm),
    }
}

/// Makes a VM with `ram`, the in-kernel interrupt controllers and the timer of a PC.
///
/// # Errors
/// [`KvmError`]; nothing is left behind then.
pub fn create_vm(kvm: &Kvm, ram: &Ram) -> Result<Arc<VmFd>, KvmError> {
    let vm = kvm.create_vm().map_err(refused("a new VM"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(refused("the identity map address"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(refused("the TSS address"))?;
    for (slot, (guest_phys_addr, memory_size, userspace_addr)) in (0u32..).zip(ram.slots()) {
        let region = kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
        // SAFETY: the mapping outlives the VM: `Machine` drops the VM's descriptors before `Ram`, which stays mapped while
        // anybody has it.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("a part of guest RAM"))?;
    }
    vm.create_irq_chip().map_err(refused("the in-kernel interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(refused("the in-kernel timer"))?;
    Ok(Arc::new(vm))
}
