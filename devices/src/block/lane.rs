//! One queue of a worker: takes requests off its ring, hands them to the backend, and answers.

// Submitting to a backend vows that guest memory stays: the snapshots held here are why it does.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{BlockBackend, Operation, Request, Signal};
use super::metrics::{QueueMetrics, name};
use super::request::{Asked, ChainError, Parser, Range, STATUS_OK, status_of};
use super::shared::Disk;
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{StoppedQueue, TransportSignals};
use crate::{GuestMemory, interrupt::QueueInterrupt};

/// A queue to work on.
pub(super) struct Start {
    pub index: u16,
    pub ring: Ring,
    pub kick: EventFd,
    pub interrupt: QueueInterrupt,
    pub memory: GuestMemory,
    pub signals: Arc<dyn TransportSignals>,
    /// Whether FLUSH was negotiated. If not, each write is stable when it completes (§5.2.6.2).
    pub flushes: bool,
    /// Heads of requests to take before those of the ring: they failed before the last stop.
    pub again: Vec<u16>,
}

/// A queue that is given back.
pub(super) struct Stopped {
    pub queue: StoppedQueue,
    /// Heads of requests that failed and were kept, in the order in which they came.
    pub held: Vec<u16>,
}

/// What all lanes of a worker work with.
pub(super) struct Desk {
    pub backend: Box<dyn BlockBackend>,
    pub disk: Arc<Disk>,
    pub parser: Parser,
}

/// What a lane has left to do once it took what it found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing until something else happens.
    Nothing,
    /// Its ring is empty, and kicks are not asked for yet.
    Empty,
    /// More is there.
    More,
    /// More may be there after this time: a limit is exhausted.
    After(Duration),
}

/// A request in flight.
struct Slot {
    busy: bool,
    /// Rises from request to request.
    sequence: u64,
    head: u16,
    status: u64,
    operation: Operation,
    offset: u64,
    length: u64,
    /// Bytes that the guest asked for in all, for the metrics.
    payload: u32,
    started: Instant,
    /// Ranges that follow the one in flight.
    ranges: Vec<Range>,
    /// Which map of guest memory its buffers belong to.
    map: u32,
}

struct Active {
    ring: Ring,
    interrupt: QueueInterrupt,
    memory: GuestMemory,
    /// The map that new requests use, with its number.
    map: (u32, Arc<GuestMemoryMmap>),
    /// Former maps that requests in flight still use.
    retired: Vec<(u32, Arc<GuestMemoryMmap>)>,
    signals: Arc<dyn TransportSignals>,
    flushes: bool,
    broken: bool,
    stopping: bool,
    /// Heads to take before those of the ring.
    again: VecDeque<u16>,
    /// Whether the ring has to wait until those that are tried again have ended.
    retrying: bool,
    /// Requests that failed and are kept, with their sequence. While there are any, no more are taken.
    held: Vec<(u64, u16)>,
}

/// A queue of the disk, with or without a driver.
pub(super) struct Lane {
    /// Which queue of the disk it is.
    pub queue: u16,
    pub metrics: Arc<QueueMetrics>,
    /// What its kicks are called.
    signal: Signal,
    /// What the ids of its requests begin with.
    base: u16,
    active: Option<Box<Active>>,
    stopped: Sender<Stopped>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// The sequence of the next request.
    sequence: u64,
    /// A flush of our own has to follow all requests before this one.
    sync_after: Option<u64>,
}

impl Lane {
    /// Lane `number` of its worker, with ids from `number` × (`depth` + 1).
    pub fn new(number: u16, queue: u16, depth: u16, metrics: Arc<QueueMetrics>, stopped: Sender<Stopped>) -> Self {
        let slot = |_| Slot {
            busy: false,
            sequence: 0,
            head: 0,
            status: 0,
            operation: Operation::Flush,
            offset: 0,
            length: 0,
            payload: 0,
            started: Instant::now(),
            ranges: Vec::new(),
            map: 0,
        };
        Self {
            queue,
            metrics,
            signal: Signal::Kick(number),
            base: number.saturating_mul(depth.saturating_add(1)),
            active: None,
            stopped,
            // The last one is for our own flush.
            slots: (0..=depth).map(slot).collect(),
            free: (0..depth).rev().collect(),
            sequence: 0,
            sync_after: None,
        }
    }

    /// Requests that were ever taken.
    pub fn taken(&self) -> u64 {
        self.sequence
    }

    pub fn is_idle(&self) -> bool {
        let own = self.slots.last().is_some_and(|own| own.busy);
        self.sync_after.is_none() && !own && self.free.len() + 1 == self.slots.len()
    }

    /// Whether its driver has made something available.
    pub fn is_available(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.ring.is_available(&active.map.1))
    }

    /// Asks for kicks; tells whether something came meanwhile.
    pub fn enable_kicks(&mut self, disk: &Disk) -> bool {
        let Some(active) = &mut self.active else { return false };
        active.ring.enable_kicks(&active.map.1).unwrap_or_else(|error| {
            active.fail(self.queue, disk, &self.metrics, &error.to_string());
            false
        })
    }

    pub fn start(&mut self, desk: &mut Desk, start: Start) -> io::Result<()> {
        let Start { index: _, ring, kick, interrupt, memory, signals, flushes, again } = start;
        self.metrics.held.set(0);
        desk.backend.watch(self.signal, Some(kick))?;
        let map = (0, memory.memory().into_inner());
        self.active = Some(Box::new(Active {
            ring,
            interrupt,
            memory,
            map,
            retired: Vec::new(),
            signals,
            flushes,
            broken: false,
            stopping: false,
            retrying: !again.is_empty(),
            again: again.into(),
            held: Vec::new(),
        }));
        Ok(())
    }

    pub fn stop(&mut self) {
        if let Some(active) = &mut self.active {
            active.stopping = true;
        }
    }

    /// What was written until now has to become stable.
    pub fn sync_soon(&mut self) {
        self.sync_after = Some(self.sequence);
    }

    /// Begins the flush of our own once the requests that it has to follow are done.
    pub fn sync(&mut self, desk: &mut Desk) {
        let Some(after) = self.sync_after else { return };
        let Some((own, slots)) = self.slots.split_last_mut() else { return };
        if own.busy || slots.iter().any(|slot| slot.busy && slot.sequence < after) {
            return;
        }
        (own.busy, own.operation, own.offset, own.length) = (true, Operation::Flush, 0, 0);
        self.sync_after = None;
        let id = self.base.saturating_add(u16::try_from(slots.len()).unwrap_or(u16::MAX));
        let request = Request { id, operation: Operation::Flush, offset: 0, length: 0, buffers: &[] };
        // SAFETY: there are no buffers.
        unsafe { desk.backend.submit(request) };
    }

    fn synced(&mut self, disk: &Disk, result: Result<u64, i32>) {
        if let Some(own) = self.slots.last_mut() {
            own.busy = false;
        }
        if let Err(errno) = result {
            self.metrics.operation(Operation::Flush).errors.increment();
            disk.io_error(errno, name(Operation::Flush), 0, 0, false);
        }
    }

    /// Whether it was told to stop, and nothing is in flight.
    pub fn has_stopped(&self) -> bool {
        self.is_idle() && self.active.as_ref().is_some_and(|active| active.stopping)
    }

    pub fn unwatch(&self, desk: &mut Desk) -> io::Result<()> {
        desk.backend.watch(self.signal, None)
    }

    /// Gives the queue back.
    pub fn give_back(&mut self) {
        let Some(active) = self.active.take() else { return };
        // The owner is gone only if the device was dropped: nobody wants the positions then.
        let _ = self.stopped.send(active.give_back(self.queue));
    }

    /// Takes what the driver made available.
    pub fn take_requests(&mut self, desk: &mut Desk, now: Instant) -> Left {
        let Some(mut active) = self.active.take() else { return Left::Nothing };
        let mut left = Left::Nothing;
        if !active.broken && !active.stopping && active.held.is_empty() && !desk.disk.is_fenced() {
            active.refresh_map(&self.slots);
            match self.take_batch(desk, &mut active, now) {
                Ok(then) => left = then,
                Err(error) => active.fail(self.queue, &desk.disk, &self.metrics, &error.to_string()),
            }
        }
        self.metrics.depth.set((self.slots.len() - 1 - self.free.len()) as u64);
        self.active = Some(active);
        self.publish(&desk.disk);
        left
    }

    fn take_batch(&mut self, desk: &mut Desk, active: &mut Active, now: Instant) -> Result<Left, ChainError> {
        let (number, memory) = active.map.clone();
        active.ring.disable_kicks(&memory)?;
        let stable = !active.flushes || !desk.disk.writeback.load(Ordering::Relaxed);
        // At most one ring full: commands, completions and other lanes have their turn whatever the driver does.
        for _ in 0..active.ring.size() {
            if let Some(pause) = desk.disk.throttled(now) {
                self.metrics.throttled.increment();
                return Ok(Left::After(pause));
            }
            if active.retrying && active.again.is_empty() {
                if !self.is_idle() {
                    return Ok(Left::Nothing);
                }
                active.retrying = false;
            }
            let Some(head) = active.next_head(&memory)? else {
                return Ok(Left::Empty);
            };
            active.ring.walk(&memory, head, &mut desk.parser.chain)?;
            let status = desk.parser.status_address(&memory, head)?;
            let rules = desk.disk.rules(stable);
            match desk.parser.parse(&memory, head, &rules)? {
                Asked::Answered { status: answer, written } => {
                    if answer != STATUS_OK {
                        self.metrics.refused.increment();
                    }
                    active.answer(&memory, head, status, answer, written)?;
                }
                asked => {
                    let size = active.ring.size();
                    let slot = self.free.pop().ok_or(RingError::TooMany { size })?;
                    self.begin(slot, head, status, number, now);
                    self.submit(desk, slot, asked, now);
                }
            }
        }
        Ok(Left::More)
    }

    fn begin(&mut self, number: u16, head: u16, status: u64, map: u32, now: Instant) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            (slot.head, slot.status, slot.map, slot.started) = (head, status, map, now);
            (slot.busy, slot.sequence) = (true, self.sequence);
            self.sequence += 1;
        }
        self.metrics.begin(number, now);
    }

    fn submit(&mut self, desk: &mut Desk, number: u16, asked: Asked, now: Instant) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        slot.ranges.clear();
        (slot.operation, slot.offset, slot.length) = match asked {
            Asked::Transfer { operation, offset, length } => (operation, offset, u64::from(length)),
            _ => {
                slot.ranges.extend(desk.parser.ranges.drain(..).rev());
                let first = slot.ranges.pop();
                first.map_or((Operation::Flush, 0, 0), |range| (range.operation, range.offset, range.length))
            }
        };
        slot.payload = u32::try_from(slot.length).unwrap_or(u32::MAX);
        let Slot { operation, offset, length, .. } = *slot;
        desk.disk.charge(operation, length, now);
        let id = self.base.saturating_add(number);
        let request = Request { id, operation, offset, length, buffers: &desk.parser.buffers };
        // SAFETY: the buffers are RAM of the map of this slot, which `Active` keeps until the slot is free again; the worker
        // drops the backend, which drains, before its lanes and their maps.
        unsafe { desk.backend.submit(request) };
    }

    /// Request `number` of this lane ended.
    pub fn completed(&mut self, desk: &mut Desk, number: u16, result: Result<u64, i32>, now: Instant) {
        if usize::from(number) + 1 == self.slots.len() {
            return self.synced(&desk.disk, result);
        }
        let Some(slot) = self.slots.get_mut(usize::from(number)).filter(|slot| slot.busy) else { return };
        // Less than was asked for is no success.
        let result = result.and_then(|done| if done == slot.length { Ok(()) } else { Err(libc::EIO) });
        if result.is_ok()
            && let Some(Range { offset, length, operation }) = slot.ranges.pop()
        {
            (slot.offset, slot.length, slot.operation) = (offset, length, operation);
            let id = self.base.saturating_add(number);
            let request = Request { id, operation, offset, length, buffers: &[] };
            // SAFETY: there are no buffers.
            unsafe { desk.backend.submit(request) };
            return;
        }
        slot.busy = false;
        if let Err(errno) = result
            && desk.disk.holds(errno)
        {
            return self.hold(&desk.disk, number, errno);
        }
        self.end(&desk.disk, number, result, now);
    }

    /// Counts a request that has ended, and answers it.
    fn end(&mut self, disk: &Disk, number: u16, result: Result<(), i32>, now: Instant) {
        let Some(slot) = self.slots.get(usize::from(number)) else { return };
        let (operation, payload) = (slot.operation, slot.payload);
        let counters = self.metrics.operation(operation);
        counters.requests.increment();
        counters.latency.record(now.saturating_duration_since(slot.started));
        let (status, written) = match result {
            Ok(()) if operation == Operation::Read => (STATUS_OK, payload),
            Ok(()) => (STATUS_OK, 0),
            Err(errno) => (status_of(errno, operation), 0),
        };
        let moved = if result.is_ok() { u64::from(payload) } else { 0 };
        match operation {
            Operation::Read => self.metrics.read_bytes.add(moved),
            Operation::Write { .. } => self.metrics.written_bytes.add(moved),
            _ => {}
        }
        if let Err(errno) = result {
            counters.errors.increment();
            if errno == libc::EBADE {
                disk.conflict();
            }
            disk.io_error(errno, name(operation), slot.offset, slot.length, false);
        }
        self.metrics.end(number);
        self.free.push(number);
        let Some(active) = &mut self.active else { return };
        let memory = Arc::clone(&active.map.1);
        if let Err(error) = active.answer(&memory, slot.head, slot.status, status, written) {
            active.fail(self.queue, disk, &self.metrics, &error.to_string());
        }
    }

    /// Keeps a request that failed, and the queue stands still.
    fn hold(&mut self, disk: &Disk, number: u16, errno: i32) {
        self.metrics.end(number);
        self.free.push(number);
        let (Some(slot), Some(active)) = (self.slots.get(usize::from(number)), &mut self.active) else { return };
        self.metrics.operation(slot.operation).errors.increment();
        if active.held.is_empty() {
            // The others will be tried again with it: one call for help is enough.
            disk.io_error(errno, name(slot.operation), slot.offset, slot.length, true);
        }
        active.held.push((slot.sequence, slot.head));
        self.metrics.held.set(active.held.len() as u64);
    }

    /// Shows the driver what was answered, and interrupts it if it wants that.
    pub fn publish(&mut self, disk: &Disk) {
        let Some(active) = &mut self.active else { return };
        match active.ring.publish(&active.map.1) {
            Ok(true) => {
                active.interrupt.trigger();
                self.metrics.interrupts.increment();
            }
            Ok(false) => {}
            Err(error) => active.fail(self.queue, disk, &self.metrics, &error.to_string()),
        }
    }

    /// The ring works no more: the driver broke it, or the host cannot go on.
    pub fn fail(&mut self, disk: &Disk, reason: &str) {
        if let Some(active) = &mut self.active {
            active.fail(self.queue, disk, &self.metrics, reason);
        }
    }
}

impl Active {
    /// The next request: first those that are tried again.
    fn next_head(&mut self, memory: &GuestMemoryMmap) -> Result<Option<u16>, ChainError> {
        match self.again.pop_front() {
            Some(head) => Ok(Some(head)),
            None => Ok(self.ring.next_head(memory)?),
        }
    }

    fn answer(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        address: u64,
        status: u8,
        written: u32,
    ) -> Result<(), ChainError> {
        let unmapped = RingError::Unmapped { head, address };
        memory.write_obj(status, GuestAddress(address)).map_err(|_| unmapped)?;
        self.ring.put_used(memory, head, written.saturating_add(1))?;
        Ok(())
    }

    fn fail(&mut self, queue: u16, disk: &Disk, metrics: &QueueMetrics, reason: &str) {
        if self.broken {
            return;
        }
        self.broken = true;
        metrics.broken.increment();
        disk.broken(queue, reason);
        self.signals.needs_reset(reason);
    }

    fn give_back(mut self, queue: u16) -> Stopped {
        self.held.sort_unstable();
        let held = self.held.iter().map(|(_, head)| *head).chain(self.again).collect();
        Stopped { queue: StoppedQueue { index: queue, state: self.ring.state() }, held }
    }

    /// Takes the present map of guest memory for new requests, and lets go of maps that no request in flight uses.
    fn refresh_map(&mut self, slots: &[Slot]) {
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
