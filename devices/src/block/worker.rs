//! The thread of one queue: takes requests off the ring, hands them to the backend, and answers.
//!
//! It waits in one place, [`BlockBackend::wait`], after a short look for more work where that pays ([`crate::pace`]). Each
//! turn takes what completed, publishes it with one index and at most one interrupt, then takes what the driver made
//! available; kicks are only asked for before the thread sleeps.

// Submitting to a backend vows that guest memory stays: the snapshots held here are why it does.
#![allow(unsafe_code)]

mod active;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use self::active::Active;
use super::backend::{BlockBackend, Completion, Event, Operation, Request, Signal};
use super::metrics::{QueueMetrics, name};
use super::request::{Asked, ChainError, Parser, Range, STATUS_OK, status_of};
use super::shared::Disk;
use crate::pace::moderation::{Level, Tuning};
use crate::pace::{self, Pace, Taken};
use crate::scheduling::Stance;
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{StoppedQueue, TransportSignals};
use crate::{GuestMemory, interrupt::QueueInterrupt};

/// How requests are gathered.
const TUNING: Tuning = Tuning {
    longest: Duration::from_millis(4),
    episode: 256,
    gain: 1.1,
    first: 0,
    large: f64::INFINITY,
    patient: Stance::Last,
};

/// What the owner of a worker asks of it.
pub(super) enum Command {
    /// Work on this queue.
    Start(Box<Start>),
    /// Take no more requests, and give the queue back once nothing is in flight.
    Stop,
    /// Make stable what was written until now: the driver turned the write cache off, and will not flush it.
    Sync,
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
    /// Heads of requests to take before those of the ring: they failed before the last stop.
    pub again: Vec<u16>,
}

/// A queue that is given back.
pub(super) struct Stopped {
    pub queue: StoppedQueue,
    /// Heads of requests that failed and were kept, in the order in which they came.
    pub held: Vec<u16>,
}

/// What a worker is made of.
pub(super) struct Parts {
    pub backend: Box<dyn BlockBackend>,
    pub disk: Arc<Disk>,
    pub metrics: Arc<QueueMetrics>,
    pub commands: Receiver<Command>,
    pub wake: EventFd,
    pub stopped: Sender<Stopped>,
    pub depth: u16,
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

/// What a worker does next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Sleep until something happens.
    Sleep,
    /// The ring is empty: look for work a little longer, then ask for kicks and sleep.
    Settle,
    /// Look at the ring again at once.
    Again,
    /// Sleep, but look at the ring after this time: a limit is exhausted.
    After(Duration),
}

/// After a panic, takes back that requests are in flight: their backend has drained, and nobody will complete them.
struct Last {
    metrics: Arc<QueueMetrics>,
    depth: u16,
}

impl Drop for Last {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (0..=self.depth).for_each(|id| self.metrics.end(id));
            self.metrics.depth.set(0);
        }
    }
}

pub(super) struct Worker {
    // Dropped first: drains, and only then the memory below may go.
    backend: Box<dyn BlockBackend>,
    active: Option<Box<Active>>,
    disk: Arc<Disk>,
    metrics: Arc<QueueMetrics>,
    commands: Receiver<Command>,
    stopped: Sender<Stopped>,
    parser: Parser,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// The sequence of the next request.
    sequence: u64,
    /// A flush of our own has to follow all requests before this one.
    sync_after: Option<u64>,
    pace: Pace,
    leaving: bool,
}

impl Worker {
    /// The body of the thread: works until its owner drops the sender of commands.
    pub fn run(parts: Parts) {
        let Parts { mut backend, disk, metrics, commands, wake, stopped, depth } = parts;
        // The first, so that the backend has drained when it is dropped.
        let _last = Last { metrics: Arc::clone(&metrics), depth };
        let prepared = backend.prepare().and_then(|()| backend.watch(Signal::Command, Some(wake)));
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
        let mut worker = Self {
            backend,
            active: None,
            metrics,
            commands,
            stopped,
            parser: Parser::new(depth.max(256)),
            // The last one is for our own flush.
            slots: (0..=depth).map(slot).collect(),
            free: (0..depth).rev().collect(),
            sequence: 0,
            sync_after: None,
            pace: Pace::begin(TUNING),
            leaving: false,
            disk,
        };
        if let Err(error) = prepared.and_then(|()| worker.turns()) {
            worker.give_up(&error);
        }
    }

    fn turns(&mut self) -> std::io::Result<()> {
        let mut events = Vec::with_capacity(self.slots.len() + 8);
        let mut next = Next::Sleep;
        loop {
            let timeout = match next {
                Next::Sleep | Next::Settle => None,
                Next::Again => Some(Duration::ZERO),
                Next::After(pause) => Some(pause),
            };
            self.backend.wait(timeout, &mut events)?;
            let now = Instant::now();
            let (done, taken) = (events.iter().any(|event| matches!(event, Event::Done(_))), self.sequence);
            self.take_events(&mut events, now)?;
            if self.leaving && self.idle() {
                return Ok(());
            }
            let slept = next == Next::Sleep;
            next = match self.gather(now) {
                Some(rest) => Next::After(rest),
                None => self.take_requests(now),
            };
            let came = u32::try_from(self.sequence - taken).unwrap_or(u32::MAX);
            self.metrics.moderated.add(if self.pace.moderation.is_on() { came.into() } else { 0 });
            if slept {
                self.pace.woke(now, done || came > 0);
            }
            self.pace.took(now, Taken { count: came, work: came.into(), given: came.into() });
            if next == Next::Settle {
                next = self.gather(now).map_or_else(|| self.settle(), |rest| Ok(Next::After(rest)))?;
            }
        }
    }

    /// How long requests are still to gather, if they are; the driver kicks sooner if they have.
    fn gather(&mut self, now: Instant) -> Option<Duration> {
        let Level { goal, .. } = self.pace.moderation.level();
        let active = self.active.as_mut().filter(|_| goal > 1)?;
        let memory = Arc::clone(&active.map.1);
        // What is wrong with the ring is found by who takes from it.
        let waiting = active.ring.waiting(&memory).ok()?;
        let rest = self.pace.moderation.rest(waiting, self.slots.len() - 1 - self.free.len(), now)?;
        let there = active.ring.kick_after(&memory, goal).unwrap_or(true);
        (!there).then_some(rest)
    }

    /// Looks for more work as long as that pays, then asks for kicks.
    fn settle(&mut self) -> std::io::Result<Next> {
        let Some(mut active) = self.active.take() else { return Ok(Next::Sleep) };
        let window = self.pace.polling.window();
        let memory = &active.map.1;
        self.pace.settled = Instant::now();
        if !window.is_zero() {
            self.backend.start()?;
            let (backend, ring) = (&mut self.backend, &active.ring);
            if pace::look(window, || backend.is_ready() || ring.is_available(memory)) {
                self.metrics.polled.increment();
                self.active = Some(active);
                return Ok(Next::Again);
            }
        }
        let more = active.ring.enable_kicks(memory).unwrap_or_else(|error| {
            self.break_ring(&mut active, &error.to_string());
            false
        });
        self.active = Some(active);
        Ok(if more { Next::Again } else { Next::Sleep })
    }

    fn idle(&self) -> bool {
        let own = self.slots.last().is_some_and(|own| own.busy);
        self.sync_after.is_none() && !own && self.free.len() + 1 == self.slots.len()
    }

    /// Begins the flush of our own once the requests that it has to follow are done.
    fn sync(&mut self) {
        let Some(after) = self.sync_after else { return };
        let Some((own, slots)) = self.slots.split_last_mut() else { return };
        if own.busy || slots.iter().any(|slot| slot.busy && slot.sequence < after) {
            return;
        }
        (own.busy, own.operation, own.offset, own.length) = (true, Operation::Flush, 0, 0);
        self.sync_after = None;
        let id = u16::try_from(slots.len()).unwrap_or(u16::MAX);
        let request = Request { id, operation: Operation::Flush, offset: 0, length: 0, buffers: &[] };
        // SAFETY: there are no buffers.
        unsafe { self.backend.submit(request) };
    }

    fn synced(&mut self, result: Result<u64, i32>) {
        if let Some(own) = self.slots.last_mut() {
            own.busy = false;
        }
        if let Err(errno) = result {
            self.metrics.operation(Operation::Flush).errors.increment();
            self.disk.io_error(errno, name(Operation::Flush), 0, 0, false);
        }
    }

    fn take_events(&mut self, events: &mut Vec<Event>, now: Instant) -> std::io::Result<()> {
        let mut commanded = false;
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
        self.sync();
        self.give_back()
    }

    fn take_commands(&mut self) -> std::io::Result<()> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(start)) => self.start(*start)?,
                Ok(Command::Stop) => self.stop(),
                Ok(Command::Sync) => self.sync_after = Some(self.sequence),
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
        let (active, kick) = Active::new(start);
        self.metrics.held.set(0);
        self.pace = Pace::begin(TUNING);
        self.backend.watch(Signal::Kick, Some(kick))?;
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
        let _ = self.stopped.send(active.give_back());
        if !self.leaving {
            self.disk.queue_stopped();
        }
        Ok(())
    }

    /// Takes what the driver made available.
    fn take_requests(&mut self, now: Instant) -> Next {
        let Some(mut active) = self.active.take() else { return Next::Sleep };
        let mut next = Next::Sleep;
        if !active.broken && !active.stopping && active.held.is_empty() && !self.disk.is_fenced() {
            active.refresh_map(&self.slots);
            match self.take_batch(&mut active, now) {
                Ok(then) => next = then,
                Err(error) => self.break_ring(&mut active, &error.to_string()),
            }
        }
        self.metrics.depth.set((self.slots.len() - 1 - self.free.len()) as u64);
        self.active = Some(active);
        self.publish();
        next
    }

    fn take_batch(&mut self, active: &mut Active, now: Instant) -> Result<Next, ChainError> {
        let (number, memory) = active.map.clone();
        active.ring.disable_kicks(&memory)?;
        let stable = !active.flushes || !self.disk.writeback.load(Ordering::Relaxed);
        // At most one ring full: commands and completions have their turn whatever the driver does.
        for _ in 0..active.ring.size() {
            if let Some(pause) = self.disk.throttled(now) {
                self.metrics.throttled.increment();
                return Ok(Next::After(pause));
            }
            if active.retrying && active.again.is_empty() {
                if !self.idle() {
                    return Ok(Next::Sleep);
                }
                active.retrying = false;
            }
            let Some(head) = active.next_head(&memory)? else {
                return Ok(Next::Settle);
            };
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
                    self.submit(id, asked, now);
                }
            }
        }
        Ok(Next::Again)
    }

    fn begin(&mut self, id: u16, head: u16, status: u64, map: u32, now: Instant) {
        if let Some(slot) = self.slots.get_mut(usize::from(id)) {
            (slot.head, slot.status, slot.map, slot.started) = (head, status, map, now);
            (slot.busy, slot.sequence) = (true, self.sequence);
            self.sequence += 1;
        }
        self.metrics.begin(id, now);
    }

    fn submit(&mut self, id: u16, asked: Asked, now: Instant) {
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
        self.disk.charge(operation, length, now);
        let request = Request { id, operation, offset, length, buffers: &self.parser.buffers };
        // SAFETY: the buffers are RAM of the map of this slot, which `Active` keeps until the slot is free again; `Worker`
        // drops the backend, which drains, before the maps.
        unsafe { self.backend.submit(request) };
    }

    fn completed(&mut self, completion: Completion, now: Instant) {
        let Completion { id, result } = completion;
        if usize::from(id) + 1 == self.slots.len() {
            return self.synced(result);
        }
        let Some(slot) = self.slots.get_mut(usize::from(id)).filter(|slot| slot.busy) else { return };
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
        slot.busy = false;
        if let Err(errno) = result
            && self.disk.holds(errno)
        {
            return self.hold(id, errno);
        }
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
            self.disk.io_error(errno, name(operation), slot.offset, slot.length, false);
        }
        let (head, address) = (slot.head, slot.status);
        self.metrics.end(id);
        self.free.push(id);
        self.answer(head, address, status, written);
    }

    /// Keeps a request that failed, and the queue stands still.
    fn hold(&mut self, id: u16, errno: i32) {
        self.metrics.end(id);
        self.free.push(id);
        let (Some(slot), Some(active)) = (self.slots.get(usize::from(id)), &mut self.active) else { return };
        self.metrics.operation(slot.operation).errors.increment();
        if active.held.is_empty() {
            // The others will be tried again with it: one call for help is enough.
            self.disk.io_error(errno, name(slot.operation), slot.offset, slot.length, true);
        }
        active.held.push((slot.sequence, slot.head));
        self.metrics.held.set(active.held.len() as u64);
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
                Command::Sync => {}
            }
            if self.idle()
                && let Some(active) = self.active.take_if(|active| active.stopping)
            {
                let _ = self.stopped.send(active.give_back());
                self.disk.queue_stopped();
            }
        }
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
