//! The search for the level with which most comes through. It cannot be known beforehand, and changes: from time to time the
//! neighbours of the present level are tried for some hundred requests, and the one stays that is best.

use std::time::{Duration, Instant};

use super::Taken;
use super::moderation::{LEVELS, Level, Tuning};

/// What is tried in turn, from the present level: first what gains most where there is anything to gain.
const STEPS: [isize; 5] = [3, 1, -1, 2, -2];
/// Those that go on from a level that was better, upwards and downwards.
const UPWARDS: usize = 1;
const DOWNWARDS: usize = 2;
/// A try ends after so many batches already if nothing gathers, after so many waits for what the driver does not have if most
/// batches were such, and when it takes so many times as long as without.
const PROBE: u32 = 8;
const VAIN: u32 = 3;
const SLOWER: f64 = 2.0;
/// Smaller batches than this on average are worth a try.
const SMALL: u32 = 4;
/// What a new episode weighs in what is known of its level.
const NEW: f64 = 0.5;
/// Less than this of what came through when something was tried last, and the next try need not wait.
const WORSE: f64 = 0.7;
/// Episodes between two tries: twice as many each time, as long as they fail.
const SOONEST: u32 = 4;
pub(super) const LATEST: u32 = 256;

/// What comes through per second.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    requests: f64,
    work: f64,
}

impl Rate {
    /// Learns what came through lately.
    fn update(self, new: Self) -> Self {
        let mean = |known: f64, new: f64| known + (new - known) * NEW;
        Self { requests: mean(self.requests, new.requests), work: mean(self.work, new.work) }
    }
}

#[derive(Debug)]
pub(super) struct Search {
    tuning: Tuning,
    /// The level that is best as far as is known, and the one that is being tried.
    home: usize,
    tried: Option<usize>,
    /// Which of [`STEPS`] is next.
    step: usize,
    /// What comes through, by level.
    rates: [Option<Rate>; LEVELS.len()],
    /// What they were at home when something was tried last.
    compared: f64,
    since: Instant,
    requests: u32,
    work: u64,
    batches: u32,
    /// Waits for more than the driver had, though it had nothing else to wait for.
    vain: u32,
    /// Episodes until the next try.
    left: u32,
    backoff: u32,
}

impl Search {
    pub fn new(tuning: Tuning, now: Instant) -> Self {
        Self {
            tuning,
            home: tuning.first,
            tried: None,
            step: 0,
            rates: [None; LEVELS.len()],
            compared: 0.0,
            since: now,
            requests: 0,
            work: 0,
            batches: 0,
            vain: 0,
            left: 1,
            backoff: SOONEST,
        }
    }

    /// At a level, for as long as no episode ends.
    #[cfg(test)]
    pub fn settle_at(&mut self, level: usize) {
        self.home = level;
    }

    /// For a driver that has begun something new: what was tried in vain need not be so again at once.
    pub fn anew(&self, now: Instant) -> Self {
        Self { left: self.left.min(2), backoff: self.backoff, ..Self::new(self.tuning, now) }
    }

    /// The level that is in force.
    pub fn index(&self) -> usize {
        self.tried.unwrap_or(self.home)
    }

    /// The level that is best as far as is known.
    #[cfg(test)]
    pub fn home(&self) -> usize {
        self.home
    }

    /// Episodes until the next try.
    #[cfg(test)]
    pub fn left(&self) -> u32 {
        self.left
    }

    /// How to take requests.
    pub fn level(&self) -> Level {
        LEVELS.get(self.index()).copied().unwrap_or_default()
    }

    /// Requests that come through in a second with the level to begin with.
    pub fn first_rate(&self) -> f64 {
        self.rate(self.tuning.first).requests
    }

    /// A wait for more requests was over before they came, and there was nothing else to wait for.
    pub fn waited_in_vain(&mut self) {
        self.vain = self.vain.saturating_add(1);
    }

    /// Other kinds of requests came in between: what was being tried is not known.
    pub fn interrupted(&mut self, now: Instant) {
        self.tried = None;
        self.begin(now);
    }

    /// A batch of requests (at least one) was taken.
    pub fn taken(&mut self, taken: Taken, now: Instant) {
        self.requests = self.requests.saturating_add(taken.count);
        self.work = self.work.saturating_add(taken.work);
        self.batches = self.batches.saturating_add(1);
        let time = now.saturating_duration_since(self.since).max(Duration::from_micros(1)).as_secs_f64();
        let rate = Rate { requests: f64::from(self.requests) / time, work: self.work as f64 / time };
        let alone = self.batches >= PROBE && self.batches.saturating_mul(2) > self.requests;
        let slow =
            self.tried.is_some() && time * self.rate(self.home).requests > SLOWER * f64::from(self.tuning.episode);
        let vain = self.vain >= VAIN && self.vain.saturating_mul(2) > self.batches;
        if self.index() > self.tuning.first && (alone || vain) {
            self.unsuited();
            self.begin(now);
        } else if self.requests >= self.tuning.episode || slow {
            self.learn(rate);
            self.begin(now);
        }
    }

    fn rate(&self, level: usize) -> Rate {
        self.rates.get(level).copied().flatten().unwrap_or_default()
    }

    /// What is tried does not suit the driver; if nothing was, the present level does not any more.
    fn unsuited(&mut self) {
        let index = self.index();
        self.set_rate(index, Rate::default());
        if self.tried.is_none() {
            self.home -= 1;
        }
        self.tried_in_vain();
    }

    fn set_rate(&mut self, level: usize, rate: Rate) {
        if let Some(known) = self.rates.get_mut(level) {
            *known = Some(rate);
        }
    }

    /// An episode is over.
    fn learn(&mut self, rate: Rate) {
        let level = self.index();
        // What a try gave long ago says nothing of today.
        let known = self.rates.get(level).copied().flatten().filter(|_| self.tried.is_none());
        self.set_rate(level, known.map_or(rate, |known| known.update(rate)));
        match self.tried {
            None => {
                let worse = self.rate(self.home).work < self.compared * WORSE;
                self.left = if worse { 0 } else { self.left.saturating_sub(1) };
                if self.left == 0 {
                    self.try_another();
                }
            }
            Some(tried) if self.is_better(tried) => {
                (self.step, self.home, self.tried) = (if tried > self.home { UPWARDS } else { DOWNWARDS }, tried, None);
                // Perhaps there is one that is better still.
                (self.left, self.backoff) = (1, SOONEST);
            }
            Some(_) => self.tried_in_vain(),
        }
    }

    fn try_another(&mut self) {
        let may_gain = self.batches.saturating_mul(SMALL) > self.requests;
        self.compared = self.rate(self.home).work;
        for _ in STEPS {
            let step = STEPS.get(self.step).copied().unwrap_or(1);
            self.step = (self.step + 1) % STEPS.len();
            let next = self.home.checked_add_signed(step).filter(|next| *next < LEVELS.len());
            // Greater batches than that have nothing to gain upwards.
            if let Some(next) = next
                && (may_gain || self.home > self.tuning.first || next < self.home)
            {
                self.tried = Some(next);
                return;
            }
        }
        self.left = SOONEST;
    }

    fn tried_in_vain(&mut self) {
        (self.tried, self.left) = (None, self.backoff);
        self.backoff = self.backoff.saturating_mul(2).min(LATEST);
    }

    fn is_better(&self, tried: usize) -> bool {
        let (home, other) = (self.rate(self.home).work, self.rate(tried).work);
        // Where nothing is gained, nothing waits.
        if tried == self.tuning.first { other > home } else { other >= home * self.tuning.gain }
    }

    fn begin(&mut self, now: Instant) {
        (self.since, self.requests, self.work, self.batches, self.vain) = (now, 0, 0, 0, 0);
    }
}
