//! What each named CPU model has, feature by feature: the levels of the x86-64 psABI, and what every server CPU of that level
//! has besides that an operating system uses.
//!
//! Bits as in Intel SDM vol. 2A (CPUID) and AMD APM vol. 3 appendix E; KVM's as in its `cpuid.rst`.

use kvm_bindings::kvm_cpuid_entry2;
use rackvisor_api::config::CpuModelName;

use CpuModelName::{X86_64V2 as V2, X86_64V3 as V3, X86_64V4 as V4};
use Register::{Eax, Ebx, Ecx, Edx};
use Vendor::{Amd, Any, Intel};

/// A register that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    /// Its value in `entry`.
    pub fn of(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        }
    }
}

/// Whose CPUs have a feature at this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// All.
    Any,
    /// AMD's and Hygon's.
    Amd,
    /// All others'.
    Intel,
}

/// Features of one register that come with one level: names and bits.
pub struct Group {
    /// The least model that has them.
    pub since: CpuModelName,
    /// Whose CPUs.
    pub vendor: Vendor,
    /// The leaf.
    pub leaf: u32,
    /// The subleaf.
    pub index: u32,
    /// The register.
    pub register: Register,
    /// Names and bit numbers.
    pub bits: &'static [(&'static str, u32)],
}

const fn group(
    since: CpuModelName,
    vendor: Vendor,
    (leaf, index): (u32, u32),
    register: Register,
    bits: &'static [(&'static str, u32)],
) -> Group {
    Group { since, vendor, leaf, index, register, bits }
}

/// Leaf 1 EDX of every x86-64 CPU, which AMD's repeat in leaf 0x80000001. Virtual 8086 mode is of no use to 64-bit systems, and some
/// hosts cannot extend it.
const LONG_AGO: &[(&str, u32)] = &[
    ("fpu", 0),
    ("de", 2),
    ("pse", 3),
    ("tsc", 4),
    ("msr", 5),
    ("pae", 6),
    ("mce", 7),
    ("cx8", 8),
    ("apic", 9),
    ("mtrr", 12),
    ("pge", 13),
    ("mca", 14),
    ("cmov", 15),
    ("pat", 16),
    ("pse36", 17),
    ("mmx", 23),
    ("fxsr", 24),
];

/// All features of all models.
pub const FEATURES: &[Group] = &[
    group(V2, Any, (1, 0), Edx, LONG_AGO),
    group(V2, Any, (1, 0), Edx, &[("sep", 11), ("clflush", 19), ("sse", 25), ("sse2", 26)]),
    group(
        V2,
        Any,
        (1, 0),
        Ecx,
        &[("sse3", 0), ("ssse3", 9), ("cx16", 13), ("sse4_1", 19), ("sse4_2", 20), ("popcnt", 23)],
    ),
    group(V2, Any, (7, 0), Ebx, &[("tsc_adjust", 1)]),
    group(V2, Amd, (0x8000_0001, 0), Edx, LONG_AGO),
    group(V2, Any, (0x8000_0001, 0), Edx, &[("syscall", 11), ("nx", 20), ("rdtscp", 27), ("lm", 29)]),
    group(V2, Any, (0x8000_0001, 0), Ecx, &[("lahf_lm", 0)]),
    group(
        V2,
        Any,
        (0x4000_0001, 0),
        Eax,
        &[
            ("kvmclock", 0),
            ("kvm_nopiodelay", 1),
            ("kvmclock2", 3),
            ("kvm_asyncpf", 4),
            ("kvm_steal_time", 5),
            ("kvm_pv_eoi", 6),
            ("kvm_pv_unhalt", 7),
            ("kvm_pv_tlb_flush", 9),
            ("kvm_pv_ipi", 11),
            ("kvm_poll_control", 12),
            ("kvm_pv_sched_yield", 13),
            ("kvm_asyncpf_int", 14),
            ("kvmclock_stable", 24),
        ],
    ),
    group(
        V3,
        Any,
        (1, 0),
        Ecx,
        &[
            ("pclmulqdq", 1),
            ("fma", 12),
            ("movbe", 22),
            ("aes", 25),
            ("xsave", 26),
            ("avx", 28),
            ("f16c", 29),
            ("rdrand", 30),
        ],
    ),
    group(V3, Any, (7, 0), Ebx, &[("fsgsbase", 0), ("bmi1", 3), ("avx2", 5), ("smep", 7), ("bmi2", 8)]),
    // The means against Spectre that updates of microcode have brought to all of them.
    group(V3, Intel, (7, 0), Edx, &[("spec_ctrl", 26), ("ssbd", 31)]),
    group(V3, Amd, (0x8000_0008, 0), Ebx, &[("ibpb", 12)]),
    group(V3, Any, (0xd, 0), Eax, &[("x87 state", 0), ("SSE state", 1), ("AVX state", 2)]),
    group(V3, Any, (0xd, 1), Eax, &[("xsaveopt", 0)]),
    group(V3, Any, (0x8000_0001, 0), Edx, &[("pdpe1gb", 26)]),
    group(V3, Any, (0x8000_0001, 0), Ecx, &[("lzcnt", 5)]),
    group(V4, Any, (1, 0), Ecx, &[("pcid", 17)]),
    group(
        V4,
        Any,
        (7, 0),
        Ebx,
        &[
            ("erms", 9),
            ("invpcid", 10),
            ("avx512f", 16),
            ("avx512dq", 17),
            ("rdseed", 18),
            ("adx", 19),
            ("smap", 20),
            ("clflushopt", 23),
            ("clwb", 24),
            ("avx512cd", 28),
            ("avx512bw", 30),
            ("avx512vl", 31),
        ],
    ),
    group(V4, Any, (0xd, 0), Eax, &[("opmask state", 5), ("ZMM_Hi256 state", 6), ("Hi16_ZMM state", 7)]),
    group(V4, Any, (0xd, 1), Eax, &[("xsavec", 1), ("xgetbv1", 2)]),
    group(V4, Any, (0x8000_0001, 0), Ecx, &[("3dnowprefetch", 8)]),
];
