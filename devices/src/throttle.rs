//! Keeps log lines that a guest can cause from filling the operator's disk.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a window of [`Throttle`] lasts.
const WINDOW: Duration = Duration::from_secs(10);

/// Lines let through in one window.
const LINES: u32 = 5;

/// Lets five log lines through in ten seconds and counts the rest.
#[derive(Debug, Default)]
pub(crate) struct Throttle(Mutex<Option<Window>>);

#[derive(Debug)]
struct Window {
    start: Instant,
    passed: u32,
    suppressed: u64,
}

impl Throttle {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// `Some(n)` if a line may be written now, where `n` lines were held back since the last one that was written.
    pub(crate) fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let window = guard.get_or_insert(Window { start: now, passed: 0, suppressed: 0 });
        if now.saturating_duration_since(window.start) >= WINDOW {
            window.start = now;
            window.passed = 0;
        }
        if window.passed < LINES {
            window.passed += 1;
            return Some(std::mem::take(&mut window.suppressed));
        }
        window.suppressed = window.suppressed.saturating_add(1);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_lines_pass_in_ten_seconds_and_the_next_one_tells_how_many_were_held_back() {
        let throttle = Throttle::new();
        let start = Instant::now();
        for _ in 0..5 {
            assert_eq!(throttle.pass_at(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(throttle.pass_at(start + Duration::from_secs(9)), None);
        }
        assert_eq!(throttle.pass_at(start + Duration::from_secs(10)), Some(7));
        assert_eq!(throttle.pass_at(start + Duration::from_secs(10)), Some(0));
    }
}
