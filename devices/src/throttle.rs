//! Keeps log lines that a guest can cause from filling the operator's disk.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a window of [`Throttle`] lasts.
const WINDOW: Duration = Duration::from_secs(10);

/// Lines let through in one window.
const LINES: u32 = 5;

/// Lets some log lines through in ten seconds, five if nothing else is said, and counts the rest.
#[derive(Debug)]
pub struct Throttle {
    lines: u32,
    window: Mutex<Option<Window>>,
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug)]
struct Window {
    start: Instant,
    passed: u32,
    suppressed: u64,
}

impl Throttle {
    /// Five lines in ten seconds.
    #[must_use]
    pub const fn new() -> Self {
        Self::of(LINES)
    }

    /// So many `lines` in ten seconds.
    #[must_use]
    pub const fn of(lines: u32) -> Self {
        Self { lines, window: Mutex::new(None) }
    }

    /// `Some(n)` if a line may be written now, where `n` lines were held back since the last one that was written.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut guard = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let window = guard.get_or_insert(Window { start: now, passed: 0, suppressed: 0 });
        if now.saturating_duration_since(window.start) >= WINDOW {
            window.start = now;
            window.passed = 0;
        }
        if window.passed < self.lines {
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
