//! What KVM supports of the Hyper-V interface.

use kvm_bindings::{CpuId, KVM_CAP_SYS_HYPERV_CPUID, KVMIO, kvm_cpuid2};
use kvm_ioctls::Kvm;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ptr;
use vmm_sys_util::ioctl_iowr_nr;

use super::{KvmError, refused};

/// Ioctls that kvm-ioctls does not have.
mod numbers {
    use super::{KVMIO, ioctl_iowr_nr, kvm_cpuid2};

    ioctl_iowr_nr!(KVM_GET_SUPPORTED_HV_CPUID, KVMIO, 0xc1, kvm_cpuid2);
}

/// KVM has some ten leaves of Hyper-V.
const MAX_LEAVES: usize = 64;

/// The CPUID leaves of a Hyper-V with all that this host's KVM can do.
///
/// # Errors
/// [`KvmError`]: [`KvmError::Missing`] before Linux 5.11.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    if kvm.check_extension_raw(u64::from(KVM_CAP_SYS_HYPERV_CPUID)) == 0 {
        return Err(KvmError::Missing("KVM_CAP_SYS_HYPERV_CPUID"));
    }
    let mut leaves = CpuId::new(MAX_LEAVES).map_err(|_| KvmError::Missing("room for all Hyper-V leaves"))?;
    // SAFETY: the structure has room for as many entries as it says, and KVM writes no more than these.
    let result =
        unsafe { ioctl_with_mut_ptr(kvm, numbers::KVM_GET_SUPPORTED_HV_CPUID(), leaves.as_mut_fam_struct_ptr()) };
    if result < 0 {
        return Err(refused("the list of supported Hyper-V features")(errno::Error::last()));
    }
    Ok(leaves)
}
