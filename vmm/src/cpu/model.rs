//! Named CPU models: CPUID that is the same on all hosts of one vendor, made from the list of [`super::features`] and from
//! constants. Of the host only the vendor remains, and that it has all that the model has.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use rackvisor_api::config::CpuModelName;

use super::cpuid::leaf;
use super::features::{FEATURES, Group, Vendor};

const LEAF_XSAVE: u32 = 0xd;
const LEAF_EXTENDED: u32 = 0x8000_0000;
const LEAF_BRAND: u32 = 0x8000_0002;
/// CLFLUSH works on 8 × 8 bytes.
const CLFLUSH_SIZE: u32 = 8 << 8;
const VIRTUAL_BITS: u32 = 48;
/// Bytes of an XSAVE area without any extended part: the legacy area and the header (Intel SDM vol. 1 §13.4).
const XSAVE_LEAST: u32 = 576;

/// Family, model and stepping as in leaf 1 EAX, of a server CPU of that level: guests choose work-arounds by them.
fn signature(name: CpuModelName, amd: bool) -> u32 {
    let (family, model, stepping): (u32, u32, u32) = match (name, amd) {
        (CpuModelName::X86_64V4, true) => (0x19, 0x11, 1),
        (_, true) => (0x17, 0x01, 2),
        (CpuModelName::X86_64V4, false) => (6, 0x55, 4),
        (CpuModelName::X86_64V3, false) => (6, 0x3f, 2),
        (_, false) => (6, 0x2c, 2),
    };
    let (base, extended) = (family.min(0xf), family.saturating_sub(0xf));
    extended << 20 | model >> 4 << 16 | base << 8 | (model & 0xf) << 4 | stepping
}

/// Physical address bits unless the configuration says otherwise: what the smallest server CPU of that level has.
#[must_use]
pub fn default_phys_bits(name: CpuModelName) -> Option<u8> {
    match name {
        CpuModelName::Host => None,
        CpuModelName::X86_64V2 => Some(40),
        CpuModelName::X86_64V3 | CpuModelName::X86_64V4 => Some(46),
    }
}

fn of_model(name: CpuModelName, amd: bool) -> impl Iterator<Item = &'static Group> {
    let vendors = [Vendor::Any, if amd { Vendor::Amd } else { Vendor::Intel }];
    FEATURES.iter().filter(move |group| group.since <= name && vendors.contains(&group.vendor))
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    entries.iter().find(|entry| entry.function == leaf && entry.index == index).copied()
}

/// The features of the model that `supported` lacks, by name.
#[must_use]
pub fn missing(supported: &[kvm_cpuid_entry2], name: CpuModelName, amd: bool) -> Vec<&'static str> {
    let mut names = Vec::new();
    for group in of_model(name, amd) {
        let mut entry = find(supported, group.leaf, group.index).unwrap_or_default();
        let there = *group.register.of(&mut entry);
        names.extend(group.bits.iter().filter(|(_, bit)| there & 1 << bit == 0).map(|(name, _)| *name));
    }
    names.dedup();
    names
}

/// All leaves of the model but those of topology, in the place of `supported`, which must have its features.
#[must_use]
pub fn leaves(supported: &[kvm_cpuid_entry2], name: CpuModelName, amd: bool) -> Vec<kvm_cpuid_entry2> {
    let vendor = find(supported, 0, 0).unwrap_or_default();
    let vendor = [vendor.ebx, vendor.ecx, vendor.edx];
    let last_extended = if amd { 0x8000_001e } else { 0x8000_0008 };
    let mut entries = vec![
        leaf(0, [LEAF_XSAVE, vendor[0], vendor[1], vendor[2]]),
        leaf(1, [signature(name, amd), CLFLUSH_SIZE, 0, 0]),
        // The APIC timer never stops.
        leaf(6, [1 << 2, 0, 0, 0]),
        leaf(7, [0; 4]),
        leaf(
            LEAF_EXTENDED,
            if amd { [last_extended, vendor[0], vendor[1], vendor[2]] } else { [last_extended, 0, 0, 0] },
        ),
        leaf(0x8000_0001, [if amd { signature(name, amd) } else { 0 }, 0, 0, 0]),
        leaf(0x8000_0008, [VIRTUAL_BITS << 8, 0, 0, 0]),
    ];
    entries.extend(brand(name));
    entries.extend(caches(amd));
    // KVM's signature; its features are in the list.
    entries.extend(find(supported, 0x4000_0000, 0));
    entries.push(leaf(0x4000_0001, [0; 4]));
    if name >= CpuModelName::X86_64V3 {
        let subleaf = |index| kvm_cpuid_entry2 {
            function: LEAF_XSAVE,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..Default::default()
        };
        entries.extend([subleaf(0), subleaf(1)]);
    }
    for group in of_model(name, amd) {
        let mask = group.bits.iter().fold(0, |mask, (_, bit)| mask | 1 << bit);
        if let Some(entry) = entries.iter_mut().find(|e| e.function == group.leaf && e.index == group.index) {
            if group.leaf == 7 {
                entry.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            }
            *group.register.of(entry) |= mask;
        }
    }
    xsave_parts(supported, &mut entries);
    entries
}

/// The parts of the XSAVE area: where they lie is the vendor's choice, which never changed.
fn xsave_parts(supported: &[kvm_cpuid_entry2], entries: &mut Vec<kvm_cpuid_entry2>) {
    let Some(main) = find(entries, LEAF_XSAVE, 0) else { return };
    let parts: Vec<_> = (2..32)
        .filter(|index| main.eax & 1 << index != 0)
        .filter_map(|index| find(supported, LEAF_XSAVE, index))
        .collect();
    let size = parts.iter().map(|part| part.eax.saturating_add(part.ebx)).fold(XSAVE_LEAST, u32::max);
    for entry in entries.iter_mut().filter(|entry| entry.function == LEAF_XSAVE && entry.index == 0) {
        (entry.ebx, entry.ecx) = (size, size);
    }
    entries.extend(parts);
}

/// Leaves 0x80000002 to 4: 48 bytes of text.
fn brand(name: CpuModelName) -> impl Iterator<Item = kvm_cpuid_entry2> {
    let mut text = [0; 48];
    for (byte, letter) in text.iter_mut().zip(format!("Rackvisor CPU {name}").bytes()) {
        *byte = letter;
    }
    let words = move |leaf: usize| {
        let word = |at: usize| {
            let bytes = text.iter().skip(leaf * 16 + at * 4).take(4);
            bytes.rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
        };
        [word(0), word(1), word(2), word(3)]
    };
    (0..3).map(move |leaf| {
        let [eax, ebx, ecx, edx] = words(leaf as usize);
        kvm_cpuid_entry2 { function: LEAF_BRAND + leaf, eax, ebx, ecx, edx, ..Default::default() }
    })
}

/// Caches of 32 KiB, 32 KiB, 512 KiB and 16 MiB, in the deterministic form that both vendors have (leaf 4, leaf 0x8000001D) and in
/// AMD's older one. Who shares them follows from the topology.
fn caches(amd: bool) -> Vec<kvm_cpuid_entry2> {
    let cache = |index: u32, kind: u32, level: u32, ways: u32, sets: u32| kvm_cpuid_entry2 {
        function: if amd { 0x8000_001d } else { 4 },
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        // Self-initialising.
        eax: 1 << 8 | level << 5 | kind,
        ebx: (ways - 1) << 22 | 63,
        ecx: sets - 1,
        edx: 0,
        ..Default::default()
    };
    let (data, code, both, none) = (1, 2, 3, 0);
    let mut leaves = vec![
        cache(0, data, 1, 8, 64),
        cache(1, code, 1, 8, 64),
        cache(2, both, 2, 8, 1024),
        cache(3, both, 3, 16, 16384),
        kvm_cpuid_entry2 { eax: none, ebx: 0, ecx: 0, ..cache(4, none, 0, 1, 1) },
    ];
    if amd {
        let level = |function, ecx, edx| leaf(function, [0, 0, ecx, edx]);
        // KiB, ways and line size of the first level; KiB of the second, units of 512 KiB of the third, ways in a code of 4 bits.
        leaves.push(level(0x8000_0005, 32 << 24 | 8 << 16 | 1 << 8 | 64, 32 << 24 | 8 << 16 | 1 << 8 | 64));
        leaves.push(level(0x8000_0006, 512 << 16 | 6 << 12 | 1 << 8 | 64, 32 << 18 | 8 << 12 | 1 << 8 | 64));
    }
    leaves
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host of this vendor with everything; what no model has from it is `taste`.
    fn host(amd: bool, taste: u32) -> Vec<kvm_cpuid_entry2> {
        let entry = |function, index, value| kvm_cpuid_entry2 {
            function,
            index,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        };
        let listed = [
            (1, 0),
            (7, 0),
            (0xd, 0),
            (0xd, 1),
            (0x4000_0000, 0),
            (0x4000_0001, 0),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
        ];
        let own = [(4, 0), (6, 0), (7, 1), (0xa, 0), (0x14, 0), (0x8000_0000, 0), (0x8000_0002, 0), (0x8000_0007, 0)];
        let mut entries: Vec<_> = listed.iter().map(|(leaf, index)| entry(*leaf, *index, u32::MAX)).collect();
        entries.extend(own.iter().map(|(leaf, index)| entry(*leaf, *index, taste)));
        let vendor = if amd { *b"AuthcAMDenti" } else { *b"GenuntelineI" };
        let word = |at: usize| u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]]);
        let first = kvm_cpuid_entry2 { eax: taste, ebx: word(0), ecx: word(4), edx: word(8), ..Default::default() };
        entries.push(first);
        for (index, offset, size) in [(2, 576, 256), (5, 1088, 64), (6, 1152, 512), (7, 1664, 1024), (9, 2688, 8)] {
            entries.push(kvm_cpuid_entry2 { function: 0xd, index, eax: size, ebx: offset, ..Default::default() });
        }
        entries
    }

    const MODELS: [CpuModelName; 3] = [CpuModelName::X86_64V2, CpuModelName::X86_64V3, CpuModelName::X86_64V4];

    #[test]
    fn two_hosts_of_one_vendor_show_the_same_cpu() {
        for name in MODELS {
            for amd in [false, true] {
                let (one, other) = (host(amd, 0), host(amd, 0x5500));
                assert_eq!(missing(&one, name, amd), Vec::<&str>::new());
                assert_eq!(leaves(&one, name, amd), leaves(&other, name, amd), "{name}");
            }
        }
    }

    #[test]
    fn each_model_has_what_the_former_has_and_nothing_that_is_not_listed() {
        for amd in [false, true] {
            let made = MODELS.map(|name| leaves(&host(amd, 0), name, amd));
            for (less, more) in made.iter().zip(&made[1..]) {
                for small in less.iter().filter(|e| matches!(e.function, 7 | 0x8000_0001)) {
                    let large = find(more, small.function, small.index).unwrap();
                    assert_eq!((large.ebx & small.ebx, large.ecx & small.ecx), (small.ebx, small.ecx));
                }
            }
            let ecx = |entries: &[_]| find(entries, 1, 0).unwrap().ecx;
            assert_eq!(ecx(&made[0]) & (1 << 5 | 1 << 28 | 1 << 3), 0, "VMX, AVX, MONITOR");
            assert_ne!(ecx(&made[1]) & 1 << 28, 0, "AVX");
            assert!(find(&made[2], 0xa, 0).is_none() && find(&made[2], 7, 1).is_none());
            assert_eq!(find(&made[1], 0xd, 0).map(|e| (e.eax, e.ecx)), Some((7, 832)));
            assert_eq!(find(&made[2], 0xd, 0).map(|e| (e.eax, e.ecx)), Some((0xe7, 2688)));
            assert!(find(&made[2], 0xd, 9).is_none(), "protection keys are not in the model");
        }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let mut poor = host(true, 0);
        for entry in poor.iter_mut().filter(|e| e.function == 7) {
            entry.ebx &= !(1 << 5 | 1 << 8);
        }
        assert_eq!(missing(&poor, CpuModelName::X86_64V2, true), Vec::<&str>::new());
        assert_eq!(missing(&poor, CpuModelName::X86_64V3, true), ["avx2", "bmi2"]);
    }

    #[test]
    fn signatures_are_those_of_real_cpus() {
        assert_eq!(signature(CpuModelName::X86_64V3, true), 0x0080_0f12, "Zen");
        assert_eq!(signature(CpuModelName::X86_64V3, false), 0x0003_06f2, "Haswell");
        assert_eq!(signature(CpuModelName::X86_64V4, true), 0x00a1_0f11, "Zen 4");
    }
}
