//! Counters that hot paths bump and the metrics endpoint reads: plain relaxed atomics, no locks, no allocation.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The present value.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The present value.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Number of finite latency buckets: bucket `i` counts durations of at most 2^i microseconds (1 µs to about 34 s).
pub const LATENCY_BUCKETS: usize = 26;

/// A histogram of durations in powers of two of a microsecond.
#[derive(Debug, Default)]
pub struct Latency {
    buckets: [AtomicU64; LATENCY_BUCKETS],
    above: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Latency {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let microseconds = nanoseconds.div_ceil(1000).max(1);
        let index = usize::try_from(microseconds.next_power_of_two().trailing_zeros()).unwrap_or(usize::MAX);
        self.buckets.get(index).unwrap_or(&self.above).fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// What was counted so far.
    #[must_use]
    pub fn snapshot(&self) -> LatencySnapshot {
        let buckets = std::array::from_fn(|i| self.buckets.get(i).map_or(0, |b| b.load(Ordering::Relaxed)));
        LatencySnapshot {
            buckets,
            above: self.above.load(Ordering::Relaxed),
            sum: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
        }
    }
}

/// A [`Latency`] at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatencySnapshot {
    /// Durations of at most 2^i microseconds that were not in a smaller bucket.
    pub buckets: [u64; LATENCY_BUCKETS],
    /// Durations above the last bucket.
    pub above: u64,
    /// All durations together.
    pub sum: Duration,
}

/// What a sample says.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A number that only grows.
    Counter(u64),
    /// A number that goes up and down.
    Gauge(f64),
    /// A distribution of durations, in seconds when it is shown.
    Latency(Box<LatencySnapshot>),
}

/// One metric at one moment, as `GET /v1/metrics` shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Name without prefix and suffix, in snake case: `disk_read_bytes`.
    pub name: &'static str,
    /// One sentence for the operator.
    pub help: &'static str,
    /// Names and values that tell samples of one name apart: `("queue", "0")`.
    pub labels: Vec<(&'static str, String)>,
    /// The value.
    pub value: Value,
}

/// Something that can be asked for its metrics at any time, from any thread.
pub trait MetricSource: Send + Sync {
    /// Hands every sample to `visit`. Samples of one name need not follow each other.
    fn collect(&self, visit: &mut dyn FnMut(Sample));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_falls_into_the_smallest_power_of_two_microseconds_that_holds_it() {
        let latency = Latency::default();
        for nanoseconds in [0, 1, 1000, 1001, 2000, 3000, 4000] {
            latency.record(Duration::from_nanos(nanoseconds));
        }
        latency.record(Duration::from_secs(60));
        latency.record(Duration::MAX);
        let seen = latency.snapshot();
        assert_eq!(seen.buckets[..3], [3, 2, 2]);
        assert_eq!(seen.above, 2);
    }
}
