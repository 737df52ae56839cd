//! How eagerly a worker takes requests.
//!
//! On a host whose processors are all busy, a worker that takes each request as soon as it is there makes each cost a kick, an
//! interrupt and context switches of its own. There are two ways to take several at once:
//! - Not to preempt (`SCHED_BATCH`, sched(7)): a worker that sleeps a lot preempts whoever runs where it is woken, such as
//!   the vCPU whose driver just kicked for the first of many requests. Without, it runs when that vCPU halts or its slice ends.
//! - To ask the driver to kick only when some requests are available, and to wait for them a bounded time.
//!
//! Both make a lone request wait, so neither is for a driver that waits for each (depth 1), or where they gain nothing. Where
//! requests are so large that what comes with each is little beside their work ([`Tuning::large`]), each is taken at once. There is
//! another way for them: not to be preempted by whoever is woken by each request that is passed on, and to hold interrupts back for
//! the time of some requests. What is best is found by [trying](super::search).

use std::time::{Duration, Instant};

use super::Taken;
use super::search::{Plan, Search};
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
}

/// How a worker takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Level {
    /// Its place among those who want to run where it does.
    pub stance: Stance,
    /// How many requests are to be available.
    pub goal: u16,
    /// For the time of how many requests interrupts are held back.
    pub held: u16,
}

impl Default for Level {
    fn default() -> Self {
        EAGER
    }
}

const fn polite(goal: u16) -> Level {
    Level { stance: Stance::Last, goal, held: 0 }
}

/// As eager as can be without privilege.
const EAGER: Level = Level { stance: Stance::Even, goal: 1, held: 0 };
/// For requests of the driver.
const LEVELS: [Level; 6] = [EAGER, polite(1), polite(4), polite(8), polite(16), polite(32)];
/// For large ones.
const LARGE: [Level; 2] = [EAGER, Level { stance: Stance::First, goal: 1, held: 6 }];
/// How many times as much has to come through to be first among others: more than chance, as that is at their expense.
const LARGE_GAIN: f64 = 1.2;
/// How many times fewer large requests are looked at together: as many as others would take too long to come.
const LARGE_FEWER: u32 = 4;
/// Requests over which their average work is taken.
const REMEMBERED: f64 = 64.0;
/// A driver that was idle for so long has begun something new.
const IDLE: Duration = Duration::from_millis(100);

/// What requests are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Any,
    /// Large ones.
    Large,
    /// What the driver gives is little beside what it receives: there is nothing to gather, and who sends that is best left
    /// alone until it has sent all it has.
    Inward,
}

#[derive(Debug)]
pub(crate) struct Moderation {
    tuning: Tuning,
    any: Search,
    large: Search,
    kind: Kind,
    until: Option<Instant>,
    last: Instant,
    /// The work of a request, on average, and how much of that the driver gives.
    size: f64,
    given: f64,
}

impl Moderation {
    pub fn new(tuning: Tuning, now: Instant) -> Self {
        let Tuning { episode, gain, first, .. } = tuning;
        let any = Plan { levels: &LEVELS, first, gain, episode, gathers: true };
        let large = Plan { levels: &LARGE, first: 0, gain: LARGE_GAIN, episode: episode / LARGE_FEWER, gathers: false };
        Self {
            tuning,
            any: Search::new(any, now),
            large: Search::new(large, now),
            kind: Kind::Any,
            until: None,
            last: now,
            size: 0.0,
            given: 0.0,
        }
    }

    /// At a level, for as long as no episode ends.
    #[cfg(test)]
    pub fn at(level: usize, tuning: Tuning, now: Instant) -> Self {
        let mut moderation = Self::new(tuning, now);
        moderation.any.settle_at(level);
        moderation
    }

    /// How the worker is to take requests.
    pub fn level(&self) -> Level {
        match self.kind {
            Kind::Any => self.any.level(),
            Kind::Large => self.large.level(),
            Kind::Inward => LEVELS.get(self.tuning.first).copied().unwrap_or_default(),
        }
    }

    /// Whether that is less eagerly than could be.
    pub fn is_on(&self) -> bool {
        self.level() != EAGER
    }

    /// How long interrupts are to be held back.
    pub fn hold(&self) -> Option<Duration> {
        let Level { held, .. } = self.level();
        (held > 0).then(|| self.time_of(held, &self.large))
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
            self.until = Some(now + self.time_of(goal, &self.any));
        }
        let rest = self.until?.saturating_duration_since(now);
        if rest.is_zero() {
            self.until = None;
            if flying == 0 && waiting > 0 {
                self.any.waited_in_vain();
            }
            return None;
        }
        Some(rest)
    }

    /// What `requests` take with the level to begin with, or the most that requests wait for each other.
    fn time_of(&self, requests: u16, search: &Search) -> Duration {
        Duration::from_secs_f64(f64::from(requests) / search.first_rate().max(1.0)).min(self.tuning.longest)
    }

    /// A batch of requests (at least one) was taken.
    pub fn taken(&mut self, taken: Taken, now: Instant) {
        if now.saturating_duration_since(self.last) > IDLE {
            let (any, large) = (self.any.anew(now), self.large.anew(now));
            *self = Self { any, large, ..Self::new(self.tuning, now) };
        }
        self.last = now;
        let kind = self.kind_after(taken);
        if std::mem::replace(&mut self.kind, kind) != kind {
            self.any.interrupted(now);
            self.large.interrupted(now);
        }
        self.until = None;
        match kind {
            Kind::Any => {
                self.any.taken(taken, now);
                let goal = self.level().goal;
                self.until = (goal > 1).then(|| now + self.time_of(goal, &self.any));
            }
            Kind::Large => self.large.taken(taken, now),
            Kind::Inward => {}
        }
    }

    /// What requests are like, as far as these tell.
    fn kind_after(&mut self, taken: Taken) -> Kind {
        let count = f64::from(taken.count.max(1));
        let weight = (count / REMEMBERED).min(1.0);
        self.size += (taken.work as f64 / count - self.size) * weight;
        self.given += (taken.given as f64 / count - self.given) * weight;
        let limit = if self.kind == Kind::Large { self.tuning.large / 4.0 } else { self.tuning.large };
        match self.size > limit {
            _ if self.given * 2.0 < self.size => Kind::Inward,
            true => Kind::Large,
            false => Kind::Any,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::search::LATEST;
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
        /// The work of a request, and whether the driver gives it.
        work: u64,
        outward: bool,
        /// Microseconds for which whoever gets a request from the worker preempts it, unless it is first; and for which a vCPU
        /// waits that it preempts if it is.
        receiver: u32,
        preempted: u32,
        /// Requests taken with another level than the first, and all.
        moderated: u32,
        total: u32,
    }

    impl Model {
        fn new(request: u32, change: u32, others: u32, depth: u32) -> Self {
            let (now, beside) = (Instant::now(), false);
            let moderation = Moderation::new(TUNING, now);
            let (work, outward, receiver, preempted) = (1, true, 0, 0);
            Self {
                moderation,
                now,
                request,
                change,
                others,
                depth,
                beside,
                work,
                outward,
                receiver,
                preempted,
                moderated: 0,
                total: 0,
            }
        }

        /// One batch; gives how many came.
        fn batch(&mut self) -> u32 {
            let level = self.moderation.level();
            let polite = level.stance == Stance::Last && !self.beside;
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
            let disturbed = if level.stance == Stance::First { self.preempted } else { self.receiver * came };
            self.now += Duration::from_micros(u64::from(self.change + disturbed));
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
        while model.moderation.any.left() < LATEST / 2 {
            model.run(1);
        }
        (model.change, model.others) = (400, 0);
        model.run(20 * TUNING.episode);
        assert!(model.moderation.any.home() > 0, "{:?}", model.moderation);
    }

    #[test]
    fn a_worker_that_begins_politely_stays_so_unless_others_keep_it_waiting_for_long() {
        for (others, polite) in [(0, true), (3000, false)] {
            let mut model = Model::new(100, 400, others, 1);
            model.moderation = Moderation::new(Tuning { first: 1, ..TUNING }, model.now);
            model.run(20_000);
            assert_eq!(LEVELS[model.moderation.any.home()].stance == Stance::Last, polite, "{:?}", model.moderation);
        }
    }

    #[test]
    fn what_the_driver_receives_is_taken_as_at_first_whatever_would_gain_and_what_it_gives_after_that_is_not() {
        let mut model = Model::new(100, 400, 0, 32);
        while model.moderation.level() == LEVELS[0] {
            model.run(1);
        }
        (model.work, model.outward) = (2000, false);
        model.run(200);
        model.run(2000);
        assert_eq!(model.moderated, 0);
        (model.work, model.outward) = (1, true);
        model.run(4000);
        assert!(model.moderation.is_on(), "{:?}", model.moderation);
    }

    #[test]
    fn a_worker_is_first_for_large_requests_of_the_driver_where_receivers_would_preempt_it_and_holds_interrupts_then() {
        let mut model = Model::new(100, 100, 0, 4);
        (model.work, model.receiver) = (2000, 200);
        let eager = model.run(100);
        assert_eq!(model.moderation.hold(), None);
        model.run(1000);
        let first = model.run(20_000);
        assert!(first > 1.9 * eager, "{first} and {eager} requests a second");
        assert!(model.moderated * 100 > model.total * 95, "{} of {}", model.moderated, model.total);
        let hold = model.moderation.hold().unwrap();
        assert!(hold > Duration::from_micros(500) && hold <= TUNING.longest, "{hold:?}");
    }

    #[test]
    fn a_worker_is_hardly_ever_first_where_it_gains_nothing_and_never_for_what_the_driver_receives() {
        let mut model = Model::new(100, 100, 0, 4);
        (model.work, model.preempted) = (2000, 400);
        model.run(200_000);
        model.run(200_000);
        assert!(model.moderated * 50 < model.total, "{} of {}", model.moderated, model.total);
        (model.outward, model.receiver, model.preempted) = (false, 200, 0);
        model.run(200);
        model.run(20_000);
        assert_eq!(model.moderated, 0);
    }

    #[test]
    fn a_worker_that_was_first_is_not_any_more_when_others_wait_for_it() {
        let mut model = Model::new(100, 100, 0, 4);
        (model.work, model.receiver) = (2000, 200);
        model.run(10_000);
        assert!(model.moderation.is_on());
        (model.receiver, model.preempted) = (0, 2000);
        model.run(1000);
        assert_eq!(model.moderation.level(), EAGER);
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
