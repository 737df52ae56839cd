//! virtio-blk as the transport and the VMM see it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::warn;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{BlockBackend, BlockSource, Geometry};
use super::config::{self, Variable, WRITEBACK_OFFSET, feature};
use super::error::{BlockError, RescanError};
use super::file::{BlockFile, OpenMode};
use super::identity;
use super::metrics::{BlockMetrics, QueueMetrics};
use super::reservation::{Guard, GuardThread, Reservation, ReservationError, ReservationOptions};
use super::shared::{Beginning, Disk, ErrorPolicy};
use super::uring::UringBackend;
use super::worker::{Command, Parts, Start, Stopped, Worker};
use crate::limiter::{Limiter, Limits};
use crate::metrics::MetricSource;
use crate::virtio::ring::Ring;
use crate::virtio::{Activation, ActiveQueue, DeviceType, StartError, StillBusy, StoppedQueue, VirtioDevice};
use crate::{DeviceNotifier, GuestMemory, ThreadKind, ThreadSpawner, scheduling};

const INDIRECT_DESC: u32 = 28;
const MAX_QUEUES: u16 = 64;
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 16..=1024;
/// What the kernel shows of the name of a thread.
const THREAD_NAME: usize = 15;
/// How long a device that is dropped waits for its workers, if they have nothing in flight.
const LEAVING: Duration = Duration::from_secs(1);

/// Makes the backend of a queue, which is to count what it does there.
pub type MakeBackend<'a> = dyn Fn(&Arc<QueueMetrics>) -> Result<Box<dyn BlockBackend>, BlockError> + 'a;

/// What a disk is made of.
#[derive(Debug, Clone)]
pub struct BlockOptions {
    /// Names the disk in threads, logs, events and metrics.
    pub id: String,
    /// A block device or a regular file.
    pub path: PathBuf,
    /// Refuse writes; several VMs may share such a disk.
    pub read_only: bool,
    /// Number of queues, each with its own thread: 1 to 64.
    pub queues: u16,
    /// Size of each queue: a power of two from 16 to 1024.
    pub queue_size: u16,
    /// Pass by the host's page cache (O_DIRECT). `None`: on block devices only.
    pub direct: Option<bool>,
    /// Show logical blocks of this many bytes (up to 4096). `None`: as the host has them.
    pub block_size: Option<u32>,
    /// The serial number that the guest reads: at most 20 printable ASCII characters. `None`: derived from the world-wide
    /// identifier of the LUN, the same on each host, or else from `id`.
    pub serial: Option<String>,
    /// Whether writes may stay in a volatile cache until the guest flushes, as disks do. `false`: each write is stable
    /// when it completes, until the guest chooses otherwise.
    pub writeback: bool,
    /// Refuse any LUN but the one with this world-wide identifier, before anything of it is read, written or reserved.
    pub wwid: Option<String>,
    /// Keep other hosts from writing the LUN for as long as it is open. Not for read-only disks.
    pub reservation: Option<ReservationOptions>,
    /// What happens to requests that fail on the host.
    pub on_error: ErrorPolicy,
    /// What the disk may do per second.
    pub limits: Limits,
    /// Limits that it shares with other disks.
    pub group: Option<Arc<Limiter>>,
    /// Host CPUs of the threads: none, one list for all queues, or one for each.
    pub affinity: Vec<Vec<u16>>,
}

impl BlockOptions {
    /// A writable disk with one queue of 256.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            read_only: false,
            queues: 1,
            queue_size: 256,
            direct: None,
            block_size: None,
            serial: None,
            writeback: true,
            wwid: None,
            reservation: None,
            on_error: ErrorPolicy::default(),
            limits: Limits::default(),
            group: None,
            affinity: Vec::new(),
        }
    }

    fn check(&self) -> Result<(), BlockError> {
        let bad = |what: String| Err(BlockError::Option { id: self.id.clone(), what });
        if self.id.is_empty() {
            return bad("its id is empty: give it one".into());
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return bad(format!("{} queues: 1 to {MAX_QUEUES} are possible", self.queues));
        }
        if !self.queue_size.is_power_of_two() || !QUEUE_SIZES.contains(&self.queue_size) {
            return bad(format!("queue size {}: a power of two from 16 to 1024 is possible", self.queue_size));
        }
        if self.read_only && self.reservation.is_some() {
            return bad("it is read-only, which needs no reservation: leave one of the two out".into());
        }
        match &self.serial {
            Some(serial) if !identity::is_valid(serial) => {
                bad(format!("serial {serial:?}: 1 to 20 printable ASCII characters are possible"))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Running,
    Stopping,
}

struct QueueThread {
    commands: Option<Sender<Command>>,
    wake: EventFd,
    stopped: Receiver<Stopped>,
    /// Heads of requests that failed before the last stop, and are tried again.
    held: Vec<u16>,
    thread: Option<JoinHandle<()>>,
    state: State,
}

impl QueueThread {
    fn send(&self, command: Command) -> Result<(), StartError> {
        let sender = self.commands.as_ref().ok_or(StartError::WorkerGone)?;
        sender.send(command).map_err(|_| StartError::WorkerGone)?;
        self.wake.write(1)?;
        Ok(())
    }
}

/// What is known of the LUN beside its shape.
#[derive(Default)]
pub(super) struct Seat {
    pub wwid: Option<String>,
    pub guard: Option<Guard>,
}

/// A virtio block device (virtio 1.2 §5.2) with a thread for each queue.
///
/// Dropping it ends the threads. One whose disk hangs is left alone: it keeps the guest memory that its requests name,
/// the file and its lock, and ends by itself when the disk answers.
pub struct VirtioBlock {
    disk: Arc<Disk>,
    queues: Vec<QueueThread>,
    sizes: Vec<u16>,
    /// Queues that have stopped since the device was last asked to.
    stopped: Vec<StoppedQueue>,
    initial_writeback: bool,
    guard: Option<GuardThread>,
    /// Keeps the disk open for those who have a handle, and no longer than the device.
    _source: Arc<dyn BlockSource>,
}

impl VirtioBlock {
    /// Opens and locks the disk, reserves it if asked to, makes its rings, and starts its threads, which wait to be given
    /// queues. May wait for the disk.
    ///
    /// # Errors
    /// [`BlockError`], which names the object and the remedy; nothing is left behind then.
    pub fn new(
        options: BlockOptions,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> Result<Self, BlockError> {
        options.check()?;
        let BlockOptions { read_only, direct, block_size, .. } = options;
        let mode = OpenMode { read_only, direct, block_size, wwid: options.wwid.clone() };
        let file = BlockFile::open(&options.path, &mode)?;
        let wwid = file.wwid();
        let reserve = |wanted| Reservation::acquire(Arc::clone(file.file()), &options.path, wanted);
        let guard = options.reservation.clone().map(reserve).transpose()?.map(Guard::new);
        let geometry = file.geometry();
        let descriptor = Arc::clone(file.file());
        let depth = options.queue_size;
        let backend = |metrics: &Arc<QueueMetrics>| -> Result<Box<dyn BlockBackend>, BlockError> {
            // One more than the guest can have in flight: the worker's own flush.
            let backend = UringBackend::new(Arc::clone(&descriptor), geometry, depth + 1, Arc::clone(metrics))?;
            Ok(Box::new(backend))
        };
        let seat = Seat { wwid, guard };
        Self::assemble(&options, seat, Arc::new(file), &backend, spawner, notifier)
    }

    /// A device in front of any backends: `backend` is called once for each queue. The path in `options` is not used.
    ///
    /// # Errors
    /// [`BlockError`] of options, threads, or `backend`.
    pub fn with_backends(
        options: &BlockOptions,
        source: Arc<dyn BlockSource>,
        backend: &MakeBackend<'_>,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> Result<Self, BlockError> {
        options.check()?;
        Self::assemble(options, Seat::default(), source, backend, spawner, notifier)
    }

    pub(super) fn assemble(
        options: &BlockOptions,
        seat: Seat,
        source: Arc<dyn BlockSource>,
        backend: &MakeBackend<'_>,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> Result<Self, BlockError> {
        let Seat { wwid, guard } = seat;
        let identity = identity::of(options.serial.as_deref(), wwid.as_deref(), &options.id);
        let metrics = Arc::new(BlockMetrics::new(&options.id, usize::from(options.queues), options.queue_size));
        let own = Arc::new(Limiter::new(options.limits));
        let disk = Arc::new(Disk::new(Beginning {
            id: options.id.clone(),
            source: &source,
            identity,
            notifier,
            metrics: Arc::clone(&metrics),
            wwid,
            guard,
            writeback: options.writeback,
            policy: options.on_error,
            limiters: std::iter::once(own).chain(options.group.clone()).collect(),
        }));
        let sizes = vec![options.queue_size; usize::from(options.queues)];
        let initial_writeback = options.writeback;
        let (queues, stopped, guard) = (Vec::new(), Vec::new(), None);
        let mut device = Self { disk, queues, sizes, stopped, initial_writeback, guard, _source: source };
        let name = thread_name(&options.id, ".pr");
        let lacking = |error| BlockError::Resources { id: options.id.clone(), what: "a thread", error };
        device.guard = Guard::start(&device.disk, &name, spawner).map_err(lacking)?;
        for (index, metrics) in metrics.queues().iter().enumerate() {
            let backend = backend(metrics)?;
            let thread = device.spawn(index, options, backend, metrics, spawner)?;
            device.queues.push(thread);
        }
        Ok(device)
    }

    fn spawn(
        &self,
        index: usize,
        options: &BlockOptions,
        backend: Box<dyn BlockBackend>,
        metrics: &Arc<QueueMetrics>,
        spawner: &dyn ThreadSpawner,
    ) -> Result<QueueThread, BlockError> {
        let lacking = |what| move |error| BlockError::Resources { id: options.id.clone(), what, error };
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(lacking("an eventfd"))?;
        let (commands, received) = mpsc::channel();
        let (stopped, answers) = mpsc::channel();
        let parts = Parts {
            backend,
            disk: Arc::clone(&self.disk),
            metrics: Arc::clone(metrics),
            commands: received,
            wake: wake.try_clone().map_err(lacking("an eventfd"))?,
            stopped,
            depth: options.queue_size,
        };
        let name = thread_name(&options.id, &format!(".q{index}"));
        let thread = spawner
            .spawn(ThreadKind::Block, &name, Box::new(move || Worker::run(parts)))
            .map_err(lacking("a thread"))?;
        if let Some(cpus) = options.affinity.get(index).or_else(|| options.affinity.first()) {
            scheduling::pin(&thread, cpus).map_err(|error| BlockError::Affinity { thread: name, error })?;
        }
        let (held, state) = (Vec::new(), State::Idle);
        Ok(QueueThread { commands: Some(commands), wake, stopped: answers, held, thread: Some(thread), state })
    }

    /// A handle for whoever looks after the disk while the transport owns the device.
    #[must_use]
    pub fn handle(&self) -> BlockHandle {
        BlockHandle { disk: Arc::clone(&self.disk) }
    }

    fn ring(&self, active: &ActiveQueue, indirect: bool, memory: &GuestMemory) -> Result<Ring, StartError> {
        let bad = |reason: String| StartError::Queue { index: active.index, reason };
        let size = self.sizes.get(usize::from(active.index)).ok_or_else(|| bad("the disk has no such queue".into()))?;
        let queue = virtio_queue::Queue::try_from(active.queue.state()).map_err(|error| bad(error.to_string()))?;
        let positions = Arc::clone(&active.positions);
        let ring = Ring::new(queue, positions, indirect, &memory.memory()).map_err(|error| bad(error.to_string()))?;
        if ring.size() > *size {
            return Err(bad(format!("{} descriptors where {size} are possible", ring.size())));
        }
        Ok(ring)
    }
}

impl VirtioDevice for VirtioBlock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        config::features(&self.disk.geometry, self.sizes.len())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let variable = Variable {
            capacity: self.disk.capacity.load(Ordering::Relaxed),
            writeback: self.disk.writeback.load(Ordering::Relaxed),
            queues: u16::try_from(self.sizes.len()).unwrap_or(u16::MAX),
            queue_size: self.sizes.first().copied().unwrap_or(0),
        };
        config::read(&self.disk.geometry, variable, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK_OFFSET, [writeback @ (0 | 1)]) = (offset, data) {
            let before = self.disk.writeback.swap(*writeback == 1, Ordering::Relaxed);
            if before && *writeback == 0 {
                // The driver will not flush what it wrote until now.
                for queue in self.queues.iter().filter(|queue| queue.state == State::Running) {
                    // A worker that is gone has said so, and its queue is broken.
                    let _ = queue.send(Command::Sync);
                }
            }
        }
    }

    fn start(&mut self, activation: Activation) -> Result<(), StartError> {
        if self.queues.iter().any(|queue| queue.state != State::Idle) {
            return Err(StartError::Running);
        }
        let indirect = activation.has(INDIRECT_DESC);
        let flushes = activation.has(feature::FLUSH);
        let Activation { memory, queues, signals, .. } = activation;
        // All or nothing: look at every queue before the first one starts.
        let mut rings = Vec::with_capacity(queues.len());
        for active in queues {
            let twice = rings.iter().any(|(other, _): &(ActiveQueue, Ring)| other.index == active.index);
            if twice {
                return Err(StartError::Queue { index: active.index, reason: "it was given twice".into() });
            }
            let ring = self.ring(&active, indirect, &memory)?;
            rings.push((active, ring));
        }
        self.disk.set_signals(Some(Arc::clone(&signals)));
        for (active, ring) in rings {
            let ActiveQueue { index, kick, interrupt, .. } = active;
            let (memory, signals) = (memory.clone(), Arc::clone(&signals));
            if let Some(queue) = self.queues.get_mut(usize::from(index)) {
                let again = std::mem::take(&mut queue.held);
                let start = Start { index, ring, kick, interrupt, memory, signals, flushes, again };
                queue.send(Command::Start(Box::new(start)))?;
                queue.state = State::Running;
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<StoppedQueue>, StillBusy> {
        let running = self.queues.iter_mut().filter(|queue| queue.state == State::Running);
        let running: Vec<&mut QueueThread> = running.collect();
        self.disk.stopping.fetch_add(u32::try_from(running.len()).unwrap_or(0), Ordering::AcqRel);
        for queue in running {
            queue.state = State::Stopping;
            // If the worker is gone, its channel of answers says so below.
            let _ = queue.send(Command::Stop);
        }
        for queue in self.queues.iter_mut().filter(|queue| queue.state == State::Stopping) {
            match queue.stopped.try_recv() {
                Ok(stopped) => {
                    queue.state = State::Idle;
                    queue.held = stopped.held;
                    self.stopped.push(stopped.queue);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => {
                    warn!(disk = self.disk.id, "a worker has ended without giving its queue back");
                    self.disk.stopping.fetch_sub(1, Ordering::AcqRel);
                    queue.state = State::Idle;
                }
            }
        }
        if self.queues.iter().any(|queue| queue.state == State::Stopping) {
            let (requests, oldest) = self.disk.metrics.in_flight();
            return Err(StillBusy { requests, oldest });
        }
        self.stopped.sort_by_key(|stopped| stopped.index);
        Ok(std::mem::take(&mut self.stopped))
    }

    fn reset(&mut self) {
        self.disk.writeback.store(self.initial_writeback, Ordering::Relaxed);
        self.disk.set_signals(None);
        for (queue, metrics) in self.queues.iter_mut().zip(self.disk.metrics.queues()) {
            queue.held.clear();
            metrics.held.set(0);
        }
    }

    fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::clone(&self.disk.metrics) as Arc<dyn MetricSource>
    }
}

impl Drop for VirtioBlock {
    fn drop(&mut self) {
        self.disk.set_signals(None);
        for queue in &mut self.queues {
            queue.commands = None;
            let _ = queue.wake.write(1);
        }
        let end = Instant::now() + LEAVING;
        for queue in &mut self.queues {
            let Some(thread) = queue.thread.take() else { continue };
            // The sender of answers goes with the worker: this waits for its end, and not for long.
            let ended = loop {
                match queue.stopped.recv_timeout(end.saturating_duration_since(Instant::now())) {
                    Ok(_) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => break true,
                    Err(mpsc::RecvTimeoutError::Timeout) => break false,
                }
            };
            if ended {
                let _ = thread.join();
            } else {
                let (requests, _) = self.disk.metrics.in_flight();
                warn!(disk = self.disk.id, requests, "a worker waits for its disk and is left to end by itself");
            }
        }
        // After the workers: their writes must not outlive the reservation.
        if let Some(guard) = &self.disk.guard {
            guard.leave(self.disk.metrics.in_flight().0);
        }
        if let Some(thread) = self.guard.take()
            && !thread.join(Instant::now() + LEAVING)
        {
            warn!(disk = self.disk.id, "the guard of the reservation waits for its disk and is left to end by itself");
        }
    }
}

/// Looks after a disk while the transport owns the device. Only [`BlockHandle::flush`] and
/// [`BlockHandle::release_reservation`] wait for the disk.
#[derive(Clone)]
pub struct BlockHandle {
    disk: Arc<Disk>,
}

impl BlockHandle {
    /// The name of the disk.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.disk.id
    }

    /// The shape of the disk, with its present capacity.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry { capacity: self.disk.capacity.load(Ordering::Relaxed), ..self.disk.geometry }
    }

    /// The serial number that the guest reads.
    #[must_use]
    pub fn serial(&self) -> String {
        identity::text(&self.disk.identity)
    }

    /// Looks at the size of the disk anew. If it grew, the guest sees that at once; gives the size in bytes.
    ///
    /// # Errors
    /// [`RescanError`] if the size cannot be got, or the disk shrank: the guest keeps the old size then.
    pub fn rescan(&self) -> Result<u64, RescanError> {
        self.disk.rescan()
    }

    /// Makes all that was written stable, for the end of the VM: the guest may have gone without a flush. Waits for the disk:
    /// not for the control thread.
    ///
    /// # Errors
    /// What the kernel answered: some of what was written may be lost.
    pub fn flush(&self) -> io::Result<()> {
        self.disk.source().map_or(Ok(()), |source| source.sync())
    }

    /// The world-wide identifier of the LUN, the same on each host, if the host knows one.
    #[must_use]
    pub fn wwid(&self) -> Option<String> {
        self.disk.wwid.clone()
    }

    /// Gives the reservation of the LUN up, for the clean end of the VM, if it has one. After the last flush; the device takes
    /// no requests any more. Waits for the disk: not for the control thread.
    ///
    /// # Errors
    /// [`ReservationError`] if the LUN stays reserved: the disk does not answer, or requests are still in flight.
    pub fn release_reservation(&self) -> Result<(), ReservationError> {
        let in_flight = self.disk.metrics.in_flight().0;
        self.disk.guard.as_ref().map_or(Ok(()), |guard| guard.release(in_flight))
    }

    /// Number and greatest age of the requests in flight, also while the disk hangs.
    #[must_use]
    pub fn in_flight(&self) -> (u32, Duration) {
        self.disk.metrics.in_flight()
    }

    /// Failed requests that are kept until the device is stopped and started.
    #[must_use]
    pub fn held(&self) -> u32 {
        u32::try_from(self.disk.metrics.held()).unwrap_or(u32::MAX)
    }

    /// Shows in the metrics whether a request is outstanding for too long, which is for the VMM to say.
    pub fn set_stalled(&self, stalled: bool) {
        self.disk.metrics.stalled.set(u64::from(stalled));
    }

    /// Another policy for requests that fail from now on.
    pub fn set_error_policy(&self, policy: ErrorPolicy) {
        self.disk.set_policy(policy);
    }

    /// Other limits from now on.
    pub fn set_limits(&self, limits: Limits) {
        if let Some(own) = self.disk.limiters.first() {
            own.set(limits);
        }
    }

    /// The counters of the disk.
    #[must_use]
    pub fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::clone(&self.disk.metrics) as Arc<dyn MetricSource>
    }
}

/// `<id><suffix>`, the id cut so that the suffix is seen.
fn thread_name(id: &str, suffix: &str) -> String {
    let mut room = THREAD_NAME.saturating_sub(suffix.len()).min(id.len());
    while !id.is_char_boundary(room) {
        room -= 1;
    }
    format!("{}{suffix}", id.get(..room).unwrap_or_default())
}
