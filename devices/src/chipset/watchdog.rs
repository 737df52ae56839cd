//! A watchdog timer that ACPI's WDAT describes (Microsoft, Hardware Watchdog Timers Design Specification 1.01). Windows and Linux
//! bring a driver for what that table describes, whatever the registers are; Windows has none for the ICH9's own or for an
//! i6300ESB.
//!
//! | offset | register | |
//! |---|---|---|
//! | 0 | COUNT | 16 bits: units of [`UNIT_MS`] until it expires |
//! | 2 | LEFT | 16 bits, read-only: units that are left |
//! | 4 | CONTROL | bit 0: it counts |
//! | 5 | RELOAD | a write begins anew |
//! | 6 | STATUS | bit 0: it has expired; cleared by writing one, kept over a reset |
//!
//! Whoever owns it looks by [`Watchdog::expires`] whether it has expired: it needs no thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::clock::Clock;
use crate::bus::{BusDevice, VmRequest};

/// First port of the watchdog.
pub const WATCHDOG_BASE: u16 = 0x680;
/// Its ports.
pub const WATCHDOG_LENGTH: u8 = 8;
/// Milliseconds of a unit.
pub const UNIT_MS: u32 = 1000;
/// The most units.
pub const MAX_COUNT: u16 = 0x3ff;

/// Offset of COUNT.
pub const COUNT: u8 = 0;
/// Offset of LEFT.
pub const LEFT: u8 = 2;
/// Offset of CONTROL.
pub const CONTROL: u8 = 4;
/// Offset of RELOAD.
pub const RELOAD: u8 = 5;
/// Offset of STATUS.
pub const STATUS: u8 = 6;

const UNIT: u64 = UNIT_MS as u64 * 1_000_000;

struct State {
    count: u16,
    /// Nanoseconds that are left, where it counts: from `since` on, unless it is paused.
    left: Option<u64>,
    since: u64,
    paused: bool,
    expired: bool,
}

impl State {
    fn left(&self, now: u64) -> Option<u64> {
        let gone = if self.paused { 0 } else { now.saturating_sub(self.since) };
        self.left.map(|left| left.saturating_sub(gone))
    }

    /// Brings what is left up to date.
    fn settle(&mut self, now: u64) {
        self.left = self.left(now);
        self.since = now;
    }

    fn reload(&mut self, now: u64) {
        self.left = self.left.map(|_| u64::from(self.count) * UNIT);
        self.since = now;
    }

    fn read(&self, offset: u64, now: u64) -> u8 {
        let units = self.left(now).map_or(0, |left| left.div_ceil(UNIT));
        let [low, high] = self.count.to_le_bytes();
        let [left_low, left_high, ..] = units.to_le_bytes();
        let registers = [low, high, left_low, left_high, self.left.is_some().into(), 0, self.expired.into(), 0];
        usize::try_from(offset).ok().and_then(|offset| registers.get(offset)).copied().unwrap_or(0xff)
    }

    fn write(&mut self, offset: u64, value: u8, now: u64) {
        let [low, high] = self.count.to_le_bytes();
        match offset {
            0 => self.count = u16::from_le_bytes([value, high]) & MAX_COUNT,
            1 => self.count = u16::from_le_bytes([low, value]) & MAX_COUNT,
            4 if value & 1 == 0 => self.left = None,
            4 if self.left.is_none() => {
                self.left = Some(0);
                self.reload(now);
            }
            5 => self.reload(now),
            6 => self.expired &= value & 1 == 0,
            _ => {}
        }
    }
}

/// The watchdog.
pub struct Watchdog {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
}

impl Watchdog {
    /// A watchdog that does not count yet.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let state = State { count: MAX_COUNT, left: None, since: 0, paused: false, expired: false };
        Self { state: Mutex::new(state), clock }
    }

    /// Whether it has expired. Says so once: it does not count any more then.
    pub fn expires(&self) -> bool {
        let mut state = self.lock();
        let expired = state.left(self.clock.monotonic()) == Some(0);
        if expired {
            state.left = None;
            state.expired = true;
        }
        expired
    }

    /// Stops the time, or lets it go on.
    pub fn pause(&self, paused: bool) {
        let mut state = self.lock();
        state.settle(self.clock.monotonic());
        state.paused = paused;
    }

    /// Back to power-on: it does not count. That it has expired is kept for the next guest to read.
    pub fn reset(&self) {
        let mut state = self.lock();
        let State { count, left, since: _, paused: _, expired: _ } = &mut *state;
        (*count, *left) = (MAX_COUNT, None);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Watchdog {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let now = self.clock.monotonic();
        let state = self.lock();
        for (offset, byte) in (offset..).zip(data) {
            *byte = state.read(offset, now);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        let now = self.clock.monotonic();
        let mut state = self.lock();
        for (offset, &byte) in (offset..).zip(data) {
            state.write(offset, byte, now);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{HandClock, read8, write8};
    use super::*;

    fn counting(units: u16) -> (Watchdog, Arc<HandClock>) {
        let clock = HandClock::at(0);
        let watchdog = Watchdog::new(Arc::clone(&clock) as _);
        watchdog.write(u64::from(COUNT), &units.to_le_bytes());
        write8(&watchdog, u64::from(CONTROL), 1);
        (watchdog, clock)
    }

    fn left(watchdog: &Watchdog) -> u16 {
        let mut data = [0; 2];
        watchdog.read(u64::from(LEFT), &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn it_expires_once_when_nobody_reloads_it_and_that_is_kept_over_a_reset() {
        let (watchdog, clock) = counting(30);
        clock.advance(29 * UNIT + 1);
        assert_eq!((left(&watchdog), watchdog.expires()), (1, false));
        write8(&watchdog, u64::from(RELOAD), 1);
        assert_eq!(left(&watchdog), 30);
        clock.advance(30 * UNIT);
        assert_eq!((watchdog.expires(), watchdog.expires()), (true, false));
        assert_eq!((read8(&watchdog, u64::from(CONTROL)), read8(&watchdog, u64::from(STATUS))), (0, 1));
        watchdog.reset();
        assert_eq!(read8(&watchdog, u64::from(STATUS)), 1);
        write8(&watchdog, u64::from(STATUS), 1);
        assert_eq!(read8(&watchdog, u64::from(STATUS)), 0);
    }

    #[test]
    fn it_counts_only_while_it_is_on_and_the_vm_runs() {
        let (watchdog, clock) = counting(10);
        clock.advance(4 * UNIT);
        watchdog.pause(true);
        clock.advance(100 * UNIT);
        assert_eq!((left(&watchdog), watchdog.expires()), (6, false));
        watchdog.pause(false);
        clock.advance(5 * UNIT);
        assert_eq!(left(&watchdog), 1);
        write8(&watchdog, u64::from(CONTROL), 0);
        clock.advance(100 * UNIT);
        assert_eq!((left(&watchdog), watchdog.expires()), (0, false));
        write8(&watchdog, u64::from(RELOAD), 1);
        assert!(!watchdog.expires(), "a reload turns nothing on");
        write8(&watchdog, u64::from(CONTROL), 1);
        write8(&watchdog, u64::from(CONTROL), 1);
        assert_eq!(left(&watchdog), 10);
    }

    #[test]
    fn a_count_of_nothing_expires_at_once_and_no_count_is_more_than_the_most() {
        let (watchdog, _) = counting(0);
        assert!(watchdog.expires());
        watchdog.write(u64::from(COUNT), &[0xff, 0xff]);
        write8(&watchdog, u64::from(CONTROL), 0xff);
        assert_eq!(left(&watchdog), MAX_COUNT);
    }
}
