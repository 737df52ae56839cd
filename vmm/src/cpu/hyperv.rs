//! Hyper-V enlightenments (Hypervisor Top-Level Functional Specification 6.0b): the CPUID leaves from the configuration
//! alone, so that they are the same on every host, and what KVM has to be told for them.

use kvm_bindings::{
    KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_HYPERV_SYNIC2, kvm_cpuid_entry2, kvm_enable_cap, kvm_msr_entry,
};
use kvm_ioctls::{Kvm, VcpuFd};
use rackvisor_api::config::HypervFeatures;

use super::cpuid::leaf;
use super::features::Register;
use super::state;
use crate::kvm::{KvmError, hyperv, refused};

/// Where KVM's own leaves begin where Hyper-V's are in their place.
pub const KVM_LEAVES: u32 = 0x4000_0100;
const LEAF_VENDOR: u32 = 0x4000_0000;
const LEAF_INTERFACE: u32 = 0x4000_0001;
const LEAF_VERSION: u32 = 0x4000_0002;
const LEAF_FEATURES: u32 = 0x4000_0003;
const LEAF_RECOMMENDATIONS: u32 = 0x4000_0004;
const LEAF_LIMITS: u32 = 0x4000_0005;
/// Of what provides devices, which Hyper-V has apart from the hypervisor.
const LEAF_STACK_VENDOR: u32 = 0x4000_0080;
const LEAF_STACK_INTERFACE: u32 = 0x4000_0081;
const LEAF_STACK_PROPERTIES: u32 = 0x4000_0082;
/// HYPERV_VS_PROPERTIES_EAX_EXTENDED_IOAPIC_RTE.
const STACK_EXTENDED_DESTINATION: u32 = 1 << 2;

/// Windows Server 2016: build and version are not looked at by any known guest, but zero is no version.
const BUILD: u32 = 14393;
const VERSION: u32 = 10 << 16;
/// Tries before a guest tells of a spinlock, and "never" (§2.4.5).
const SPINLOCK_RETRIES: u32 = 0x1fff;
const SPINLOCK_NEVER: u32 = u32::MAX;
/// Virtual and logical processors at most, as KVM says it.
const MAX_VCPUS: u32 = 1024;
const MAX_LOGICAL: u32 = 64;

const EAX_HYPERCALLS: u32 = 1 << 5;
/// CPUs may be added: needs nothing of KVM.
const EDX_CPU_HOT_ADD: u32 = 1 << 3;

/// Parameters 0 to 4 of a guest's crash.
pub const CRASH_PARAMETERS: std::ops::RangeInclusive<u32> = 0x4000_0100..=0x4000_0104;
const MSR_CRASH_CONTROL: u32 = 0x4000_0105;
/// The guest may notify. KVM passes nothing on unless it is set.
const CRASH_NOTIFY: u64 = 1 << 63;
const MSR_SCONTROL: u32 = 0x4000_0080;
/// The synthetic interrupt controller is on from power-on (§11.8.1).
const SCONTROL_ENABLE: u64 = 1;

/// MSRs that a reset must bring back and that KVM does not list: SIEFP, SIMP, SINT0 to 15, and the configurations and counts of the
/// four timers. A configuration comes before its count: it stops the timer.
pub fn unlisted_msrs() -> impl Iterator<Item = u32> {
    (0x4000_0082..=0x4000_0083).chain(0x4000_0090..=0x4000_009f).chain(0x4000_00b0..=0x4000_00b7)
}

/// A bit that tells the guest of a feature, and that KVM must know.
struct Bit {
    feature: &'static str,
    wanted: fn(&HypervFeatures) -> bool,
    leaf: u32,
    register: Register,
    bit: u32,
}

const fn bit(
    feature: &'static str,
    wanted: fn(&HypervFeatures) -> bool,
    leaf: u32,
    register: Register,
    bit: u32,
) -> Bit {
    Bit { feature, wanted, leaf, register, bit }
}

/// §2.4.4 and §2.4.5.
const BITS: [Bit; 23] = [
    bit("runtime", |f| f.runtime, LEAF_FEATURES, Register::Eax, 0),
    bit("time", |f| f.time, LEAF_FEATURES, Register::Eax, 1),
    bit("synic", |f| f.synic, LEAF_FEATURES, Register::Eax, 2),
    bit("stimer", |f| f.stimer, LEAF_FEATURES, Register::Eax, 3),
    bit("vapic", |f| f.vapic, LEAF_FEATURES, Register::Eax, 4),
    bit("vpindex", |f| f.vpindex, LEAF_FEATURES, Register::Eax, 6),
    bit("reset", |f| f.reset, LEAF_FEATURES, Register::Eax, 7),
    bit("time", |f| f.time, LEAF_FEATURES, Register::Eax, 9),
    bit("frequencies", |f| f.frequencies, LEAF_FEATURES, Register::Eax, 11),
    bit("reenlightenment", |f| f.reenlightenment, LEAF_FEATURES, Register::Eax, 13),
    bit("xmm_input", |f| f.xmm_input, LEAF_FEATURES, Register::Edx, 4),
    bit("frequencies", |f| f.frequencies, LEAF_FEATURES, Register::Edx, 8),
    bit("crash", |f| f.crash, LEAF_FEATURES, Register::Edx, 10),
    bit("tlbflush_ext", |f| f.tlbflush_ext, LEAF_FEATURES, Register::Edx, 14),
    bit("stimer_direct", |f| f.stimer_direct, LEAF_FEATURES, Register::Edx, 19),
    bit("tlbflush", |f| f.tlbflush, LEAF_RECOMMENDATIONS, Register::Eax, 2),
    bit("vapic", |f| f.vapic, LEAF_RECOMMENDATIONS, Register::Eax, 3),
    bit("relaxed", |f| f.relaxed, LEAF_RECOMMENDATIONS, Register::Eax, 5),
    bit("apicv", |f| f.apicv, LEAF_RECOMMENDATIONS, Register::Eax, 9),
    bit("ipi", |f| f.ipi, LEAF_RECOMMENDATIONS, Register::Eax, 10),
    bit("tlbflush", |f| f.tlbflush, LEAF_RECOMMENDATIONS, Register::Eax, 11),
    bit("ipi", |f| f.ipi, LEAF_RECOMMENDATIONS, Register::Eax, 11),
    bit("hypercalls", |_| true, LEAF_FEATURES, Register::Eax, EAX_HYPERCALLS.trailing_zeros()),
];

/// The leaves that `features` come to.
#[must_use]
pub fn leaves(features: &HypervFeatures) -> Vec<kvm_cpuid_entry2> {
    let mut vendor = [0; 3];
    for (word, bytes) in vendor.iter_mut().zip(features.vendor.as_bytes().chunks(4)) {
        *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    }
    let retries = if features.spinlocks { SPINLOCK_RETRIES } else { SPINLOCK_NEVER };
    let mut leaves = vec![
        leaf(LEAF_VENDOR, [LEAF_LIMITS, vendor[0], vendor[1], vendor[2]]),
        leaf(LEAF_INTERFACE, [u32::from_le_bytes(*b"Hv#1"), 0, 0, 0]),
        leaf(LEAF_VERSION, [BUILD, VERSION, 0, 0]),
        leaf(LEAF_FEATURES, [0, 0, 0, EDX_CPU_HOT_ADD]),
        leaf(LEAF_RECOMMENDATIONS, [0, retries, 0, 0]),
        leaf(LEAF_LIMITS, [MAX_VCPUS, MAX_LOGICAL, 0, 0]),
    ];
    for bit in BITS.iter().filter(|bit| (bit.wanted)(features)) {
        if let Some(entry) = leaves.iter_mut().find(|entry| entry.function == bit.leaf) {
            *bit.register.of(entry) |= 1 << bit.bit;
        }
    }
    leaves
}

/// The leaves that tell of destinations of 15 bits in the I/O APIC and in messages: not in the specification, but in Linux'
/// include/hyperv/hvgdk_mini.h.
#[must_use]
pub fn extended_destinations() -> [kvm_cpuid_entry2; 3] {
    let text = |text: [u8; 4]| u32::from_le_bytes(text);
    [
        leaf(LEAF_STACK_VENDOR, [LEAF_STACK_PROPERTIES, text(*b"Micr"), text(*b"osof"), text(*b"t VS")]),
        leaf(LEAF_STACK_INTERFACE, [text(*b"VS#1"), 0, 0, 0]),
        leaf(LEAF_STACK_PROPERTIES, [STACK_EXTENDED_DESTINATION, 0, 0, 0]),
    ]
}

/// The features of `wanted` that KVM lacks on this host, by their names in the configuration.
///
/// # Errors
/// [`KvmError`] if it supports none at all.
pub fn missing(kvm: &Kvm, wanted: &HypervFeatures) -> Result<Vec<&'static str>, KvmError> {
    let supported = hyperv::supported_cpuid(kvm)?;
    let lacks = |bit: &&Bit| {
        let entry = supported.as_slice().iter().find(|entry| entry.function == bit.leaf);
        entry.is_none_or(|entry| *bit.register.of(&mut { *entry }) & 1 << bit.bit == 0)
    };
    let mut names: Vec<_> =
        BITS.iter().filter(|bit| (bit.wanted)(wanted)).filter(lacks).map(|bit| bit.feature).collect();
    names.dedup();
    Ok(names)
}

/// Turns on in KVM what a vCPU with `features` needs, and holds the guest to what its CPUID says. CPUID must be set.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn prepare(kvm: &Kvm, vcpu: &VcpuFd, features: &HypervFeatures) -> Result<(), KvmError> {
    let enable = |cap, on: u64, what| {
        let mut cap = kvm_enable_cap { cap, ..Default::default() };
        cap.args[0] = on;
        vcpu.enable_cap(&cap).map_err(refused(what))
    };
    if kvm.check_extension_raw(u64::from(KVM_CAP_HYPERV_ENFORCE_CPUID)) != 0 {
        enable(KVM_CAP_HYPERV_ENFORCE_CPUID, 1, "KVM_CAP_HYPERV_ENFORCE_CPUID")?;
    }
    if features.synic {
        enable(KVM_CAP_HYPERV_SYNIC2, 0, "KVM_CAP_HYPERV_SYNIC2")?;
    }
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let at_power_on = [
        features.synic.then(|| entry(MSR_SCONTROL, SCONTROL_ENABLE)),
        features.crash.then(|| entry(MSR_CRASH_CONTROL, CRASH_NOTIFY)),
    ];
    state::write_msrs(vcpu, &at_power_on.into_iter().flatten().collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf_of(features: &HypervFeatures, function: u32) -> kvm_cpuid_entry2 {
        *leaves(features).iter().find(|entry| entry.function == function).unwrap()
    }

    #[test]
    fn the_leaves_follow_from_the_configuration_alone() {
        let all = HypervFeatures::default();
        let vendor = leaf_of(&all, LEAF_VENDOR);
        assert_eq!((vendor.eax, vendor.ebx.to_le_bytes()), (0x4000_0005, *b"Micr"));
        assert_eq!((vendor.ecx.to_le_bytes(), vendor.edx.to_le_bytes()), (*b"osof", *b"t Hv"));
        assert_eq!(leaf_of(&all, LEAF_INTERFACE).eax.to_le_bytes(), *b"Hv#1");
        let features = leaf_of(&all, LEAF_FEATURES);
        assert_eq!(
            (features.eax, features.ebx, features.edx),
            (0x2aff, 0, 1 << 3 | 1 << 4 | 1 << 8 | 1 << 10 | 1 << 19)
        );
        let hints = leaf_of(&all, LEAF_RECOMMENDATIONS);
        assert_eq!((hints.eax, hints.ebx), (0xe2c, 0x1fff));
        let short = HypervFeatures { vendor: "Ab".into(), ..all.clone() };
        assert_eq!((leaf_of(&short, LEAF_VENDOR).ebx, leaf_of(&short, LEAF_VENDOR).ecx), (0x6241, 0));
    }

    #[test]
    fn what_is_turned_off_is_not_shown() {
        let all = HypervFeatures::default();
        let without = HypervFeatures { crash: false, spinlocks: false, tlbflush: false, ..all.clone() };
        assert_eq!(leaf_of(&without, LEAF_FEATURES).edx, leaf_of(&all, LEAF_FEATURES).edx & !(1 << 10));
        let hints = leaf_of(&without, LEAF_RECOMMENDATIONS);
        assert_eq!((hints.eax & (1 << 2 | 1 << 11), hints.ebx), (1 << 11, u32::MAX), "IPIs need processor sets too");
    }
}
