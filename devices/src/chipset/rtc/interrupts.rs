//! Alarm, update and periodic interrupts: what has come to pass, what comes next, and the thread that waits for it.

use std::io;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::calendar::{DateTime, NANOSECONDS};
use super::{A, A_DIVIDER, A_DIVIDER_RUN, ALARM, B, ENABLES, Now, PERIODIC, Rtc, State, UPDATE};
use crate::{ThreadKind, ThreadSpawner};

const SECONDS_ALARM: u8 = 0x01;
const MINUTES_ALARM: u8 = 0x03;
const HOURS_ALARM: u8 = 0x05;
/// Alarm bytes from here on match every value.
const ANY: u8 = 0xc0;
const CRYSTAL_HZ: u32 = 32_768;
/// The longest wait: host time may be set meanwhile, and the alarm comes at most so much too late then.
const LOOK: i128 = NANOSECONDS;

impl Rtc {
    /// Runs `action` on flags that are up to date, then raises what became due and wakes the timer if it has to wait for
    /// something else. The line is set under the lock, so that no pulse comes after the read of register C that takes it back.
    pub(super) fn with<T>(&self, action: impl FnOnce(&mut State, i128) -> T) -> T {
        let now = self.now();
        let mut state = self.lock();
        let before = state.wanted();
        let due = state.catch_up(now);
        let earlier = state.interrupts();
        let result = action(&mut state, now.realtime);
        state.ticks_seen = state.ticks(now.monotonic);
        let due = due || state.interrupts() & !earlier != 0 || state.held_back;
        state.held_back = due && state.paused;
        if due && !state.paused {
            self.line.pulse();
        }
        if before != state.wanted() {
            self.changed.notify_all();
        }
        result
    }

    /// Holds interrupts back, or lets them come: what became due meanwhile comes once.
    pub fn pause(&self, paused: bool) {
        self.with(|state, _| state.paused = paused);
        self.changed.notify_all();
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.ended {
            let now = self.now();
            if !state.paused && state.catch_up(now) {
                self.line.pulse();
            }
            state = match state.next(now) {
                Some(wait) => self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl State {
    /// Flags that are set and enabled.
    pub(super) fn interrupts(&self) -> u8 {
        self.flags & self.get(B) & ENABLES
    }

    /// What decides when the next interrupt comes.
    fn wanted(&self) -> ([u8; 5], i128, bool) {
        let registers = [A, B, SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM].map(|index| self.get(index));
        (registers, self.offset, self.held.is_some())
    }

    /// Sets the flags of what came to pass since they were last true; says whether any of that is enabled.
    pub(super) fn catch_up(&mut self, now: Now) -> bool {
        let second = self.guest_time(now.realtime).div_euclid(NANOSECONDS);
        let ticks = self.ticks(now.monotonic);
        let mut new = 0;
        if self.held.is_none() && second != self.updates_seen {
            new |= UPDATE;
            if self.next_alarm(self.updates_seen + 1).is_some_and(|alarm| alarm <= second) {
                new |= ALARM;
            }
        }
        if ticks != self.ticks_seen {
            new |= PERIODIC;
        }
        (self.updates_seen, self.ticks_seen) = (second, ticks);
        self.flags |= new;
        new & self.get(B) & ENABLES != 0
    }

    /// Periodic ticks so far, at the rate that register A has now; none without a rate.
    pub(super) fn ticks(&self, monotonic: u64) -> u128 {
        u128::from(monotonic) * u128::from(self.rate().unwrap_or(0)) / NANOSECONDS.unsigned_abs()
    }

    /// The periodic rate in Hz (MC146818A datasheet, table 5).
    fn rate(&self) -> Option<u32> {
        let a = self.get(A);
        if a & A_DIVIDER != A_DIVIDER_RUN {
            return None;
        }
        match a & 0xf {
            0 => None,
            // The two highest are not there with this crystal: they stand for 256 and 128 Hz.
            few @ 1..=2 => Some(CRYSTAL_HZ >> (few + 6)),
            rate => Some(CRYSTAL_HZ >> (rate - 1)),
        }
    }

    /// How long until the next interrupt that is enabled, or until it is time to look again.
    pub(super) fn next(&self, now: Now) -> Option<Duration> {
        if self.paused {
            return None;
        }
        let enabled = self.get(B) & ENABLES;
        let time = self.guest_time(now.realtime);
        let running = self.held.is_none();
        let update = (running && enabled & UPDATE != 0).then(|| NANOSECONDS - time.rem_euclid(NANOSECONDS));
        let alarm = (running && enabled & ALARM != 0)
            .then(|| self.next_alarm(time.div_euclid(NANOSECONDS) + 1))
            .flatten()
            .map(|second| (second * NANOSECONDS - time).min(LOOK));
        let tick = self.rate().filter(|_| enabled & PERIODIC != 0).map(|rate| {
            let next = (self.ticks(now.monotonic) + 1) * NANOSECONDS.unsigned_abs();
            let at = next.div_ceil(u128::from(rate));
            i128::try_from(at).unwrap_or(i128::MAX) - i128::from(now.monotonic)
        });
        let wait = update.into_iter().chain(alarm).chain(tick).min()?;
        Some(Duration::from_nanos(u64::try_from(wait.max(1)).unwrap_or(u64::MAX)))
    }

    /// The first second from `from` on that the alarm matches; none if it never does.
    pub(super) fn next_alarm(&self, from: i128) -> Option<i128> {
        let set = |index| Some(self.get(index)).filter(|value| *value < ANY);
        let (hour, minute, second) = (set(HOURS_ALARM), set(MINUTES_ALARM), set(SECONDS_ALARM));
        let (hour, minute, second) =
            (hour.map(|h| self.decode_hour(h)), minute.map(|m| self.decode(m)), second.map(|s| self.decode(s)));
        if hour.is_some_and(|h| h > 23) || minute.is_some_and(|m| m > 59) || second.is_some_and(|s| s > 59) {
            return None;
        }
        let mut at = from;
        // Each step leaves an hour, a minute or a second that does not match: a day has no more of them in a row.
        for _ in 0..24 + 60 + 60 {
            let time = DateTime::from_nanoseconds(at * NANOSECONDS);
            if hour.is_some_and(|h| h != time.hour) {
                at += 3600 - at.rem_euclid(3600);
            } else if minute.is_some_and(|m| m != time.minute) {
                at += 60 - at.rem_euclid(60);
            } else if second.is_some_and(|s| s != time.second) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }
}

/// The thread that raises interrupts when they are due. Dropping it ends it.
pub struct RtcTimer {
    rtc: Arc<Rtc>,
    thread: Option<JoinHandle<()>>,
}

impl RtcTimer {
    /// Starts the thread for `rtc`.
    ///
    /// # Errors
    /// What the kernel answered when it refused another thread.
    pub fn start(rtc: &Arc<Rtc>, spawner: &dyn ThreadSpawner) -> io::Result<Self> {
        let theirs = Arc::clone(rtc);
        let thread = spawner.spawn(ThreadKind::Rtc, "rtc", Box::new(move || theirs.run()))?;
        Ok(Self { rtc: Arc::clone(rtc), thread: Some(thread) })
    }
}

impl Drop for RtcTimer {
    fn drop(&mut self) {
        self.rtc.lock().ended = true;
        self.rtc.changed.notify_all();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the thread of the clock panicked");
        }
    }
}
