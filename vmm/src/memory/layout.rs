//! Where things are in the guest's physical address space (DESIGN §5). Follows from the configuration alone.

use rackvisor_devices::pci::Windows;
use vm_memory::GuestAddress;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Memory of system management mode, where PCs had it first: first address and bytes.
pub const SMRAM: (u64, u64) = (0xa_0000, 0x2_0000);
/// Bytes of TSEG, more memory of it, for up to 1 TiB of RAM; and what each further TiB adds: the page tables of firmware that
/// may touch all of it.
const TSEG_LEAST: u64 = 16 * MIB;
const TSEG_PER_TIB: u64 = 8 * MIB;
/// End of conventional memory; video memory and option ROMs of a PC follow.
pub const LOW_RAM_END: u64 = 640 * KIB;
/// Where the direct boot places ACPI tables: the BIOS area in which an OS looks for the RSDP (ACPI 6.5 §5.2.5.1).
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Where the direct boot places the SMBIOS entry point: where an OS looks for it (DSP0134 3.6 §5.2.2).
pub const SMBIOS: u64 = 0xf_0000;
/// And the structures behind it.
pub const SMBIOS_TABLES: u64 = SMBIOS + 0x20;
/// End of all tables of the direct boot at the latest.
pub const TABLES_END: u64 = 0xf_f000;
/// Where the page with the generation ID lies in a direct boot: the last one of the BIOS area, apart from the tables.
pub const GENERATION_PAGE: u32 = TABLES_END as u32;
/// End of the BIOS area.
pub const BIOS_END: u64 = MIB;
/// Start of extended memory.
pub const HIGH_RAM_START: u64 = MIB;
/// RAM below 4 GiB ends here at the latest, so that ECAM fits at either place where stock firmware puts it.
pub const RAM_32BIT_END: u64 = 2 * GIB;
/// RAM goes on here.
pub const RAM_64BIT_START: u64 = 4 * GIB;

/// PCI Express configuration space: 256 buses of 1 MiB.
pub const ECAM: u64 = 0xb000_0000;
/// Bytes of configuration space.
pub const ECAM_SIZE: u64 = 256 * MIB;
/// 32-bit window for BARs.
pub const PCI_32BIT: (u64, u64) = (0xc000_0000, 0x3c00_0000);
/// I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Three pages that KVM needs on Intel hosts to run real mode, and one for its identity map.
pub const KVM_TSS: usize = 0xfeff_d000;
/// Page that KVM needs on Intel hosts for an identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// All of these pages: first address and bytes.
pub const KVM_PAGES: (u64, u64) = (KVM_IDENTITY_MAP, 4 << 12);
/// Ports for I/O BARs.
pub const PCI_PORTS: std::ops::Range<u64> = 0xc000..0x1_0000;
/// Size of the 64-bit window for BARs. It follows RAM, aligned to its own size.
pub const PCI_64BIT_SIZE: u64 = 64 * GIB;

/// A part of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub start: GuestAddress,
    /// Bytes.
    pub length: u64,
}

/// The ranges of RAM for `size` bytes: one below [`RAM_32BIT_END`], and one from [`RAM_64BIT_START`] if there is more.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<RamRange> {
    let low = size.min(RAM_32BIT_END);
    let mut ranges = vec![RamRange { start: GuestAddress(0), length: low }];
    if size > low {
        ranges.push(RamRange { start: GuestAddress(RAM_64BIT_START), length: size - low });
    }
    ranges
}

/// The RAM of each of several nodes that have `sizes` bytes and follow each other.
#[must_use]
pub fn node_ranges(sizes: &[u64]) -> Vec<Vec<RamRange>> {
    let total = sizes.iter().sum();
    let mut free = ram_ranges(total).into_iter();
    let mut current = free.next();
    let nodes = sizes.iter().map(|&size| {
        let (mut wanted, mut ranges) = (size, Vec::new());
        while let Some(range) = current.as_mut().filter(|_| wanted > 0) {
            let length = wanted.min(range.length);
            ranges.push(RamRange { start: range.start, length });
            wanted -= length;
            range.start = GuestAddress(range.start.0 + length);
            range.length -= length;
            if range.length == 0 {
                current = free.next();
            }
        }
        ranges
    });
    nodes.collect()
}

/// TSEG, the end of `size` bytes of RAM below 4 GiB: first address and bytes.
#[must_use]
pub fn tseg(size: u64) -> (u64, u64) {
    let more_tib = size.div_ceil(1 << 40).saturating_sub(1);
    let length = TSEG_LEAST + more_tib * TSEG_PER_TIB;
    (size.min(RAM_32BIT_END) - length, length)
}

/// The parts of `ranges` that the map of `size` bytes of RAM shows as RAM.
#[must_use]
pub fn usable(ranges: &[RamRange], size: u64) -> Vec<RamRange> {
    let map = memory_map(size);
    let ram = || map.iter().filter(|entry| entry.kind == MemoryKind::Ram);
    let parts = ranges.iter().flat_map(|range| {
        ram().filter_map(|entry| {
            let start = range.start.0.max(entry.start);
            let end = (range.start.0 + range.length).min(entry.start + entry.length);
            (start < end).then(|| RamRange { start: GuestAddress(start), length: end - start })
        })
    });
    parts.collect()
}

/// The 64-bit window for BARs above `size` bytes of RAM: start and length.
#[must_use]
pub fn pci_64bit_window(size: u64) -> (u64, u64) {
    let end = RAM_64BIT_START.saturating_add(size.saturating_sub(RAM_32BIT_END));
    (end.next_multiple_of(PCI_64BIT_SIZE), PCI_64BIT_SIZE)
}

/// Where BARs lie for a guest with `size` bytes of RAM that boots without firmware.
#[must_use]
pub fn direct_windows(size: u64) -> Windows {
    let range = |(start, length): (u64, u64)| start..start + length;
    Windows { low: range(PCI_32BIT), high: range(pci_64bit_window(size)), io: PCI_PORTS }
}

/// Where firmware may place BARs for a guest with `size` bytes of RAM: wherever there is no RAM and nothing of the chipset.
#[must_use]
pub fn firmware_windows(size: u64) -> Windows {
    let (low, high) = (size.min(RAM_32BIT_END), RAM_64BIT_START.saturating_add(size.saturating_sub(RAM_32BIT_END)));
    Windows { low: low..PCI_32BIT.0 + PCI_32BIT.1, high: high..u64::MAX, io: 0..1 << 16 }
}

/// What an entry of the memory map is for; values as in e820 (ACPI 6.5 §15.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not for the guest to use.
    Reserved = 2,
}

/// One entry of the memory map that a guest is given at boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// What it is for.
    pub kind: MemoryKind,
}

/// The memory map for `size` bytes of RAM, in order of address.
#[must_use]
pub fn memory_map(size: u64) -> Vec<MapEntry> {
    let entry = |start, end: u64, kind| MapEntry { start, length: end - start, kind };
    let low_end = size.min(RAM_32BIT_END);
    let mut map = vec![
        entry(0, LOW_RAM_END, MemoryKind::Ram),
        entry(ACPI_TABLES, BIOS_END, MemoryKind::Reserved),
        entry(HIGH_RAM_START, low_end, MemoryKind::Ram),
        entry(ECAM, ECAM + ECAM_SIZE, MemoryKind::Reserved),
    ];
    if size > low_end {
        map.push(entry(RAM_64BIT_START, RAM_64BIT_START + size - low_end, MemoryKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u64; 7] = [128 * MIB, 130 * MIB, 2 * GIB - 2 * MIB, 2 * GIB, 2 * GIB + 2 * MIB, 5 * GIB, 512 * GIB];

    #[test]
    fn ram_of_any_size_is_all_there_and_leaves_the_32_bit_devices_alone() {
        for size in SIZES {
            let ranges = ram_ranges(size);
            assert_eq!(ranges.iter().map(|r| r.length).sum::<u64>(), size);
            for range in ranges {
                let end = range.start.0 + range.length;
                assert!(end <= RAM_32BIT_END || range.start.0 >= RAM_64BIT_START, "{range:?}");
            }
        }
    }

    #[test]
    fn the_memory_map_is_sorted_without_overlap_and_its_ram_lies_in_ram() {
        for size in SIZES {
            let map = memory_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].length <= pair[1].start, "{pair:?}");
            }
            for entry in map.iter().filter(|e| e.kind == MemoryKind::Ram) {
                let inside =
                    |r: &RamRange| r.start.0 <= entry.start && entry.start + entry.length <= r.start.0 + r.length;
                assert!(ram_ranges(size).iter().any(inside), "{entry:?}");
            }
        }
    }

    #[test]
    fn tseg_is_the_end_of_low_ram_and_grows_with_big_guests() {
        assert_eq!(tseg(128 * MIB), (112 * MIB, 16 * MIB));
        assert_eq!(tseg(5 * GIB), (2 * GIB - 16 * MIB, 16 * MIB));
        assert_eq!(tseg(16 << 40), (2 * GIB - 136 * MIB, 136 * MIB));
    }

    #[test]
    fn nodes_divide_all_ram_and_what_they_show_is_what_the_memory_map_shows() {
        for sizes in [&[128 * MIB][..], &[GIB, GIB], &[GIB, 2 * GIB, GIB], &[2 * MIB, 5 * GIB], &[2 * GIB, 2 * MIB]] {
            let total = sizes.iter().sum();
            let nodes = node_ranges(sizes);
            for (node, size) in nodes.iter().zip(sizes) {
                assert_eq!(node.iter().map(|r| r.length).sum::<u64>(), *size);
            }
            let mut shown: Vec<_> = nodes.iter().flat_map(|node| usable(node, total)).collect();
            // Ranges of neighbours that meet are one in the map.
            let mut joined: Vec<RamRange> = Vec::new();
            for range in shown.drain(..) {
                match joined.last_mut().filter(|last| last.start.0 + last.length == range.start.0) {
                    Some(last) => last.length += range.length,
                    None => joined.push(range),
                }
            }
            let map = memory_map(total);
            let ram = map.iter().filter(|entry| entry.kind == MemoryKind::Ram);
            let ram: Vec<_> = ram.map(|e| RamRange { start: GuestAddress(e.start), length: e.length }).collect();
            assert_eq!(joined, ram, "{sizes:?}");
        }
    }

    #[test]
    fn the_64_bit_window_never_overlaps_ram() {
        for size in SIZES {
            let (start, _) = pci_64bit_window(size);
            assert!(ram_ranges(size).iter().all(|r| r.start.0 + r.length <= start));
            assert_eq!(start % PCI_64BIT_SIZE, 0);
        }
    }
}
