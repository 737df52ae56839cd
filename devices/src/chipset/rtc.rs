//! The real-time clock and CMOS memory at ports 0x70 and 0x71: an MC146818 with a century byte and the memory sizes that
//! firmware reads.
//!
//! The clock is the host's plus an offset. What a guest writes changes the offset only, so time itself needs no thread and goes
//! on while the VM is down. Alarm, update and periodic interrupts do: [`RtcTimer`] waits for the next one that is enabled. Each is
//! a pulse of the line whether or not register C was read since, as the WAET promises.
//!
//! Values that are no date or time (a 13th month) are brought to the nearest that is, when the clock is started on them.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::clock::Clock;
use crate::bus::{BusDevice, VmRequest};
use crate::interrupt::InterruptLine;

mod calendar;
mod interrupts;

pub use interrupts::RtcTimer;

use calendar::{DateTime, NANOSECONDS};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
const CENTURY: u8 = super::RTC_CENTURY;

const A_UIP: u8 = 1 << 7;
const A_DIVIDER: u8 = 7 << 4;
/// The divider of the 32.768 kHz crystal: the one setting in which time passes (010); 11x holds it.
const A_DIVIDER_RUN: u8 = 2 << 4;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24H: u8 = 1 << 1;
/// Enables in B and flags in C, at the same places: periodic, alarm, update ended.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const ENABLES: u8 = PERIODIC | ALARM | UPDATE;
/// Register C: one of the flags is set and enabled.
const C_IRQF: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;
const HOUR_PM: u8 = 1 << 7;

/// How long before a second ends UIP announces the update (MC146818A datasheet: tBUC, 244 µs).
const UIP_LEAD: i128 = 244_000;
/// When the divider leaves its reset, the first update follows half a second later.
const DIVIDER_START: i128 = NANOSECONDS / 2;

/// What the RTC is made from.
#[derive(Debug, Clone, Default)]
pub struct RtcConfig {
    /// Bytes of RAM below 4 GiB, for the memory size bytes 0x15–0x18, 0x30/31, 0x34/35.
    pub ram_below_4g: u64,
    /// Bytes of RAM above 4 GiB, for 0x5B–0x5D.
    pub ram_above_4g: u64,
    /// What the clock shows beyond UTC, in seconds.
    pub offset_seconds: i64,
}

struct State {
    index: u8,
    /// What is not computed from the clock; the time registers while the clock is held.
    cmos: [u8; 128],
    /// Guest time minus host time, in nanoseconds.
    offset: i128,
    /// While the clock is held (SET, or divider in reset): the guest's sub-second phase and whether the divider was reset.
    held: Option<Held>,
    /// The guest's second up to which [`State::flags`] are true.
    updates_seen: i128,
    /// The periodic tick up to which they are.
    ticks_seen: u128,
    /// The flags of register C, cleared when it is read.
    flags: u8,
    /// No interrupts now: the VM is paused.
    paused: bool,
    /// An interrupt became due while paused.
    held_back: bool,
    /// The timer's thread is to end.
    ended: bool,
}

/// Both clocks at one moment.
#[derive(Clone, Copy)]
struct Now {
    realtime: i128,
    monotonic: u64,
}

#[derive(Clone, Copy)]
struct Held {
    divider_reset: bool,
}

/// The clock and CMOS memory.
pub struct Rtc {
    state: Mutex<State>,
    /// What the timer waits for may have changed.
    changed: Condvar,
    clock: Arc<dyn Clock>,
    line: Arc<dyn InterruptLine>,
}

impl Rtc {
    /// A clock that shows the host's time plus the configured offset, and memory sizes for firmware. `line` is IRQ 8, an edge.
    #[must_use]
    pub fn new(config: &RtcConfig, clock: Arc<dyn Clock>, line: Arc<dyn InterruptLine>) -> Self {
        let mut cmos = [0; 128];
        for (index, value) in [(A, 0x26), (B, B_24H), (D, D_VALID)].into_iter().chain(memory_sizes(config)) {
            if let Some(byte) = cmos.get_mut(usize::from(index)) {
                *byte = value;
            }
        }
        let offset = i128::from(config.offset_seconds) * NANOSECONDS;
        let updates_seen = (clock.realtime() + offset).div_euclid(NANOSECONDS);
        let state = State {
            index: 0,
            cmos,
            offset,
            held: None,
            updates_seen,
            ticks_seen: 0,
            flags: 0,
            paused: false,
            held_back: false,
            ended: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), clock, line }
    }

    /// A machine reset: interrupt enables and NMI mask are cleared; time and memory stay (MC146818A, RESET pin).
    pub fn reset(&self) {
        self.with(|state, now| {
            state.index = 0;
            let b = state.get(B);
            // SET is not touched by the pin, but a guest that died while setting the clock must not leave it stopped.
            state.write_b(b & (B_BINARY | B_24H), now);
            state.write_a(0x26, now);
            state.flags = 0;
        });
    }

    /// Guest time minus UTC in seconds, including what the guest itself set.
    #[must_use]
    pub fn offset_seconds(&self) -> i64 {
        i64::try_from(self.lock().offset.div_euclid(NANOSECONDS)).unwrap_or(0)
    }

    /// Whether the guest masks non-maskable interrupts (bit 7 of port 0x70).
    #[must_use]
    pub fn nmi_masked(&self) -> bool {
        self.lock().index & 0x80 != 0
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Now {
        Now { realtime: self.clock.realtime(), monotonic: self.clock.monotonic() }
    }
}

/// The bytes that hold the memory size, as SeaBIOS and OVMF read them.
fn memory_sizes(config: &RtcConfig) -> impl Iterator<Item = (u8, u8)> {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    let word = |value: u64| u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
    let base = word(640.min(config.ram_below_4g / KIB));
    let extended = word(config.ram_below_4g.saturating_sub(MIB) / KIB);
    let above_16m = word(config.ram_below_4g.saturating_sub(16 * MIB) / (64 * KIB));
    let above_4g = u32::try_from(config.ram_above_4g / (64 * KIB)).unwrap_or(u32::MAX).min(0xff_ffff).to_le_bytes();
    let groups: [(u8, Vec<u8>); 5] = [
        (0x15, base.to_vec()),
        (0x17, extended.to_vec()),
        (0x30, extended.to_vec()),
        (0x34, above_16m.to_vec()),
        (0x5b, above_4g.iter().take(3).copied().collect()),
    ];
    groups.into_iter().flat_map(|(start, bytes)| (start..).zip(bytes))
}

impl State {
    fn get(&self, index: u8) -> u8 {
        self.cmos.get(usize::from(index & 0x7f)).copied().unwrap_or(0)
    }

    fn put(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.cmos.get_mut(usize::from(index & 0x7f)) {
            *byte = value;
        }
    }

    fn guest_time(&self, now: i128) -> i128 {
        now + self.offset
    }

    fn is_time(index: u8) -> bool {
        matches!(index, SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY)
    }

    fn read(&mut self, now: i128) -> u8 {
        let index = self.index & 0x7f;
        let time = self.guest_time(now);
        match index {
            A => {
                let updating = self.held.is_none() && time.rem_euclid(NANOSECONDS) >= NANOSECONDS - UIP_LEAD;
                self.get(A) | if updating { A_UIP } else { 0 }
            }
            C => {
                let interrupts = self.interrupts();
                std::mem::take(&mut self.flags) | if interrupts != 0 { C_IRQF } else { 0 }
            }
            _ if Self::is_time(index) && self.held.is_none() => self.encoded(index, &DateTime::from_nanoseconds(time)),
            _ => self.get(index),
        }
    }

    fn write(&mut self, value: u8, now: i128) {
        let index = self.index & 0x7f;
        match index {
            A => self.write_a(value, now),
            B => self.write_b(value, now),
            C | D => {}
            _ if Self::is_time(index) && self.held.is_none() => {
                // A running clock is set at once: stop it for this one register.
                let divider_reset = false;
                self.hold(now, divider_reset);
                self.put(index, value);
                self.release(now);
            }
            _ => self.put(index, value),
        }
    }

    fn write_a(&mut self, value: u8, now: i128) {
        self.put(A, value & !A_UIP);
        self.update_hold(now);
    }

    fn write_b(&mut self, value: u8, now: i128) {
        let mut value = value;
        if value & B_SET != 0 {
            // The registers are frozen in the mode that they were in, then read in the mode that is written.
            self.hold(now, false);
            value &= !UPDATE;
        }
        self.put(B, value);
        self.update_hold(now);
    }

    fn update_hold(&mut self, now: i128) {
        let stopped = self.get(A) & A_DIVIDER != A_DIVIDER_RUN;
        if stopped || self.get(B) & B_SET != 0 {
            self.hold(now, stopped);
        } else {
            self.release(now);
        }
    }

    fn hold(&mut self, now: i128, divider_reset: bool) {
        match &mut self.held {
            Some(held) => held.divider_reset |= divider_reset,
            None => {
                let time = DateTime::from_nanoseconds(self.guest_time(now));
                for index in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY] {
                    let value = self.encoded(index, &time);
                    self.put(index, value);
                }
                self.held = Some(Held { divider_reset });
            }
        }
    }

    /// Starts the clock on what the registers hold.
    fn release(&mut self, now: i128) {
        let Some(held) = self.held.take() else { return };
        // SET alone leaves the divider running, and with it the moment at which seconds change.
        let phase = if held.divider_reset { DIVIDER_START } else { self.guest_time(now).rem_euclid(NANOSECONDS) };
        let set = self.decoded().to_nanoseconds() + phase;
        self.offset = set - now;
        self.updates_seen = set.div_euclid(NANOSECONDS);
    }

    fn encoded(&self, index: u8, time: &DateTime) -> u8 {
        let number = match index {
            SECONDS => time.second,
            MINUTES => time.minute,
            HOURS => return self.encoded_hour(time.hour),
            WEEKDAY => time.weekday(),
            DAY => time.day,
            MONTH => time.month,
            YEAR => u8::try_from(time.year % 100).unwrap_or(0),
            _ => u8::try_from(time.year / 100).unwrap_or(0),
        };
        self.encode(number)
    }

    fn encoded_hour(&self, hour: u8) -> u8 {
        if self.get(B) & B_24H != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decoded(&self) -> DateTime {
        let number = |index| self.decode(self.get(index));
        DateTime::clamped(
            u16::from(number(CENTURY)) * 100 + u16::from(number(YEAR).min(99)),
            number(MONTH),
            number(DAY),
            self.decode_hour(self.get(HOURS)),
            number(MINUTES),
            number(SECONDS),
        )
    }

    fn decode_hour(&self, hour: u8) -> u8 {
        if self.get(B) & B_24H != 0 {
            return self.decode(hour);
        }
        let twelve = self.decode(hour & !HOUR_PM).min(12) % 12;
        twelve + if hour & HOUR_PM != 0 { 12 } else { 0 }
    }

    fn encode(&self, number: u8) -> u8 {
        if self.get(B) & B_BINARY != 0 { number } else { ((number / 10) << 4) | (number % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.get(B) & B_BINARY != 0 { value } else { (value >> 4).saturating_mul(10).saturating_add(value & 0xf) }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.with(|state, now| {
            for (offset, byte) in (offset..).zip(data) {
                // The index register is write-only.
                *byte = if offset == 1 { state.read(now) } else { 0xff };
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        self.with(|state, now| {
            for (offset, &byte) in (offset..).zip(data) {
                if offset == 0 {
                    state.index = byte;
                } else {
                    state.write(byte, now);
                }
            }
        });
        None
    }
}

#[cfg(test)]
mod tests;
