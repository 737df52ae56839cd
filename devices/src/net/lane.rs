//! One queue of the card as its worker has it.

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::QueueInterrupt;
use crate::metrics::Counter;
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{ActiveQueue, StartError, StoppedQueue};

/// A ring with its ways in and out.
pub(super) struct Lane {
    pub(super) index: u16,
    pub(super) ring: Ring,
    pub(super) kick: EventFd,
    interrupt: QueueInterrupt,
}

impl Lane {
    /// Goes on where `queue` stands. `indirect`: whether the driver negotiated INDIRECT_DESC.
    pub(super) fn new(queue: ActiveQueue, indirect: bool, memory: &GuestMemoryMmap) -> Result<Self, StartError> {
        let ActiveQueue { index, queue, kick, interrupt } = queue;
        match Ring::new(queue, indirect, memory) {
            Ok(ring) => Ok(Self { index, ring, kick, interrupt }),
            Err(error) => Err(StartError::Queue { index, reason: error.to_string() }),
        }
    }

    /// Shows the driver what was used and interrupts it if it wants that.
    pub(super) fn flush(&mut self, memory: &GuestMemoryMmap, interrupts: &Counter) -> Result<(), RingError> {
        if self.ring.publish(memory)? {
            self.interrupt(interrupts);
        }
        Ok(())
    }

    /// Interrupts the driver.
    pub(super) fn interrupt(&self, interrupts: &Counter) {
        interrupts.increment();
        self.interrupt.trigger();
    }

    /// The queue's positions, to go on from later.
    pub(super) fn stop(&self) -> StoppedQueue {
        StoppedQueue { index: self.index, state: self.ring.state() }
    }
}
