//! Whether a worker lets requests gather before it takes them.
//!
//! Where a driver and its worker are awake in turns only, on a host whose processors are all busy, each request costs a kick,
//! an interrupt and context switches of its own. Taking the next ones a little later, without kicks, then gives more of
//! them in the same time, and so answers each sooner. Whether it does cannot be known beforehand: it is tried, for a few
//! hundred requests, and kept only while more requests come through than without. A driver that waits for each
//! request (depth 1), and one that sends them at times of its own, are left alone.

use std::time::{Duration, Instant};

/// Requests that are looked at together.
const EPISODE: u32 = 128;
/// A try ends after so many batches already if nothing gathers.
const PROBE: u32 = 8;
/// Smaller batches than this on average are worth a try.
const SMALL: u32 = 4;
/// How many times as many have to come through as without gathering.
const GAIN: f64 = 1.1;
/// Time for gathering, in times of one request and at least and most.
const REQUESTS: u32 = 4;
const LEAST: Duration = Duration::from_micros(50);
const MOST: Duration = Duration::from_millis(4);
/// Episodes between two tries.
const SOONEST: u32 = 4;
const LATEST: u32 = 256;
/// Episodes after which what was gained is measured anew.
const KEPT: u32 = 16;
/// A driver that was idle for so long has begun something new.
const IDLE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Gather {
    /// Time for gathering after each batch; `None`: requests are taken at once.
    pause: Option<Duration>,
    until: Option<Instant>,
    since: Instant,
    last: Instant,
    requests: u32,
    batches: u32,
    /// Requests per second without gathering, and the most with it.
    plain: f64,
    best: f64,
    /// Whether a longer pause was tried, and gave no more.
    settled: bool,
    /// Episodes until the next decision that is due.
    left: u32,
    backoff: u32,
}

impl Gather {
    pub fn new(now: Instant) -> Self {
        let (requests, batches, left, backoff) = (0, 0, SOONEST, SOONEST);
        Self {
            pause: None,
            until: None,
            since: now,
            last: now,
            requests,
            batches,
            plain: 0.0,
            best: 0.0,
            settled: false,
            left,
            backoff,
        }
    }

    /// Whether requests gather at present.
    pub fn is_on(&self) -> bool {
        self.pause.is_some()
    }

    /// How long the next requests are still to gather.
    pub fn rest(&mut self, now: Instant) -> Option<Duration> {
        let rest = self.until?.saturating_duration_since(now);
        if rest.is_zero() {
            self.until = None;
            return None;
        }
        Some(rest)
    }

    /// A batch of requests (at least one) was taken.
    pub fn taken(&mut self, requests: u32, now: Instant) {
        if now.saturating_duration_since(self.last) > IDLE {
            (self.pause, self.left) = (None, self.left.min(1));
            self.begin(now);
        }
        self.last = now;
        self.requests = self.requests.saturating_add(requests);
        self.batches += 1;
        let small = self.batches.saturating_mul(SMALL) > self.requests;
        if self.pause.is_some() && self.batches >= PROBE && self.batches.saturating_mul(2) > self.requests {
            self.give_up(now);
        } else if self.requests >= EPISODE {
            let time = now.saturating_duration_since(self.since).max(Duration::from_micros(1));
            self.decide(f64::from(self.requests) / time.as_secs_f64(), small, now);
        }
        self.until = self.pause.map(|pause| now + pause);
    }

    fn decide(&mut self, rate: f64, small: bool, now: Instant) {
        self.left = self.left.saturating_sub(1);
        match self.pause {
            None if self.left == 0 && small => {
                (self.plain, self.best, self.settled) = (rate, rate, false);
                let pause = Duration::from_secs_f64(f64::from(REQUESTS) / rate.max(1.0));
                // Sooner than that, the worker finds requests before it sleeps.
                self.pause = (pause >= LEAST).then_some(pause.min(MOST));
                self.left = if self.pause.is_some() { KEPT } else { SOONEST };
            }
            Some(_) if rate < self.plain * GAIN => return self.give_up(now),
            Some(pause) => self.keep(pause, rate),
            None => {}
        }
        self.begin(now);
    }

    /// Gathering is worth it: perhaps more of it is worth more.
    fn keep(&mut self, pause: Duration, rate: f64) {
        self.backoff = SOONEST;
        if self.left == 0 {
            (self.pause, self.left) = (None, 1);
        } else if rate >= self.best * GAIN && pause < MOST {
            self.best = rate;
            self.pause = Some((pause * 2).min(MOST));
        } else if !self.settled && rate < self.best {
            (self.settled, self.best) = (true, f64::INFINITY);
            self.pause = Some((pause / 2).max(LEAST));
        }
    }

    fn give_up(&mut self, now: Instant) {
        (self.pause, self.left) = (None, self.backoff);
        self.backoff = self.backoff.saturating_mul(2).min(LATEST);
        self.begin(now);
    }

    fn begin(&mut self, now: Instant) {
        (self.since, self.requests, self.batches) = (now, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver with requests outstanding, on a host where to change between driver and worker costs a time.
    struct Model {
        gather: Gather,
        now: Instant,
        /// What a request costs the driver, and a batch both.
        request: Duration,
        batch: Duration,
        depth: u32,
        gathered: u32,
        total: u32,
    }

    impl Model {
        fn new(request: u64, batch: u64, depth: u32) -> Self {
            let now = Instant::now();
            let (request, batch) = (Duration::from_micros(request), Duration::from_micros(batch));
            Self { gather: Gather::new(now), now, request, batch, depth, gathered: 0, total: 0 }
        }

        /// Gives the requests per second.
        fn run(&mut self, batches: u32) -> f64 {
            let (start, mut sum) = (self.now, 0);
            (self.gathered, self.total) = (0, 0);
            for _ in 0..batches {
                let rest = self.gather.rest(self.now);
                let time = rest.unwrap_or(self.request).max(self.request);
                let came = (time.as_nanos() / self.request.as_nanos()).min(self.depth.into());
                let came = u32::try_from(came).unwrap();
                self.now += time;
                assert_eq!(self.gather.rest(self.now), None, "it ends by itself");
                self.now += self.batch;
                self.gather.taken(came, self.now);
                (sum, self.total) = (sum + came, self.total + came);
                self.gathered += if rest.is_some() { came } else { 0 };
            }
            f64::from(sum) / self.now.duration_since(start).as_secs_f64()
        }
    }

    #[test]
    fn requests_gather_where_more_of_them_come_through() {
        let mut model = Model::new(100, 400, 32);
        let first = model.run(100);
        model.run(2000);
        let then = model.run(2000);
        assert!(then > 2.0 * first, "{then} and {first} requests a second");
    }

    #[test]
    fn a_driver_that_waits_for_each_request_is_hardly_ever_tried() {
        let mut model = Model::new(100, 400, 1);
        model.run(200_000);
        model.run(200_000);
        assert!(model.gathered * 1000 < model.total, "{} of {}", model.gathered, model.total);
    }

    #[test]
    fn a_driver_that_has_nothing_of_it_is_hardly_ever_tried() {
        // Batches cost nothing: gathering wins nothing.
        let mut model = Model::new(200, 0, 32);
        model.run(200_000);
        model.run(200_000);
        assert!(model.gathered * 50 < model.total, "{} of {}", model.gathered, model.total);
    }

    #[test]
    fn after_a_break_requests_are_taken_at_once() {
        let mut model = Model::new(100, 400, 32);
        while !model.gather.is_on() {
            model.run(1);
        }
        model.now += 2 * IDLE;
        model.gather.taken(1, model.now);
        assert_eq!(model.gather.rest(model.now), None);
    }

    #[test]
    fn nothing_gathers_for_longer_than_the_limit_nor_where_the_worker_looks_for_requests_anyway() {
        let mut slow = Model::new(5000, 5000, 32);
        for _ in 0..5000 {
            slow.run(1);
            assert!(slow.gather.rest(slow.now).is_none_or(|rest| rest <= MOST));
        }
        let mut fast = Model::new(2, 4, 32);
        fast.run(20_000);
        assert_eq!(fast.gathered, 0);
    }
}
