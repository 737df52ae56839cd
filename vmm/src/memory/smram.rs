//! The memory that system management mode has for itself: which parts of RAM that is, and how it is hidden from devices.
#![allow(unsafe_code)] // A map of parts of a mapping has no safe form.

use std::sync::{Arc, PoisonError};

use rackvisor_devices::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::{MemoryError, Ram, Slot, layout};

/// RAM with the memory of system management mode in parts of its own, in order of address.
#[must_use]
pub fn cut(ram: &Ram) -> Vec<Slot> {
    let edges = hidden(ram).map(|(start, length)| [start, start + length]);
    let mut parts = Vec::new();
    for mut rest in ram.slots() {
        for edge in edges.as_flattened() {
            let Some(length) = edge.checked_sub(rest.start).filter(|length| (1..rest.length).contains(length)) else {
                continue;
            };
            parts.push(Slot { length, ..rest });
            rest = Slot { start: *edge, length: rest.length - length, host: rest.host + length };
        }
        parts.push(rest);
    }
    parts
}

/// First guest-physical address and bytes of what can be hidden, in order of address: the old place, and TSEG.
#[must_use]
pub fn hidden(ram: &Ram) -> [(u64, u64); 2] {
    [layout::SMRAM, layout::tseg(ram.size())]
}

/// Hides the memory of system management mode from devices. It must be gone before the [`Ram`] that it is from.
pub struct Curtain {
    shared: GuestMemory,
    all: GuestMemoryMmap,
    rest: GuestMemoryMmap,
}

impl Curtain {
    /// All of `ram` is to be seen yet.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] if there is not enough.
    pub fn new(ram: &mut Ram) -> Result<Self, MemoryError> {
        let failed = |e: &dyn std::fmt::Display| MemoryError::Layout(e.to_string());
        let hidden = hidden(ram);
        let seen = cut(ram).into_iter().filter(|part| !hidden.contains(&(part.start, part.length)));
        let regions = seen.map(|part| {
            let length = usize::try_from(part.length).map_err(|e| failed(&e))?;
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            // SAFETY: the part lies in a mapping of `ram`, which is unmapped only when nobody has one of its parts any more.
            let region = unsafe { MmapRegion::build_raw(part.host as *mut u8, length, prot, flags) };
            let region = GuestRegionMmap::new(region.map_err(|e| failed(&e))?, GuestAddress(part.start));
            region.map(Arc::new).ok_or_else(|| failed(&format!("{part:?} runs past the end of the address space")))
        });
        ram.parts = regions.collect::<Result<_, _>>()?;
        let rest = GuestMemoryMmap::from_arc_regions(ram.parts.clone()).map_err(|e| failed(&e))?;
        Ok(Self { shared: ram.shared(), all: ram.map().clone(), rest })
    }

    /// Closes it in front of both parts, or opens it; for what devices begin from now on.
    pub fn set(&self, closed: bool) {
        let map = if closed { &self.rest } else { &self.all };
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).replace(map.clone());
    }
}

#[cfg(test)]
mod tests {
    use rackvisor_api::config::MemoryConfig;
    use rackvisor_api::size::ByteSize;
    use vm_memory::{Bytes, GuestAddressSpace};

    use super::*;

    fn ram(mib: u64) -> Ram {
        Ram::new(&MemoryConfig::new(ByteSize::mib(mib)), &[]).unwrap()
    }

    #[test]
    fn what_can_be_hidden_is_cut_out_of_ram_and_no_byte_is_lost() {
        for (mib, places) in
            [(128, vec![0, 0xa_0000, 0xc_0000, 112 << 20]), (3072, vec![0, 0xa_0000, 0xc_0000, 2032 << 20, 4 << 30])]
        {
            let ram = ram(mib);
            let parts = cut(&ram);
            assert_eq!(parts.iter().map(|part| part.start).collect::<Vec<_>>(), places);
            assert_eq!(parts.iter().map(|part| part.length).sum::<u64>(), mib << 20);
            for (start, length) in hidden(&ram) {
                assert!(parts.iter().any(|part| (part.start, part.length) == (start, length)), "{start:#x}");
            }
            let offset = |part: &Slot, whole: &Slot| part.host - whole.host == part.start - whole.start;
            for whole in ram.slots() {
                let inside = |part: &&Slot| (whole.start..whole.start + whole.length).contains(&part.start);
                assert!(parts.iter().filter(inside).all(|part| offset(part, &whole)));
            }
        }
    }

    #[test]
    fn devices_reach_what_is_hidden_only_while_the_curtain_is_open() {
        let mut ram = ram(128);
        let curtain = Curtain::new(&mut ram).unwrap();
        let devices = ram.shared();
        let write = |at: u64| devices.memory().write_obj(7u64, GuestAddress(at)).is_ok();
        let hidden = [0xa_0000, 0xb_fff8, 112 << 20, (128 << 20) - 8];
        let seen = [0, 0x9_fff8, 0xc_0000, (112 << 20) - 8];
        assert!(hidden.into_iter().chain(seen).all(write));
        curtain.set(true);
        assert!(seen.into_iter().all(write) && !hidden.into_iter().any(write));
        assert!(!write((112 << 20) - 4), "nor across its edge");
        ram.map().write_obj(8u64, GuestAddress(0)).unwrap();
        assert_eq!(devices.memory().read_obj::<u64>(GuestAddress(0)).unwrap(), 8, "it is the same memory");
        curtain.set(false);
        assert!(hidden.into_iter().all(write));
    }
}
