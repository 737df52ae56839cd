//! The memory balloon: virtio-balloon (virtio 1.2 §5.5). The host says how much memory the guest shall do without, the driver takes it
//! from the guest and tells which pages, and these go back to the host until the guest touches them again.
//!
//! With [`feature::PAGE_REPORTING`] the driver also tells of pages that are free anyway, and with [`feature::STATS_VQ`] how the guest's
//! memory is doing. Nothing is kept of which pages the balloon holds, so a guest cannot make it grow; a page that the driver names and
//! still uses is the guest's loss.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::attendant::{Activity, Attendant, GiveBack, Outcome, Service, WorkerError};
use super::ring::{Chain, RingError, Segment};
use super::{Activation, DeviceType, StartError, StillBusy, StoppedQueue, VirtioDevice};
use crate::metrics::{Counter, MetricSource, Sample, Value};
use crate::{DeviceNotifier, ThreadKind, ThreadSpawner, pages};

/// Feature bits (§5.5.3).
pub mod feature {
    /// There is a queue of statistics.
    pub const STATS_VQ: u32 = 1;
    /// The driver takes pages back rather than let the guest run out of memory.
    pub const DEFLATE_ON_OOM: u32 = 2;
    /// There is a queue of free pages.
    pub const PAGE_REPORTING: u32 = 5;
}

/// Bytes of a page of the balloon (§5.5.6), whatever the guest's are.
pub const PAGE: u64 = 4096;
/// Inflate, deflate, statistics, and reports of free pages twice. The standard counts queues by what the device could offer
/// (§5.5.2), Linux before 6.11 by what it does offer; as there is no queue of hints, reports come by the fourth or the fifth.
const QUEUE_SIZES: [u16; 5] = [128, 128, 16, 128, 128];
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;

/// Offset of what the driver says that the balloon holds; what it is to hold comes before it (§5.5.4).
const ACTUAL: u64 = 4;

/// Most pages of a chain that are given back: Linux names 256, virtio-win 1024. To keep the others is always right.
const MOST_PAGES: usize = 16 << 10;
/// A tag and a value (§5.5.6.3).
const STATISTIC: usize = 10;
/// Tags that are known; the standard has ten.
const TAGS: usize = 8;
/// A statistic that the driver has not told.
const UNTOLD: u64 = u64::MAX;

/// What a balloon is made of.
#[derive(Debug, Clone)]
pub struct BalloonOptions {
    /// Identifier of the device, also the start of its thread's name.
    pub id: String,
    /// What the balloon is to hold at first, in bytes: a multiple of [`PAGE`], less than 16 TiB.
    pub size: u64,
    /// Whether the driver may take pages back when the guest runs out of memory.
    pub deflate_on_oom: bool,
    /// Whether the driver may tell of free pages.
    pub free_page_reporting: bool,
}

struct Shared {
    id: String,
    activity: Arc<Activity>,
    /// Pages that the balloon is to hold.
    wanted: AtomicU32,
    /// Pages that it holds, as the driver says.
    actual: AtomicU32,
    inflated: Counter,
    deflated: Counter,
    reported: Counter,
    refused: Counter,
    /// By tag.
    statistics: [AtomicU64; TAGS],
}

impl Shared {
    fn forget(&self) {
        self.actual.store(0, Ordering::Relaxed);
        self.statistics.iter().for_each(|value| value.store(UNTOLD, Ordering::Relaxed));
    }
}

/// A name, help, label and value of a statistic, in the order of their tags.
const SHOWN: [(&str, &str, (&str, &str)); TAGS] = {
    const SWAP: (&str, &str) = ("balloon_guest_swap_bytes", "What the guest's driver says was swapped in and out.");
    const FAULTS: (&str, &str) = ("balloon_guest_faults", "Page faults that the guest's driver tells of.");
    const MEMORY: (&str, &str) = ("balloon_guest_memory_bytes", "What the guest's driver says of the guest's memory.");
    [
        (SWAP.0, SWAP.1, ("direction", "in")),
        (SWAP.0, SWAP.1, ("direction", "out")),
        (FAULTS.0, FAULTS.1, ("kind", "major")),
        (FAULTS.0, FAULTS.1, ("kind", "minor")),
        (MEMORY.0, MEMORY.1, ("kind", "free")),
        (MEMORY.0, MEMORY.1, ("kind", "total")),
        (MEMORY.0, MEMORY.1, ("kind", "available")),
        (MEMORY.0, MEMORY.1, ("kind", "cached")),
    ]
};

struct Metrics {
    shared: Arc<Shared>,
    /// Each look at the statistics asks the driver for new ones, so a VM that nobody looks at is left alone.
    ask: GiveBack,
}

impl MetricSource for Metrics {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        let shared = &self.shared;
        let labels = || vec![("balloon", shared.id.clone())];
        let counters: [(&'static str, &'static str, &Counter); 6] = [
            ("balloon_inflated_bytes", "Memory that the guest gave back by inflating the balloon.", &shared.inflated),
            ("balloon_deflated_bytes", "Memory that the guest took back by deflating the balloon.", &shared.deflated),
            ("balloon_reported_bytes", "Free memory that the guest gave back by reporting it.", &shared.reported),
            ("balloon_refused_bytes", "Memory that the guest named and that could not be given back.", &shared.refused),
            ("balloon_kicks", "Kicks of the queues.", &shared.activity.kicks),
            ("balloon_interrupts", "Interrupts of the queues.", &shared.activity.interrupts),
        ];
        for (name, help, counter) in counters {
            visit(Sample { name, help, labels: labels(), value: Value::Counter(counter.value()) });
        }
        for (name, help, pages) in [
            ("balloon_wanted_bytes", "What the balloon is to hold.", &shared.wanted),
            ("balloon_held_bytes", "What the balloon holds, as the guest's driver says.", &shared.actual),
        ] {
            let value = Value::Gauge(bytes(pages.load(Ordering::Relaxed)) as f64);
            visit(Sample { name, help, labels: labels(), value });
        }
        for ((name, help, label), value) in SHOWN.into_iter().zip(&shared.statistics) {
            let value = value.load(Ordering::Relaxed);
            if value != UNTOLD {
                let labels = labels().into_iter().chain([(label.0, label.1.to_owned())]).collect();
                visit(Sample { name, help, labels, value: Value::Gauge(value as f64) });
            }
        }
        self.ask.now();
    }
}

fn bytes(pages: u32) -> u64 {
    u64::from(pages) * PAGE
}

/// The control thread's side of a balloon: the transport owns the device itself. Calls return at once, from any thread.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    /// Another size that the balloon is to have, in bytes. The driver has to be told that the configuration has changed
    /// ([`super::TransportSignals::config_changed`]).
    pub fn set_size(&self, size: u64) {
        self.shared.wanted.store(pages_of(size), Ordering::Relaxed);
    }

    /// What the balloon holds, in bytes, as the driver says.
    #[must_use]
    pub fn held(&self) -> u64 {
        bytes(self.shared.actual.load(Ordering::Relaxed))
    }
}

fn pages_of(size: u64) -> u32 {
    u32::try_from(size / PAGE).unwrap_or(u32::MAX)
}

/// virtio-balloon.
pub struct VirtioBalloon {
    shared: Arc<Shared>,
    features: u64,
    attendant: Attendant,
}

impl VirtioBalloon {
    /// Makes the device and its thread.
    ///
    /// # Errors
    /// [`WorkerError`] if the host has no thread or descriptor left.
    pub fn new(
        options: BalloonOptions,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> Result<Self, WorkerError> {
        let BalloonOptions { id, size, deflate_on_oom, free_page_reporting } = options;
        let features = 1 << feature::STATS_VQ
            | u64::from(deflate_on_oom) << feature::DEFLATE_ON_OOM
            | u64::from(free_page_reporting) << feature::PAGE_REPORTING;
        let activity = Arc::new(Activity::default());
        let shared = Arc::new(Shared {
            id: id.clone(),
            activity: Arc::clone(&activity),
            wanted: AtomicU32::new(pages_of(size)),
            actual: AtomicU32::new(0),
            inflated: Counter::default(),
            deflated: Counter::default(),
            reported: Counter::default(),
            refused: Counter::default(),
            statistics: std::array::from_fn(|_| AtomicU64::new(UNTOLD)),
        });
        let service = Box::new(Keeper { shared: Arc::clone(&shared), negotiated: 0, data: Vec::new() });
        let attendant = Attendant::new(&id, ThreadKind::Balloon, service, activity, spawner, notifier)?;
        Ok(Self { shared, features, attendant })
    }

    /// What stays with the control thread.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle { shared: Arc::clone(&self.shared) }
    }
}

impl VirtioDevice for VirtioBalloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let fields = [&self.shared.wanted, &self.shared.actual];
        let content = fields.into_iter().flat_map(|field| field.load(Ordering::Relaxed).to_le_bytes());
        data.fill(0);
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(content.skip(skipped)) {
            *to = from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(pages)) = (offset, data.try_into()) {
            self.shared.actual.store(u32::from_le_bytes(pages), Ordering::Relaxed);
        }
    }

    fn start(&mut self, activation: Activation) -> Result<(), StartError> {
        self.attendant.start(activation)
    }

    fn stop(&mut self) -> Result<Vec<StoppedQueue>, StillBusy> {
        self.attendant.stop()
    }

    fn reset(&mut self) {
        self.shared.forget();
    }

    fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::new(Metrics { shared: Arc::clone(&self.shared), ask: self.attendant.give_back() })
    }
}

/// Serves the queues.
struct Keeper {
    shared: Arc<Shared>,
    negotiated: u64,
    /// What was read of a chain.
    data: Vec<u8>,
}

impl Service for Keeper {
    fn begin(&mut self, features: u64) {
        self.negotiated = features;
    }

    fn serve(&mut self, queue: u16, memory: &GuestMemoryMmap, head: u16, chain: &Chain) -> Result<Outcome, RingError> {
        let has = |feature: u32| self.negotiated & 1 << feature != 0;
        match queue {
            INFLATE => {
                self.read(memory, head, chain)?;
                self.inflate(memory);
            }
            DEFLATE => {
                let named: u64 = chain.readable().iter().map(|piece| u64::from(piece.length)).sum();
                self.shared.deflated.add((named / 4).saturating_mul(PAGE));
            }
            STATISTICS if has(feature::STATS_VQ) => {
                self.read(memory, head, chain)?;
                self.take_statistics();
                return Ok(Outcome::Kept);
            }
            _ if has(feature::PAGE_REPORTING) => {
                for Segment { address, length } in chain.writable() {
                    let given = self.give(memory, *address, u64::from(*length));
                    self.shared.reported.add(given);
                }
            }
            _ => {}
        }
        Ok(Outcome::Done(0))
    }
}

impl Keeper {
    /// Reads what the driver says, as far as it is wanted.
    fn read(&mut self, memory: &GuestMemoryMmap, head: u16, chain: &Chain) -> Result<(), RingError> {
        self.data.clear();
        for Segment { address, length } in chain.readable() {
            let room = (4 * MOST_PAGES).saturating_sub(self.data.len());
            let length = usize::try_from(*length).unwrap_or(usize::MAX).min(room);
            let start = self.data.len();
            self.data.resize(start.saturating_add(length), 0);
            let part = self.data.get_mut(start..).unwrap_or_default();
            let unmapped = RingError::Unmapped { head, address: *address };
            memory.read_slice(part, GuestAddress(*address)).map_err(|_| unmapped)?;
        }
        Ok(())
    }

    /// Gives the pages back that were named.
    fn inflate(&self, memory: &GuestMemoryMmap) {
        let (numbers, _) = self.data.as_chunks::<4>();
        let mut numbers: Vec<u64> = numbers.iter().map(|number| u32::from_le_bytes(*number).into()).collect();
        // Neighbours go together: a system call each is dear.
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|one, next| one.saturating_add(1) == *next) {
            let first = run.first().copied().unwrap_or_default();
            let given = self.give(memory, first * PAGE, run.len() as u64 * PAGE);
            self.shared.inflated.add(given);
        }
    }

    /// Gives whole pages of a range back to the host; says how many bytes these were, and counts what was refused.
    fn give(&self, memory: &GuestMemoryMmap, address: u64, length: u64) -> u64 {
        let end = address.saturating_add(length) / PAGE * PAGE;
        // Past the last page there is nothing.
        let (mut at, mut given) = (address.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX), 0);
        while at < end {
            let Some(region) = memory.find_region(GuestAddress(at)) else { break };
            let offset = at.saturating_sub(region.start_addr().0);
            let part = (end - at).min(region.len().saturating_sub(offset));
            match pages::give_back(region, offset, part) {
                Ok(()) => given += part,
                Err(error) if self.shared.refused.value() == 0 => {
                    let balloon = &self.shared.id;
                    tracing::warn!(balloon, %error, "the host does not take memory of the guest back");
                }
                Err(_) => {}
            }
            at = at.saturating_add(part.max(PAGE));
        }
        self.shared.refused.add(length.saturating_sub(given));
        given
    }

    fn take_statistics(&self) {
        let (told, _) = self.data.as_chunks::<STATISTIC>();
        for [low, high, value @ ..] in told {
            let tag = usize::from(u16::from_le_bytes([*low, *high]));
            if let Some(statistic) = self.shared.statistics.get(tag) {
                statistic.store(u64::from_le_bytes(*value), Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests;
