use std::sync::Arc;

use super::super::tests::{HandClock, Line, read8, write8};
use super::*;

/// 2024-02-29 23:59:58 UTC, a Thursday.
const LEAP_DAY: i64 = 1_709_251_198;
const SECOND: u64 = 1_000_000_000;

fn rtc_with(config: &RtcConfig) -> (Rtc, Arc<HandClock>) {
    let clock = HandClock::at(LEAP_DAY);
    (Rtc::new(config, Arc::clone(&clock) as _, Arc::<Line>::default()), clock)
}

fn rtc_with_line() -> (Rtc, Arc<HandClock>, Arc<Line>) {
    let (clock, line) = (HandClock::at(LEAP_DAY), Arc::<Line>::default());
    (Rtc::new(&RtcConfig::default(), Arc::clone(&clock) as _, Arc::clone(&line) as _), clock, line)
}

fn rtc() -> (Rtc, Arc<HandClock>) {
    rtc_with(&RtcConfig::default())
}

fn get(rtc: &Rtc, index: u8) -> u8 {
    write8(rtc, 0, index);
    read8(rtc, 1)
}

fn set(rtc: &Rtc, index: u8, value: u8) {
    write8(rtc, 0, index);
    write8(rtc, 1, value);
}

/// Century, year, month, day, weekday, hour, minute, second.
fn date(rtc: &Rtc) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|index| get(rtc, index))
}

#[test]
fn the_clock_shows_host_time_in_bcd_and_goes_on() {
    let (rtc, clock) = rtc();
    assert_eq!(date(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
    clock.advance(2 * SECOND);
    assert_eq!(date(&rtc), [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x00]);
}

#[test]
fn binary_and_12_hour_modes_change_what_is_shown() {
    let (rtc, clock) = rtc();
    set(&rtc, B, B_24H | B_BINARY);
    assert_eq!(date(&rtc), [20, 24, 2, 29, 5, 23, 59, 58]);
    set(&rtc, B, B_BINARY);
    assert_eq!(get(&rtc, HOURS), 11 | HOUR_PM);
    set(&rtc, B, 0);
    assert_eq!(get(&rtc, HOURS), 0x11 | HOUR_PM);
    clock.advance(2 * SECOND);
    assert_eq!(get(&rtc, HOURS), 0x12, "midnight is 12 AM");
    clock.advance(12 * 3600 * SECOND);
    assert_eq!(get(&rtc, HOURS), 0x12 | HOUR_PM, "noon is 12 PM");
}

#[test]
fn the_configured_offset_gives_local_time() {
    let (rtc, _) = rtc_with(&RtcConfig { offset_seconds: 2 * 3600, ..RtcConfig::default() });
    assert_eq!(date(&rtc), [0x20, 0x24, 0x03, 0x01, 6, 0x01, 0x59, 0x58]);
    assert_eq!(rtc.offset_seconds(), 7200);
}

#[test]
fn update_in_progress_announces_the_last_244_microseconds_of_a_second() {
    let (rtc, clock) = rtc();
    assert_eq!(get(&rtc, A), 0x26);
    clock.advance(SECOND - 244_001);
    assert_eq!(get(&rtc, A) & A_UIP, 0);
    clock.advance(1);
    assert_eq!(get(&rtc, A) & A_UIP, A_UIP);
    clock.advance(243_999);
    assert_eq!((get(&rtc, A) & A_UIP, get(&rtc, SECONDS)), (A_UIP, 0x58));
    clock.advance(1);
    assert_eq!((get(&rtc, A) & A_UIP, get(&rtc, SECONDS)), (0, 0x59));
    set(&rtc, B, B_24H | B_SET);
    clock.advance(SECOND - 1000);
    assert_eq!(get(&rtc, A) & A_UIP, 0, "no update while SET");
}

#[test]
fn register_c_tells_of_an_update_once_and_reading_clears_it() {
    let (rtc, clock) = rtc();
    assert_eq!(get(&rtc, C), 0);
    clock.advance(SECOND);
    set(&rtc, C, 0xff);
    // The periodic flag is set as well, at the rate of register A.
    assert_eq!(get(&rtc, C), UPDATE | PERIODIC);
    assert_eq!(get(&rtc, C), 0);
}

#[test]
fn set_holds_the_clock_while_the_guest_writes_and_the_difference_becomes_the_offset() {
    let (rtc, clock) = rtc();
    set(&rtc, B, B_24H | B_SET);
    clock.advance(5 * SECOND + 300_000_000);
    assert_eq!(get(&rtc, SECONDS), 0x58, "held");
    for (index, value) in
        [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)]
    {
        set(&rtc, index, value);
        assert_eq!(get(&rtc, index), value);
    }
    set(&rtc, B, B_24H);
    assert_eq!(date(&rtc), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]);
    // The divider was not touched: seconds change when they did before.
    clock.advance(700_000_000);
    assert_eq!(date(&rtc), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
    // Host time goes on, and the offset is what makes the difference.
    assert_eq!(rtc.offset_seconds(), 946_684_800 - (LEAP_DAY + 6));
}

#[test]
fn linux_sets_the_clock_with_the_divider_in_reset_and_the_first_update_comes_half_a_second_later() {
    let (rtc, clock) = rtc();
    let (control, rate) = (get(&rtc, B), get(&rtc, A));
    set(&rtc, B, control | B_SET);
    set(&rtc, A, rate | 0x70);
    clock.advance(250_000_000);
    for (index, value) in [(YEAR, 0x30), (MONTH, 0x06), (DAY, 0x15), (HOURS, 0x12), (MINUTES, 0), (SECONDS, 0)] {
        set(&rtc, index, value);
    }
    set(&rtc, B, control);
    clock.advance(2 * SECOND);
    assert_eq!(get(&rtc, SECONDS), 0, "held until the divider runs");
    set(&rtc, A, rate);
    clock.advance(499_999_999);
    assert_eq!(get(&rtc, SECONDS), 0);
    clock.advance(1);
    assert_eq!(date(&rtc), [0x20, 0x30, 0x06, 0x15, 7, 0x12, 0, 1]);
}

#[test]
fn a_single_register_of_the_running_clock_can_be_written() {
    let (rtc, _) = rtc();
    set(&rtc, HOURS, 0x05);
    assert_eq!(date(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x05, 0x59, 0x58]);
    assert_eq!(rtc.offset_seconds(), -18 * 3600);
}

#[test]
fn what_is_no_date_becomes_the_nearest_one() {
    let (rtc, _) = rtc();
    set(&rtc, B, B_SET | B_24H);
    for index in [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS] {
        set(&rtc, index, 0xff);
    }
    set(&rtc, B, B_24H);
    assert_eq!(date(&rtc), [0x99, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]);
    set(&rtc, MONTH, 0);
    assert_eq!(get(&rtc, MONTH), 1);
}

#[test]
fn the_memory_size_is_where_firmware_looks_for_it() {
    let (rtc, _) = rtc_with(&RtcConfig { ram_below_4g: 2 << 30, ram_above_4g: 3 << 30, offset_seconds: 0 });
    let word = |index| u16::from_le_bytes([get(&rtc, index), get(&rtc, index + 1)]);
    assert_eq!(word(0x15), 640);
    assert_eq!((word(0x17), word(0x30)), (u16::MAX, u16::MAX));
    assert_eq!(u64::from(word(0x34)) * 65536 + (16 << 20), 2 << 30);
    let high = u32::from_le_bytes([get(&rtc, 0x5b), get(&rtc, 0x5c), get(&rtc, 0x5d), 0]);
    assert_eq!(u64::from(high) * 65536, 3 << 30);
    let (small, _) = rtc_with(&RtcConfig { ram_below_4g: 8 << 20, ..RtcConfig::default() });
    assert_eq!((get(&small, 0x17), get(&small, 0x18), get(&small, 0x34)), (0, 28, 0));
}

#[test]
fn memory_keeps_what_is_written_and_status_registers_do_not() {
    let (rtc, _) = rtc();
    for index in [1, 3, 5, 0x0f, 0x40, 0x7f] {
        set(&rtc, index, 0x5a);
        assert_eq!(get(&rtc, index), 0x5a);
    }
    set(&rtc, D, 0);
    assert_eq!(get(&rtc, D), D_VALID);
    set(&rtc, A, 0xa6);
    assert_eq!(get(&rtc, A), 0x26, "UIP is read-only");
    assert_eq!(read8(&rtc, 0), 0xff, "the index is write-only");
}

#[test]
fn bit_7_of_the_index_masks_nmi_and_is_no_part_of_the_index() {
    let (rtc, _) = rtc();
    assert_eq!(get(&rtc, 0x80 | D), D_VALID);
    assert!(rtc.nmi_masked());
    get(&rtc, D);
    assert!(!rtc.nmi_masked());
}

#[test]
fn a_reset_keeps_the_guests_time_and_starts_a_clock_that_was_held() {
    let (rtc, clock) = rtc();
    set(&rtc, YEAR, 0x30);
    set(&rtc, 0x40, 0x5a);
    set(&rtc, B, B_SET | B_24H | 0x70);
    set(&rtc, A, 0x70);
    rtc.reset();
    clock.advance(SECOND);
    assert_eq!((get(&rtc, YEAR), get(&rtc, SECONDS)), (0x30, 0x59));
    assert_eq!((get(&rtc, 0x40), get(&rtc, B)), (0x5a, B_24H));
}

#[test]
fn an_update_interrupts_each_second_also_where_nobody_reads_register_c() {
    let (rtc, clock, line) = rtc_with_line();
    set(&rtc, B, B_24H | UPDATE);
    for second in 1..=3 {
        clock.advance(SECOND);
        get(&rtc, D);
        get(&rtc, D);
        assert_eq!((line.rises(), line.is_high()), (second, false));
    }
    // It is past midnight, which is what the alarm is set to at first.
    assert_eq!((get(&rtc, C), get(&rtc, C)), (C_IRQF | UPDATE | ALARM | PERIODIC, 0));
    set(&rtc, B, B_24H | B_SET | UPDATE);
    clock.advance(3 * SECOND);
    assert_eq!((get(&rtc, C) & UPDATE, get(&rtc, B)), (0, B_24H | B_SET), "no updates while the clock is held");
    assert_eq!(line.rises(), 3);
}

#[test]
fn an_enable_interrupts_for_what_is_pending_already() {
    let (rtc, clock, line) = rtc_with_line();
    clock.advance(SECOND);
    get(&rtc, D);
    assert_eq!(line.rises(), 0);
    set(&rtc, B, B_24H | UPDATE);
    assert_eq!(line.rises(), 1);
}

#[test]
fn an_alarm_comes_at_its_time_whatever_the_mode_and_every_minute_where_it_says_so() {
    // It is 23:59:58.
    for (mode, [hours, minutes, seconds], wait) in [
        (B_24H, [0x00, 0x00, 0x01], 3),
        (B_24H | B_BINARY, [0, 1, 0], 62),
        (0, [0x12, 0x00, 0x00], 2),
        (B_BINARY, [1 | HOUR_PM, 0, 0], 2 + 13 * 3600),
        (B_24H, [0xff, 0xc0, 0x59], 1),
        (B_24H, [0xff, 0x30, 0x00], 1802),
        (B_24H, [0x23, 0x59, 0x58], 86_400),
    ] {
        let (rtc, clock, line) = rtc_with_line();
        for (index, value) in [(0x05, hours), (0x03, minutes), (0x01, seconds), (B, mode | ALARM)] {
            set(&rtc, index, value);
        }
        let next = |rtc: &Rtc| {
            let state = rtc.lock();
            state.next_alarm(state.updates_seen + 1).map(|at| at - state.updates_seen)
        };
        assert_eq!(next(&rtc), Some(wait), "{mode:#x} {hours:#x}");
        clock.advance((wait as u64 - 1) * SECOND);
        assert_eq!((get(&rtc, C) & ALARM, line.rises()), (0, 0));
        clock.advance(SECOND);
        assert_eq!((get(&rtc, C) & (ALARM | C_IRQF), line.rises()), (ALARM | C_IRQF, 1));
    }
    let (rtc, _) = rtc();
    set(&rtc, 0x05, 0x24);
    assert_eq!(rtc.lock().next_alarm(0), None, "there is no such hour");
}

#[test]
fn periodic_interrupts_come_at_the_rate_of_register_a() {
    for (rate, hz) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)] {
        let (rtc, clock, line) = rtc_with_line();
        set(&rtc, A, 0x20 | rate);
        set(&rtc, B, B_24H | PERIODIC);
        let wait = rtc.lock().next(rtc.now()).unwrap();
        assert_eq!(wait.as_nanos(), (1_000_000_000_u128).div_ceil(hz));
        for _ in 0..10 {
            clock.advance(u64::try_from(wait.as_nanos()).unwrap());
            get(&rtc, D);
        }
        assert_eq!((line.rises(), get(&rtc, C) & !(UPDATE | ALARM)), (10, C_IRQF | PERIODIC));
        set(&rtc, A, 0x20);
        clock.advance(SECOND);
        assert_eq!((get(&rtc, C) & PERIODIC, rtc.lock().next(rtc.now())), (0, None), "rate 0 is none");
    }
}

#[test]
fn nobody_waits_for_what_is_not_enabled_and_a_paused_clock_keeps_what_became_due() {
    let (rtc, clock, line) = rtc_with_line();
    assert_eq!(rtc.lock().next(rtc.now()), None);
    set(&rtc, B, B_24H | UPDATE);
    assert!(rtc.lock().next(rtc.now()).is_some());
    rtc.pause(true);
    assert_eq!(rtc.lock().next(rtc.now()), None);
    clock.advance(5 * SECOND);
    get(&rtc, D);
    rtc.pause(false);
    assert_eq!(line.rises(), 1);
    rtc.reset();
    clock.advance(SECOND);
    get(&rtc, D);
    assert_eq!(line.rises(), 1, "a reset clears the enables");
}

#[test]
fn the_timer_raises_interrupts_by_itself_and_ends_when_it_is_dropped() {
    let line = Arc::<Line>::default();
    let rtc = Rtc::new(&RtcConfig::default(), Arc::new(super::super::HostClock::new()), Arc::clone(&line) as _);
    let rtc = Arc::new(rtc);
    let timer = RtcTimer::start(&rtc, &crate::PlainThreads).unwrap();
    set(&rtc, A, 0x26);
    set(&rtc, B, B_24H | PERIODIC);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while line.rises() < 20 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    drop(timer);
    assert_eq!(Arc::strong_count(&rtc), 1);
}
