//! The life of devices that have little to do: one worker thread `<id>.q0` serves all queues, chain by chain.
//!
//! A device brings a [`Service`], which lives on the thread; what is left is that of every [`super::VirtioDevice`]: parked until
//! the driver is ready, at work between `start` and `stop`, and never more than some chains away from hearing of a stop.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Instant;
use std::{fmt, io};

use thiserror::Error;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::ring::{Chain, Ring, RingError};
use super::{Activation, ActiveQueue, StartError, StillBusy, StoppedQueue, TransportSignals};
use crate::interrupt::QueueInterrupt;
use crate::metrics::Counter;
use crate::{DeviceEvent, DeviceNotifier, GuestMemory, ThreadKind, ThreadSpawner};

/// Chains of a queue per turn; then the other queues and messages are looked at.
const TURN_CHAINS: u32 = 16;
/// VIRTIO_F_RING_INDIRECT_DESC, which the transport offers.
const RING_INDIRECT_DESC: u32 = 28;
/// The event of the worker's own eventfd; others are the positions of queues.
const WAKE: u64 = u64::MAX;

/// The host refused something that a device is made of.
#[derive(Debug, Error)]
#[error(
    "device {id}: the host refused to {action}: {error}; raise the limits of descriptors and threads of this process"
)]
pub struct WorkerError {
    id: String,
    action: &'static str,
    error: io::Error,
}

/// What became of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is done, with so many bytes written.
    Done(u32),
    /// It is kept, and its queue stands still, until [`Attendant::give_back`].
    Kept,
}

/// What a device does with its chains, on its thread.
pub(super) trait Service: Send + 'static {
    /// The driver is ready, with these features, or goes on after a pause.
    fn begin(&mut self, features: u64);

    /// Serves the chain at `head` of the queue with this position.
    ///
    /// # Errors
    /// [`RingError`] if the chain breaks the rules: the driver has to reset the device.
    fn serve(&mut self, queue: u16, memory: &GuestMemoryMmap, head: u16, chain: &Chain) -> Result<Outcome, RingError>;
}

/// What thread and device share.
struct Shared {
    id: String,
    wake: EventFd,
    notifier: Arc<dyn DeviceNotifier>,
    stop_wanted: AtomicBool,
    give_back: AtomicBool,
    activity: Arc<Activity>,
}

/// What a worker counts.
#[derive(Debug, Default)]
pub(super) struct Activity {
    pub(super) kicks: Counter,
    pub(super) interrupts: Counter,
}

enum Message {
    Start(Box<Running>),
    Stop,
    Exit,
}

enum Lifecycle {
    Stopped,
    Running,
    Stopping(Instant),
}

/// The device's side of its worker.
pub(super) struct Attendant {
    shared: Arc<Shared>,
    messages: Sender<Message>,
    stopped: Receiver<Vec<StoppedQueue>>,
    thread: Option<JoinHandle<()>>,
    lifecycle: Lifecycle,
}

impl fmt::Debug for Attendant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attendant").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl Attendant {
    /// Starts the thread, parked.
    pub(super) fn new(
        id: &str,
        kind: ThreadKind,
        service: Box<dyn Service>,
        activity: Arc<Activity>,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> Result<Self, WorkerError> {
        let host = |action| move |error| WorkerError { id: id.to_owned(), action, error };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("make an eventfd"))?;
        let (stop_wanted, give_back) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { id: id.to_owned(), wake, notifier, stop_wanted, give_back, activity });
        let epoll = Epoll::new().map_err(host("make an epoll"))?;
        let event = EpollEvent::new(EventSet::IN, WAKE);
        epoll.ctl(ControlOperation::Add, shared.wake.as_raw_fd(), event).map_err(host("watch an eventfd"))?;
        let (messages, inbox) = mpsc::channel();
        let (outbox, stopped) = mpsc::channel();
        let worker = Worker { shared: Arc::clone(&shared), inbox, outbox, epoll, service, running: None };
        let thread = spawner.spawn(kind, &format!("{id}.q0"), Box::new(move || worker.run()));
        let thread = Some(thread.map_err(host("start a thread"))?);
        Ok(Self { shared, messages, stopped, thread, lifecycle: Lifecycle::Stopped })
    }

    fn send(&self, message: Message) -> Result<(), StartError> {
        self.messages.send(message).map_err(|_| StartError::WorkerGone)?;
        self.shared.wake_up();
        Ok(())
    }

    /// See [`super::VirtioDevice::start`].
    pub(super) fn start(&mut self, activation: Activation) -> Result<(), StartError> {
        if !matches!(self.lifecycle, Lifecycle::Stopped) {
            return Err(StartError::Running);
        }
        let indirect = activation.has(RING_INDIRECT_DESC);
        let Activation { features, memory, queues, signals } = activation;
        let queues = queues.into_iter().map(|ActiveQueue { index, queue, positions, kick, interrupt }| {
            let ring = Ring::new(queue, positions, indirect, &memory.memory())
                .map_err(|error| StartError::Queue { index, reason: error.to_string() })?;
            Ok(QueueAtWork {
                index,
                ring,
                kick,
                interrupt,
                kept: None,
                gives_back: false,
                pending: true,
                broken: false,
            })
        });
        let queues = queues.collect::<Result<Vec<_>, StartError>>()?;
        // A driver that enabled no queue wants nothing.
        let longest = queues.iter().map(|queue| queue.ring.chain_limit()).max();
        let Some(longest) = longest else { return Ok(()) };
        let chain = Chain::with_capacity(longest.into());
        let running = Running { queues, features, memory, signals, chain };
        self.shared.stop_wanted.store(false, Ordering::SeqCst);
        self.send(Message::Start(Box::new(running)))?;
        self.lifecycle = Lifecycle::Running;
        Ok(())
    }

    /// See [`super::VirtioDevice::stop`].
    pub(super) fn stop(&mut self) -> Result<Vec<StoppedQueue>, StillBusy> {
        let since = match self.lifecycle {
            Lifecycle::Stopped => return Ok(Vec::new()),
            Lifecycle::Stopping(since) => since,
            Lifecycle::Running => {
                self.shared.stop_wanted.store(true, Ordering::SeqCst);
                // A thread that is gone shows below.
                let _ = self.send(Message::Stop);
                let now = Instant::now();
                self.lifecycle = Lifecycle::Stopping(now);
                now
            }
        };
        let queues = match self.stopped.try_recv() {
            Ok(queues) => queues,
            Err(TryRecvError::Disconnected) => Vec::new(),
            Err(TryRecvError::Empty) => return Err(StillBusy { requests: 1, oldest: since.elapsed() }),
        };
        self.lifecycle = Lifecycle::Stopped;
        Ok(queues)
    }

    /// Gives chains that were kept back to the driver, by whoever has it.
    pub(super) fn give_back(&self) -> GiveBack {
        GiveBack(Arc::clone(&self.shared))
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        self.shared.stop_wanted.store(true, Ordering::SeqCst);
        let _ = self.send(Message::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            let id = &self.shared.id;
            tracing::error!(id, "the worker thread had panicked: report this with the log before it");
        }
    }
}

/// Gives chains that were kept back to the driver.
pub(super) struct GiveBack(Arc<Shared>);

impl GiveBack {
    /// Does so, soon.
    pub(super) fn now(&self) {
        self.0.give_back.store(true, Ordering::SeqCst);
        self.0.wake_up();
    }
}

impl Shared {
    fn wake_up(&self) {
        // It fails only when the counter is full, and then the worker is awake.
        let _ = self.wake.write(1);
    }
}

struct Worker {
    shared: Arc<Shared>,
    inbox: Receiver<Message>,
    outbox: Sender<Vec<StoppedQueue>>,
    epoll: Epoll,
    service: Box<dyn Service>,
    running: Option<Box<Running>>,
}

impl Worker {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 8];
        let mut more = false;
        loop {
            let ready = match self.epoll.wait(if more { 0 } else { -1 }, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(id = self.shared.id, %error, "epoll failed: the device stops for good");
                    return;
                }
            };
            for event in events.iter().take(ready) {
                if event.data() == WAKE {
                    if !self.handle_messages() {
                        return;
                    }
                } else if let Some(running) = &mut self.running {
                    running.kicked(event.data());
                    self.shared.activity.kicks.increment();
                }
            }
            more = match &mut self.running {
                Some(running) => running.turn(&self.shared, &mut *self.service),
                None => false,
            };
        }
    }

    fn watch(&self, running: &Running, begin: bool) {
        for queue in &running.queues {
            let operation = if begin { ControlOperation::Add } else { ControlOperation::Delete };
            // Edge-triggered: the queue is looked at until it is empty, so the count of kicks need not be read.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, queue.index.into());
            if let Err(error) = self.epoll.ctl(operation, queue.kick.as_raw_fd(), event) {
                tracing::error!(id = self.shared.id, %error, "the kicks of a queue cannot be watched");
            }
        }
    }

    /// Takes the device's messages; `false` when the thread is to end.
    fn handle_messages(&mut self) -> bool {
        let _ = self.shared.wake.read();
        if self.shared.give_back.swap(false, Ordering::SeqCst)
            && let Some(running) = &mut self.running
        {
            running.queues.iter_mut().for_each(|queue| queue.gives_back = true);
        }
        loop {
            match self.inbox.try_recv() {
                Ok(Message::Start(running)) => {
                    self.watch(&running, true);
                    self.service.begin(running.features);
                    self.running = Some(running);
                }
                Ok(Message::Stop) => {
                    let running = self.running.take();
                    if let Some(running) = &running {
                        // The transport holds the same eventfds: closing ours would not end the watch.
                        self.watch(running, false);
                    }
                    let queues = running.map(|running| running.queues).unwrap_or_default();
                    let _ = self.outbox.send(queues.into_iter().map(QueueAtWork::stop).collect());
                    self.shared.notifier.notify(&self.shared.id, DeviceEvent::Drained);
                }
                Ok(Message::Exit) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }
}

/// A device at work.
struct Running {
    queues: Vec<QueueAtWork>,
    features: u64,
    memory: GuestMemory,
    signals: Arc<dyn TransportSignals>,
    chain: Chain,
}

impl Running {
    fn kicked(&mut self, index: u64) {
        for queue in self.queues.iter_mut().filter(|queue| u64::from(queue.index) == index) {
            queue.pending = true;
        }
    }

    /// Serves some chains of each queue; says whether there may be more.
    fn turn(&mut self, shared: &Shared, service: &mut dyn Service) -> bool {
        let memory = self.memory.memory();
        let mut more = false;
        for queue in &mut self.queues {
            more |= queue.turn(shared, service, &memory, &mut self.chain).unwrap_or_else(|error| {
                queue.broken = true;
                let reason = error.to_string();
                self.signals.needs_reset(&reason);
                shared.notifier.notify(&shared.id, DeviceEvent::NeedsReset { reason });
                false
            });
        }
        more
    }
}

/// A queue at work.
struct QueueAtWork {
    index: u16,
    ring: Ring,
    kick: EventFd,
    interrupt: QueueInterrupt,
    /// The head of the chain that is kept.
    kept: Option<u16>,
    /// The chain that is kept is wanted back.
    gives_back: bool,
    pending: bool,
    broken: bool,
}

impl QueueAtWork {
    fn turn(
        &mut self,
        shared: &Shared,
        service: &mut dyn Service,
        memory: &GuestMemoryMmap,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        if std::mem::take(&mut self.gives_back)
            && let Some(head) = self.kept.take()
        {
            self.ring.put_used(memory, head, 0)?;
            self.pending = true;
        }
        if !self.pending || self.broken || self.kept.is_some() {
            return Ok(false);
        }
        let served = self.serve(shared, service, memory, chain);
        // What was done before a broken chain is done.
        let published = self.ring.publish(memory);
        if let Ok(true) = published {
            shared.activity.interrupts.increment();
            self.interrupt.trigger();
        }
        served.and_then(|more| published.map(|_| more))
    }

    fn serve(
        &mut self,
        shared: &Shared,
        service: &mut dyn Service,
        memory: &GuestMemoryMmap,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        self.ring.disable_kicks(memory)?;
        for _ in 0..TURN_CHAINS {
            // A stop need not wait for the rest of the turn.
            if shared.stop_wanted.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let Some(head) = self.ring.next_head(memory)? else {
                if self.ring.enable_kicks(memory)? {
                    self.ring.disable_kicks(memory)?;
                    continue;
                }
                self.pending = false;
                return Ok(false);
            };
            self.ring.walk(memory, head, chain)?;
            match service.serve(self.index, memory, head, chain)? {
                Outcome::Done(written) => self.ring.put_used(memory, head, written)?,
                Outcome::Kept => {
                    self.kept = Some(head);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The queue's positions, to go on from later. A chain that is kept is taken again then.
    fn stop(mut self) -> StoppedQueue {
        self.ring.rewind(u16::from(self.kept.is_some()));
        StoppedQueue { index: self.index, state: self.ring.state() }
    }
}
