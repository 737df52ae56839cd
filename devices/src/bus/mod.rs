//! Port and memory-mapped I/O: a map from address ranges to devices.
//!
//! Unclaimed reads give all-ones, as on a PC, and unclaimed writes are dropped: stock firmware relies on both. The map's
//! lock is never held while a device runs, so that a device may change the map (a BAR that moves) without a deadlock.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;

/// What a guest access asks of the whole VM. Returned by a device and applied by the owner of the VM, never by the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmRequest {
    /// Reset the machine (0xCF9, i8042, ACPI reset register).
    Reset,
    /// Power the machine off (ACPI S5).
    PowerOff,
    /// The BARs of the PCI function in this slot (0..=31) of bus 0 changed: map them anew before the vCPU goes on.
    BarsChanged(u8),
    /// A system management interrupt of the vCPU that made the access, before its next instruction.
    Smi {
        /// Of all others as well.
        broadcast: bool,
    },
}

/// Registers on a bus. Accesses come from several vCPU threads at once: a device does its own interior locking.
pub trait BusDevice: Send + Sync {
    /// Fills `data` (1, 2, 4 or 8 bytes) from the registers at `offset` bytes from the start of the claimed range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` (1, 2, 4 or 8 bytes) to the registers at `offset` bytes from the start of the claimed range.
    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest>;
}

/// Why a range could not be claimed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error("bus range {base:#x}+{length:#x} is empty or runs past the end of the address space")]
    BadRange {
        /// First address.
        base: u64,
        /// Bytes.
        length: u64,
    },
    /// Another device has a part of it.
    #[error("bus range {base:#x}+{length:#x} overlaps the device at {other:#x}: give one of them another address")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Bytes asked for.
        length: u64,
        /// First address of the range in the way.
        other: u64,
    },
}

struct Entry {
    length: u64,
    device: Arc<dyn BusDevice>,
}

/// A map from address ranges to devices.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
    below: Option<Arc<Bus>>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty bus on top of `below`, which gets what nobody claims here: what a vCPU sees in system management mode, with
    /// devices that nobody else reaches.
    #[must_use]
    pub fn over(below: Arc<Self>) -> Self {
        Self { below: Some(below), ..Self::default() }
    }

    /// Claims `length` bytes from `base` for `device`.
    ///
    /// # Errors
    /// [`BusError`] if the range is not a range or is taken; the map is unchanged then.
    pub fn insert(&self, base: u64, length: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let Some(last) = length.checked_sub(1).and_then(|l| base.checked_add(l)) else {
            return Err(BusError::BadRange { base, length });
        };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, entry)) = ranges.range(..=last).next_back()
            && other.saturating_add(entry.length - 1) >= base
        {
            return Err(BusError::Overlap { base, length, other });
        }
        ranges.insert(base, Entry { length, device });
        Ok(())
    }

    /// Releases the range that starts at `base`; says whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&base).is_some()
    }

    /// Reads `data.len()` bytes at `address`: all-ones where no device claims every byte of it.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data` at `address`; dropped where no device claims every byte of it.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<VmRequest> {
        let (offset, device) = self.find(address, data.len())?;
        device.write(offset, data)
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        self.find_here(address, length).or_else(|| self.below.as_ref()?.find(address, length))
    }

    fn find_here(&self, address: u64, length: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= entry.length).then(|| (offset, Arc::clone(&entry.device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(u8);

    impl BusDevice for Constant {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(offset as u8));
        }

        fn write(&self, _offset: u64, _data: &[u8]) -> Option<VmRequest> {
            Some(VmRequest::Reset)
        }
    }

    fn byte(bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn an_access_reaches_the_device_that_claims_it_with_the_offset_in_its_range() {
        let bus = Bus::new();
        bus.insert(0x100, 8, Arc::new(Constant(1))).unwrap();
        bus.insert(0x108, 8, Arc::new(Constant(0x81))).unwrap();
        assert_eq!(byte(&bus, 0x107), 8);
        assert_eq!(byte(&bus, 0x108), 0x81);
        assert_eq!(bus.write(0x100, &[0]), Some(VmRequest::Reset));
    }

    #[test]
    fn an_unclaimed_read_gives_all_ones_and_an_unclaimed_write_is_dropped() {
        let bus = Bus::new();
        bus.insert(0x100, 8, Arc::new(Constant(1))).unwrap();
        assert_eq!(byte(&bus, 0xff), 0xff);
        assert_eq!(byte(&bus, 0x108), 0xff);
        assert_eq!(bus.write(0x108, &[0]), None);
    }

    #[test]
    fn an_access_across_the_end_of_a_range_is_unclaimed() {
        let bus = Bus::new();
        bus.insert(0x100, 8, Arc::new(Constant(1))).unwrap();
        let mut data = [0; 4];
        bus.read(0x106, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(bus.write(u64::MAX, &[0; 8]), None);
    }

    #[test]
    fn what_lies_on_top_of_a_bus_hides_what_is_there_and_is_not_seen_from_below() {
        let below = Arc::new(Bus::new());
        below.insert(0x100, 0x10, Arc::new(Constant(1))).unwrap();
        let above = Bus::over(Arc::clone(&below));
        above.insert(0x104, 4, Arc::new(Constant(0x81))).unwrap();
        above.insert(0x200, 4, Arc::new(Constant(0x91))).unwrap();
        assert_eq!([0x103, 0x104, 0x108].map(|at| byte(&above, at)), [4, 0x81, 9]);
        assert_eq!([0x104, 0x200].map(|at| byte(&below, at)), [5, 0xff]);
        assert_eq!((above.write(0x200, &[0]), below.write(0x200, &[0])), (Some(VmRequest::Reset), None));
    }

    #[test]
    fn overlapping_empty_and_endless_ranges_are_refused() {
        let bus = Bus::new();
        bus.insert(0x100, 8, Arc::new(Constant(1))).unwrap();
        for (base, length) in [(0xf9, 8), (0x107, 1), (0x100, 8), (0x0, 0x1000)] {
            let other = 0x100;
            let refused = bus.insert(base, length, Arc::new(Constant(2)));
            assert_eq!(refused, Err(BusError::Overlap { base, length, other }));
        }
        assert!(matches!(bus.insert(0x200, 0, Arc::new(Constant(2))), Err(BusError::BadRange { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, Arc::new(Constant(2))), Err(BusError::BadRange { .. })));
        assert!(bus.remove(0x100));
        assert!(!bus.remove(0x100));
        assert_eq!(byte(&bus, 0x100), 0xff);
    }
}
