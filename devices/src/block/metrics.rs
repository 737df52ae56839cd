//! What is counted of a disk, queue by queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::metrics::{Counter, Gauge, Latency, MetricSource, Sample, Value};

use super::backend::Operation;

/// Counters of one kind of request.
#[derive(Debug, Default)]
pub struct OperationMetrics {
    /// Requests that ended, well or not.
    pub requests: Counter,
    /// Requests that ended with an error of the host.
    pub errors: Counter,
    /// From taking the request off the ring to its end.
    pub latency: Latency,
}

/// Counters of one queue. The worker writes them, anybody may read them.
#[derive(Debug)]
pub struct QueueMetrics {
    operations: [OperationMetrics; 5],
    /// Bytes that reads gave.
    pub read_bytes: Counter,
    /// Bytes that writes took.
    pub written_bytes: Counter,
    /// Requests that were refused for what they asked: bad range, bad type.
    pub refused: Counter,
    /// Requests in flight.
    pub depth: Gauge,
    /// Kicks that woke the worker.
    pub kicks: Counter,
    /// Times that the worker found work without having slept.
    pub polled: Counter,
    /// Requests that the worker was less eager to take, so that more come at once.
    pub moderated: Counter,
    /// Interrupts that were sent.
    pub interrupts: Counter,
    /// Requests whose buffers were misaligned and had to be copied.
    pub bounced: Counter,
    /// Failed requests that are kept until the queue is started anew.
    pub held: Gauge,
    /// How often requests had to wait for a limit.
    pub throttled: Counter,
    /// How often the driver broke the ring.
    pub broken: Counter,
    /// When each request in flight was taken, in nanoseconds since `epoch` plus one; 0: none.
    started: Box<[AtomicU64]>,
    epoch: Instant,
}

const NAMES: [&str; 5] = ["read", "write", "flush", "discard", "write_zeroes"];

fn position(operation: Operation) -> usize {
    match operation {
        Operation::Read => 0,
        Operation::Write { .. } => 1,
        Operation::Flush => 2,
        Operation::Discard => 3,
        Operation::WriteZeroes { .. } => 4,
    }
}

/// The name of an operation, as labels and log lines have it.
#[must_use]
pub fn name(operation: Operation) -> &'static str {
    NAMES.get(position(operation)).copied().unwrap_or("other")
}

impl QueueMetrics {
    /// For a queue with `depth` requests at most.
    #[must_use]
    pub fn new(depth: u16) -> Self {
        Self {
            operations: Default::default(),
            read_bytes: Counter::default(),
            written_bytes: Counter::default(),
            refused: Counter::default(),
            depth: Gauge::default(),
            kicks: Counter::default(),
            polled: Counter::default(),
            moderated: Counter::default(),
            interrupts: Counter::default(),
            bounced: Counter::default(),
            held: Gauge::default(),
            throttled: Counter::default(),
            broken: Counter::default(),
            started: (0..depth).map(|_| AtomicU64::new(0)).collect(),
            epoch: Instant::now(),
        }
    }

    /// The counters of this kind of request.
    #[must_use]
    pub fn operation(&self, operation: Operation) -> &OperationMetrics {
        let [first, ..] = &self.operations;
        self.operations.get(position(operation)).unwrap_or(first)
    }

    /// Request `id` is in flight since `now`.
    pub fn begin(&self, id: u16, now: Instant) {
        let nanoseconds = u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX - 1);
        if let Some(started) = self.started.get(usize::from(id)) {
            started.store(nanoseconds.saturating_add(1), Ordering::Relaxed);
        }
    }

    /// Request `id` is no longer in flight.
    pub fn end(&self, id: u16) {
        if let Some(started) = self.started.get(usize::from(id)) {
            started.store(0, Ordering::Relaxed);
        }
    }

    /// Number and greatest age of requests in flight. Any thread may ask, also while the worker hangs.
    #[must_use]
    pub fn in_flight(&self) -> (u32, Duration) {
        let now = self.epoch.elapsed();
        let mut found = (0_u32, Duration::ZERO);
        for started in &self.started {
            let since = started.load(Ordering::Relaxed);
            if let Some(nanoseconds) = since.checked_sub(1) {
                found = (found.0 + 1, found.1.max(now.saturating_sub(Duration::from_nanos(nanoseconds))));
            }
        }
        found
    }
}

/// All counters of a disk.
#[derive(Debug)]
pub struct BlockMetrics {
    id: String,
    queues: Vec<Arc<QueueMetrics>>,
    /// Bytes, as the guest sees it.
    pub capacity: Gauge,
    /// 1 while a request is outstanding for too long.
    pub stalled: Gauge,
}

impl BlockMetrics {
    /// For disk `id` with queues of this depth.
    #[must_use]
    pub fn new(id: &str, queues: usize, depth: u16) -> Self {
        let queues = (0..queues).map(|_| Arc::new(QueueMetrics::new(depth))).collect();
        Self { id: id.to_owned(), queues, capacity: Gauge::default(), stalled: Gauge::default() }
    }

    /// The counters of each queue.
    #[must_use]
    pub fn queues(&self) -> &[Arc<QueueMetrics>] {
        &self.queues
    }

    /// Failed requests that are kept.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.queues.iter().map(|queue| queue.held.value()).sum()
    }

    /// Number and greatest age of all requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> (u32, Duration) {
        let each = self.queues.iter().map(|queue| queue.in_flight());
        each.fold((0, Duration::ZERO), |all, one| (all.0 + one.0, all.1.max(one.1)))
    }
}

impl MetricSource for BlockMetrics {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        let mut give = |name, help, labels, value| visit(Sample { name, help, labels, value });
        let disk = ("disk", self.id.clone());
        #[allow(clippy::cast_precision_loss)]
        let gauge = |value: u64| Value::Gauge(value as f64);
        let capacity = gauge(self.capacity.value());
        give("disk_capacity_bytes", "Size of the disk as the guest sees it.", vec![disk.clone()], capacity);
        let stalled = gauge(self.stalled.value());
        give("disk_stalled", "1 while a request is outstanding for too long.", vec![disk.clone()], stalled);
        let (_, oldest) = self.in_flight();
        let oldest = Value::Gauge(oldest.as_secs_f64());
        give("disk_oldest_request_seconds", "Age of the oldest request in flight.", vec![disk.clone()], oldest);
        for (index, queue) in self.queues.iter().enumerate() {
            let labels = vec![disk.clone(), ("queue", index.to_string())];
            let counters = [
                ("disk_read_bytes", "Bytes that the guest read.", &queue.read_bytes),
                ("disk_written_bytes", "Bytes that the guest wrote.", &queue.written_bytes),
                ("disk_refused_requests", "Requests refused for what they asked.", &queue.refused),
                ("disk_kicks", "Kicks by the guest that woke the worker.", &queue.kicks),
                ("disk_polls", "Times that the worker found work without having slept.", &queue.polled),
                ("disk_moderated_requests", "Requests taken less eagerly, for more to come at once.", &queue.moderated),
                ("disk_interrupts", "Interrupts sent to the guest.", &queue.interrupts),
                ("disk_bounced_requests", "Requests copied because their buffers were misaligned.", &queue.bounced),
                ("disk_throttled", "Times that requests had to wait for a limit.", &queue.throttled),
                ("disk_broken_rings", "Times that the driver broke the rules of the ring.", &queue.broken),
            ];
            for (name, help, counter) in counters {
                give(name, help, labels.clone(), Value::Counter(counter.value()));
            }
            give("disk_queue_depth", "Requests in flight.", labels.clone(), gauge(queue.depth.value()));
            let held = gauge(queue.held.value());
            give("disk_held_requests", "Failed requests that are kept until the VM is resumed.", labels.clone(), held);
            for (operation, name) in queue.operations.iter().zip(NAMES) {
                let mut labels = labels.clone();
                labels.push(("op", name.to_owned()));
                let requests = Value::Counter(operation.requests.value());
                give("disk_requests", "Requests that ended.", labels.clone(), requests);
                let errors = Value::Counter(operation.errors.value());
                give("disk_errors", "Requests that failed with an error of the host.", labels.clone(), errors);
                let latency = Value::Latency(Box::new(operation.latency.snapshot()));
                give("disk_request_seconds", "Time from the ring to the end of a request.", labels, latency);
            }
        }
    }
}
