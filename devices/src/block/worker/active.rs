//! A queue from its start to its stop.

use std::collections::VecDeque;
use std::sync::Arc;

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::super::request::ChainError;
use super::{Slot, Start, Stopped};
use crate::GuestMemory;
use crate::interrupt::QueueInterrupt;
use crate::virtio::ring::Ring;
use crate::virtio::{StoppedQueue, TransportSignals};

/// The queue that a worker works on.
pub(super) struct Active {
    pub(super) index: u16,
    pub(super) ring: Ring,
    pub(super) interrupt: QueueInterrupt,
    pub(super) memory: GuestMemory,
    /// The map that new requests use, with its number.
    pub(super) map: (u32, Arc<GuestMemoryMmap>),
    /// Former maps that requests in flight still use.
    pub(super) retired: Vec<(u32, Arc<GuestMemoryMmap>)>,
    pub(super) signals: Arc<dyn TransportSignals>,
    pub(super) flushes: bool,
    pub(super) broken: bool,
    pub(super) stopping: bool,
    /// Heads to take before those of the ring.
    pub(super) again: VecDeque<u16>,
    /// Whether the ring has to wait until those that are tried again have ended.
    pub(super) retrying: bool,
    /// Requests that failed and are kept, with their sequence. While there are any, no more are taken.
    pub(super) held: Vec<(u64, u16)>,
}

impl Active {
    /// The queue as it was handed over, and its kick.
    pub(super) fn new(start: Start) -> (Self, EventFd) {
        let Start { index, ring, kick, interrupt, memory, signals, flushes, again } = start;
        let map = (0, memory.memory().into_inner());
        let (retired, broken, stopping, held) = (Vec::new(), false, false, Vec::new());
        let (retrying, again) = (!again.is_empty(), again.into());
        let active = Self {
            index,
            ring,
            interrupt,
            memory,
            map,
            retired,
            signals,
            flushes,
            broken,
            stopping,
            again,
            retrying,
            held,
        };
        (active, kick)
    }

    /// The next request: first those that are tried again.
    pub(super) fn next_head(&mut self, memory: &GuestMemoryMmap) -> Result<Option<u16>, ChainError> {
        match self.again.pop_front() {
            Some(head) => Ok(Some(head)),
            None => Ok(self.ring.next_head(memory)?),
        }
    }

    pub(super) fn give_back(mut self) -> Stopped {
        self.held.sort_unstable();
        let held = self.held.iter().map(|(_, head)| *head).chain(self.again).collect();
        Stopped { queue: StoppedQueue { index: self.index, state: self.ring.state() }, held }
    }

    /// Takes the present map of guest memory for new requests, and lets go of maps that no request in flight uses.
    pub(super) fn refresh_map(&mut self, slots: &[Slot]) {
        let present = self.memory.memory();
        if std::ptr::eq(&raw const *present, Arc::as_ptr(&self.map.1)) && self.retired.is_empty() {
            return;
        }
        if !std::ptr::eq(&raw const *present, Arc::as_ptr(&self.map.1)) {
            let next = (self.map.0.wrapping_add(1), present.into_inner());
            self.retired.push(std::mem::replace(&mut self.map, next));
        }
        self.retired.retain(|(number, _)| slots.iter().any(|slot| slot.busy && slot.map == *number));
    }
}
