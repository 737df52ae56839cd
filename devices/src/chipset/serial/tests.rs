use std::sync::Arc;

use super::super::tests::{Line, read8, write8};
use super::*;
use crate::PlainThreads;
use crate::console::{Console, ConsoleMode};

const FCR: u64 = IIR_FCR;
const IIR: u64 = IIR_FCR;

fn uart() -> (Serial, Arc<Line>, Console) {
    let (line, console) = (Arc::new(Line::default()), Console::new(ConsoleMode::Off, &PlainThreads).unwrap());
    (Serial::new(Arc::clone(&line) as _, console.output()), line, console)
}

fn get(uart: &Serial, offset: u64) -> u8 {
    read8(uart, offset)
}

fn set(uart: &Serial, offset: u64, value: u8) {
    assert_eq!(write8(uart, offset, value), None);
}

fn drain(uart: &Serial) -> Vec<u8> {
    let mut bytes = Vec::new();
    while get(uart, LSR) & LSR_DATA != 0 {
        bytes.push(get(uart, DATA));
    }
    bytes
}

#[test]
fn what_the_guest_sends_reaches_the_console_and_the_transmitter_is_always_empty() {
    let (uart, _, console) = uart();
    for byte in b"hello" {
        set(&uart, DATA, *byte);
        assert_eq!(get(&uart, LSR), 0x60);
    }
    assert_eq!(console.recent(100), b"hello");
}

/// The steps of Linux' autoconfig() and autoconfig_16550a() in drivers/tty/serial/8250/8250_port.c, in their order.
#[test]
fn linux_finds_a_16550a_and_none_of_its_relatives() {
    let (uart, _, _) = uart();
    // Is anybody there?
    set(&uart, IER, 0);
    assert_eq!(get(&uart, IER) & 0x0f, 0);
    set(&uart, IER, 0x0f);
    assert_eq!(get(&uart, IER), 0x0f);
    set(&uart, IER, 0);
    // Loopback: RTS and OUT2 come back as CTS and DCD.
    let mcr = get(&uart, MCR);
    set(&uart, MCR, MCR_LOOP | 0x0a);
    assert_eq!(get(&uart, MSR) & 0xf0, 0x90);
    set(&uart, MCR, mcr);
    // No extended feature register behind LCR 0xBF; FIFOs that work.
    set(&uart, LCR, 0xbf);
    set(&uart, FCR, 0);
    set(&uart, LCR, 0);
    set(&uart, FCR, FCR_ENABLE);
    assert_eq!(get(&uart, IIR) >> 6, 3);
    set(&uart, LCR, 0x80);
    assert_ne!(get(&uart, 2), 0, "would be an EFR");
    set(&uart, LCR, 0xbf);
    assert_ne!(get(&uart, 2), 0, "would be an EFR");
    // No National Semiconductor register bank that changes with loopback.
    set(&uart, LCR, 0);
    let status = get(&uart, MCR);
    set(&uart, LCR, 0xe0);
    assert_eq!((get(&uart, 2) ^ status) & MCR_LOOP, 0);
    set(&uart, LCR, 0);
    set(&uart, MCR, status ^ MCR_LOOP);
    set(&uart, LCR, 0xe0);
    assert_eq!((get(&uart, 2) ^ status) & MCR_LOOP, 0);
    set(&uart, LCR, 0);
    set(&uart, MCR, status);
    // No 64-byte FIFO, with and without DLAB.
    for lcr in [0, 0x80] {
        set(&uart, LCR, lcr);
        set(&uart, FCR, FCR_ENABLE | 0x20);
        assert_eq!(get(&uart, IIR) >> 5, 6);
    }
    set(&uart, LCR, 0);
    // No XScale: UUE does not stick.
    set(&uart, IER, 0x40);
    assert_eq!(get(&uart, IER) & 0x40, 0);
}

/// serial8250_THRE_test() and the TXEN test of serial8250_do_startup().
#[test]
fn linux_finds_no_transmit_interrupt_bug() {
    let (uart, line, _) = uart();
    for _ in 0..2 {
        set(&uart, IER, IER_EMPTY);
        assert!(line.is_high());
        assert_eq!(get(&uart, IIR) & 0x0f, IIR_EMPTY);
        assert!(!line.is_high(), "reading the identification acknowledges it");
        assert_eq!(get(&uart, IIR) & 0x0f, IIR_NONE);
        set(&uart, IER, 0);
    }
    set(&uart, IER, IER_EMPTY);
    assert_eq!((get(&uart, LSR) & 0x40, get(&uart, IIR) & IIR_NONE), (0x40, 0));
}

#[test]
fn the_registers_keep_what_is_written_and_the_divisor_hides_behind_dlab() {
    let (uart, _, console) = uart();
    for value in [0x5a, 0xa5] {
        set(&uart, SCR, value);
        assert_eq!(get(&uart, SCR), value);
    }
    set(&uart, LCR, 0x83);
    set(&uart, 0, 0x01);
    set(&uart, 1, 0x02);
    assert_eq!((get(&uart, 0), get(&uart, 1), get(&uart, LCR)), (1, 2, 0x83));
    set(&uart, LCR, 0x03);
    assert_eq!((get(&uart, DATA), get(&uart, IER)), (0, 0));
    assert_eq!(console.recent(10), b"", "divisor bytes are not sent");
    set(&uart, MCR, 0xff);
    assert_eq!(get(&uart, MCR), 0x1f);
    set(&uart, LSR, 0xff);
    set(&uart, MSR, 0xff);
    assert_eq!(get(&uart, LSR), 0x60);
}

#[test]
fn a_wide_access_reaches_the_registers_one_after_the_other() {
    let (uart, _, _) = uart();
    uart.write(LCR, &[0x1b, 0x0b]);
    assert_eq!((get(&uart, LCR), get(&uart, MCR)), (0x1b, 0x0b));
    let mut data = [0; 8];
    uart.read(LCR, &mut data[..4]);
    assert_eq!(data[..4], [0x1b, 0x0b, 0x60, 0xb0]);
}

#[test]
fn interrupts_are_identified_by_priority() {
    let (uart, line, _) = uart();
    set(&uart, FCR, FCR_ENABLE);
    set(&uart, MCR, MCR_LOOP);
    for _ in 0..17 {
        set(&uart, DATA, b'x');
    }
    set(&uart, IER, 0x0f);
    assert!(line.is_high());
    assert_eq!(get(&uart, IIR), IIR_FIFO | IIR_LINE, "an overrun first");
    assert_eq!(get(&uart, LSR), 0x63);
    assert_eq!(get(&uart, IIR), IIR_FIFO | IIR_RECEIVED);
    assert_eq!(get(&uart, IIR), IIR_FIFO | IIR_RECEIVED, "stays until it is read");
    assert_eq!(drain(&uart).len(), 16);
    assert_eq!(get(&uart, IIR), IIR_FIFO | IIR_EMPTY);
    assert_eq!(get(&uart, IIR), IIR_FIFO | IIR_MODEM);
    get(&uart, MSR);
    assert_eq!(get(&uart, IIR), IIR_FIFO | IIR_NONE);
    assert!(!line.is_high());
}

#[test]
fn received_bytes_interrupt_at_the_trigger_level_and_fewer_as_a_timeout() {
    let (uart, line, _) = uart();
    for (setting, trigger) in [(0x00u8, 1usize), (0x40, 4), (0x80, 8), (0xc0, 14)] {
        set(&uart, FCR, FCR_ENABLE | FCR_CLEAR_RECEIVED | setting);
        set(&uart, IER, IER_RECEIVED);
        for count in 1..=16 {
            assert_eq!(uart.push(b"a"), 1);
            let cause = if count >= trigger { IIR_RECEIVED } else { IIR_TIMEOUT };
            assert_eq!(get(&uart, IIR), IIR_FIFO | cause, "{count} bytes, trigger {trigger}");
            assert!(line.is_high());
        }
        assert_eq!(drain(&uart).len(), 16);
        assert!(!line.is_high());
    }
}

#[test]
fn without_fifo_one_byte_at_a_time_is_received_and_nothing_is_lost() {
    let (uart, _, _) = uart();
    assert_eq!(uart.push(b"one by one"), 10);
    assert_eq!(get(&uart, IIR), IIR_NONE);
    assert_eq!(drain(&uart), b"one by one");
    assert_eq!(get(&uart, LSR), 0x60, "no overrun");
}

#[test]
fn input_beyond_the_backlog_is_refused_and_the_console_is_told_of_room() {
    let (uart, _, _) = uart();
    set(&uart, FCR, FCR_ENABLE);
    let typed: Vec<u8> = (0..6000u32).map(|i| i as u8).collect();
    let taken = uart.push(&typed);
    assert_eq!(taken, BACKLOG);
    assert!(uart.lock().refused);
    let mut read: Vec<u8> = (0..BACKLOG / 2).map(|_| get(&uart, DATA)).collect();
    assert!(!uart.lock().refused, "half of it is room enough");
    assert_eq!(uart.push(&typed[taken..]), typed.len() - taken);
    read.extend(drain(&uart));
    assert_eq!(read, typed);
    assert_eq!(uart.lock().backlog.capacity(), 0, "an idle port holds no memory");
}

#[test]
fn clearing_the_fifo_drops_what_is_in_it_and_not_what_waits_behind_it() {
    let (uart, _, _) = uart();
    set(&uart, FCR, FCR_ENABLE);
    uart.push(b"0123456789abcdefREST");
    set(&uart, FCR, FCR_ENABLE | FCR_CLEAR_RECEIVED);
    assert_eq!(drain(&uart), b"REST");
}

#[test]
fn loopback_returns_bytes_to_the_guest_and_neither_end_hears_of_it() {
    let (uart, _, console) = uart();
    set(&uart, FCR, FCR_ENABLE);
    set(&uart, MCR, MCR_LOOP);
    uart.push(b"typed");
    for byte in b"loop" {
        set(&uart, DATA, *byte);
    }
    assert_eq!(drain(&uart), b"loop");
    assert_eq!(console.recent(10), b"");
    set(&uart, MCR, 0);
    assert_eq!(drain(&uart), b"typed");
}

#[test]
fn without_fifo_a_second_byte_in_loopback_overruns_the_first() {
    let (uart, _, _) = uart();
    set(&uart, MCR, MCR_LOOP);
    set(&uart, DATA, b'a');
    set(&uart, DATA, b'b');
    assert_eq!(get(&uart, LSR), 0x63);
    assert_eq!(get(&uart, LSR), 0x61, "reading clears the error");
    assert_eq!(get(&uart, DATA), b'b');
}

#[test]
fn modem_lines_are_on_and_their_changes_are_told_once() {
    let (uart, _, _) = uart();
    assert_eq!(get(&uart, MSR), 0xb0);
    set(&uart, MCR, MCR_LOOP | MCR_OUT1);
    assert_eq!(get(&uart, MSR), 0x40 | 0x0b, "all others fell; RI counts only when it ends");
    assert_eq!(get(&uart, MSR), 0x40);
    set(&uart, MCR, MCR_LOOP);
    assert_eq!(get(&uart, MSR), 0x04);
    set(&uart, MCR, MCR_LOOP | MCR_DTR);
    assert_eq!(get(&uart, MSR), 0x22);
}

#[test]
fn the_line_rises_once_for_a_burst_of_output_as_linux_writes_it() {
    let (uart, line, console) = uart();
    set(&uart, FCR, FCR_ENABLE);
    set(&uart, IER, IER_EMPTY | IER_RECEIVED);
    for round in 1..=3 {
        assert_eq!(line.rises(), round);
        assert_eq!(get(&uart, IIR), IIR_FIFO | IIR_EMPTY);
        for byte in [b'.'; 16] {
            set(&uart, DATA, byte);
        }
    }
    assert_eq!(console.recent(100).len(), 48);
    set(&uart, IER, IER_RECEIVED);
    assert!(!line.is_high());
}

#[test]
fn a_reset_lowers_the_line_and_forgets_input() {
    let (uart, line, _) = uart();
    set(&uart, IER, IER_RECEIVED);
    uart.push(b"stale");
    assert!(line.is_high());
    uart.reset();
    assert!(!line.is_high());
    assert_eq!((get(&uart, LSR), get(&uart, IER)), (0x60, 0));
}
