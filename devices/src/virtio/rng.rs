//! Random numbers for the guest: virtio-rng (virtio 1.2 §5.4), from the host kernel's generator.
//!
//! One queue, one worker thread `<id>.q0`. A chain is filled with at most [`MAX_BYTES`]; the driver is told how many came
//! (§5.4.6: at least one byte, not necessarily all), so that no chain keeps the worker for long.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, atomic::AtomicBool};
use std::thread::JoinHandle;
use std::time::Instant;
use std::{fmt, io};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::ring::{Chain, Ring, RingError};
use super::{Activation, ActiveQueue, DeviceType, StartError, StillBusy, StoppedQueue, TransportSignals, VirtioDevice};
use crate::interrupt::QueueInterrupt;
use crate::metrics::{Counter, MetricSource, Sample, Value};
use crate::{DeviceEvent, DeviceNotifier, GuestMemory, ThreadSpawner};

/// Most bytes that one chain gets.
pub const MAX_BYTES: usize = 64 << 10;
/// Chains per turn; then messages are looked at.
const TURN_CHAINS: u32 = 16;
const QUEUE_SIZES: [u16; 1] = [256];
/// VIRTIO_F_RING_INDIRECT_DESC, which the transport offers.
const RING_INDIRECT_DESC: u32 = 28;
const WAKE: u64 = 0;
const KICK: u64 = 1;

/// The host refused something that the device is made of.
#[derive(Debug, Error)]
#[error(
    "random number device {id}: the host refused to {action}: {error}; raise the limits of descriptors and threads of this process"
)]
pub struct RngError {
    id: String,
    action: &'static str,
    error: io::Error,
}

struct Shared {
    id: String,
    wake: EventFd,
    notifier: Arc<dyn DeviceNotifier>,
    stop_wanted: AtomicBool,
    requests: Counter,
    bytes: Counter,
    errors: Counter,
    kicks: Counter,
    interrupts: Counter,
}

impl MetricSource for Shared {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        let counters: [(&'static str, &'static str, &Counter); 5] = [
            ("rng_requests", "Requests for random bytes.", &self.requests),
            ("rng_bytes", "Random bytes that the guest got.", &self.bytes),
            ("rng_errors", "Times that the host gave no random bytes.", &self.errors),
            ("rng_kicks", "Kicks of the queue.", &self.kicks),
            ("rng_interrupts", "Interrupts of the queue.", &self.interrupts),
        ];
        for (name, help, counter) in counters {
            let labels = vec![("rng", self.id.clone())];
            visit(Sample { name, help, labels, value: Value::Counter(counter.value()) });
        }
    }
}

enum Message {
    Start(Box<Running>),
    Stop,
    Exit,
}

/// A queue at work.
struct Running {
    index: u16,
    ring: Ring,
    kick: EventFd,
    interrupt: QueueInterrupt,
    memory: GuestMemory,
    signals: Arc<dyn TransportSignals>,
    chain: Chain,
    pending: bool,
    broken: bool,
}

enum Lifecycle {
    Stopped,
    Running,
    Stopping(Instant),
}

/// virtio-rng.
pub struct VirtioRng {
    shared: Arc<Shared>,
    messages: Sender<Message>,
    stopped: Receiver<Option<StoppedQueue>>,
    thread: Option<JoinHandle<()>>,
    lifecycle: Lifecycle,
}

impl fmt::Debug for VirtioRng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioRng").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl VirtioRng {
    /// Makes the device `id` and its thread.
    ///
    /// # Errors
    /// [`RngError`] if the host has no thread or descriptor left.
    pub fn new(id: &str, spawner: &dyn ThreadSpawner, notifier: Arc<dyn DeviceNotifier>) -> Result<Self, RngError> {
        let host = |action| move |error| RngError { id: id.to_owned(), action, error };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("make an eventfd"))?;
        let shared = Arc::new(Shared {
            id: id.to_owned(),
            wake,
            notifier,
            stop_wanted: AtomicBool::new(false),
            requests: Counter::default(),
            bytes: Counter::default(),
            errors: Counter::default(),
            kicks: Counter::default(),
            interrupts: Counter::default(),
        });
        let epoll = Epoll::new().map_err(host("make an epoll"))?;
        let event = EpollEvent::new(EventSet::IN, WAKE);
        epoll.ctl(ControlOperation::Add, shared.wake.as_raw_fd(), event).map_err(host("watch an eventfd"))?;
        let (messages, inbox) = mpsc::channel();
        let (outbox, stopped) = mpsc::channel();
        let buffer = vec![0; MAX_BYTES].into_boxed_slice();
        let worker = Worker { shared: Arc::clone(&shared), inbox, outbox, epoll, running: None, buffer };
        let thread = spawner.spawn(&format!("{id}.q0"), Box::new(move || worker.run()));
        let thread = Some(thread.map_err(host("start a thread"))?);
        Ok(Self { shared, messages, stopped, thread, lifecycle: Lifecycle::Stopped })
    }

    fn send(&self, message: Message) -> Result<(), StartError> {
        self.messages.send(message).map_err(|_| StartError::WorkerGone)?;
        // It fails only when the counter is full, and then the worker is awake.
        let _ = self.shared.wake.write(1);
        Ok(())
    }
}

impl VirtioDevice for VirtioRng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), StartError> {
        if !matches!(self.lifecycle, Lifecycle::Stopped) {
            return Err(StartError::Running);
        }
        let indirect = activation.has(RING_INDIRECT_DESC);
        let Activation { memory, queues, signals, .. } = activation;
        // A driver that enabled no queue wants nothing.
        let Some(ActiveQueue { index, queue, kick, interrupt }) = queues.into_iter().next() else { return Ok(()) };
        let ring = Ring::new(queue, indirect, &memory.memory())
            .map_err(|error| StartError::Queue { index, reason: error.to_string() })?;
        let chain = Chain::with_capacity(ring.chain_limit().into());
        let running = Running { index, ring, kick, interrupt, memory, signals, chain, pending: true, broken: false };
        self.shared.stop_wanted.store(false, Ordering::SeqCst);
        self.send(Message::Start(Box::new(running)))?;
        self.lifecycle = Lifecycle::Running;
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<StoppedQueue>, StillBusy> {
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
        let queue = match self.stopped.try_recv() {
            Ok(queue) => queue,
            Err(TryRecvError::Disconnected) => None,
            Err(TryRecvError::Empty) => return Err(StillBusy { requests: 1, oldest: since.elapsed() }),
        };
        self.lifecycle = Lifecycle::Stopped;
        Ok(queue.into_iter().collect())
    }

    fn reset(&mut self) {}

    fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::<Shared>::clone(&self.shared)
    }
}

impl Drop for VirtioRng {
    fn drop(&mut self) {
        self.shared.stop_wanted.store(true, Ordering::SeqCst);
        let _ = self.send(Message::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(rng = self.shared.id, "the worker thread had panicked: report this with the log before it");
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    inbox: Receiver<Message>,
    outbox: Sender<Option<StoppedQueue>>,
    epoll: Epoll,
    running: Option<Box<Running>>,
    buffer: Box<[u8]>,
}

impl Worker {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 2];
        let mut more = false;
        loop {
            let ready = match self.epoll.wait(if more { 0 } else { -1 }, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(rng = self.shared.id, %error, "epoll failed: the device stops for good");
                    return;
                }
            };
            for event in events.iter().take(ready) {
                if event.data() == WAKE {
                    if !self.handle_messages() {
                        return;
                    }
                } else if let Some(running) = &mut self.running {
                    running.pending = true;
                    self.shared.kicks.increment();
                }
            }
            more = match &mut self.running {
                Some(running) => running.turn(&self.shared, &mut self.buffer),
                None => false,
            };
        }
    }

    fn watch(&self, operation: ControlOperation, kick: &EventFd) {
        // Edge-triggered: the queue is looked at until it is empty, so the count of kicks need not be read.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, KICK);
        if let Err(error) = self.epoll.ctl(operation, kick.as_raw_fd(), event) {
            tracing::error!(rng = self.shared.id, %error, "the queue's kicks cannot be watched");
        }
    }

    /// Takes the device's messages; `false` when the thread is to end.
    fn handle_messages(&mut self) -> bool {
        let _ = self.shared.wake.read();
        loop {
            match self.inbox.try_recv() {
                Ok(Message::Start(running)) => {
                    self.watch(ControlOperation::Add, &running.kick);
                    self.running = Some(running);
                }
                Ok(Message::Stop) => {
                    let running = self.running.take();
                    if let Some(running) = &running {
                        // The transport holds the same eventfd: closing ours would not end the watch.
                        self.watch(ControlOperation::Delete, &running.kick);
                    }
                    let queue =
                        running.map(|running| StoppedQueue { index: running.index, state: running.ring.state() });
                    let _ = self.outbox.send(queue);
                    self.shared.notifier.notify(&self.shared.id, DeviceEvent::Drained);
                }
                Ok(Message::Exit) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }
}

impl Running {
    /// Fills some chains; says whether there may be more.
    fn turn(&mut self, shared: &Shared, buffer: &mut [u8]) -> bool {
        if !self.pending || self.broken {
            return false;
        }
        let memory = self.memory.memory();
        let served = self.serve(shared, &memory, buffer);
        // What was done before a broken chain is done.
        let published = self.ring.publish(&memory);
        if let Ok(true) = published {
            shared.interrupts.increment();
            self.interrupt.trigger();
        }
        served.and_then(|more| published.map(|_| more)).unwrap_or_else(|error| {
            self.broken = true;
            let reason = error.to_string();
            self.signals.needs_reset(&reason);
            shared.notifier.notify(&shared.id, DeviceEvent::NeedsReset { reason });
            false
        })
    }

    fn serve(&mut self, shared: &Shared, memory: &GuestMemoryMmap, buffer: &mut [u8]) -> Result<bool, RingError> {
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
            self.ring.walk(memory, head, &mut self.chain)?;
            let written = self.fill(shared, memory, head, buffer)?;
            self.ring.put_used(memory, head, written)?;
        }
        Ok(true)
    }

    fn fill(&self, shared: &Shared, memory: &GuestMemoryMmap, head: u16, buffer: &mut [u8]) -> Result<u32, RingError> {
        shared.requests.increment();
        let wanted = self.chain.writable().iter().fold(0u64, |sum, piece| sum + u64::from(piece.length));
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..wanted) else { return Ok(0) };
        if let Err(error) = entropy::fill(buffer) {
            if shared.errors.value() == 0 {
                tracing::error!(rng = shared.id, %error, "the host gives no random bytes: the guest's requests fail");
            }
            shared.errors.increment();
            return Ok(0);
        }
        let mut rest: &[u8] = buffer;
        for piece in self.chain.writable() {
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at(length);
            let unmapped = RingError::Unmapped { head, address: piece.address };
            memory.write_slice(part, GuestAddress(piece.address)).map_err(|_| unmapped)?;
            rest = after;
        }
        shared.bytes.add(u64::try_from(wanted).unwrap_or(0));
        Ok(u32::try_from(wanted).unwrap_or(u32::MAX))
    }
}

mod entropy {
    #![allow(unsafe_code)] // getrandom(2) has no safe wrapper among our dependencies.

    use std::io;

    /// Fills `buffer` from the kernel's generator.
    pub(super) fn fill(mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            // SAFETY: the pointer and the length are those of a slice that is borrowed mutably.
            let done = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            match usize::try_from(done) {
                Ok(done) => buffer = buffer.get_mut(done..).unwrap_or_default(),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}
