//! The generation ID of the VM (Microsoft, "Virtual Machine Generation ID", 2012): 16 bytes in guest memory that differ whenever the guest may
//! live a part of its life twice, as after a clone or the restore of a snapshot, and not after a migration. Guests then take new
//! random seeds, and domain controllers forget what they handed out.
//!
//! It lies in a page of its own that the guest's memory map keeps from everybody: at a fixed place where no firmware starts the guest, and
//! else where the firmware puts the page that it is given (fw_cfg's `etc/vmgenid_guid`), which it tells (QEMU docs/specs/vmgenid.rst).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory as _, GuestMemoryError, Permissions};

use crate::GuestMemory;
use crate::chipset::PowerManagement;
use crate::throttle::Throttle;

/// The general purpose event that tells the guest of a new ID; the DSDT has its method.
pub(crate) const GPE: u8 = 5;
/// Bytes of the page.
pub const PAGE: usize = 0x1000;
/// Offset of the ID in its page: behind room for a header that firmware looks for.
pub const OFFSET: u64 = 0x28;

static PLACE_LOG: Throttle = Throttle::new();

/// Where the page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// There, always.
    Fixed(u64),
    /// Where the firmware has put it, if it has.
    Firmware(Option<u64>),
}

struct State {
    id: [u8; 16],
    place: Place,
}

/// The generation ID of a VM.
pub struct GenerationId {
    memory: GuestMemory,
    power: Arc<PowerManagement>,
    state: Mutex<State>,
}

impl GenerationId {
    /// An ID whose page is to lie at the guest-physical address `page`, in RAM that the guest's map shows as reserved; or where
    /// firmware puts it.
    #[must_use]
    pub fn new(page: Option<u64>, id: [u8; 16], memory: GuestMemory, power: Arc<PowerManagement>) -> Self {
        let place = page.map_or(Place::Firmware(None), Place::Fixed);
        Self { memory, power, state: Mutex::new(State { id, place }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The page that firmware is to find a place for.
    #[must_use]
    pub fn page(&self) -> Vec<u8> {
        let mut page = vec![0; OFFSET as usize];
        page.extend(self.lock().id);
        page.resize(PAGE, 0);
        page
    }

    /// The firmware has put the page to `page`. Where no RAM is it is taken for not placed.
    pub fn placed(&self, page: u64) {
        let mut state = self.lock();
        state.place = Place::Firmware(Some(page));
        let written = self.write(&state);
        if written.is_err() {
            state.place = Place::Firmware(None);
        }
        let Some(held_back) = PLACE_LOG.pass() else { return };
        match written {
            Ok(()) => tracing::debug!(held_back, "the firmware has put the generation ID to page={page:#x}"),
            Err(error) => tracing::warn!(held_back, "the firmware gave no place in RAM to the generation ID: {error}"),
        }
    }

    /// Writes it to guest memory, before the guest runs. Firmware places it later.
    ///
    /// # Errors
    /// If the fixed address is not in RAM.
    pub fn place(&self) -> Result<(), GuestMemoryError> {
        let mut state = self.lock();
        if matches!(state.place, Place::Firmware(_)) {
            state.place = Place::Firmware(None);
        }
        self.write(&state)
    }

    /// Changes it while the guest exists, and tells the guest so if it has it already.
    ///
    /// # Errors
    /// If the address is not in RAM.
    pub fn change(&self, id: [u8; 16]) -> Result<(), GuestMemoryError> {
        let mut state = self.lock();
        let former = std::mem::replace(&mut state.id, id);
        self.write(&state)?;
        if former != id && state.place != Place::Firmware(None) {
            self.power.raise_gpe(GPE);
        }
        Ok(())
    }

    fn write(&self, state: &State) -> Result<(), GuestMemoryError> {
        let (Place::Fixed(page) | Place::Firmware(Some(page))) = state.place else { return Ok(()) };
        let address = GuestAddress(page.saturating_add(OFFSET));
        let memory = self.memory.memory();
        if !memory.check_range(address, state.id.len(), Permissions::Write) {
            return Err(GuestMemoryError::InvalidGuestAddress(address));
        }
        memory.write_slice(&state.id, address)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::bus::BusDevice;
    use crate::chipset::HostClock;
    use crate::interrupt::InterruptLine;

    struct NoLine;

    impl InterruptLine for NoLine {
        fn set(&self, _asserted: bool) {}
    }

    struct Bench {
        memory: GuestMemory,
        power: Arc<PowerManagement>,
    }

    impl Bench {
        fn new() -> Self {
            let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
            let power =
                Arc::new(PowerManagement::new(Arc::new(NoLine), Arc::new(HostClock::new()), true, Arc::default()));
            Self { memory: GuestMemory::new(map), power }
        }

        fn generation(&self, page: Option<u64>) -> GenerationId {
            GenerationId::new(page, [1; 16], self.memory.clone(), Arc::clone(&self.power))
        }

        /// What the guest reads in the page at `page`.
        fn seen(&self, page: u64) -> [u8; 16] {
            self.memory.memory().read_obj(GuestAddress(page + 0x28)).unwrap()
        }

        fn status(&self) -> u8 {
            let mut data = [0];
            self.power.read(0x20, &mut data);
            data[0]
        }
    }

    #[test]
    fn the_guest_is_told_of_another_id_alone_and_reads_it() {
        let bench = Bench::new();
        let generation = bench.generation(Some(0x100));
        generation.place().unwrap();
        assert_eq!((bench.seen(0x100), bench.status()), ([1; 16], 0));
        generation.change([1; 16]).unwrap();
        assert_eq!(bench.status(), 0);
        generation.change([2; 16]).unwrap();
        assert_eq!((bench.seen(0x100), bench.status()), ([2; 16], 1 << GPE));
        bench.memory.memory().write_obj([9u8; 16], GuestAddress(0x128)).unwrap();
        generation.place().unwrap();
        assert_eq!(bench.seen(0x100), [2; 16], "what the guest did to it does not outlive a reset");
        assert!(bench.generation(Some(0x1000)).place().is_err());
    }

    #[test]
    fn it_follows_the_firmware_which_gets_the_id_that_is_valid_then() {
        let bench = Bench::new();
        let generation = bench.generation(None);
        generation.place().unwrap();
        // While the firmware works nobody has to be told.
        generation.change([2; 16]).unwrap();
        assert_eq!((bench.seen(0x200), bench.status()), ([0; 16], 0));
        let page = generation.page();
        assert_eq!((page.len(), &page[0x28..0x38]), (PAGE, &[2; 16][..]));
        // It may have read the page before the change.
        generation.placed(0x200);
        assert_eq!((bench.seen(0x200), bench.status()), ([2; 16], 0));
        generation.change([3; 16]).unwrap();
        assert_eq!((bench.seen(0x200), bench.status()), ([3; 16], 1 << GPE));
        // After a reset the place is RAM like any other.
        generation.place().unwrap();
        generation.change([4; 16]).unwrap();
        assert_eq!(bench.seen(0x200), [3; 16]);
    }

    #[test]
    fn a_place_outside_of_ram_is_none() {
        let bench = Bench::new();
        let generation = bench.generation(None);
        for page in [0xfd0, 0x1000, u64::MAX, u64::MAX - 0x28] {
            generation.placed(page);
            generation.change([2; 16]).unwrap();
            generation.change([3; 16]).unwrap();
            assert_eq!(bench.status(), 0, "{page:#x}");
        }
    }
}
