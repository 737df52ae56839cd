//! KVM: the only part of Rackvisor that speaks to `/dev/kvm`, with `cpu`.
#![allow(unsafe_code)] // Handing guest RAM to KVM, and an ioctl that kvm-ioctls lacks, have no safe form.

pub mod chipset;
pub mod hyperv;
pub mod interrupts;
pub mod ioevents;
pub mod rom;
pub mod smm;

use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;

use self::chipset::Irqchip;
use crate::memory::{Ram, Slot, layout, smram};

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
    /// There is no system management mode.
    #[error(
        "this host's KVM has no system management mode ({0}), which boot.firmware.smm asks for: use a host kernel with \
         CONFIG_KVM_SMM, or firmware without SMM (OVMF_CODE_4M.fd) and no boot.firmware.smm"
    )]
    NoSmm(&'static str),
    /// Some APIC IDs cannot be reached.
    #[error(
        "this host's KVM lacks {0}, without which interrupts do not reach vCPUs with APIC IDs above 254: use Linux 4.7 or newer, \
         or give the VM fewer `cpus.count`, or a `cpus.topology` whose numbers are powers of two"
    )]
    NoWideIds(&'static str),
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

/// Which of KVM's address spaces a memory slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressSpace {
    /// What vCPUs see.
    Normal = 0,
    /// What they see in system management mode.
    Smm = 1,
}

impl AddressSpace {
    /// KVM's number of slot `index` of this address space.
    #[must_use]
    pub fn slot(self, index: u32) -> u32 {
        (self as u32) << 16 | index
    }
}

/// Shows `part` of RAM to the guest at slot `index` of an address space; or nothing, with a length of zero.
///
/// # Errors
/// What the kernel answered.
fn map_ram(vm: &VmFd, space: AddressSpace, index: u32, part: Slot) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: space.slot(index),
        flags: 0,
        guest_phys_addr: part.start,
        memory_size: part.length,
        userspace_addr: part.host,
    };
    // SAFETY: the mapping outlives the VM: `Machine` drops the VM's descriptors before `Ram`, which stays mapped while
    // anybody has it.
    unsafe { vm.set_user_memory_region(region) }
}

/// Makes a VM with `ram` and the part of the chipset that `irqchip` says is in the kernel. With `smm`, RAM is there in system
/// management mode as well, and what that has for itself is in slots of its own outside.
///
/// # Errors
/// [`KvmError`]; nothing is left behind then.
pub fn create_vm(kvm: &Kvm, ram: &Ram, smm: bool, irqchip: Irqchip) -> Result<Arc<VmFd>, KvmError> {
    let vm = kvm.create_vm().map_err(refused("a new VM"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(refused("the identity map address"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(refused("the TSS address"))?;
    let normal = if smm { smram::cut(ram) } else { ram.slots().collect() };
    let normal = normal.into_iter().zip(0..).map(|part| (AddressSpace::Normal, part));
    let inside = ram.slots().zip(0..).filter(|_| smm).map(|part| (AddressSpace::Smm, part));
    for (space, (part, index)) in normal.chain(inside) {
        map_ram(&vm, space, index, part).map_err(refused("a part of guest RAM"))?;
    }
    irqchip.create(kvm, &vm)?;
    Ok(Arc::new(vm))
}
