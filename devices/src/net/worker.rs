//! The thread of a queue pair. It waits in epoll, and nowhere else, for messages from the device, for kicks and for the tap.
//!
//! Kicks and the tap are watched edge-triggered: an event only marks that there may be something, and work ends when the ring
//! or the tap is seen empty. So no event source has to be switched off while it cannot be served, which is what makes
//! reception freeze or spin elsewhere: a tap whose frames find no buffers keeps its mark and is read when the driver kicks.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::announce::{self, Rounds};
use super::control::Control;
use super::counters::PairCounters;
use super::features::{GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, bit};
use super::filter::Filter;
use super::lane::Lane;
use super::obey::obey;
use super::rx::Rx;
use super::shared::Shared;
use super::steering::hash::Hasher;
use super::tap::{HASH_HEADER_SIZE, HEADER_SIZE, TapError};
use super::tx::Tx;
use super::{MAX_FRAME, features, sys};
use crate::metrics::Counter;
use crate::virtio::ring::RingError;
use crate::virtio::{StoppedQueue, TransportSignals};
use crate::{DeviceEvent, GuestMemory};

const WAKE: u64 = 0;
const TAP: u64 = 1;
const RX_KICK: u64 = 2;
const TX_KICK: u64 = 3;
const CONTROL_KICK: u64 = 4;
const TIMER: u64 = 5;
/// Between two looks for a tap that was deleted.
const RETRY: Duration = Duration::from_secs(1);
/// Turns that the emptying of a tap of stale frames may take: more frames than a tap's queue commonly holds.
const PURGE_TURNS: u32 = 64;

/// What the device tells a worker.
pub(super) enum Message {
    Start(Box<Start>),
    Stop,
    Exit,
}

/// What a worker starts with.
pub(super) struct Start {
    pub(super) features: u64,
    pub(super) memory: GuestMemory,
    pub(super) rx: Option<Lane>,
    pub(super) tx: Option<Lane>,
    pub(super) control: Option<Lane>,
    /// For the control queue: receive and transmit queues that the driver has enabled.
    pub(super) enabled: Vec<u16>,
    pub(super) signals: Arc<dyn TransportSignals>,
    /// The driver is new: what the tap holds is not for it.
    pub(super) fresh: bool,
    /// [`Shared::pairs_generation`] when this was sent.
    pub(super) pairs_generation: u64,
}

/// What the data path works with during one turn.
pub(super) struct Context<'a> {
    pub(super) shared: &'a Shared,
    pub(super) counters: &'a PairCounters,
    pub(super) memory: &'a GuestMemoryMmap,
    pub(super) tap: BorrowedFd<'a>,
    pub(super) now: Instant,
    pub(super) link_up: bool,
    pub(super) filter: &'a Filter,
    pub(super) offloads: u64,
    /// Bytes of the header before each frame.
    pub(super) header: usize,
    /// Room to keep ready for the next frame, in bytes, with its header.
    pub(super) largest_frame: usize,
    /// What hashes frames for the driver, if it wants to hear of that.
    pub(super) hasher: Option<&'a Hasher>,
}

impl Context<'_> {
    /// Shows the driver what was used in `lane`, and interrupts it when it wants that, or `at_once`: what was done before a
    /// broken chain is done.
    pub(super) fn settle(&self, lane: &mut Lane, interrupts: &Counter, at_once: bool) -> Result<(), RingError> {
        if at_once {
            return lane.flush(self.memory, interrupts);
        }
        lane.settle(self.memory, self.shared.coalescing.get(lane.index), self.now, interrupts)
    }
}

struct Running {
    memory: GuestMemory,
    /// The map that the held buffers were found in.
    map: Arc<GuestMemoryMmap>,
    rx: Option<Rx>,
    tx: Option<Tx>,
    control: Option<Control>,
    signals: Arc<dyn TransportSignals>,
    pairs_generation: u64,
    purge_turns: u32,
    /// The filter as it was seen last, with its generation.
    filter: (u64, Arc<Filter>),
    /// What hashes frames, likewise.
    hasher: (u64, Arc<Option<Hasher>>),
    /// Whether the driver is told hashes.
    reports: bool,
    /// Whether the driver takes requests to announce itself.
    announces: bool,
}

pub(super) struct Worker {
    index: usize,
    shared: Arc<Shared>,
    messages: Receiver<Message>,
    stopped: Sender<Vec<StoppedQueue>>,
    epoll: Epoll,
    running: Option<Running>,
    carrier: bool,
    /// [`Shared::purges`] as it was seen last.
    purges: u64,
    /// [`Shared::announcements`] as it was seen last.
    announcements: u64,
    /// [`Shared::tap_generation`] as it was seen last.
    tap_generation: u64,
    /// When the first worker looks again whether a lost tap is back.
    retry: Option<Instant>,
    /// An announcement that is under way. The first worker makes it.
    rounds: Option<Rounds>,
    /// Wakes for interrupts that were held back: epoll's own timeout counts milliseconds, and they want microseconds.
    timer: TimerFd,
    /// What it is set to.
    alarm: Option<Instant>,
}

impl Worker {
    /// A parked worker for queue pair `index`.
    pub(super) fn new(
        index: usize,
        shared: Arc<Shared>,
        messages: Receiver<Message>,
        stopped: Sender<Vec<StoppedQueue>>,
    ) -> std::io::Result<Self> {
        let epoll = Epoll::new()?;
        if let Some(wake) = shared.wakes.get(index) {
            let event = EpollEvent::new(EventSet::IN, WAKE);
            epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        }
        let timer = TimerFd::new()?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, TIMER);
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), event)?;
        Ok(Self {
            index,
            shared,
            messages,
            stopped,
            epoll,
            running: None,
            carrier: true,
            purges: 0,
            announcements: 0,
            tap_generation: 0,
            retry: None,
            rounds: None,
            timer,
            alarm: None,
        })
    }

    /// The body of the thread.
    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let (Some(counters), Some(tap)) = (shared.counters.get(self.index), shared.tap.queue(self.index)) else {
            return;
        };
        let mut events = [EpollEvent::default(); 8];
        let mut more = false;
        self.follow_link();
        loop {
            self.set_timer(counters);
            let ready = match self.epoll.wait(self.timeout(more), &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(nic = shared.id, queue = self.index, %error, "epoll failed: the queue stops for good");
                    return;
                }
            };
            for event in events.iter().take(ready) {
                if event.data() == WAKE {
                    if !self.handle_messages(counters, tap) {
                        return;
                    }
                } else if event.data() == TIMER {
                    self.alarm = None;
                } else if let Some(running) = &mut self.running {
                    running.mark(event.data(), event.event_set(), counters);
                }
            }
            self.look_after_tap();
            self.follow_tap(tap);
            self.announce(tap);
            more = self.turn(counters, tap);
        }
    }

    /// How long to wait for events, in milliseconds; -1: for ever.
    fn timeout(&self, more: bool) -> i32 {
        let throttled = self.running.iter().flat_map(|running| {
            let (rx, tx) = (running.rx.as_ref(), running.tx.as_ref());
            [rx.and_then(|rx| rx.throttled), tx.and_then(|tx| tx.throttled)].into_iter().flatten()
        });
        let due = self.rounds.map(|rounds| rounds.next()).into_iter().chain(self.retry).chain(throttled).min();
        let due = due.map(|due| due.saturating_duration_since(Instant::now()));
        match (more, due) {
            (true, _) => 0,
            // Rounded up: it is due when the wait is over.
            (false, Some(left)) => i32::try_from(left.as_millis()).unwrap_or(i32::MAX - 1) + i32::from(!left.is_zero()),
            (false, None) => -1,
        }
    }

    /// Sets the timer to the first interrupt that is held back.
    fn set_timer(&mut self, counters: &PairCounters) {
        let Some(running) = &mut self.running else { return };
        let Some(due) = running.due().filter(|due| self.alarm != Some(*due)) else { return };
        // Zero would switch it off.
        let wait = due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        match self.timer.reset(wait, None) {
            Ok(()) => self.alarm = Some(due),
            // Better too early than never.
            Err(_) => running.flush(counters),
        }
    }

    /// The first worker sees whether a tap that was deleted has been made again, once a second while it is lost.
    fn look_after_tap(&mut self) {
        let shared = &self.shared;
        if self.index > 0 || !shared.is_tap_lost() {
            self.retry = None;
            return;
        }
        let now = Instant::now();
        if self.retry.is_some_and(|retry| now < retry) {
            return;
        }
        self.retry = Some(now + RETRY);
        if !shared.tap.is_gone() {
            return;
        }
        let reopened = shared.tap.reopen().and_then(|()| {
            let name = shared.tap.name().to_owned();
            shared.prepare_tap().map_err(|error| TapError::Kernel { name, action: "prepare it for the driver", error })
        });
        match reopened {
            Ok(()) => {
                if !self.carrier {
                    shared.tap.set_carrier(false);
                }
                shared.tap_generation.fetch_add(1, Ordering::SeqCst);
                shared.tap_works();
                shared.wake_all();
            }
            Err(error) => tracing::debug!(nic = shared.id, %error, "the tap is not back"),
        }
    }

    /// Watches the tap anew if there is another file behind its descriptor, which ended the former watch.
    fn follow_tap(&mut self, tap: BorrowedFd<'_>) {
        let generation = self.shared.tap_generation.load(Ordering::SeqCst);
        if std::mem::replace(&mut self.tap_generation, generation) == generation || self.running.is_none() {
            return;
        }
        self.watch(ControlOperation::Add, tap.as_raw_fd(), TAP, EventSet::IN | EventSet::OUT);
        if let Some(running) = &mut self.running {
            running.mark_all();
            if let Some(tx) = &mut running.tx {
                tx.blocked = false;
            }
        }
    }

    /// Does a round of an announcement if one is due.
    fn announce(&mut self, tap: BorrowedFd<'_>) {
        let shared = &self.shared;
        if self.index > 0 {
            return;
        }
        let now = Instant::now();
        let wanted = shared.announcements.load(Ordering::SeqCst);
        if std::mem::replace(&mut self.announcements, wanted) != wanted {
            self.rounds = Some(Rounds::begin(now));
        }
        let Some(rounds) = self.rounds.take_if(|rounds| rounds.next() <= now) else { return };
        self.rounds = rounds.after(now);
        if !shared.link_up.load(Ordering::SeqCst) {
            return;
        }
        let (_, filter) = shared.filter.get();
        if let Err(error) = sys::send(tap, &announce::rarp(filter.mac(), shared.tap.header())) {
            tracing::warn!(nic = shared.id, tap = shared.tap.name(), %error, "an announcement could not be sent");
        }
        if self.running.as_ref().is_some_and(|running| running.announces) {
            shared.ask_to_announce();
        }
    }

    /// Takes the device's messages; `false` when the thread is to end.
    fn handle_messages(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) -> bool {
        if let Some(wake) = self.shared.wakes.get(self.index) {
            let _ = wake.read();
        }
        loop {
            match self.messages.try_recv() {
                Ok(Message::Start(start)) => self.start(*start, tap),
                Ok(Message::Stop) => self.stop(counters, tap),
                Ok(Message::Exit) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => break,
            }
        }
        self.follow_link();
        self.follow_pairs();
        true
    }

    fn watch(&self, operation: ControlOperation, fd: RawFd, token: u64, events: EventSet) {
        if let Err(error) = self.epoll.ctl(operation, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token)) {
            tracing::error!(nic = self.shared.id, queue = self.index, token, %error, "a descriptor cannot be watched");
        }
    }

    fn start(&mut self, start: Start, tap: BorrowedFd<'_>) {
        let shared = &self.shared;
        let reports = start.features & bit(features::HASH_REPORT) != 0;
        if self.index == 0 {
            let header = if reports { HASH_HEADER_SIZE } else { HEADER_SIZE };
            let prepared = shared.tap.set_header(header).and_then(|()| shared.prepare_tap());
            if let Err(error) = prepared {
                shared.tap_failed("prepare for the driver", &error);
            }
        }
        let max_pairs = shared.max_pairs();
        let merge = start.features & bit(features::MRG_RXBUF) != 0;
        let running = Running {
            map: start.memory.memory().into_inner(),
            memory: start.memory,
            rx: start.rx.map(|lane| Rx::new(lane, merge)),
            tx: start.tx.map(Tx::new),
            control: start.control.map(|lane| Control::new(lane, start.features, max_pairs, start.enabled)),
            signals: start.signals,
            pairs_generation: start.pairs_generation,
            purge_turns: if start.fresh { PURGE_TURNS } else { 0 },
            filter: shared.filter.get(),
            hasher: shared.hasher.get(),
            reports,
            announces: start.features & bit(features::GUEST_ANNOUNCE) != 0,
        };
        for (kick, token) in running.kicks() {
            self.watch(ControlOperation::Add, kick, token, EventSet::IN);
        }
        self.watch(ControlOperation::Add, tap.as_raw_fd(), TAP, EventSet::IN | EventSet::OUT);
        self.running = Some(running);
    }

    fn stop(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) {
        let mut queues = Vec::new();
        if let Some(mut running) = self.running.take() {
            running.flush(counters);
            // The transport holds the same eventfds: closing ours would not end the watch.
            for (kick, token) in running.kicks() {
                self.watch(ControlOperation::Delete, kick, token, EventSet::empty());
            }
            self.watch(ControlOperation::Delete, tap.as_raw_fd(), TAP, EventSet::empty());
            queues.extend(running.rx.map(|rx| rx.stop(counters)));
            queues.extend(running.tx.map(|tx| tx.lane.stop()));
            queues.extend(running.control.map(Control::stop));
        }
        // If nobody listens any more, the device is gone, and the next message says so.
        let _ = self.stopped.send(queues);
        if self.shared.draining.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.shared.notify(DeviceEvent::Drained);
        }
    }

    /// The first worker shows the link to the host: it may wait for the kernel's network lock, which others must not.
    fn follow_link(&mut self) {
        let up = self.shared.link_up.load(Ordering::SeqCst);
        if self.index == 0 && self.carrier != up {
            self.shared.tap.set_carrier(up);
            self.carrier = up;
        }
    }

    /// Confirms that this worker works by the present number of pairs and the present hashes, which the first one waits for.
    fn follow_pairs(&mut self) {
        let Some(running) = &mut self.running else { return };
        let shared = &self.shared;
        let generation = shared.pairs_generation.load(Ordering::SeqCst);
        if self.index == 0 {
            if shared.pairs_waiting.load(Ordering::SeqCst) == 0
                && let Some(control) = &mut running.control
                && let Err(error) = control.finish(&running.map)
            {
                fail(shared, &running.signals, &error);
            }
            return;
        }
        if std::mem::replace(&mut running.pairs_generation, generation) == generation {
            return;
        }
        // A turn ends with everything published, so nothing of this pair is under way here.
        running.mark_all();
        if shared.pairs_waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
            shared.wake(0);
        }
    }

    /// Does some of whatever there is to do; says whether there is more to do at once.
    fn turn(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) -> bool {
        let Some(running) = &mut self.running else { return false };
        let shared = &*self.shared;
        running.follow_memory(counters);
        let purges = shared.purges.load(Ordering::SeqCst);
        if std::mem::replace(&mut self.purges, purges) != purges {
            running.purge_turns = PURGE_TURNS;
        }
        let mut more = running.serve_control(shared);
        // After a command was obeyed that may have changed them.
        shared.filter.follow(&mut running.filter);
        shared.hasher.follow(&mut running.hasher);
        if self.index < usize::from(shared.pairs.load(Ordering::SeqCst)) {
            let was_blocked = running.tx_blocked();
            more |= running.serve_frames(shared, counters, tap);
            if running.tx_blocked() && !was_blocked {
                // Looks at the tap anew: it may have become writable before it was asked to tell. Once only: frames that
                // wait in the tap are an event each time.
                self.watch(ControlOperation::Modify, tap.as_raw_fd(), TAP, EventSet::IN | EventSet::OUT);
            }
        } else {
            running.flush(counters);
        }
        more
    }
}

impl Running {
    fn kicks(&self) -> impl Iterator<Item = (RawFd, u64)> {
        let rx = self.rx.as_ref().map(|rx| (rx.lane.kick.as_raw_fd(), RX_KICK));
        let tx = self.tx.as_ref().map(|tx| (tx.lane.kick.as_raw_fd(), TX_KICK));
        let control = self.control.as_ref().map(|control| (control.lane.kick.as_raw_fd(), CONTROL_KICK));
        [rx, tx, control].into_iter().flatten()
    }

    fn mark(&mut self, token: u64, events: EventSet, counters: &PairCounters) {
        let readable = events.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
        match (token, &mut self.rx, &mut self.tx, &mut self.control) {
            (TAP, rx, tx, _) => {
                if let Some(rx) = rx {
                    rx.readable |= readable;
                }
                if let Some(tx) = tx
                    && events.intersects(EventSet::OUT | EventSet::ERROR | EventSet::HANG_UP)
                {
                    tx.blocked = false;
                }
            }
            (RX_KICK, Some(_), ..) => counters.rx_kicks.increment(),
            (TX_KICK, _, Some(tx), _) => {
                counters.tx_kicks.increment();
                tx.pending = true;
            }
            (CONTROL_KICK, .., Some(control)) => control.pending = true,
            _ => {}
        }
    }

    /// When the first interrupt that is held back is due.
    fn due(&self) -> Option<Instant> {
        let (rx, tx) = (self.rx.as_ref(), self.tx.as_ref());
        let due = [rx.and_then(|rx| rx.lane.due), tx.and_then(|tx| tx.lane.due)];
        due.into_iter().flatten().min()
    }

    /// Tells the driver at once what it was not told yet.
    fn flush(&mut self, counters: &PairCounters) {
        let rx = self.rx.as_mut().map(|rx| (&mut rx.lane, &counters.rx_interrupts));
        let tx = self.tx.as_mut().map(|tx| (&mut tx.lane, &counters.tx_interrupts));
        for (lane, interrupts) in [rx, tx].into_iter().flatten() {
            // A ring that is not there any more has been told of, or will be when it is worked on.
            let _ = lane.flush(&self.map, interrupts);
        }
    }

    fn tx_blocked(&self) -> bool {
        self.tx.as_ref().is_some_and(|tx| tx.blocked)
    }

    fn mark_all(&mut self) {
        if let Some(rx) = &mut self.rx {
            rx.readable = true;
        }
        if let Some(tx) = &mut self.tx {
            tx.pending = true;
        }
    }

    /// Goes over to the present memory map. Buffers that were found in the former one are given back and found anew.
    fn follow_memory(&mut self, counters: &PairCounters) {
        let now = self.memory.memory();
        if std::ptr::eq(&raw const *now, Arc::as_ptr(&self.map)) {
            return;
        }
        if let Some(rx) = &mut self.rx {
            rx.release(counters);
        }
        self.map = now.into_inner();
    }

    fn serve_control(&mut self, shared: &Shared) -> bool {
        let Some(control) = &mut self.control else { return false };
        control.service(&self.map, |command| obey(shared, command)).unwrap_or_else(|error| {
            fail(shared, &self.signals, &error);
            false
        })
    }

    fn serve_frames(&mut self, shared: &Shared, counters: &PairCounters, tap: BorrowedFd<'_>) -> bool {
        let offloads = shared.offloads.load(Ordering::Relaxed);
        let segmented = bit(GUEST_TSO4) | bit(GUEST_TSO6) | bit(GUEST_USO4) | bit(GUEST_USO6);
        let header = shared.tap.header();
        let context = Context {
            shared,
            counters,
            memory: &self.map,
            tap,
            now: Instant::now(),
            link_up: shared.link_up.load(Ordering::SeqCst),
            filter: &self.filter.1,
            offloads,
            header,
            largest_frame: header + if offloads & segmented == 0 { shared.plain_frame } else { MAX_FRAME },
            hasher: self.hasher.1.as_ref().as_ref().filter(|_| self.reports),
        };
        // First of all, so that what is thrown away cannot be an answer to what the driver sends now.
        if self.purge_turns > 0
            && let Some(rx) = &mut self.rx
        {
            let left = rx.discard(&context, &counters.rx_drops.stale);
            self.purge_turns = if left { self.purge_turns - 1 } else { 0 };
            if self.purge_turns > 0 {
                return true;
            }
        }
        let sent = self.tx.as_mut().map_or(Ok(false), |tx| tx.service(&context));
        let received = self.rx.as_mut().map_or(Ok(false), |rx| rx.service(&context));
        settle(shared, &self.signals, sent) | settle(shared, &self.signals, received)
    }
}

fn settle(shared: &Shared, signals: &Arc<dyn TransportSignals>, result: Result<bool, RingError>) -> bool {
    result.unwrap_or_else(|error| {
        fail(shared, signals, &error);
        false
    })
}

/// The driver broke a ring. That ring is left alone until the device is reset.
fn fail(shared: &Shared, signals: &Arc<dyn TransportSignals>, error: &RingError) {
    let reason = error.to_string();
    signals.needs_reset(&reason);
    shared.notify(DeviceEvent::NeedsReset { reason });
}
