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
use crate::{DeviceEvent, DeviceNotifier, GuestMemory, ThreadKind, ThreadSpawner};

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
        let thread = spawner.spawn(ThreadKind::Rng, &format!("{id}.q0"), Box::new(move || worker.run()));
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::PlainThreads;
    use crate::virtio::double::{Buffer, EVENT_IDX, INDIRECT_DESC, RecordedNotifier, TestDriver, UNMAPPED, Used};

    const SOON: Duration = Duration::from_secs(20);

    fn running(features: u64) -> (VirtioRng, TestDriver, Arc<RecordedNotifier>) {
        let notifier = Arc::new(RecordedNotifier::default());
        let mut device = VirtioRng::new("rng", &PlainThreads, notifier.clone()).unwrap();
        let mut driver = TestDriver::new(device.queue_sizes());
        device.start(driver.activation(features)).unwrap();
        (device, driver, notifier)
    }

    fn stop(device: &mut VirtioRng, notifier: &RecordedNotifier) -> Vec<StoppedQueue> {
        device.stop().unwrap_or_else(|_| {
            // `Drained` of an earlier stop may be seen again: ask until it is true.
            notifier.wait(SOON, |event| *event == DeviceEvent::Drained).expect("the device says when it has drained");
            let end = Instant::now() + SOON;
            loop {
                match device.stop() {
                    Ok(queues) => return queues,
                    Err(busy) => assert!(Instant::now() < end, "{busy}"),
                }
                std::thread::yield_now();
            }
        })
    }

    #[test]
    fn every_byte_of_a_request_is_filled_with_what_differs_each_time() {
        let (_device, mut driver, _) = running(EVENT_IDX | INDIRECT_DESC);
        let address = driver.allocate(4096, 1);
        let mut seen = Vec::new();
        for indirect in [false, true] {
            let buffers = [Buffer::writable(address, 100), Buffer::writable(address + 200, 33)];
            let ring = driver.ring(0);
            let head = if indirect { ring.add_indirect(&buffers) } else { ring.add(&buffers) };
            ring.kick();
            assert_eq!(ring.wait_used(SOON), Some(Used { head, length: 133 }));
            assert!(ring.wait_interrupt(SOON));
            ring.want_interrupts(true);
            seen.push(driver.read(address, 100));
            seen.push(driver.read(address + 200, 33));
            assert_eq!(driver.read(address + 100, 100), [0; 100], "what was not asked for is left alone");
        }
        for (i, bytes) in seen.iter().enumerate() {
            assert!(bytes.iter().filter(|byte| **byte == 0).count() < bytes.len() / 4);
            assert!(seen[i + 1..].iter().all(|other| other[..33] != bytes[..33]));
        }
    }

    #[test]
    fn a_request_gets_no_more_than_its_limit_and_is_told_so() {
        let (device, mut driver, _) = running(0);
        let address = driver.allocate(1 << 20, 4096);
        let head = driver.ring(0).add(&[Buffer::writable(address, 60_000), Buffer::writable(address + 60_000, 60_000)]);
        driver.ring(0).kick();
        assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head, length: 65_536 }));
        assert_ne!(driver.read(address + 65_500, 36), [0; 36]);
        assert_eq!(driver.read(address + 65_536, 100), [0; 100]);
        let mut bytes = 0;
        device.metrics().collect(&mut |sample| {
            if let ("rng_bytes", Value::Counter(value)) = (sample.name, sample.value) {
                bytes = value;
            }
        });
        assert_eq!(bytes, 65_536);
    }

    #[test]
    fn a_request_without_room_comes_back_empty() {
        let (_device, mut driver, _) = running(0);
        let address = driver.allocate(64, 1);
        for buffer in [Buffer::readable(address, 64), Buffer::writable(address, 0)] {
            let head = driver.ring(0).add(&[buffer]);
            driver.ring(0).kick();
            assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head, length: 0 }));
        }
    }

    #[test]
    fn a_stop_gives_positions_from_which_a_start_goes_on() {
        let (mut device, mut driver, notifier) = running(0);
        let address = driver.allocate(64, 1);
        for _ in 0..300 {
            let head = driver.ring(0).add(&[Buffer::writable(address, 8)]);
            driver.ring(0).kick();
            let stopped = stop(&mut device, &notifier);
            assert_eq!(stopped.len(), 1);
            assert_eq!(stopped[0].state.next_avail, stopped[0].state.next_used);
            device.start(driver.resume(0, &stopped)).unwrap();
            assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head, length: 8 }));
        }
        assert!(matches!(device.start(driver.activation(0)), Err(StartError::Running)));
    }

    #[test]
    fn broken_chains_end_in_a_reset_after_which_the_device_works() {
        let (mut device, mut driver, notifier) = running(0);
        let address = driver.allocate(64, 1);
        let good = driver.ring(0).add(&[Buffer::writable(address, 8)]);
        driver.ring(0).add(&[Buffer::writable(UNMAPPED, 8)]);
        driver.ring(0).kick();
        driver.signals().wait_needs_reset(SOON).expect("the device asks for a reset");
        assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head: good, length: 8 }));
        driver.ring(0).kick_always();
        stop(&mut device, &notifier);
        device.reset();
        device.start(driver.activation(0)).unwrap();
        let table = driver.ring(0).addresses().0;
        driver.ring(0).write_descriptor(table, 0, address, 8, 3, 0);
        driver.ring(0).push_available(0);
        driver.ring(0).publish();
        driver.ring(0).kick();
        // A chain that is its own next ends, too.
        let end = Instant::now() + SOON;
        while driver.signals().reset_reasons().len() < 2 {
            assert!(Instant::now() < end, "the device asks for a reset");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_hundred_thousand_chains_of_garbage_neither_stop_nor_break_the_device() {
        let (mut device, mut driver, notifier) = running(INDIRECT_DESC);
        let base = driver.allocate(1 << 20, 4096);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move |limit: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % limit
        };
        let mut resets = 0;
        for _ in 0..100_000 / 64 {
            let ring = driver.ring(0);
            let table = ring.addresses().0;
            for index in 0..ring.size() {
                let address = if random(300) == 0 { random(u64::MAX) } else { base + random(1 << 19) };
                let flags = if random(20) == 0 { random(8) } else { 2 + u64::from(random(3) == 0) };
                let size = u64::from(ring.size());
                ring.write_descriptor(table, index, address, random(200) as u32, flags as u16, random(size) as u16);
            }
            for _ in 0..64 {
                ring.push_available(random(256) as u16);
            }
            ring.publish();
            ring.kick_always();
            // All of it is done, or something was found to be broken.
            let end = Instant::now() + SOON;
            while driver.ring(0).used_index() != 64 && driver.signals().reset_reasons().len() == resets {
                assert!(Instant::now() < end, "the device is stuck");
                std::thread::yield_now();
            }
            resets = driver.signals().reset_reasons().len();
            stop(&mut device, &notifier);
            device.reset();
            device.start(driver.activation(INDIRECT_DESC)).unwrap();
        }
        assert!(resets > 100);
        let head = driver.ring(0).add(&[Buffer::writable(base, 8)]);
        driver.ring(0).kick();
        assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head, length: 8 }));
    }
}
