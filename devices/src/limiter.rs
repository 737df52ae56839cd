//! Limits on requests (or frames) and bytes per second: token buckets that may go into debt.
//!
//! A request may start while no bucket is in debt, and is charged whole, so a large one is never cut and never starves:
//! the next one waits until its debt is paid. On average the rate is exact whatever the sizes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The longest that a throttled queue sleeps before it looks at its limits again, which may have changed.
pub(crate) const THROTTLE_SLICE: Duration = Duration::from_millis(100);

/// The rate of one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units per second; 0 counts as 1.
    pub per_second: u64,
    /// Units that may come at once after a pause. `None`: what comes in a tenth of a second.
    pub burst: Option<u64>,
}

/// What may be done per second; `None` is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests of a disk, but for flushes; frames of a NIC.
    pub ops: Option<Rate>,
    /// Bytes that are moved.
    pub bytes: Option<Rate>,
}

/// A bucket as the time at which it has no debt: in the past by as much as it is full.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_second: u64,
    /// Nanoseconds that it may lie in the past.
    depth: u64,
    /// Nanoseconds since the limiter's epoch.
    solvent: i128,
}

const SECOND: u128 = 1_000_000_000;
/// The default burst, in nanoseconds.
const DEFAULT_DEPTH: u64 = 100_000_000;

impl Bucket {
    fn new(rate: Rate, now: i128) -> Self {
        let per_second = rate.per_second.max(1);
        let depth = |burst: u64| time_of(burst, per_second);
        let depth = rate.burst.map_or(DEFAULT_DEPTH, depth);
        // A change of the limits is no gift: it starts empty.
        Self { per_second, depth, solvent: now }
    }

    fn wait(&self, now: i128) -> u64 {
        u64::try_from((self.solvent - now).clamp(0, i128::from(u64::MAX))).unwrap_or(0)
    }

    fn charge(&mut self, units: u64, now: i128) {
        self.solvent = self.solvent.max(now - i128::from(self.depth)) + i128::from(time_of(units, self.per_second));
    }
}

/// Nanoseconds in which `units` come.
fn time_of(units: u64, per_second: u64) -> u64 {
    u64::try_from(u128::from(units) * SECOND / u128::from(per_second)).unwrap_or(u64::MAX)
}

#[derive(Debug, Default)]
struct Buckets {
    ops: Option<Bucket>,
    bytes: Option<Bucket>,
}

/// Holds requests to [`Limits`], which may change at any time. Several queues and disks may share it.
#[derive(Debug)]
pub struct Limiter {
    epoch: Instant,
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
}

impl Limiter {
    /// A limiter with these limits.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let limiter = Self { epoch: Instant::now(), limited: AtomicBool::new(false), buckets: Mutex::default() };
        limiter.set(limits);
        limiter
    }

    /// Other limits from now on. Who waits for the old ones looks again within a tenth of a second.
    pub fn set(&self, limits: Limits) {
        let now = self.nanoseconds(Instant::now());
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        *buckets = Buckets { ops: bucket(limits.ops), bytes: bucket(limits.bytes) };
        self.limited.store(limits != Limits::default(), Ordering::Release);
    }

    /// Whether there are any limits.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    /// How long the next request has to wait, if it has to.
    #[must_use]
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        if !self.is_on() {
            return None;
        }
        let now = self.nanoseconds(now);
        let buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = [&buckets.ops, &buckets.bytes].map(|bucket| bucket.as_ref().map_or(0, |bucket| bucket.wait(now)));
        let longest = waits.into_iter().max().unwrap_or(0);
        (longest > 0).then(|| Duration::from_nanos(longest))
    }

    /// A request with this many bytes has started.
    pub fn charge(&self, bytes: u64, now: Instant) {
        if !self.is_on() {
            return;
        }
        let now = self.nanoseconds(now);
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets { ops, bytes: volume } = &mut *buckets;
        if let Some(bucket) = ops {
            bucket.charge(1, now);
        }
        if let Some(bucket) = volume {
            bucket.charge(bytes, now);
        }
    }

    fn nanoseconds(&self, now: Instant) -> i128 {
        i128::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(i128::MAX >> 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(ops: Option<(u64, Option<u64>)>, bytes: Option<(u64, Option<u64>)>) -> Limits {
        let rate = |rate: Option<(u64, Option<u64>)>| rate.map(|(per_second, burst)| Rate { per_second, burst });
        Limits { ops: rate(ops), bytes: rate(bytes) }
    }

    /// Requests of these sizes in turn, each as early as it may start, for a time; gives their number and bytes.
    fn run(limiter: &Limiter, sizes: &[u64], time: Duration) -> (u64, u64) {
        let start = Instant::now();
        let (mut now, mut done) = (start, (0, 0));
        for size in sizes.iter().cycle() {
            now += limiter.wait(now).unwrap_or_default();
            if now >= start + time {
                break;
            }
            limiter.charge(*size, now);
            done = (done.0 + 1, done.1 + size);
        }
        done
    }

    #[test]
    fn the_rate_is_exact_in_the_long_run_whatever_the_sizes() {
        for (sizes, rate) in [(vec![4096], 1 << 20), (vec![512, 1 << 20, 4096], 3 << 20), (vec![8 << 20], 1 << 20)] {
            let limiter = Limiter::new(limits(None, Some((rate, Some(4096)))));
            let (_, bytes) = run(&limiter, &sizes, Duration::from_secs(100));
            let error = bytes.abs_diff(rate * 100);
            assert!(error <= 4096 + (8 << 20), "{bytes} bytes at {rate} per second");
            assert!(bytes <= rate * 100 + 4096 + sizes.iter().max().unwrap());
        }
        let limiter = Limiter::new(limits(Some((1000, Some(1))), None));
        let (ops, _) = run(&limiter, &[4096], Duration::from_secs(10));
        assert!((10_000..=10_002).contains(&ops), "{ops}");
    }

    #[test]
    fn the_tighter_of_two_limits_counts() {
        let limiter = Limiter::new(limits(Some((100, Some(1))), Some((1 << 20, Some(1)))));
        let (ops, _) = run(&limiter, &[512], Duration::from_secs(10));
        assert!((1000..=1002).contains(&ops), "{ops}");
        let (_, bytes) = run(&limiter, &[1 << 20], Duration::from_secs(10));
        assert!(bytes <= 12 << 20, "{bytes}");
    }

    #[test]
    fn a_pause_earns_the_burst_and_no_more() {
        let limiter = Limiter::new(limits(Some((1000, Some(50))), None));
        let later = Instant::now() + Duration::from_secs(3600);
        let mut started = 0;
        while limiter.wait(later).is_none() {
            limiter.charge(0, later);
            started += 1;
        }
        assert!((50..=51).contains(&started), "{started}");
    }

    #[test]
    fn extreme_rates_and_sizes_neither_overflow_nor_stop_for_ever() {
        let now = Instant::now();
        let limiter = Limiter::new(limits(Some((1, Some(u64::MAX))), Some((1, Some(u64::MAX)))));
        for _ in 0..1000 {
            limiter.charge(u64::MAX, now);
        }
        assert!(limiter.wait(now).is_some());
        limiter.set(limits(Some((u64::MAX, None)), Some((u64::MAX, None))));
        limiter.charge(u64::from(u32::MAX), now);
        assert!(limiter.wait(now + Duration::from_millis(1)).is_none());
        limiter.set(Limits::default());
        limiter.charge(u64::MAX, now);
        assert!(limiter.wait(now).is_none());
    }

    #[test]
    fn new_limits_count_from_now_on() {
        let now = Instant::now();
        let limiter = Limiter::new(limits(Some((1, Some(1))), None));
        limiter.charge(0, now);
        limiter.charge(0, now);
        assert!(limiter.wait(now).is_some_and(|wait| wait > Duration::from_millis(500)));
        limiter.set(limits(Some((1_000_000, None)), None));
        assert!(limiter.wait(now + Duration::from_millis(1)).is_none());
    }
}
