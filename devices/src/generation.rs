//! The generation ID of the VM (Microsoft, "Virtual Machine Generation ID", 2012): 16 bytes in guest memory that differ whenever the guest may
//! live a part of its life twice, as after a clone or the restore of a snapshot, and not after a migration. Guests then take new
//! random seeds, and domain controllers forget what they handed out.

use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

use crate::GuestMemory;
use crate::chipset::PowerManagement;

/// The general purpose event that tells the guest of a new ID; the DSDT has its method.
pub(crate) const GPE: u8 = 5;

/// The generation ID of a VM.
pub struct GenerationId {
    address: u64,
    memory: GuestMemory,
    power: Arc<PowerManagement>,
    id: Mutex<[u8; 16]>,
}

impl GenerationId {
    /// An ID that is to lie at the guest-physical `address`, a multiple of 8 in RAM that the guest's map shows as reserved.
    #[must_use]
    pub fn new(address: u64, id: [u8; 16], memory: GuestMemory, power: Arc<PowerManagement>) -> Self {
        Self { address, memory, power, id: Mutex::new(id) }
    }

    /// Where it lies: what the ACPI tables say.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Writes it to guest memory, before the guest runs.
    ///
    /// # Errors
    /// If the address is not in RAM.
    pub fn place(&self) -> Result<(), GuestMemoryError> {
        let id = *self.id.lock().unwrap_or_else(PoisonError::into_inner);
        self.memory.memory().write_slice(&id, GuestAddress(self.address))
    }

    /// Changes it while the guest exists, and tells the guest so.
    ///
    /// # Errors
    /// If the address is not in RAM.
    pub fn change(&self, id: [u8; 16]) -> Result<(), GuestMemoryError> {
        let former = std::mem::replace(&mut *self.id.lock().unwrap_or_else(PoisonError::into_inner), id);
        self.place()?;
        if former != id {
            self.power.raise_gpe(GPE);
        }
        Ok(())
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

    #[test]
    fn the_guest_is_told_of_another_id_alone_and_reads_it() {
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let memory = GuestMemory::new(map);
        let power = Arc::new(PowerManagement::new(Arc::new(NoLine), Arc::new(HostClock::new()), true, Arc::default()));
        let status = || {
            let mut data = [0];
            power.read(0x20, &mut data);
            data[0]
        };
        let generation = GenerationId::new(0x108, [1; 16], memory.clone(), Arc::clone(&power));
        let seen = || memory.memory().read_obj::<[u8; 16]>(GuestAddress(0x108)).unwrap();
        generation.place().unwrap();
        assert_eq!((seen(), status()), ([1; 16], 0));
        generation.change([1; 16]).unwrap();
        assert_eq!(status(), 0);
        generation.change([2; 16]).unwrap();
        assert_eq!((seen(), status()), ([2; 16], 1 << GPE));
        memory.memory().write_obj([9u8; 16], GuestAddress(0x108)).unwrap();
        generation.place().unwrap();
        assert_eq!(seen(), [2; 16], "what the guest did to it does not outlive a reset");
        let outside = GenerationId::new(0x1000, [1; 16], memory.clone(), Arc::clone(&power));
        assert!(outside.place().is_err());
    }
}
