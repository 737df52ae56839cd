//! Guest RAM: host mappings aligned to 2 MiB, so that huge pages can back them, and given to KVM by the assembly.
#![allow(unsafe_code)] // mmap, madvise and munmap have no safe form.

pub mod layout;
pub mod smram;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use rackvisor_api::config::{HugePages, MemoryConfig, NumaNode};
use rackvisor_devices::{GuestMemory, pages};
use thiserror::Error;
use vm_memory::{GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

/// Alignment of every mapping and of the size of RAM, in bytes: the smaller huge page of x86-64.
pub const ALIGNMENT: usize = 2 << 20;

/// Why RAM could not be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The kernel refused a mapping.
    #[error("cannot map {mib} MiB of guest RAM ({what}): {source}; {remedy}")]
    Map {
        /// Size of the part that failed.
        mib: u64,
        /// What was asked for.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The ranges do not form an address space.
    #[error("guest RAM layout is impossible: {0}")]
    Layout(String),
}

/// The RAM of one VM. Dropping it unmaps it, unless somebody still has it: then it is leaked and the log says so, since
/// a worker that a hung disk holds must never write to memory that is somebody else's by then.
pub struct Ram {
    map: GuestMemoryMmap,
    shared: GuestMemory,
    /// Each is a mapping of this value's own. Every map that anybody has holds them, or the parts.
    regions: Vec<Arc<GuestRegionMmap>>,
    /// Parts of the same mappings, for a map in which some of RAM is hidden.
    parts: Vec<Arc<GuestRegionMmap>>,
    prefault: bool,
}

impl Ram {
    /// Maps RAM as `config` says, that of each of `nodes` on the host's nodes that it names.
    ///
    /// # Errors
    /// [`MemoryError`]; nothing stays mapped then.
    pub fn new(config: &MemoryConfig, nodes: &[NumaNode]) -> Result<Self, MemoryError> {
        let sizes: Vec<_> = nodes.iter().map(|node| node.memory.bytes()).collect();
        let parts = layout::node_ranges(&sizes);
        let parts: Vec<_> =
            nodes.iter().zip(&parts).flat_map(|(node, parts)| parts.iter().map(move |p| (node, p))).collect();
        let regions = layout::ram_ranges(config.size.bytes())
            .into_iter()
            .map(|range| {
                let length = usize::try_from(range.length).map_err(|e| MemoryError::Layout(e.to_string()))?;
                let mapping = Mapping::new(length, config)?;
                let end = range.start.0 + range.length;
                for (node, part) in parts.iter().filter(|(_, part)| (range.start.0..end).contains(&part.start.0)) {
                    mapping.bind(part.start.0 - range.start.0, part.length, &node.host_nodes)?;
                }
                if config.prefault {
                    prefault(mapping.address, mapping.length)?;
                }
                let region = mapping.into_region()?;
                GuestRegionMmap::new(region, range.start)
                    .map(Arc::new)
                    .ok_or_else(|| MemoryError::Layout(format!("{range:?} runs past the end of the address space")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let map = GuestMemoryMmap::from_arc_regions(regions.clone());
        let map = map.map_err(|e| MemoryError::Layout(e.to_string()))?;
        let shared = GuestMemory::new(map.clone());
        Ok(Self { map, shared, regions, parts: Vec::new(), prefault: config.prefault })
    }

    /// RAM as devices see it.
    #[must_use]
    pub fn shared(&self) -> GuestMemory {
        self.shared.clone()
    }

    /// The map of RAM.
    #[must_use]
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.len()).sum()
    }

    /// Makes all of RAM zeros, by giving its pages back to the host. Nobody may use it meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::Map`] when the host refuses that, or has no pages for RAM that is to be prefaulted.
    pub fn clear(&self) -> Result<(), MemoryError> {
        for region in &self.regions {
            pages::give_back(region, 0, region.len()).map_err(|source| MemoryError::Map {
                mib: region.len() >> 20,
                what: "clearing it, as the guest asked for",
                source,
                remedy: "shut the VM down and boot it, which gives it new RAM",
            })?;
            if self.prefault {
                prefault(region.as_ptr().cast(), region.size())?;
            }
        }
        Ok(())
    }

    /// The mappings that RAM consists of, in order of address.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.regions.iter().map(|region| Slot {
            start: region.start_addr().0,
            length: region.len(),
            host: region.as_ptr() as u64,
        })
    }
}

/// A part of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Address on the host.
    pub host: u64,
}

impl Drop for Ram {
    fn drop(&mut self) {
        self.shared = GuestMemory::new(GuestMemoryMmap::new());
        self.map = GuestMemoryMmap::new();
        if self.regions.iter().chain(&self.parts).any(|region| Arc::strong_count(region) != 1) {
            tracing::error!("guest RAM is still in use by a device that did not stop: it stays mapped");
            return;
        }
        for region in &self.regions {
            // SAFETY: `Mapping::into_region` made this mapping and gave it up; nobody else holds it or a part of it, as the
            // counts above say, and this value is being dropped.
            unsafe { libc::munmap(region.as_ptr().cast(), region.size()) };
        }
    }
}

/// A mapping that is unmapped on drop.
struct Mapping {
    address: *mut libc::c_void,
    length: usize,
    prot: i32,
    flags: i32,
}

impl Mapping {
    fn new(length: usize, config: &MemoryConfig) -> Result<Self, MemoryError> {
        let huge = match config.hugepages {
            HugePages::Off | HugePages::Thp => None,
            HugePages::Size2M => Some((libc::MAP_HUGETLB | libc::MAP_HUGE_2MB, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)),
            HugePages::Size1G => Some((libc::MAP_HUGETLB | libc::MAP_HUGE_1GB, libc::MFD_HUGETLB | libc::MFD_HUGE_1GB)),
        };
        let alignment = if config.hugepages == HugePages::Size1G { 1 << 30 } else { ALIGNMENT };
        // Huge pages are reserved now: one that is missing later would kill the VMM by SIGBUS.
        let mut flags = libc::MAP_FIXED | if huge.is_none() { libc::MAP_NORESERVE } else { 0 };
        let file = if config.shared {
            flags |= libc::MAP_SHARED;
            Some(memory_file(length, huge.map_or(0, |h| h.1)).map_err(|e| refused(length, "memfd", e, config))?)
        } else {
            flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge.map_or(0, |h| h.0);
            None
        };
        let mut mapping = Self::reserve(length, alignment).map_err(|e| refused(length, "address space", e, config))?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: MAP_FIXED replaces only the reservation that `mapping` owns, which has this address and length.
        let mapped = unsafe { libc::mmap(mapping.address, length, prot, flags, fd, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(refused(length, "mmap", io::Error::last_os_error(), config));
        }
        mapping.prot = prot;
        mapping.flags = flags & !libc::MAP_FIXED;
        if huge.is_none() {
            let advice = if config.hugepages == HugePages::Thp { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
            // SAFETY: the range is this mapping's. A kernel without huge pages refuses the advice, which does no harm.
            unsafe { libc::madvise(mapping.address, length, advice) };
        }
        // SAFETY: as above. RAM of a guest has no place in a core dump of the VMM.
        unsafe { libc::madvise(mapping.address, length, libc::MADV_DONTDUMP) };
        Ok(mapping)
    }

    /// Reserves `length` bytes of address space at a multiple of `alignment`.
    fn reserve(length: usize, alignment: usize) -> io::Result<Self> {
        let total = length.checked_add(alignment).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head = start.align_offset(alignment).min(alignment);
        let address = start.wrapping_byte_add(head);
        let unmap = |at: *mut libc::c_void, bytes: usize| {
            if bytes > 0 {
                // SAFETY: only the parts of the new mapping before and behind the aligned one are given back.
                unsafe { libc::munmap(at, bytes) };
            }
        };
        unmap(start, head);
        unmap(address.wrapping_byte_add(length), total - head - length);
        Ok(Self { address, length, prot: libc::PROT_NONE, flags })
    }

    /// Has the pages of `length` bytes from `offset` taken from these nodes of the host, if there are any.
    fn bind(&self, offset: u64, length: u64, host_nodes: &[u16]) -> Result<(), MemoryError> {
        const MPOL_BIND: libc::c_int = 2;
        const WORDS: usize = 1024 / libc::c_ulong::BITS as usize;
        if host_nodes.is_empty() {
            return Ok(());
        }
        let mut mask: [libc::c_ulong; WORDS] = [0; WORDS];
        for node in host_nodes {
            let (word, bit) = (usize::from(*node) / 64, *node % 64);
            if let Some(word) = mask.get_mut(word) {
                *word |= 1 << bit;
            }
        }
        let address = self.address.wrapping_byte_add(usize::try_from(offset).unwrap_or(self.length));
        // SAFETY: the range is a part of this mapping, whose content does not change; the mask has as many bits as is said (the
        // kernel takes one less than it is told).
        let result =
            unsafe { libc::syscall(libc::SYS_mbind, address, length, MPOL_BIND, mask.as_ptr(), 1025usize, 0usize) };
        if result == 0 {
            return Ok(());
        }
        Err(MemoryError::Map {
            mib: length >> 20,
            what: "host_nodes",
            source: io::Error::last_os_error(),
            remedy: "name nodes that the host has (/sys/devices/system/node/has_memory) and this process may use (cpuset.mems)",
        })
    }

    fn into_region(self) -> Result<MmapRegion, MemoryError> {
        // SAFETY: the mapping is valid for `length` bytes, and `Ram` unmaps it only when nobody has the region any more.
        let region = unsafe { MmapRegion::build_raw(self.address.cast(), self.length, self.prot, self.flags) };
        let region = region.map_err(|e| MemoryError::Layout(e.to_string()))?;
        std::mem::forget(self);
        Ok(region)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference into it exists.
        unsafe { libc::munmap(self.address, self.length) };
    }
}

/// Takes all pages of a part of guest RAM from the host.
fn prefault(address: *mut libc::c_void, length: usize) -> Result<(), MemoryError> {
    // SAFETY: populating changes no content, and what is no mapping is refused by the kernel.
    let result = unsafe { libc::madvise(address, length, libc::MADV_POPULATE_WRITE) };
    if result == 0 {
        return Ok(());
    }
    Err(MemoryError::Map {
        mib: length as u64 >> 20,
        what: "prefault",
        source: io::Error::last_os_error(),
        remedy: "free memory on the host (or in its cgroup), or leave `memory.prefault` off",
    })
}

fn memory_file(length: usize, flags: u32) -> io::Result<File> {
    // SAFETY: the name is a C string; a new descriptor comes back or -1.
    let fd = unsafe { libc::memfd_create(c"rackvisor-ram".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(length as u64)?;
    Ok(file)
}

fn refused(length: usize, what: &'static str, source: io::Error, config: &MemoryConfig) -> MemoryError {
    let remedy = match config.hugepages {
        HugePages::Size2M => "reserve more 2 MiB pages (vm.nr_hugepages) or set `memory.hugepages` to \"thp\"",
        HugePages::Size1G => {
            "reserve more 1 GiB pages (hugepagesz=1G hugepages=N) or set `memory.hugepages` to \"thp\""
        }
        HugePages::Off | HugePages::Thp => "give the VM less `memory.size` or free memory on the host",
    };
    MemoryError::Map { mib: length as u64 >> 20, what, source, remedy }
}

#[cfg(test)]
mod tests {
    use rackvisor_api::size::ByteSize;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn config(mib: u64, shared: bool) -> MemoryConfig {
        MemoryConfig { size: ByteSize::mib(mib), shared, hugepages: HugePages::Thp, prefault: false }
    }

    #[test]
    fn ram_is_aligned_to_2_mib_zeroed_and_writable_in_every_part() {
        for shared in [false, true] {
            let ram = Ram::new(&config(5 << 10, shared), &[]).unwrap();
            for Slot { start, length, host } in ram.slots() {
                assert_eq!(host % ALIGNMENT as u64, 0);
                let last = GuestAddress(start + length - 8);
                assert_eq!(ram.map().read_obj::<u64>(last).unwrap(), 0);
                ram.map().write_obj(7u64, last).unwrap();
                assert_eq!(ram.map().read_obj::<u64>(last).unwrap(), 7);
            }
        }
    }

    #[test]
    fn cleared_ram_is_zeros_and_usable() {
        for (shared, prefault) in [(false, false), (true, false), (false, true), (true, true)] {
            let ram = Ram::new(&MemoryConfig { prefault, ..config(128, shared) }, &[]).unwrap();
            let last = GuestAddress((128 << 20) - 8);
            ram.map().write_obj(7u64, last).unwrap();
            ram.clear().unwrap();
            assert_eq!(ram.map().read_obj::<u64>(last).unwrap(), 0);
            ram.map().write_obj(8u64, last).unwrap();
            assert_eq!(ram.map().read_obj::<u64>(last).unwrap(), 8);
        }
    }

    #[test]
    fn ram_of_a_node_comes_from_the_nodes_of_the_host_that_it_names() {
        let node = |host_nodes: &[u16], mib| NumaNode {
            cpus: None,
            memory: ByteSize::mib(mib),
            distances: Vec::new(),
            host_nodes: host_nodes.to_vec(),
        };
        let ram = Ram::new(&config(128, false), &[node(&[], 64), node(&[0], 64)]).unwrap();
        let host = ram.slots().next().unwrap().host;
        if let Ok(maps) = std::fs::read_to_string("/proc/self/numa_maps") {
            let bound = format!("{:x} bind:0", host + (64 << 20));
            assert!(maps.lines().any(|line| line.starts_with(&bound)), "no {bound} in {maps}");
        }
        let absent = Ram::new(&config(128, false), &[node(&[1000], 128)]).err().unwrap();
        assert!(absent.to_string().contains("host_nodes"), "{absent}");
    }

    fn is_mapped(host: u64) -> bool {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().any(|line| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let parse = |s| u64::from_str_radix(s, 16).unwrap();
            (parse(start)..parse(end)).contains(&host)
        })
    }

    #[test]
    fn ram_that_a_device_still_holds_stays_mapped() {
        let ram = Ram::new(&config(128, false), &[]).unwrap();
        let host = ram.slots().next().unwrap().host;
        let held = ram.shared();
        drop(ram);
        assert!(is_mapped(host));
        drop(held);
    }
}
