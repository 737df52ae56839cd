//! The thread of one queue: takes requests off the ring, hands them to the backend, and answers.
//!
//! It waits in one place, [`BlockBackend::wait`]. Each turn takes what completed, publishes it with one index and at most
//! one interrupt, then takes what the driver made available; kicks are only asked for before the thread sleeps.

// Submitting to a backend vows that guest memory stays: the snapshots held here are why it does.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{BlockBackend, Completion, Event, Operation, Request, Signal};
use super::metrics::{QueueMetrics, name};
use super::request::{Asked, ChainError, Parser, Range, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP};
use super::shared::Disk;
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{StoppedQueue, TransportSignals};
use crate::{GuestMemory, interrupt::QueueInterrupt};

/// What the owner of a worker asks of it.
pub(super) enum Command {
    /// Work on this queue.
    Start(Box<Start>),
    /// Take no more requests, and give the queue back once nothing is in flight.
    Stop,
}

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
}

/// What a worker is made of.
pub(super) struct Parts {
    pub backend: Box<dyn BlockBackend>,
    pub disk: Arc<Disk>,
    pub metrics: Arc<QueueMetrics>,
    pub commands: Receiver<Command>,
    pub wake: EventFd,
    pub stopped: Sender<StoppedQueue>,
    pub depth: u16,
}

/// A request in flight.
struct Slot {
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
    index: u16,
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
}

pub(super) struct Worker {
    // Dropped first: drains, and only then the memory below may go.
    backend: Box<dyn BlockBackend>,
    active: Option<Box<Active>>,
    disk: Arc<Disk>,
    metrics: Arc<QueueMetrics>,
    commands: Receiver<Command>,
    stopped: Sender<StoppedQueue>,
    parser: Parser,
    slots: Vec<Slot>,
    free: Vec<u16>,
    leaving: bool,
}

impl Worker {
    /// The body of the thread: works until its owner drops the sender of commands.
    pub fn run(parts: Parts) {
        let Parts { mut backend, disk, metrics, commands, wake, stopped, depth } = parts;
        let prepared = backend.prepare().and_then(|()| backend.watch(Signal::Command, Some(wake)));
        let slot = |_| Slot {
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
        let mut worker = Self {
            backend,
            active: None,
            metrics,
            commands,
            stopped,
            parser: Parser::new(depth.max(256)),
            slots: (0..depth).map(slot).collect(),
            free: (0..depth).rev().collect(),
            leaving: false,
            disk,
        };
        if let Err(error) = prepared.and_then(|()| worker.turns()) {
            worker.give_up(&error);
        }
    }

    fn turns(&mut self) -> std::io::Result<()> {
        let mut events = Vec::with_capacity(self.slots.len() + 8);
        let mut more = false;
        loop {
            self.backend.wait(more.then_some(Duration::ZERO), &mut events)?;
            self.take_events(&mut events)?;
            if self.leaving && self.idle() {
                return Ok(());
            }
            more = self.take_requests();
        }
    }

    fn idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    fn take_events(&mut self, events: &mut Vec<Event>) -> std::io::Result<()> {
        let mut commanded = false;
        let now = Instant::now();
        for event in events.drain(..) {
            match event {
                Event::Done(completion) => self.completed(completion, now),
                Event::Signal(Signal::Kick) => self.metrics.kicks.increment(),
                Event::Signal(Signal::Command) => commanded = true,
            }
        }
        self.publish();
        if commanded {
            self.take_commands()?;
        }
        self.give_back()
    }

    fn take_commands(&mut self) -> std::io::Result<()> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(start)) => self.start(*start)?,
                Ok(Command::Stop) => self.stop(),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => {
                    self.leaving = true;
                    self.stop();
                    return Ok(());
                }
            }
        }
    }

    fn start(&mut self, start: Start) -> std::io::Result<()> {
        let Start { index, ring, kick, interrupt, memory, signals, flushes } = start;
        self.backend.watch(Signal::Kick, Some(kick))?;
        let map = (0, memory.memory().into_inner());
        let (retired, broken, stopping) = (Vec::new(), false, false);
        let active = Active { index, ring, interrupt, memory, map, retired, signals, flushes, broken, stopping };
        self.active = Some(Box::new(active));
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(active) = &mut self.active {
            active.stopping = true;
        }
    }

    /// Gives the queue back if it was asked for and nothing is in flight.
    fn give_back(&mut self) -> std::io::Result<()> {
        if !self.idle() {
            return Ok(());
        }
        let Some(active) = self.active.take_if(|active| active.stopping) else { return Ok(()) };
        self.backend.watch(Signal::Kick, None)?;
        // The owner is gone only if the device was dropped: nobody wants the positions then.
        let _ = self.stopped.send(StoppedQueue { index: active.index, state: active.ring.state() });
        drop(active);
        if !self.leaving {
            self.disk.queue_stopped();
        }
        Ok(())
    }

    /// Takes what the driver made available; tells whether there may be more at once.
    fn take_requests(&mut self) -> bool {
        let Some(mut active) = self.active.take() else { return false };
        let mut more = false;
        if !active.broken && !active.stopping && !self.disk.is_fenced() {
            active.refresh_map(&self.slots, &self.free);
            match self.take_batch(&mut active) {
                Ok(left) => more = left,
                Err(error) => self.break_ring(&mut active, &error.to_string()),
            }
        }
        self.metrics.depth.set((self.slots.len() - self.free.len()) as u64);
        self.active = Some(active);
        self.publish();
        more
    }

    fn take_batch(&mut self, active: &mut Active) -> Result<bool, ChainError> {
        let (number, memory) = active.map.clone();
        active.ring.disable_kicks(&memory)?;
        let now = Instant::now();
        let stable = !active.flushes || !self.disk.writeback.load(Ordering::Relaxed);
        // At most one ring full: commands and completions have their turn whatever the driver does.
        for _ in 0..active.ring.size() {
            let Some(head) = active.ring.next_head(&memory)? else { return Ok(active.ring.enable_kicks(&memory)?) };
            active.ring.walk(&memory, head, &mut self.parser.chain)?;
            let status = self.parser.status_address(&memory, head)?;
            let rules = self.disk.rules(stable);
            match self.parser.parse(&memory, head, &rules)? {
                Asked::Answered { status: answer, written } => {
                    if answer != STATUS_OK {
                        self.metrics.refused.increment();
                    }
                    answer_chain(active, &memory, head, status, answer, written)?;
                }
                asked => {
                    let size = active.ring.size();
                    let id = self.free.pop().ok_or(RingError::TooMany { size })?;
                    self.begin(id, head, status, number, now);
                    self.submit(id, asked);
                }
            }
        }
        Ok(true)
    }

    fn begin(&mut self, id: u16, head: u16, status: u64, map: u32, now: Instant) {
        if let Some(slot) = self.slots.get_mut(usize::from(id)) {
            (slot.head, slot.status, slot.map, slot.started) = (head, status, map, now);
        }
        self.metrics.begin(id, now);
    }

    fn submit(&mut self, id: u16, asked: Asked) {
        let Some(slot) = self.slots.get_mut(usize::from(id)) else { return };
        slot.ranges.clear();
        (slot.operation, slot.offset, slot.length) = match asked {
            Asked::Transfer { operation, offset, length } => (operation, offset, u64::from(length)),
            _ => {
                slot.ranges.extend(self.parser.ranges.drain(..).rev());
                let first = slot.ranges.pop();
                first.map_or((Operation::Flush, 0, 0), |range| (range.operation, range.offset, range.length))
            }
        };
        slot.payload = u32::try_from(slot.length).unwrap_or(u32::MAX);
        let Slot { operation, offset, length, .. } = *slot;
        let request = Request { id, operation, offset, length, buffers: &self.parser.buffers };
        // SAFETY: the buffers are RAM of the map of this slot, which `Active` keeps until the slot is free again; `Worker`
        // drops the backend, which drains, before the maps.
        unsafe { self.backend.submit(request) };
    }

    fn completed(&mut self, completion: Completion, now: Instant) {
        let Completion { id, result } = completion;
        let Some(slot) = self.slots.get_mut(usize::from(id)) else { return };
        // Less than was asked for is no success.
        let result = result.and_then(|done| if done == slot.length { Ok(()) } else { Err(libc::EIO) });
        if result.is_ok()
            && let Some(Range { offset, length, operation }) = slot.ranges.pop()
        {
            (slot.offset, slot.length, slot.operation) = (offset, length, operation);
            let request = Request { id, operation, offset, length, buffers: &[] };
            // SAFETY: there are no buffers.
            unsafe { self.backend.submit(request) };
            return;
        }
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
                self.disk.conflict();
            }
            self.disk.io_error(errno, name(operation), slot.offset, slot.length);
        }
        let (head, address) = (slot.head, slot.status);
        self.metrics.end(id);
        self.free.push(id);
        self.answer(head, address, status, written);
    }

    fn answer(&mut self, head: u16, address: u64, status: u8, written: u32) {
        let Some(mut active) = self.active.take() else { return };
        let memory = Arc::clone(&active.map.1);
        if let Err(error) = answer_chain(&mut active, &memory, head, address, status, written) {
            self.break_ring(&mut active, &error.to_string());
        }
        self.active = Some(active);
    }

    fn publish(&mut self) {
        let Some(mut active) = self.active.take() else { return };
        match active.ring.publish(&active.map.1) {
            Ok(true) => {
                active.interrupt.trigger();
                self.metrics.interrupts.increment();
            }
            Ok(false) => {}
            Err(error) => self.break_ring(&mut active, &error.to_string()),
        }
        self.active = Some(active);
    }

    fn break_ring(&self, active: &mut Active, reason: &str) {
        if active.broken {
            return;
        }
        active.broken = true;
        self.metrics.broken.increment();
        self.disk.broken(active.index, reason);
        active.signals.needs_reset(reason);
    }

    /// The backend cannot go on. What is in flight stays so, and the memory with it, for ever.
    fn give_up(mut self, error: &std::io::Error) {
        self.disk.lost(error);
        if let Some(mut active) = self.active.take() {
            self.break_ring(&mut active, "the host's I/O engine failed");
            self.active = Some(active);
        }
        // Commands are answered as far as they can be, from now on without the backend.
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Start(start) => start.signals.needs_reset("the host's I/O engine failed"),
                Command::Stop => self.stop(),
            }
            if self.idle()
                && let Some(active) = self.active.take_if(|active| active.stopping)
            {
                let _ = self.stopped.send(StoppedQueue { index: active.index, state: active.ring.state() });
                self.disk.queue_stopped();
            }
        }
    }
}

impl Active {
    /// Takes the present map of guest memory for new requests, and lets go of maps that no request in flight uses.
    fn refresh_map(&mut self, slots: &[Slot], free: &[u16]) {
        let present = self.memory.memory();
        if std::ptr::eq(&raw const *present, Arc::as_ptr(&self.map.1)) && self.retired.is_empty() {
            return;
        }
        if !std::ptr::eq(&raw const *present, Arc::as_ptr(&self.map.1)) {
            let next = (self.map.0.wrapping_add(1), present.into_inner());
            self.retired.push(std::mem::replace(&mut self.map, next));
        }
        let in_flight = |number: u32| {
            let uses = |(id, slot): (usize, &Slot)| slot.map == number && !free.iter().any(|&f| usize::from(f) == id);
            slots.iter().enumerate().any(uses)
        };
        self.retired.retain(|(number, _)| in_flight(*number));
    }
}

fn answer_chain(
    active: &mut Active,
    memory: &GuestMemoryMmap,
    head: u16,
    address: u64,
    status: u8,
    written: u32,
) -> Result<(), ChainError> {
    let unmapped = RingError::Unmapped { head, address };
    memory.write_obj(status, GuestAddress(address)).map_err(|_| unmapped)?;
    active.ring.put_used(memory, head, written.saturating_add(1))?;
    Ok(())
}

/// The status that tells the guest of an errno (§5.2.6): the one place where they are mapped.
fn status_of(errno: i32, operation: Operation) -> u8 {
    match (errno, operation) {
        (libc::EOPNOTSUPP, Operation::Discard | Operation::WriteZeroes { .. }) => STATUS_UNSUPP,
        _ => STATUS_IOERR,
    }
}
