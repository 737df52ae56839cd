//! How eagerly a worker takes requests.
//!
//! On a host whose processors are all busy, a worker that takes each request as soon as it is there makes each cost a kick, an
//! interrupt and context switches of its own. There are two ways to take several at once:
//! - Not to preempt (`SCHED_BATCH`, sched(7)): a worker that sleeps a lot preempts whoever runs where it is woken, such as
//!   the vCPU whose driver just kicked for the first of many requests. Without, it runs when that vCPU halts or its slice ends.
//! - To ask the driver to kick only when some requests are available, and to wait for them a bounded time.
//!
//! Both make a lone request wait, so neither is for a driver that waits for each (depth 1), where requests are so large that
//! what comes with each is little beside their work ([`Tuning::large`]), or where they gain nothing. Which
//! is best cannot be known beforehand: from time to time the neighbours of the present [level](LEVELS) are tried for some
//! hundred requests, and the one stays with which most come through.

use std::time::{Duration, Instant};

use super::Taken;

/// What suits a kind of device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tuning {
    /// The most that requests wait for each other.
    pub longest: Duration,
    /// Requests that are looked at together.
    pub episode: u32,
    /// How many times as much has to come through for a change of level: less may be chance.
    pub gain: f64,
    /// The level to begin with, and to go back to where nothing is gained.
    pub first: usize,
    /// The work of a request, on average, from which on each is taken as soon as it is there; it ends at a quarter of that.
    pub large: f64,
}

/// How a worker takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Level {
    /// Whether it waits until others have finished where it is woken.
    pub polite: bool,
    /// How many requests are to be available.
    pub goal: u16,
}

const LEVELS: [Level; 6] = [
    Level { polite: false, goal: 1 },
    Level { polite: true, goal: 1 },
    Level { polite: true, goal: 4 },
    Level { polite: true, goal: 8 },
    Level { polite: true, goal: 16 },
    Level { polite: true, goal: 32 },
];
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
/// Requests over which their average work is taken.
const REMEMBERED: f64 = 64.0;
/// Episodes between two tries: twice as many each time, as long as they fail.
const SOONEST: u32 = 4;
const LATEST: u32 = 256;
/// A driver that was idle for so long has begun something new.
const IDLE: Duration = Duration::from_millis(100);

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
pub(crate) struct Moderation {
    /// The level that is best as far as is known, and the one that is being tried.
    home: usize,
    tried: Option<usize>,
    /// Which of [`STEPS`] is next.
    step: usize,
    tuning: Tuning,
    /// What comes through, by level.
    rates: [Option<Rate>; LEVELS.len()],
    /// What they were at home when something was tried last.
    compared: f64,
    until: Option<Instant>,
    since: Instant,
    last: Instant,
    requests: u32,
    work: u64,
    batches: u32,
    /// The work of a request, on average, and whether that is much.
    size: f64,
    large: bool,
    /// Waits for more than the driver had, though it had nothing else to wait for.
    vain: u32,
    /// Episodes until the next try.
    left: u32,
    backoff: u32,
}

impl Moderation {
    pub fn new(tuning: Tuning, now: Instant) -> Self {
        Self {
            home: tuning.first,
            tried: None,
            step: 0,
            tuning,
            rates: [None; LEVELS.len()],
            compared: 0.0,
            until: None,
            since: now,
            last: now,
            requests: 0,
            work: 0,
            batches: 0,
            size: 0.0,
            large: false,
            vain: 0,
            left: 1,
            backoff: SOONEST,
        }
    }

    /// At a level, for as long as no episode ends.
    #[cfg(test)]
    pub fn at(level: usize, tuning: Tuning, now: Instant) -> Self {
        Self { home: level, ..Self::new(tuning, now) }
    }

    /// How the worker is to take requests.
    pub fn level(&self) -> Level {
        let [first, ..] = LEVELS;
        LEVELS.get(self.index()).copied().unwrap_or(first)
    }

    /// Whether that is less eagerly than could be.
    pub fn is_on(&self) -> bool {
        self.index() > 0
    }

    fn index(&self) -> usize {
        if self.large { 0 } else { self.tried.unwrap_or(self.home) }
    }

    fn rate(&self, level: usize) -> Rate {
        self.rates.get(level).copied().flatten().unwrap_or_default()
    }

    /// How long the next requests are still to gather, if `waiting` have, and `flying` are worked on; `None`: they are to be
    /// taken.
    pub fn rest(&mut self, waiting: u16, flying: usize, now: Instant) -> Option<Duration> {
        let goal = self.level().goal;
        if waiting >= goal || goal == 1 {
            self.until = None;
            return None;
        }
        if self.until.is_none() && waiting > 0 {
            self.until = Some(now + self.pause(goal));
        }
        let rest = self.until?.saturating_duration_since(now);
        if rest.is_zero() {
            self.until = None;
            self.vain += u32::from(flying == 0 && waiting > 0);
            return None;
        }
        Some(rest)
    }

    /// The most that requests wait for each other: what as many take with the level to begin with.
    fn pause(&self, goal: u16) -> Duration {
        Duration::from_secs_f64(f64::from(goal) / self.rate(self.tuning.first).requests.max(1.0))
            .min(self.tuning.longest)
    }

    /// A batch of requests (at least one) was taken.
    pub fn taken(&mut self, taken: Taken, now: Instant) {
        if now.saturating_duration_since(self.last) > IDLE {
            *self = Self { left: self.left.min(2), backoff: self.backoff, ..Self::new(self.tuning, now) };
        }
        self.last = now;
        if self.is_large(taken) {
            (self.tried, self.until) = (None, None);
            self.begin(now);
            return;
        }
        self.requests = self.requests.saturating_add(taken.count);
        self.work = self.work.saturating_add(taken.work);
        self.batches += 1;
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
        let goal = self.level().goal;
        self.until = (goal > 1).then(|| now + self.pause(goal));
    }

    /// Whether requests are large, as far as these tell.
    fn is_large(&mut self, taken: Taken) -> bool {
        let count = f64::from(taken.count.max(1));
        self.size += (taken.work as f64 / count - self.size) * (count / REMEMBERED).min(1.0);
        self.large = self.size > if self.large { self.tuning.large / 4.0 } else { self.tuning.large };
        self.large
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
                // Perhaps there is one that is better still.
                (self.home, self.tried, self.step) = (tried, None, if tried > self.home { UPWARDS } else { DOWNWARDS });
                (self.left, self.backoff) = (1, SOONEST);
            }
            Some(_) => self.tried_in_vain(),
        }
    }

    fn try_another(&mut self) {
        let small = self.batches.saturating_mul(SMALL) > self.requests;
        self.compared = self.rate(self.home).work;
        for _ in STEPS {
            let step = STEPS.get(self.step).copied().unwrap_or(1);
            self.step = (self.step + 1) % STEPS.len();
            let next = self.home.checked_add_signed(step).filter(|next| *next < LEVELS.len());
            // Greater batches than that have nothing to gain upwards.
            if let Some(next) = next
                && (small || self.home > self.tuning.first || next < self.home)
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

#[cfg(test)]
mod tests {
    use super::*;

    const TUNING: Tuning =
        Tuning { longest: Duration::from_millis(4), episode: 256, gain: 1.1, first: 0, large: 1000.0 };

    /// A driver with requests outstanding, and a worker.
    struct Model {
        moderation: Moderation,
        now: Instant,
        /// Microseconds: what a request costs the driver, and to change between driver and worker; and how long a polite
        /// worker waits for others.
        request: u32,
        change: u32,
        others: u32,
        depth: u32,
        /// Whether the worker runs beside the driver: then politeness is for nothing.
        beside: bool,
        /// The work of a request.
        work: u64,
        /// Requests taken with another level than the first, and all.
        moderated: u32,
        total: u32,
    }

    impl Model {
        fn new(request: u32, change: u32, others: u32, depth: u32) -> Self {
            let (now, beside) = (Instant::now(), false);
            let moderation = Moderation::new(TUNING, now);
            Self { moderation, now, request, change, others, depth, beside, work: 1, moderated: 0, total: 0 }
        }

        /// One batch; gives how many came.
        fn batch(&mut self) -> u32 {
            let level = self.moderation.level();
            let polite = level.polite && !self.beside;
            let mut came = if polite { self.depth } else { 1 };
            let waited = if polite { self.others } else { 0 };
            self.now += Duration::from_micros(u64::from(came * self.request + waited));
            // Those that gather: the kick comes with the last.
            while came < self.depth && self.moderation.rest(u16::try_from(came).unwrap(), 0, self.now).is_some() {
                came += 1;
                self.now += Duration::from_micros(u64::from(self.request));
            }
            while let Some(rest) = self.moderation.rest(u16::try_from(came).unwrap(), 0, self.now) {
                self.now += rest;
            }
            self.now += Duration::from_micros(u64::from(self.change));
            self.moderation.taken(Taken { count: came, work: u64::from(came) * self.work }, self.now);
            self.total += came;
            self.moderated += if level == LEVELS[0] { 0 } else { came };
            came
        }

        /// Gives the requests per second.
        fn run(&mut self, batches: u32) -> f64 {
            let start = self.now;
            (self.moderated, self.total) = (0, 0);
            let sum: u32 = (0..batches).map(|_| self.batch()).sum();
            f64::from(sum) / self.now.duration_since(start).as_secs_f64()
        }
    }

    #[test]
    fn a_worker_waits_for_the_driver_where_more_requests_come_through() {
        let mut model = Model::new(100, 400, 0, 32);
        let first = model.run(100);
        model.run(4000);
        let then = model.run(4000);
        assert!(then > 3.0 * first, "{then} and {first} requests a second");
    }

    #[test]
    fn requests_gather_beside_a_driver_that_the_worker_does_not_preempt() {
        let mut model = Model::new(100, 400, 0, 32);
        model.beside = true;
        let first = model.run(100);
        model.run(4000);
        let then = model.run(4000);
        assert!(model.moderation.level().goal > 4, "{:?}", model.moderation);
        assert!(then > 2.0 * first, "{then} and {first} requests a second");
    }

    #[test]
    fn a_driver_that_waits_for_each_request_is_hardly_ever_tried() {
        let mut model = Model::new(100, 400, 3000, 1);
        model.run(200_000);
        model.run(200_000);
        assert!(model.moderated * 1000 < model.total, "{} of {}", model.moderated, model.total);
    }

    #[test]
    fn a_driver_that_has_nothing_of_it_is_hardly_ever_tried() {
        // Others keep the processor busy for longer than the changes cost.
        let mut model = Model::new(100, 0, 20_000, 32);
        model.run(200_000);
        model.run(200_000);
        assert!(model.moderated * 50 < model.total, "{} of {}", model.moderated, model.total);
    }

    #[test]
    fn what_was_tried_in_vain_is_tried_again_at_once_when_less_comes_through_than_then() {
        let mut model = Model::new(100, 0, 3000, 32);
        model.run(60_000);
        while model.moderation.left < LATEST / 2 {
            model.run(1);
        }
        (model.change, model.others) = (400, 0);
        model.run(20 * TUNING.episode);
        assert!(model.moderation.home > 0, "{:?}", model.moderation);
    }

    #[test]
    fn a_worker_that_begins_politely_stays_so_unless_others_keep_it_waiting_for_long() {
        for (others, polite) in [(0, true), (3000, false)] {
            let mut model = Model::new(100, 400, others, 1);
            model.moderation = Moderation::new(Tuning { first: 1, ..TUNING }, model.now);
            model.run(20_000);
            assert_eq!(LEVELS[model.moderation.home].polite, polite, "{:?}", model.moderation);
        }
    }

    #[test]
    fn large_requests_are_taken_at_once_whatever_would_gain_and_small_ones_after_them_are_not() {
        let mut model = Model::new(100, 400, 0, 32);
        while model.moderation.level() == LEVELS[0] {
            model.run(1);
        }
        model.work = 2000;
        model.run(200);
        model.run(2000);
        assert_eq!(model.moderated, 0);
        model.work = 1;
        model.run(4000);
        assert!(model.moderation.is_on(), "{:?}", model.moderation);
    }

    #[test]
    fn after_a_break_requests_are_taken_at_once() {
        let mut model = Model::new(100, 400, 0, 32);
        while model.moderation.level() == LEVELS[0] {
            model.run(1);
        }
        model.now += 2 * IDLE;
        model.moderation.taken(Taken { count: 1, work: 1 }, model.now);
        assert_eq!(model.moderation.level(), LEVELS[0]);
        assert_eq!(model.moderation.rest(1, 0, model.now), None);
    }

    #[test]
    fn nothing_gathers_for_longer_than_the_limit() {
        let mut slow = Model::new(5000, 5000, 0, 32);
        slow.beside = true;
        for _ in 0..5000 {
            slow.run(1);
            assert!(slow.moderation.rest(0, 1, slow.now).is_none_or(|rest| rest <= TUNING.longest));
        }
    }
}
