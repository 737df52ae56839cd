//! Where the chipset's clocks take their time from, so that tests can turn it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Time as the chipset sees it.
pub trait Clock: Send + Sync {
    /// Nanoseconds since some fixed moment; never goes back.
    fn monotonic(&self) -> u64;

    /// Nanoseconds since 1970-01-01 00:00 UTC; jumps when the host's clock is set.
    fn realtime(&self) -> i128;
}

/// The host's clocks. Monotonic time starts with the clock's making.
#[derive(Debug)]
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    /// A clock that starts now.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn monotonic(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn realtime(&self) -> i128 {
        let nanoseconds = |duration: Duration| i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX);
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => nanoseconds(since),
            Err(before) => -nanoseconds(before.duration()),
        }
    }
}
