//! The thread of one queue, or of several where the host has no processors to spare ([`super::BlockOptions::workers`]).
//!
//! It waits in one place, [`BlockBackend::wait`], after a short look for more work where that pays ([`super::poll`]). Each
//! turn takes what completed, publishes it with one index and at most one interrupt a queue, then takes what the drivers
//! made available; kicks are only asked for before the thread sleeps.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::backend::{BlockBackend, Completion, Event, Signal};
use super::lane::{Desk, Lane, Left, Start, Stopped};
use super::metrics::QueueMetrics;
use super::poll::{self, Polling};
use super::request::Parser;
use super::shared::Disk;

/// What the owner of a worker asks of it.
pub(super) enum Command {
    /// Work on this queue.
    Start(Box<Start>),
    /// Take no more requests of this queue, and give it back once nothing of it is in flight.
    Stop(u16),
    /// Make stable what this queue wrote until now: the driver turned the write cache off, and will not flush it.
    Sync(u16),
}

/// A queue that a worker may be told to work on.
pub(super) struct Seat {
    pub queue: u16,
    pub metrics: Arc<QueueMetrics>,
    pub stopped: Sender<Stopped>,
}

/// What a worker is made of.
pub(super) struct Parts {
    pub backend: Box<dyn BlockBackend>,
    pub disk: Arc<Disk>,
    pub seats: Vec<Seat>,
    pub commands: Receiver<Command>,
    pub wake: EventFd,
    /// Requests in flight at once in each queue.
    pub depth: u16,
}

/// What a worker does next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Sleep until something happens.
    Sleep,
    /// Look at the rings again at once.
    Again,
    /// Sleep, but look at the rings after this time.
    After(Duration),
}

pub(super) struct Worker {
    // Dropped first: its backend drains, and only then the memory that the lanes keep may go.
    desk: Desk,
    lanes: Vec<Lane>,
    /// Lanes whose rings are empty, and that have not asked for kicks.
    empty: Vec<bool>,
    commands: Receiver<Command>,
    polling: Polling,
    /// When all rings were last found empty.
    settled: Instant,
    /// Ids of requests for each lane.
    stride: u16,
    leaving: bool,
}

impl Worker {
    /// The body of the thread: works until its owner drops the sender of commands.
    pub fn run(parts: Parts) {
        let Parts { mut backend, disk, seats, commands, wake, depth } = parts;
        let prepared = backend.prepare().and_then(|()| backend.watch(Signal::Command, Some(wake)));
        let lanes =
            (0..).zip(seats).map(|(number, seat)| Lane::new(number, seat.queue, depth, seat.metrics, seat.stopped));
        let lanes: Vec<Lane> = lanes.collect();
        let mut worker = Self {
            desk: Desk { backend, disk, parser: Parser::new(depth.max(256)) },
            empty: vec![false; lanes.len()],
            lanes,
            commands,
            polling: Polling::default(),
            settled: Instant::now(),
            stride: depth.saturating_add(1),
            leaving: false,
        };
        if let Err(error) = prepared.and_then(|()| worker.turns()) {
            worker.give_up(&error);
        }
    }

    fn turns(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(self.lanes.len() * (usize::from(self.stride) + 1) + 8);
        let mut next = Next::Sleep;
        loop {
            let timeout = match next {
                Next::Sleep => None,
                Next::Again => Some(Duration::ZERO),
                Next::After(pause) => Some(pause),
            };
            self.desk.backend.wait(timeout, &mut events)?;
            let now = Instant::now();
            let done = events.iter().any(|event| matches!(event, Event::Done(_)));
            self.take_events(&mut events, now)?;
            if self.leaving && self.lanes.iter().all(Lane::is_idle) {
                return Ok(());
            }
            let (then, came) = self.take_requests(now);
            if next == Next::Sleep {
                self.polling.waited(now.saturating_duration_since(self.settled), done || came);
            }
            next = match then {
                Next::Again => then,
                _ if self.empty.contains(&true) => self.settle(then)?,
                _ => then,
            };
        }
    }

    fn take_events(&mut self, events: &mut Vec<Event>, now: Instant) -> io::Result<()> {
        let mut commanded = false;
        for event in events.drain(..) {
            match event {
                Event::Done(Completion { id, result }) => {
                    if let Some(lane) = self.lanes.get_mut(usize::from(id / self.stride)) {
                        lane.completed(&mut self.desk, id % self.stride, result, now);
                    }
                }
                Event::Signal(Signal::Kick(lane)) => {
                    if let Some(lane) = self.lanes.get(usize::from(lane)) {
                        lane.metrics.kicks.increment();
                    }
                }
                Event::Signal(Signal::Command) => commanded = true,
            }
        }
        for lane in &mut self.lanes {
            lane.publish(&self.desk.disk);
        }
        if commanded {
            self.take_commands()?;
        }
        for lane in &mut self.lanes {
            lane.sync(&mut self.desk);
            if lane.has_stopped() {
                lane.unwatch(&mut self.desk)?;
                lane.give_back();
                if !self.leaving {
                    self.desk.disk.queue_stopped();
                }
            }
        }
        Ok(())
    }

    fn take_commands(&mut self) -> io::Result<()> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(start)) => self.start(*start)?,
                Ok(Command::Stop(queue)) => self.with(queue, Lane::stop),
                Ok(Command::Sync(queue)) => self.with(queue, Lane::sync_soon),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => {
                    self.leaving = true;
                    self.lanes.iter_mut().for_each(Lane::stop);
                    return Ok(());
                }
            }
        }
    }

    fn start(&mut self, start: Start) -> io::Result<()> {
        self.polling = Polling::default();
        match self.lanes.iter_mut().find(|lane| lane.queue == start.index) {
            Some(lane) => lane.start(&mut self.desk, start),
            None => Ok(()),
        }
    }

    fn with(&mut self, queue: u16, act: impl FnOnce(&mut Lane)) {
        if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.queue == queue) {
            act(lane);
        }
    }

    /// Takes what the drivers made available; tells whether there was anything.
    fn take_requests(&mut self, now: Instant) -> (Next, bool) {
        let (mut next, mut came) = (Next::Sleep, false);
        for (lane, empty) in self.lanes.iter_mut().zip(&mut self.empty) {
            let before = lane.taken();
            let left = lane.take_requests(&mut self.desk, now);
            came |= lane.taken() > before;
            *empty = left == Left::Empty;
            next = match (next, left) {
                (Next::Again, _) | (_, Left::More) => Next::Again,
                (Next::After(one), Left::After(other)) => Next::After(one.min(other)),
                (_, Left::After(pause)) => Next::After(pause),
                (next, Left::Nothing | Left::Empty) => next,
            };
        }
        (next, came)
    }

    /// Looks for more work as long as that pays, then asks for kicks. `next` is what to do if there is none.
    fn settle(&mut self, next: Next) -> io::Result<Next> {
        let window = self.polling.window();
        self.settled = Instant::now();
        if !window.is_zero() {
            self.desk.backend.start()?;
            let (backend, lanes) = (&mut self.desk.backend, self.lanes.iter().zip(&self.empty));
            let available = || lanes.clone().any(|(lane, empty)| *empty && lane.is_available());
            if poll::look(window, || backend.is_ready() || available()) {
                self.lanes.iter().take(1).for_each(|lane| lane.metrics.polled.increment());
                return Ok(Next::Again);
            }
        }
        let mut more = false;
        for (lane, _) in self.lanes.iter_mut().zip(&self.empty).filter(|(_, empty)| **empty) {
            more |= lane.enable_kicks(&self.desk.disk);
        }
        Ok(if more { Next::Again } else { next })
    }

    /// The backend cannot go on. What is in flight stays so, and the memory with it, for ever.
    fn give_up(mut self, error: &io::Error) {
        self.desk.disk.lost(error);
        for lane in &mut self.lanes {
            lane.fail(&self.desk.disk, "the host's I/O engine failed");
        }
        // Commands are answered as far as they can be, from now on without the backend.
        loop {
            for lane in self.lanes.iter_mut().filter(|lane| lane.has_stopped()) {
                lane.give_back();
                self.desk.disk.queue_stopped();
            }
            match self.commands.recv() {
                Ok(Command::Start(start)) => start.signals.needs_reset("the host's I/O engine failed"),
                Ok(Command::Stop(queue)) => self.with(queue, Lane::stop),
                Ok(Command::Sync(_)) => {}
                Err(_) => return,
            }
        }
    }
}
