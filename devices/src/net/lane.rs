//! One queue of the card as its worker has it.

use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::coalescing::Coalescing;
use crate::interrupt::QueueInterrupt;
use crate::metrics::Counter;
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{ActiveQueue, StartError, StoppedQueue};

/// A ring with its ways in and out.
pub(super) struct Lane {
    pub(super) index: u16,
    pub(super) ring: Ring,
    pub(super) kick: EventFd,
    pub(super) interrupt: QueueInterrupt,
    /// Frames since the driver was last told of any.
    frames: u32,
    /// When the first of them was shown.
    since: Option<Instant>,
    /// When the interrupt for them is due.
    pub(super) due: Option<Instant>,
    /// The kernel interrupts the driver without us.
    direct: bool,
}

impl Lane {
    /// Goes on where `queue` stands. `indirect`: whether the driver negotiated INDIRECT_DESC.
    pub(super) fn new(queue: ActiveQueue, indirect: bool, memory: &GuestMemoryMmap) -> Result<Self, StartError> {
        let ActiveQueue { index, queue, positions, kick, interrupt } = queue;
        match Ring::new(queue, positions, indirect, memory) {
            Ok(ring) => Ok(Self { index, ring, kick, interrupt, frames: 0, since: None, due: None, direct: false }),
            Err(error) => Err(StartError::Queue { index, reason: error.to_string() }),
        }
    }

    /// Whether it is a transmit queue (virtio 1.2 §5.1.2).
    pub(super) fn sends(&self) -> bool {
        !self.index.is_multiple_of(2)
    }

    /// A frame was put into the ring, or taken out of it.
    pub(super) fn count_frame(&mut self) {
        self.frames = self.frames.saturating_add(1);
    }

    /// Shows the driver what was used and interrupts it at once if it wants that.
    pub(super) fn flush(&mut self, memory: &GuestMemoryMmap, interrupts: &Counter) -> Result<(), RingError> {
        (self.frames, self.since, self.due) = (0, None, None);
        if self.ring.publish(memory)? {
            self.interrupt(interrupts);
        }
        Ok(())
    }

    /// Shows the driver what was used, and interrupts it as soon as `coalescing` says.
    pub(super) fn settle(
        &mut self,
        memory: &GuestMemoryMmap,
        coalescing: Coalescing,
        now: Instant,
        interrupts: &Counter,
    ) -> Result<(), RingError> {
        // Whatever becomes of it: what is due for ever would wake the worker for ever.
        self.due = None;
        self.ring.show(memory)?;
        if !self.ring.is_untold() {
            return Ok(());
        }
        // As many as the ring holds are all that the driver can wait for.
        let frames = if self.frames >= self.ring.size().into() { u32::MAX } else { self.frames };
        match coalescing.until(frames, *self.since.get_or_insert(now)) {
            Some(due) if due > now => {
                self.due = Some(due);
                Ok(())
            }
            _ => self.flush(memory, interrupts),
        }
    }

    /// Has signals of `call` interrupt the driver past the worker, or not.
    pub(super) fn set_direct(&mut self, call: &Arc<EventFd>, direct: bool) {
        match (std::mem::replace(&mut self.direct, direct), direct) {
            (false, true) => self.interrupt.attach(call),
            (true, false) => self.interrupt.detach(),
            _ => {}
        }
    }

    /// Interrupts the driver as soon as `coalescing` says, where the kernel has the ring and has `asked` for it: by time alone, as
    /// nobody tells us of how many frames. What our own path held back is due as well.
    pub(super) fn pass_on(&mut self, asked: bool, coalescing: Coalescing, now: Instant, interrupts: &Counter) {
        if !asked && self.since.is_none() {
            return;
        }
        self.due = coalescing.until(1, *self.since.get_or_insert(now)).filter(|due| *due > now);
        if self.due.is_none() {
            (self.frames, self.since) = (0, None);
            self.interrupt(interrupts);
        }
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
