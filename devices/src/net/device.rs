//! The network card as the transport sees it: features, configuration space and lifecycle (virtio 1.2 §5.1).

use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use thiserror::Error;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::features::{self, bit};
use super::lane::Lane;
use super::shared::{CardOptions, Shared};
use super::steering::config::TABLE_LENGTH;
use super::steering::hash::KEY_LENGTH;
use super::steering::{Steering, flow};
use super::tap::{MAX_QUEUES, Tap};
use super::vhost::{DEVICE, Vhost, thread};
use super::worker::{Message, Start, Worker};
use crate::limiter::Limits;
use crate::metrics::MetricSource;
use crate::virtio::{Activation, DeviceType, StartError, StillBusy, StoppedQueue, TransportSignals, VirtioDevice};
use crate::{DeviceNotifier, ThreadKind, ThreadSpawner};

/// VIRTIO_F_RING_INDIRECT_DESC, which the transport offers.
pub(super) const RING_INDIRECT_DESC: u32 = 28;
/// Size of the control queue: commands come one at a time, in up to three descriptors.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Link speed shown to the guest, in Mbit/s. A tap has none; drivers that aggregate links want one.
const SPEED: u32 = 10_000;
const FULL_DUPLEX: u8 = 1;
/// Smallest MTU that a device may show (virtio 1.2 §5.1.4.1).
const SMALLEST_MTU: u16 = 68;

/// What a network card is made of.
pub struct NetOptions {
    /// Identifier of the card, also the start of its threads' names.
    pub id: String,
    /// The host side, with as many queues as `queue_pairs`.
    pub tap: Tap,
    /// The guest's MAC address: unicast, not zero.
    pub mac: [u8; 6],
    /// Receive/transmit queue pairs, 1..=256.
    pub queue_pairs: u16,
    /// Descriptors per queue: a power of two, 16..=32768; 256 is a good value.
    pub queue_size: u16,
    /// The MTU that the guest is told, in bytes, at least 68 and at most the tap's. `None`: the guest chooses.
    pub mtu: Option<u16>,
    /// Whether the link is up at first.
    pub link_up: bool,
    /// Drop what the guest sends under another address than `mac`, also one that it gave itself.
    pub antispoof: bool,
    /// Whether the guest may say which pair receives a frame (RSS), and is told the hash that says so (HASH_REPORT; not with
    /// `vhost`). Needs several queue pairs, and CAP_BPF and CAP_PERFMON while the card is made (Linux 5.8 or newer).
    pub rss: bool,
    /// Have the kernel's vhost-net move the frames, with the same features but for reports of hashes; interrupts are held back by time
    /// alone. It moves them unseen: `antispoof` and limits hold only while our own path has the rings, so they are not for such a
    /// card.
    pub vhost: bool,
    /// What the guest may receive per second: what exceeds it waits in the tap, which drops what it cannot hold.
    pub rx_limits: Limits,
    /// What the guest may send per second: what exceeds it waits in its ring.
    pub tx_limits: Limits,
}

/// Why a network card could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NetError {
    /// An address that no card can have.
    #[error("NIC {id}: {mac} is not the address of one card: use a unicast address such as 52:54:00:12:34:56")]
    Mac {
        /// The card.
        id: String,
        /// The address.
        mac: String,
    },
    /// The tap has another number of queues.
    #[error(
        "NIC {id}: {pairs} queue pairs asked for (1 to {MAX_QUEUES} are possible), but tap {tap} was opened with {queues} queue(s): make them equal"
    )]
    QueuePairs {
        /// The card.
        id: String,
        /// Its tap.
        tap: String,
        /// Queue pairs asked for.
        pairs: u16,
        /// Queues of the tap.
        queues: u16,
    },
    /// A queue size that virtio does not allow.
    #[error("NIC {id}: queue size {size} is not a power of two from 16 to 32768: use 256")]
    QueueSize {
        /// The card.
        id: String,
        /// The size.
        size: u16,
    },
    /// An MTU that is too small, or larger than the tap's.
    #[error(
        "NIC {id}: MTU {mtu} does not fit: use {SMALLEST_MTU} to {largest}, or raise the MTU of tap {tap} with `ip link set {tap} mtu {mtu}`"
    )]
    Mtu {
        /// The card.
        id: String,
        /// Its tap.
        tap: String,
        /// The MTU asked for.
        mtu: u16,
        /// The tap's.
        largest: u32,
    },
    /// RSS on a card with one queue pair.
    #[error("NIC {0}: RSS chooses between queue pairs, and the NIC has one: give it more, or leave RSS out")]
    RssPairs(String),
    /// The host does not let a program of ours steer frames.
    #[error(
        "NIC {id}: the kernel refused the program that steers frames for RSS: {error}; it needs CAP_BPF and CAP_PERFMON, and Linux 5.8 or newer: start with these capabilities, or leave RSS out"
    )]
    Steering {
        /// The card.
        id: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The kernel's vhost-net cannot be used.
    #[error(
        "NIC {id}: {DEVICE}, which `vhost` needs, cannot be used: {error}; load it with `modprobe vhost_net` (Linux 5.4 or newer) and give this user access, or set `vhost` to false"
    )]
    Vhost {
        /// The card.
        id: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The host refused a descriptor or a thread.
    #[error(
        "NIC {id}: the host refused to {action}: {error}; raise the limits of descriptors and threads of this process"
    )]
    Host {
        /// The card.
        id: String,
        /// What was asked for.
        action: &'static str,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// The state of a card as the control plane shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetState {
    /// Whether the link is up.
    pub link_up: bool,
    /// Queue pairs that the driver uses.
    pub active_pairs: u16,
    /// Queue pairs that it could use.
    pub max_pairs: u16,
}

/// The control thread's side of a card: the transport owns the card itself. Calls return at once, from any thread.
#[derive(Clone)]
pub struct NetHandle {
    shared: Arc<Shared>,
}

impl NetHandle {
    /// Sets the link up or down: the guest sees it in its status and hears of it, the host sees the tap's carrier. While it is
    /// down frames are dropped both ways, and what came meanwhile is not delivered later.
    pub fn set_link(&self, up: bool) {
        self.shared.set_link(up);
    }

    /// Other limits on what the guest may receive and send, from now on.
    pub fn set_limits(&self, rx: Limits, tx: Limits) {
        self.shared.rx_limiter.set(rx);
        self.shared.tx_limiter.set(tx);
    }

    /// Tells the network where the card is, as after a move: reverse ARP through the tap, and a request to the driver if it takes
    /// such; five times within a second.
    pub fn announce(&self) {
        self.shared.announce();
    }

    /// The state of the card.
    #[must_use]
    pub fn state(&self) -> NetState {
        NetState {
            link_up: self.shared.link_up.load(Ordering::SeqCst),
            active_pairs: self.shared.pairs.load(Ordering::SeqCst),
            max_pairs: self.shared.max_pairs(),
        }
    }

    /// The card's counters.
    #[must_use]
    pub fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::<Shared>::clone(&self.shared)
    }
}

struct WorkerHandle {
    messages: Sender<Message>,
    stopped: Receiver<Vec<StoppedQueue>>,
    thread: Option<JoinHandle<()>>,
}

/// What the workers are doing.
enum Lifecycle {
    Stopped,
    Running,
    Stopping {
        since: Instant,
        /// Workers that have not answered.
        left: Vec<usize>,
        queues: Vec<StoppedQueue>,
    },
}

/// virtio-net over a tap: one worker thread `<id>.q<N>` per queue pair, parked until the driver is ready.
pub struct VirtioNet {
    shared: Arc<Shared>,
    workers: Vec<WorkerHandle>,
    queue_sizes: Vec<u16>,
    features: u64,
    mtu: u16,
    lifecycle: Lifecycle,
    /// Queues that the driver enabled but cannot use with the features that it took: kept as they are.
    idle: Vec<StoppedQueue>,
    /// The driver has not started the card since the last reset.
    fresh: bool,
}

impl VirtioNet {
    /// Makes a card and its threads.
    ///
    /// # Errors
    /// [`NetError`] if the options do not fit each other, or the host has no thread or descriptor left.
    pub fn new(
        options: NetOptions,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> Result<Self, NetError> {
        check(&options)?;
        let features = offered(&options);
        let NetOptions { id, tap, mac, queue_pairs, queue_size, mtu, link_up, antispoof, rss, vhost, .. } = options;
        let (rx_limits, tx_limits) = (options.rx_limits, options.tx_limits);
        let host = |action| {
            let id = id.clone();
            move |error| NetError::Host { id, action, error }
        };
        let wake = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let wakes: io::Result<Vec<EventFd>> = (0..queue_pairs).map(|_| wake()).collect();
        let wakes = wakes.map_err(host("make an eventfd"))?;
        let steering = rss.then(Steering::new).transpose();
        let steering = steering.map_err(|error| NetError::Steering { id: id.clone(), error })?;
        let card = CardOptions { id: id.clone(), mac, antispoof, link_up, vhost, rx_limits, tx_limits, steering };
        let shared = Arc::new(Shared::new(card, tap, wakes, notifier));
        let mut queue_sizes = vec![queue_size; usize::from(queue_pairs) * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let workers = Vec::new();
        let mtu = mtu.unwrap_or(0);
        let lifecycle = Lifecycle::Stopped;
        // Complete before the first thread, so that a failure half-way ends the threads made so far.
        let mut card = Self { shared, workers, queue_sizes, features, mtu, lifecycle, idle: Vec::new(), fresh: true };
        for index in 0..usize::from(queue_pairs) {
            let (messages, inbox) = mpsc::channel();
            let (outbox, stopped) = mpsc::channel();
            let kernel = if vhost {
                Some(Vhost::open().map_err(|error| NetError::Vhost { id: id.clone(), error })?)
            } else {
                None
            };
            let worker = Worker::new(index, Arc::clone(&card.shared), kernel, inbox, outbox);
            let worker = worker.map_err(host("make an epoll"))?;
            let thread = spawner.spawn(ThreadKind::Net, &format!("{id}.q{index}"), Box::new(move || worker.run()));
            let thread = Some(thread.map_err(host("start a thread"))?);
            card.workers.push(WorkerHandle { messages, stopped, thread });
        }
        if vhost && let Err(error) = thread::make_polite() {
            tracing::debug!(nic = id, %error, "vhost-net's threads preempt others: they may not be set");
        }
        Ok(card)
    }

    /// The control thread's side of this card.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        NetHandle { shared: Arc::clone(&self.shared) }
    }

    fn config(&self) -> [u8; 24] {
        let link = u16::from(self.shared.link_up.load(Ordering::SeqCst));
        let announce = u16::from(self.shared.announcing.load(Ordering::SeqCst)) << 1;
        let (_, filter) = self.shared.filter.get();
        let mac = filter.mac();
        let mut config = [0; 24];
        let rss = self.features & bit(features::RSS) != 0;
        let length = |length: usize| if rss { u16::try_from(length).unwrap_or(u16::MAX) } else { 0 }.to_le_bytes();
        let [key_length, _] = length(KEY_LENGTH);
        let fields: [(usize, &[u8]); 9] = [
            (0, &mac),
            (6, &(link | announce).to_le_bytes()),
            (8, &self.shared.max_pairs().to_le_bytes()),
            (10, &self.mtu.to_le_bytes()),
            (12, &SPEED.to_le_bytes()),
            (16, &[FULL_DUPLEX]),
            (17, &[key_length]),
            (18, &length(TABLE_LENGTH)),
            (20, &if rss { flow::SUPPORTED } else { 0 }.to_le_bytes()),
        ];
        for (offset, value) in fields {
            for (to, from) in config.iter_mut().skip(offset).zip(value) {
                *to = *from;
            }
        }
        config
    }

    /// Sorts the driver's queues by worker (§5.1.2): the control queue comes after as many pairs as the driver can use.
    fn lanes(&mut self, activation: &mut Activation) -> Result<Vec<Start>, StartError> {
        let several = activation.has(features::MQ) || activation.has(features::RSS);
        let pairs = if several { self.workers.len() } else { 1 };
        let fresh = self.fresh;
        let pairs_generation = self.shared.pairs_generation.load(Ordering::SeqCst);
        let mut starts: Vec<Start> = self
            .workers
            .iter()
            .map(|_| Start {
                features: activation.features,
                memory: activation.memory.clone(),
                rx: None,
                tx: None,
                control: None,
                enabled: Vec::new(),
                signals: Arc::clone(&activation.signals),
                fresh,
                pairs_generation,
            })
            .collect();
        let indirect = activation.has(RING_INDIRECT_DESC);
        let control = activation.has(features::CTRL_VQ).then_some(2 * pairs);
        let memory = activation.memory.memory();
        self.idle.clear();
        for queue in activation.queues.drain(..) {
            let index = queue.index;
            let number = usize::from(index);
            let place = if Some(number) == control {
                starts.first_mut().map(|start| &mut start.control)
            } else if number >= 2 * pairs {
                None
            } else {
                let receive = number.is_multiple_of(2);
                starts.get_mut(number / 2).map(|start| if receive { &mut start.rx } else { &mut start.tx })
            };
            match place {
                Some(place) if place.is_none() => *place = Some(Lane::new(queue, indirect, &memory)?),
                Some(_) => return Err(StartError::Queue { index, reason: "it was given twice".to_owned() }),
                None => self.idle.push(StoppedQueue { index, state: queue.queue.state() }),
            }
        }
        let lanes = starts.iter().flat_map(|start| [&start.rx, &start.tx]).flatten();
        let enabled = lanes.map(|lane| lane.index).collect();
        if let Some(first) = starts.first_mut() {
            first.enabled = enabled;
        }
        Ok(starts)
    }

    fn begin_stop(&mut self) {
        let count = u16::try_from(self.workers.len()).unwrap_or(u16::MAX);
        self.shared.draining.store(count, Ordering::SeqCst);
        for (index, worker) in self.workers.iter().enumerate() {
            if worker.messages.send(Message::Stop).is_err() {
                // Its thread is gone: it will not answer, and has nothing in flight.
                self.shared.draining.fetch_sub(1, Ordering::SeqCst);
            }
            self.shared.wake(index);
        }
        let left = (0..self.workers.len()).collect();
        self.lifecycle = Lifecycle::Stopping { since: Instant::now(), left, queues: Vec::new() };
    }
}

impl VirtioDevice for VirtioNet {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(self.config().iter().skip(offset)) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // With VERSION_1 all fields are read-only (§5.1.4).
    }

    fn start(&mut self, mut activation: Activation) -> Result<(), StartError> {
        if !matches!(self.lifecycle, Lifecycle::Stopped) {
            return Err(StartError::Running);
        }
        let starts = self.lanes(&mut activation)?;
        if self.fresh {
            self.shared.forget_driver(activation.features);
        }
        self.shared.pairs_waiting.store(0, Ordering::SeqCst);
        let signals: Weak<dyn TransportSignals> = Arc::downgrade(&activation.signals);
        self.shared.set_signals(Some(signals));
        self.lifecycle = Lifecycle::Running;
        self.fresh = false;
        for (index, (worker, start)) in self.workers.iter().zip(starts).enumerate() {
            if worker.messages.send(Message::Start(Box::new(start))).is_err() {
                self.begin_stop();
                return Err(StartError::WorkerGone);
            }
            self.shared.wake(index);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<StoppedQueue>, StillBusy> {
        if matches!(self.lifecycle, Lifecycle::Running) {
            self.begin_stop();
        }
        let Lifecycle::Stopping { since, left, queues } = &mut self.lifecycle else { return Ok(Vec::new()) };
        let workers = &self.workers;
        left.retain(|index| match workers.get(*index).map(|worker| worker.stopped.try_recv()) {
            Some(Ok(stopped)) => {
                queues.extend(stopped);
                false
            }
            Some(Err(TryRecvError::Empty)) => true,
            Some(Err(TryRecvError::Disconnected)) | None => false,
        });
        if !left.is_empty() {
            let requests = u32::try_from(left.len()).unwrap_or(u32::MAX);
            return Err(StillBusy { requests, oldest: since.elapsed() });
        }
        let mut queues = std::mem::take(queues);
        queues.append(&mut self.idle);
        queues.sort_by_key(|queue| queue.index);
        self.lifecycle = Lifecycle::Stopped;
        self.shared.set_signals(None);
        Ok(queues)
    }

    fn reset(&mut self) {
        self.fresh = true;
        self.shared.announcing.store(false, Ordering::SeqCst);
        self.shared.forget_driver(0);
    }

    fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::<Shared>::clone(&self.shared)
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        for (index, worker) in self.workers.iter().enumerate() {
            let _ = worker.messages.send(Message::Exit);
            self.shared.wake(index);
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take()
                && thread.join().is_err()
            {
                tracing::error!(
                    nic = self.shared.id,
                    "a worker thread had panicked: report this with the log before it"
                );
            }
        }
    }
}

fn offered(options: &NetOptions) -> u64 {
    use features::*;
    let mut offered = [
        CSUM,
        GUEST_CSUM,
        CTRL_GUEST_OFFLOADS,
        MAC,
        GUEST_TSO4,
        GUEST_TSO6,
        GUEST_ECN,
        HOST_TSO4,
        HOST_TSO6,
        HOST_ECN,
        MRG_RXBUF,
        STATUS,
        CTRL_VQ,
        CTRL_RX,
        CTRL_VLAN,
        CTRL_RX_EXTRA,
        GUEST_ANNOUNCE,
        CTRL_MAC_ADDR,
        NOTF_COAL,
        VQ_NOTF_COAL,
        SPEED_DUPLEX,
    ]
    .into_iter()
    .fold(0, |all, feature| all | bit(feature));
    if options.tap.has_uso() {
        offered |= bit(HOST_USO) | bit(GUEST_USO4) | bit(GUEST_USO6);
    }
    if options.mtu.is_some() {
        offered |= bit(MTU);
    }
    if options.queue_pairs > 1 {
        offered |= bit(MQ);
    }
    if options.rss {
        offered |= bit(RSS);
        if !options.vhost {
            // The kernel tells nobody the hash.
            offered |= bit(HASH_REPORT);
        }
    }
    offered
}

fn check(options: &NetOptions) -> Result<(), NetError> {
    let id = || options.id.clone();
    let tap = || options.tap.name().to_owned();
    let [first, ..] = options.mac;
    if first & 1 != 0 || options.mac == [0; 6] {
        let bytes: Vec<String> = options.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        return Err(NetError::Mac { id: id(), mac: bytes.join(":") });
    }
    let (pairs, queues) = (options.queue_pairs, options.tap.queues());
    if pairs != queues || !(1..=MAX_QUEUES).contains(&pairs) {
        return Err(NetError::QueuePairs { id: id(), tap: tap(), pairs, queues });
    }
    if options.rss && pairs == 1 {
        return Err(NetError::RssPairs(id()));
    }
    let size = options.queue_size;
    if !size.is_power_of_two() || !(16..=32768).contains(&size) {
        return Err(NetError::QueueSize { id: id(), size });
    }
    if let Some(mtu) = options.mtu {
        let largest = options.tap.mtu().unwrap_or(u32::from(u16::MAX));
        if mtu < SMALLEST_MTU || u32::from(mtu) > largest {
            return Err(NetError::Mtu { id: id(), tap: tap(), mtu, largest });
        }
    }
    Ok(())
}
