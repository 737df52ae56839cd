//! How eagerly a worker takes requests.
//!
//! On a host whose processors are all busy, a worker that takes each request as soon as it is there makes each cost a kick, an
//! interrupt and context switches of its own. There are two ways to take several at once:
//! - Not to preempt ([`Tuning::patient`], sched(7)): a worker that sleeps a lot preempts whoever runs where it is woken, such as
//!   the vCPU whose driver just kicked for the first of many requests. Without, it runs when that vCPU halts or its slice ends.
//! - To ask the driver to kick only when some requests are available, and to wait for them a bounded time.
//!
//! Both make a lone request wait, so neither is for a driver that waits for each (depth 1), or where they gain nothing. Which
//! is best is found by [trying](super::search). Where requests are so large that what comes with each is little beside their
//! work ([`Tuning::large`]), and where most of that work is what the driver receives, nothing gathers, and nothing is tried.

use std::time::{Duration, Instant};

use super::Taken;
use super::search::Search;
use crate::scheduling::Stance;

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
    /// The place of a worker that does not preempt.
    pub patient: Stance,
}

/// How a worker takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Level {
    /// Whether it preempts whoever runs where it is woken.
    pub preempts: bool,
    /// How many requests are to be available.
    pub goal: u16,
}

impl Default for Level {
    fn default() -> Self {
        EAGER
    }
}

const fn patient(goal: u16) -> Level {
    Level { preempts: false, goal }
}

const EAGER: Level = Level { preempts: true, goal: 1 };
pub(super) const LEVELS: [Level; 6] = [EAGER, patient(1), patient(4), patient(8), patient(16), patient(32)];
/// Requests over which their average work is taken.
const REMEMBERED: f64 = 64.0;
/// A driver that was idle for so long has begun something new.
const IDLE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct Moderation {
    tuning: Tuning,
    search: Search,
    /// Whether requests are large: then they have nothing of waiting for each other.
    large: bool,
    /// Whether what the driver gives is little beside what it receives: there is nothing to gather, and who sends that is best
    /// left alone until it has sent all it has.
    inward: bool,
    until: Option<Instant>,
    last: Instant,
    /// The work of a request, on average, and how much of that the driver gives.
    size: f64,
    given: f64,
}

impl Moderation {
    pub fn new(tuning: Tuning, now: Instant) -> Self {
        let search = Search::new(tuning, now);
        Self { tuning, search, large: false, inward: false, until: None, last: now, size: 0.0, given: 0.0 }
    }

    /// At a level, for as long as no episode ends.
    #[cfg(test)]
    pub fn at(level: usize, tuning: Tuning, now: Instant) -> Self {
        let mut moderation = Self::new(tuning, now);
        moderation.search.settle_at(level);
        moderation
    }

    /// How the worker is to take requests.
    pub fn level(&self) -> Level {
        if self.gathers() { self.search.level() } else { LEVELS.get(self.tuning.first).copied().unwrap_or_default() }
    }

    /// The worker's place among those who want to run where it does.
    pub fn stance(&self) -> Stance {
        if self.level().preempts { Stance::Even } else { self.tuning.patient }
    }

    /// Whether that is less eagerly than could be.
    pub fn is_on(&self) -> bool {
        self.level() != EAGER
    }

    fn gathers(&self) -> bool {
        !(self.large || self.inward)
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
            self.until = Some(now + self.time_of(goal));
        }
        let rest = self.until?.saturating_duration_since(now);
        if rest.is_zero() {
            self.until = None;
            if flying == 0 && waiting > 0 {
                self.search.waited_in_vain();
            }
            return None;
        }
        Some(rest)
    }

    /// What `requests` take with the level to begin with, or the most that requests wait for each other.
    fn time_of(&self, requests: u16) -> Duration {
        Duration::from_secs_f64(f64::from(requests) / self.search.first_rate().max(1.0)).min(self.tuning.longest)
    }

    /// A batch of requests (at least one) was taken.
    pub fn taken(&mut self, taken: Taken, now: Instant) {
        if now.saturating_duration_since(self.last) > IDLE {
            *self = Self { search: self.search.anew(now), ..Self::new(self.tuning, now) };
        }
        self.last = now;
        let gathered = self.gathers();
        self.weigh(taken);
        if self.gathers() != gathered {
            self.search.interrupted(now);
        }
        self.until = None;
        if self.gathers() {
            self.search.taken(taken, now);
            let goal = self.level().goal;
            self.until = (goal > 1).then(|| now + self.time_of(goal));
        }
    }

    /// Learns what requests are like.
    fn weigh(&mut self, taken: Taken) {
        let count = f64::from(taken.count.max(1));
        let weight = (count / REMEMBERED).min(1.0);
        self.size += (taken.work as f64 / count - self.size) * weight;
        self.given += (taken.given as f64 / count - self.given) * weight;
        self.large = self.size > if self.large { self.tuning.large / 4.0 } else { self.tuning.large };
        self.inward = self.given * 2.0 < self.size;
    }
}

#[cfg(test)]
mod tests {
    use super::super::search::LATEST;
    use super::*;

    const TUNING: Tuning = Tuning {
        longest: Duration::from_millis(4),
        episode: 256,
        gain: 1.1,
        first: 0,
        large: 1000.0,
        patient: Stance::Last,
    };

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
        /// The work of a request, and whether the driver gives it.
        work: u64,
        outward: bool,
        /// Requests taken with another level than the first, and all.
        moderated: u32,
        total: u32,
    }

    impl Model {
        fn new(request: u32, change: u32, others: u32, depth: u32) -> Self {
            let (now, beside) = (Instant::now(), false);
            let moderation = Moderation::new(TUNING, now);
            let (work, outward) = (1, true);
            Self { moderation, now, request, change, others, depth, beside, work, outward, moderated: 0, total: 0 }
        }

        /// One batch; gives how many came.
        fn batch(&mut self) -> u32 {
            let level = self.moderation.level();
            let polite = !level.preempts && !self.beside;
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
            let work = u64::from(came) * self.work;
            self.moderation.taken(Taken { count: came, work, given: if self.outward { work } else { 0 } }, self.now);
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
        while model.moderation.search.left() < LATEST / 2 {
            model.run(1);
        }
        (model.change, model.others) = (400, 0);
        model.run(20 * TUNING.episode);
        assert!(model.moderation.search.home() > 0, "{:?}", model.moderation);
    }

    #[test]
    fn a_worker_that_begins_politely_stays_so_unless_others_keep_it_waiting_for_long() {
        for (others, polite) in [(0, true), (3000, false)] {
            let mut model = Model::new(100, 400, others, 1);
            model.moderation = Moderation::new(Tuning { first: 1, ..TUNING }, model.now);
            model.run(20_000);
            assert_eq!(!LEVELS[model.moderation.search.home()].preempts, polite, "{:?}", model.moderation);
        }
    }

    #[test]
    fn large_requests_and_what_the_driver_receives_are_taken_as_at_first_whatever_would_gain_and_others_after_them_are_not()
     {
        for (work, outward) in [(2000, true), (10, false)] {
            let mut model = Model::new(100, 400, 0, 32);
            while model.moderation.level() == LEVELS[0] {
                model.run(1);
            }
            (model.work, model.outward) = (work, outward);
            model.run(200);
            model.run(2000);
            assert_eq!(model.moderated, 0);
            (model.work, model.outward) = (1, true);
            model.run(4000);
            assert!(model.moderation.is_on(), "{:?}", model.moderation);
        }
    }

    #[test]
    fn after_a_break_requests_are_taken_at_once() {
        let mut model = Model::new(100, 400, 0, 32);
        while model.moderation.level() == LEVELS[0] {
            model.run(1);
        }
        model.now += 2 * IDLE;
        model.moderation.taken(Taken { count: 1, work: 1, given: 1 }, model.now);
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
