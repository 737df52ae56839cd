//! System management mode: memory that only it sees, and the interrupts that lead to it.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_MULTI_ADDRESS_SPACE, kvm_msi};
use kvm_ioctls::{Cap, Kvm, VmFd};
use rackvisor_devices::pci::smram::{Hidden, SmramMapping};

use super::{AddressSpace, KvmError, map_ram};
use crate::memory::smram::{Curtain, cut, hidden};
use crate::memory::{MemoryError, Ram, Slot};

/// Delivery mode of a message-signalled interrupt (Intel SDM vol. 3 §11.11.2): an SMI.
const MSI_SMI: u32 = 2 << 8;
const MSI_ADDRESS: u32 = 0xfee0_0000;

/// Checks that `kvm` has it.
///
/// # Errors
/// [`KvmError::NoSmm`].
pub fn check(kvm: &Kvm) -> Result<(), KvmError> {
    if !kvm.check_extension(Cap::X86Smm) {
        return Err(KvmError::NoSmm("KVM_CAP_X86_SMM"));
    }
    match kvm.check_extension_raw(u64::from(KVM_CAP_MULTI_ADDRESS_SPACE)) {
        2.. => Ok(()),
        _ => Err(KvmError::NoSmm("KVM_CAP_MULTI_ADDRESS_SPACE")),
    }
}

/// Hides memory by taking its slots out of the normal address space.
pub struct KvmSmram {
    vm: Arc<VmFd>,
    curtain: Curtain,
    compatible: (u32, Slot),
    tseg: (u32, Slot),
}

impl KvmSmram {
    /// For a `vm` that was made from `ram` with system management mode. Must be gone before `ram`.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] if there is not enough RAM.
    pub fn new(vm: Arc<VmFd>, ram: &mut Ram) -> Result<Self, MemoryError> {
        let parts: Vec<_> = (0u32..).zip(cut(ram)).collect();
        let find = |(start, length)| {
            let found = parts.iter().find(|(_, part)| (part.start, part.length) == (start, length)).copied();
            found.ok_or_else(|| MemoryError::Layout(format!("no {length:#x} bytes of RAM at {start:#x}")))
        };
        let [compatible, tseg] = hidden(ram).map(find);
        Ok(Self { compatible: compatible?, tseg: tseg?, vm, curtain: Curtain::new(ram)? })
    }
}

impl SmramMapping for KvmSmram {
    fn hide(&self, hidden: Hidden) -> io::Result<()> {
        self.curtain.set(hidden != Hidden::default());
        for ((index, part), hide) in [(self.compatible, hidden.compatible), (self.tseg, hidden.tseg)] {
            let slot = Slot { length: if hide { 0 } else { part.length }, ..part };
            match map_ram(&self.vm, AddressSpace::Normal, index, slot).map_err(io::Error::from) {
                // So KVM says that the slot is empty already.
                Err(error) if hide && error.raw_os_error() == Some(libc::EINVAL) => {}
                done => done?,
            }
        }
        Ok(())
    }
}

/// Raises system management interrupts of vCPUs.
#[derive(Clone)]
pub struct KvmSmis {
    vm: Arc<VmFd>,
    apic_ids: Arc<[u32]>,
}

impl KvmSmis {
    /// For the vCPUs of `vm`, which have these local APIC IDs in order of index.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, apic_ids: &[u32]) -> Self {
        Self { vm, apic_ids: apic_ids.into() }
    }

    /// Raises one of every vCPU but that with this index, which raises its own before its next instruction.
    pub fn raise_all_but(&self, index: u16) {
        for (_, id) in (0u16..).zip(&*self.apic_ids).filter(|(other, _)| *other != index) {
            let (low, high) = ((id & 0xff) << 12, id & !0xff);
            let message =
                kvm_msi { address_lo: MSI_ADDRESS | low, address_hi: high, data: MSI_SMI, ..Default::default() };
            // KVM answers how many vCPUs it reached; one whose APIC the guest has turned off is not among them.
            let _ = self.vm.signal_msi(message);
        }
    }
}
