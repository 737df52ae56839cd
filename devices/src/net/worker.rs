//! The thread of a queue pair. It waits in epoll, and nowhere else, for messages from the device, for kicks and for the tap.
//!
//! Kicks and the tap are watched edge-triggered: an event only marks that there may be something, and work ends when the ring
//! or the tap is seen empty. So no event source has to be switched off while it cannot be served, which is what makes
//! reception freeze or spin elsewhere: a tap whose frames find no buffers keeps its mark and is read when the driver kicks.

mod kernel;
mod tap;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::announce::Rounds;
use super::batch::Batch;
use super::control::Control;
use super::counters::{PairCounters, Passed};
use super::features::{GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, bit};
use super::filter::Filter;
use super::lane::Lane;
use super::obey::obey;
use super::path::Path;
use super::shared::Shared;
use super::steering::hash::Hasher;
use super::tap::{HASH_HEADER_SIZE, HEADER_SIZE};
use super::vhost::Vhost;
use super::watches::{Token, Watches};
use super::{MAX_FRAME, features};
use crate::metrics::Counter;
use crate::pace::moderation::Tuning;
use crate::pace::{Pace, Taken};
use crate::scheduling::Stance;
use crate::virtio::ring::RingError;
use crate::virtio::{StoppedQueue, TransportSignals};
use crate::{DeviceEvent, GuestMemory};

/// How frames are gathered. TCP follows the way that frames take by much more than chance, hence the gain. A worker that waits
/// until the vCPU where it is woken has finished makes fewer interrupts of as many frames, also where no more can come. One whom
/// receivers on the host preempt for each frame takes turns with them, at the cost of both. Frames that TCP hands over in pieces
/// of many kilobytes wait for nothing: Linux lets a stream have few of them on their way.
pub(super) const TUNING: Tuning = Tuning {
    longest: Duration::from_millis(4),
    episode: 512,
    gain: 1.3,
    first: 1,
    large: 16384.0,
    patient: Stance::Steady,
};

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
    /// Whether the pair is in use. For one that is not, `tap` is the first queue of it.
    pub(super) in_use: bool,
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
    path: Path,
    pace: Pace,
    /// The worker has slept before this turn.
    slept: bool,
    control: Option<Control>,
    signals: Arc<dyn TransportSignals>,
    pairs_generation: u64,
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
    watches: Watches,
    /// The kernel's data path, where the card is to use it.
    vhost: Option<Vhost>,
    /// Frames on their way to the tap.
    batch: Batch,
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
    /// The tap had something to tell, and it was no frame. Linux tells that a tap is deleted while it still is one, and never
    /// again.
    suspect: bool,
    /// An announcement that is under way. The first worker makes it.
    rounds: Option<Rounds>,
    /// Wakes for interrupts that were held back: epoll's own timeout counts milliseconds, and they want microseconds.
    timer: TimerFd,
    /// What it is set to.
    alarm: Option<Instant>,
}

impl Worker {
    /// A parked worker for queue pair `index`, with a data path of the kernel's if it has one.
    pub(super) fn new(
        index: usize,
        shared: Arc<Shared>,
        vhost: Option<Vhost>,
        messages: Receiver<Message>,
        stopped: Sender<Vec<StoppedQueue>>,
    ) -> std::io::Result<Self> {
        let watches = Watches::new(Arc::clone(&shared), index)?;
        if let Some(vhost) = &vhost {
            vhost.calls.iter().for_each(|call| watches.add(call.as_raw_fd(), Token::Call, EventSet::IN));
            watches.add(vhost.error.as_raw_fd(), Token::VhostError, EventSet::IN);
        }
        let timer = TimerFd::new()?;
        watches.add(timer.as_raw_fd(), Token::Timer, EventSet::IN);
        Ok(Self {
            index,
            shared,
            messages,
            stopped,
            watches,
            vhost,
            batch: Batch::new(),
            running: None,
            carrier: true,
            purges: 0,
            announcements: 0,
            tap_generation: 0,
            retry: None,
            suspect: false,
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
        self.batch.prepare();
        self.follow_link();
        loop {
            self.set_timer(counters);
            let ready = match self.watches.wait(self.timeout(more), &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(nic = shared.id, queue = self.index, %error, "epoll failed: the queue stops for good");
                    return;
                }
            };
            if let Some(running) = &mut self.running {
                running.slept = !more;
            }
            for event in events.iter().take(ready) {
                if !self.handle(event, counters, tap) {
                    return;
                }
            }
            self.look_after_tap();
            self.follow_tap(counters, tap);
            self.announce(tap);
            let received = counters.rx_packets.value();
            more = self.turn(counters, tap);
            self.suspect &= counters.rx_packets.value() == received;
        }
    }

    /// Notes an event; `false` when the thread is to end.
    fn handle(&mut self, event: &EpollEvent, counters: &PairCounters, tap: BorrowedFd<'_>) -> bool {
        match (Token::of(event), &mut self.running) {
            (Some(Token::Wake), _) => return self.handle_messages(counters, tap),
            (Some(Token::VhostError), _) => self.vhost_error(counters),
            (Some(Token::Timer), _) => self.alarm = None,
            (Some(token), Some(running)) => {
                self.suspect |= token == Token::Tap;
                running.mark(token, event.event_set(), counters);
            }
            _ => {}
        }
        true
    }

    /// How long to wait for events, in milliseconds; -1: for ever.
    fn timeout(&self, more: bool) -> i32 {
        let throttled = self.running.iter().flat_map(|running| running.path.throttled());
        let due = self.rounds.map(|rounds| rounds.next()).into_iter().chain(self.retry).chain(throttled).min();
        let due = due.map(|due| due.saturating_duration_since(Instant::now()));
        match (more, due) {
            (true, _) => 0,
            // Rounded up: it is due when the wait is over.
            (false, Some(left)) => i32::try_from(left.as_millis()).unwrap_or(i32::MAX - 1) + i32::from(!left.is_zero()),
            (false, None) => -1,
        }
    }

    /// Sets the timer to the first interrupt that is held back, or the next look at the kernel's rings.
    fn set_timer(&mut self, counters: &PairCounters) {
        let Some(running) = &mut self.running else { return };
        let look = self.vhost.as_ref().and_then(Vhost::due);
        let due = running.path.due().into_iter().chain(look).min();
        let Some(due) = due.filter(|due| self.alarm != Some(*due)) else { return };
        // Zero would switch it off.
        let wait = due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        match self.timer.reset(wait, None) {
            Ok(()) => self.alarm = Some(due),
            // Better too early than never.
            Err(_) => match &self.vhost {
                Some(vhost) if vhost.runs() => running.path.end_calls(vhost, counters),
                _ => running.path.flush(&running.map, counters),
            },
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
        // The kernel must have left a pair that is no longer in use before that is confirmed.
        self.follow_tap(counters, tap);
        self.follow_path(counters, tap);
        self.follow_pairs();
        true
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
            shared.filter_tap();
        }
        let offloads = shared.offloads.load(Ordering::SeqCst);
        let max_pairs = shared.max_pairs();
        let running = Running {
            map: start.memory.memory().into_inner(),
            memory: start.memory,
            pace: Pace::begin(TUNING),
            slept: true,
            path: Path::new(start.rx, start.tx, start.features, offloads, start.fresh),
            control: start.control.map(|lane| Control::new(lane, start.features, max_pairs, start.enabled)),
            signals: start.signals,
            pairs_generation: start.pairs_generation,
            filter: shared.filter.get(),
            hasher: shared.hasher.get(),
            reports,
            announces: start.features & bit(features::GUEST_ANNOUNCE) != 0,
        };
        if let Some(control) = &running.control {
            self.watches.add(control.lane.kick.as_raw_fd(), Token::ControlKick, EventSet::IN);
        }
        running.path.watch(&self.watches, tap);
        self.batch.follow(tap);
        self.running = Some(running);
    }

    fn stop(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) {
        self.take_back(counters, tap);
        let mut queues = Vec::new();
        if let Some(mut running) = self.running.take() {
            running.path.flush(&running.map, counters);
            queues.extend(running.path.stop(&self.watches, tap, counters));
            if let Some(control) = running.control {
                // The transport holds the same eventfd: closing ours would not end the watch.
                self.watches.remove(control.lane.kick.as_raw_fd());
                queues.push(control.stop());
            }
        }
        // If nobody listens any more, the device is gone, and the next message says so.
        let _ = self.stopped.send(queues);
        if self.shared.draining.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.shared.notify(DeviceEvent::Drained);
        }
    }

    /// Confirms that this worker works by the present number of pairs and the present hashes, which the first one waits for.
    fn follow_pairs(&mut self) {
        let Some(running) = &mut self.running else { return };
        let shared = &self.shared;
        let generation = shared.pairs_generation.load(Ordering::SeqCst);
        if self.index == 0 {
            if shared.pairs_waiting.load(Ordering::SeqCst) > 0 {
                return;
            }
            // Nobody is at work any more on a queue that goes out of service now.
            if let Err(error) = shared.tap.use_queues(shared.pairs.load(Ordering::SeqCst).into()) {
                shared.tap_failed("take a queue out of service", &error);
            }
            if let Some(control) = &mut running.control
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
        running.path.mark_all();
        if shared.pairs_waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
            shared.wake(0);
        }
    }

    /// Does some of whatever there is to do; says whether there is more to do at once.
    fn turn(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) -> bool {
        self.follow_path(counters, tap);
        if self.is_in_kernel() {
            return self.stand_by(counters);
        }
        let Some(running) = &mut self.running else { return false };
        let shared = &*self.shared;
        running.follow_memory(counters);
        let mut more = running.serve_control(shared);
        // After a command was obeyed that may have changed them.
        shared.filter.follow(&mut running.filter);
        shared.hasher.follow(&mut running.hasher);
        if self.index >= usize::from(shared.pairs.load(Ordering::SeqCst)) {
            // What the driver had sent by it already: Linux does so until its command is answered, and never sends again what
            // a card holds back.
            if let Some(first) = shared.tap.queue(0) {
                more |= running.serve_frames(shared, counters, first, false, &mut self.batch);
            }
            running.path.flush(&running.map, counters);
            return more;
        }
        let was_blocked = running.path.is_blocked();
        more |= running.serve_frames(shared, counters, tap, true, &mut self.batch);
        if running.path.is_blocked() && !was_blocked {
            // Looks at the tap anew: it may have become writable before it was asked to tell. Once only: frames that
            // wait in the tap are an event each time.
            self.watches.renew(tap.as_raw_fd(), Token::Tap, EventSet::IN | EventSet::OUT);
        }
        self.hand_over(counters, tap);
        more
    }
}

impl Running {
    fn mark(&mut self, token: Token, events: EventSet, counters: &PairCounters) {
        match (token, &mut self.control) {
            (Token::ControlKick, Some(control)) => control.pending = true,
            _ => self.path.mark(token, events, counters),
        }
    }

    fn is_map_current(&self) -> bool {
        std::ptr::eq(&raw const *self.memory.memory(), Arc::as_ptr(&self.map))
    }

    /// Goes over to the present memory map. Buffers that were found in the former one are given back and found anew.
    fn follow_memory(&mut self, counters: &PairCounters) {
        if !self.is_map_current() {
            self.path.release(counters);
            self.map = self.memory.memory().into_inner();
        }
    }

    fn serve_control(&mut self, shared: &Shared) -> bool {
        let Some(control) = &mut self.control else { return false };
        control.service(&self.map, |command| obey(shared, command)).unwrap_or_else(|error| {
            fail(shared, &self.signals, &error);
            false
        })
    }

    fn serve_frames(
        &mut self,
        shared: &Shared,
        counters: &PairCounters,
        tap: BorrowedFd<'_>,
        in_use: bool,
        batch: &mut Batch,
    ) -> bool {
        let offloads = shared.offloads.load(Ordering::Relaxed);
        let segmented = bit(GUEST_TSO4) | bit(GUEST_TSO6) | bit(GUEST_USO4) | bit(GUEST_USO6);
        let header = shared.tap.header();
        let context = Context {
            shared,
            counters,
            memory: &self.map,
            tap,
            in_use,
            now: Instant::now(),
            link_up: shared.link_up.load(Ordering::SeqCst),
            filter: &self.filter.1,
            offloads,
            header,
            largest_frame: header + if offloads & segmented == 0 { shared.plain_frame } else { MAX_FRAME },
            hasher: self.hasher.1.as_ref().as_ref().filter(|_| self.reports),
        };
        let before = counters.passed();
        let [sent, received] = self.path.serve(&context, &mut self.pace.moderation, batch);
        let more = settle(shared, &self.signals, sent) | settle(shared, &self.signals, received);
        learn(&mut self.pace, self.slept, &context, counters.passed().since(before));
        if more {
            return true;
        }
        let rest = self.path.rest(&context, &mut self.pace);
        settle(shared, &self.signals, rest)
    }
}

/// Learns from what a turn has moved.
fn learn(pace: &mut Pace, slept: bool, context: &Context<'_>, passed: Passed) {
    if slept && passed.sent > 0 {
        pace.woke(context.now, true);
    }
    let count = passed.sent.saturating_add(passed.received);
    if pace.moderation.is_on() {
        context.counters.moderated.add(count);
    }
    let (work, given) = (passed.sent_bytes.saturating_add(passed.received_bytes), passed.sent_bytes);
    pace.took(context.now, Taken { count: u32::try_from(count).unwrap_or(u32::MAX), work, given });
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
