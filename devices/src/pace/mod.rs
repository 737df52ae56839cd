//! When a worker takes what there is: how long it looks for more before it sleeps, and how eagerly it takes it ([`moderation`]).
//!
//! To sleep and be woken costs the host two context switches and the guest an exit. Where work follows within microseconds,
//! looking for it is cheaper for both; where it does not, looking is a waste. So the time follows from how long the worker
//! had to wait lately: nothing on an idle or a slow device, never more than [`LONGEST`].

pub(crate) mod moderation;
mod search;

use std::time::{Duration, Instant};

use self::moderation::{Moderation, Tuning};
use crate::scheduling::{self, Stance};

/// The most that is looked for work at a time.
pub(crate) const LONGEST: Duration = Duration::from_micros(32);
const SHORTEST: Duration = Duration::from_micros(4);

#[derive(Debug, Default)]
pub(crate) struct Polling {
    window: Duration,
}

impl Polling {
    /// How long to look for work now.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// Learns from one wait: how long it took from the last work to this, and whether there was any.
    pub fn waited(&mut self, time: Duration, worked: bool) {
        if !worked || time > LONGEST {
            self.window = Duration::ZERO;
        } else if time > self.window {
            self.window = (self.window * 2).clamp(SHORTEST, LONGEST);
        }
    }
}

/// What a worker knows of when work comes.
#[derive(Debug)]
pub(crate) struct Pace {
    pub polling: Polling,
    pub moderation: Moderation,
    /// When the ring was last found empty.
    pub settled: Instant,
    /// As it was taken last.
    stance: Stance,
}

/// What a worker has just taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    /// Requests or frames.
    pub count: u32,
    /// What came through with them: requests, or bytes where their sizes differ much.
    pub work: u64,
    /// How much of that the driver has given.
    pub given: u64,
}

impl Pace {
    /// A new driver's, of which nothing is known yet.
    pub fn begin(tuning: Tuning) -> Self {
        let now = Instant::now();
        let moderation = Moderation::new(tuning, now);
        let stance = moderation.stance();
        // Whatever the thread was for a former driver.
        let _ = scheduling::take(stance);
        Self { polling: Polling::default(), moderation, settled: now, stance }
    }

    /// The worker has nothing to do from now on that anybody waits for.
    pub fn stand_back(&mut self) {
        self.take(Stance::Last);
    }

    fn take(&mut self, stance: Stance) {
        if std::mem::replace(&mut self.stance, stance) != stance {
            // Where the host does not let a thread choose, it stays as it is.
            let _ = scheduling::take(stance);
        }
    }

    /// The worker woke at `now` from sleep, and found what it looks for (`worked`) or something else.
    pub fn woke(&mut self, now: Instant, worked: bool) {
        self.polling.waited(now.saturating_duration_since(self.settled), worked);
    }

    /// The worker took something at `now`.
    pub fn took(&mut self, now: Instant, taken: Taken) {
        if taken.count == 0 {
            return;
        }
        self.moderation.taken(taken, now);
        self.take(self.moderation.stance());
    }
}

/// Looks until there is something, at most for `window`; tells whether there was.
pub(crate) fn look(window: Duration, mut found: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        if found() {
            return true;
        }
        if begin.elapsed() >= window {
            return false;
        }
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(20);

    #[test]
    fn a_new_driver_finds_the_worker_as_it_begins_whatever_it_was_for_the_former_one() {
        let tuning = Tuning { longest: SOON, episode: 1, gain: 1.0, first: 0, large: 1.0, patient: Stance::Last };
        let before = scheduling::policy(0);
        Pace::begin(tuning).stand_back();
        assert_ne!(scheduling::policy(0), before);
        Pace::begin(tuning);
        assert_eq!(scheduling::policy(0), before);
    }

    #[test]
    fn work_that_comes_soon_is_looked_for_and_never_longer_than_the_limit() {
        let mut polling = Polling::default();
        assert_eq!(polling.window(), Duration::ZERO, "a disk that has done nothing yet costs nothing");
        for wanted in [4, 8, 16, 32, 32] {
            polling.waited(LONGEST, true);
            assert_eq!(polling.window(), Duration::from_micros(wanted));
        }
        let mut polling = Polling::default();
        (0..5).for_each(|_| polling.waited(SOON, true));
        assert_eq!(polling.window(), LONGEST, "enough to find it");
    }

    #[test]
    fn a_slow_or_idle_disk_and_kicks_for_nothing_end_it_at_once() {
        for (time, worked) in [(LONGEST * 2, true), (SOON, false)] {
            let mut polling = Polling::default();
            (0..5).for_each(|_| polling.waited(SOON, true));
            polling.waited(time, worked);
            assert_eq!(polling.window(), Duration::ZERO);
        }
    }

    #[test]
    fn a_look_ends_when_something_is_found_or_the_time_is_over() {
        let mut looks = 0;
        assert!(look(Duration::MAX, || {
            looks += 1;
            looks == 3
        }));
        assert_eq!(looks, 3);
        assert!(!look(SOON, || false));
    }
}
