//! The registers of a vCPU: power-on state, which a reset returns to, and the state in which a direct boot enters a kernel.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::boot::{Entry, Mode};
use crate::kvm::chipset::Irqchip;
use crate::kvm::{KvmError, refused};

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_APIC_BASE: u32 = 0x1b;
/// x2APIC mode.
const APIC_BASE_EXTENDED: u64 = 1 << 10;
const MSR_IA32_FEATURE_CONTROL: u32 = 0x3a;
const FEATURE_CONTROL_LOCKED: u64 = 1;
const FEATURE_CONTROL_VMX: u64 = 1 << 2;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back by default.
const MTRR_ENABLED_WB: u64 = 1 << 11 | 6;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;

/// A vCPU at power-on: all that a reset must bring back.
pub struct PowerOnState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    xcrs: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

impl PowerOnState {
    /// Reads the state of a vCPU that has not run yet. `kvm` lists the MSRs, to which `more` are added.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn save(kvm: &Kvm, vcpu: &VcpuFd, more: impl Iterator<Item = u32>) -> Result<Self, KvmError> {
        let what = refused("the state of a new vCPU");
        let list = kvm.get_msr_index_list().map_err(&what)?;
        let list: Vec<u32> = list.as_slice().iter().copied().chain(more).collect();
        Ok(Self {
            regs: vcpu.get_regs().map_err(&what)?,
            sregs: vcpu.get_sregs().map_err(&what)?,
            fpu: vcpu.get_fpu().map_err(&what)?,
            xcrs: kvm.check_extension(Cap::Xcrs).then(|| vcpu.get_xcrs()).transpose().map_err(&what)?,
            debug: vcpu.get_debug_regs().map_err(&what)?,
            lapic: vcpu.get_lapic().map_err(&what)?,
            events: vcpu.get_vcpu_events().map_err(&what)?,
            mp_state: vcpu.get_mp_state().map_err(&what)?,
            msrs: read_msrs(vcpu, &list)?,
        })
    }

    /// Brings the vCPU back to this state.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let what = refused("the power-on state of a vCPU");
        vcpu.set_mp_state(self.mp_state).map_err(&what)?;
        vcpu.set_regs(&self.regs).map_err(&what)?;
        vcpu.set_sregs(&self.sregs).map_err(&what)?;
        vcpu.set_fpu(&self.fpu).map_err(&what)?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(&what)?;
        }
        vcpu.set_debug_regs(&self.debug).map_err(&what)?;
        vcpu.set_lapic(&self.lapic).map_err(&what)?;
        write_msrs(vcpu, &self.msrs)?;
        // A system management interrupt that has been raised and not looked at yet is one of the events only once they were
        // read: else it would outlive the reset.
        vcpu.get_vcpu_events().map_err(&what)?;
        vcpu.set_vcpu_events(&self.events).map_err(&what)
    }
}

/// Locks the register of the features that only firmware turns on, with VMX on if `nested`: neither OVMF nor a direct boot
/// does, and Windows asks for it. AMD has no such register.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn lock_features(vcpu: &VcpuFd, nested: bool) -> Result<(), KvmError> {
    let data = FEATURE_CONTROL_LOCKED | if nested { FEATURE_CONTROL_VMX } else { 0 };
    write_msrs(vcpu, &[kvm_msr_entry { index: MSR_IA32_FEATURE_CONTROL, data, ..Default::default() }])
}

/// Sets what firmware sets on every CPU before an operating system runs: MTRRs, fast strings, the APIC's wiring, and its mode, which is
/// x2APIC for all where one has an ID above 254 (Intel SDM vol. 3 §11.12.8.1): Linux takes no notice of that one otherwise.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn set_firmware_state(vcpu: &VcpuFd, irqchip: Irqchip) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    write_msrs(
        vcpu,
        &[entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WB)],
    )?;
    if irqchip == Irqchip::Split {
        let mut sregs = vcpu.get_sregs().map_err(refused("the mode of the local APIC"))?;
        sregs.apic_base |= APIC_BASE_EXTENDED;
        vcpu.set_sregs(&sregs).map_err(refused("the mode of the local APIC"))?;
    }
    let mut lapic = vcpu.get_lapic().map_err(refused("the local APIC"))?;
    for (offset, mode) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(mode.to_le_bytes()) {
            *register = byte as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(refused("the local APIC"))
}

/// Makes the boot vCPU start at `entry`.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn set_entry(vcpu: &VcpuFd, entry: &Entry) -> Result<(), KvmError> {
    let what = refused("the entry point of the kernel");
    let mut sregs = vcpu.get_sregs().map_err(&what)?;
    let mut regs = kvm_regs { rip: entry.rip, rflags: RFLAGS_FIXED, ..Default::default() };
    let segment = |selector: u16, kind: u8, long: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    let data = segment(0x18, DATA, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 |= CR0_PE;
    match entry.mode {
        Mode::Protected => {
            regs.rbx = entry.info;
            sregs.cs = segment(0x10, CODE, 0);
        }
        Mode::Long { page_tables, gdt } => {
            regs.rsi = entry.info;
            sregs.cs = segment(0x10, CODE, 1);
            sregs.gdt.base = gdt;
            sregs.gdt.limit = 0x1f;
            sregs.cr3 = page_tables;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
    }
    vcpu.set_sregs(&sregs).map_err(&what)?;
    vcpu.set_regs(&regs).map_err(&what)?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(&what)
}

/// Reads those of `indices` that this vCPU has.
pub(super) fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    // The APIC base travels with the special registers, and time must not be set back.
    let entry = |&index: &u32| kvm_msr_entry { index, ..Default::default() };
    let wanted = indices.iter().filter(|i| ![MSR_IA32_TSC, MSR_IA32_APIC_BASE].contains(i));
    transfer(wanted.map(entry).collect(), |msrs| vcpu.get_msrs(msrs).map_err(refused("MSRs of a vCPU")))
}

/// Writes `entries`; MSRs that KVM lists but does not let anybody set are left alone.
pub(super) fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    transfer(entries.to_vec(), |msrs| vcpu.set_msrs(msrs).map_err(refused("MSRs of a vCPU"))).map(drop)
}

/// Hands MSRs to KVM, which stops at the first that it refuses: that one is skipped. Gives those that went through.
fn transfer(
    mut entries: Vec<kvm_msr_entry>,
    hand_over: impl Fn(&mut Msrs) -> Result<usize, KvmError>,
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut through = Vec::with_capacity(entries.len());
    while !entries.is_empty() {
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Missing("room for all MSRs"))?;
        let done = hand_over(&mut msrs)?.min(entries.len());
        through.extend(msrs.as_slice().iter().take(done));
        entries.drain(..entries.len().min(done + 1));
    }
    Ok(through)
}
