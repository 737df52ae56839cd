//! Doubles that the chipset's tests share, the small devices, and hostile accesses to all of it.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::PlainThreads;
use crate::bus::{BusDevice, VmRequest};
use crate::console::{Console, ConsoleMode};

/// A line that remembers its level and how often it rose.
#[derive(Default)]
pub(super) struct Line {
    pub(super) level: AtomicBool,
    pub(super) rises: AtomicU64,
}

impl Line {
    pub(super) fn is_high(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    pub(super) fn rises(&self) -> u64 {
        self.rises.load(Ordering::SeqCst)
    }
}

impl InterruptLine for Line {
    fn set(&self, asserted: bool) {
        if asserted && !self.level.swap(asserted, Ordering::SeqCst) {
            self.rises.fetch_add(1, Ordering::SeqCst);
        }
        self.level.store(asserted, Ordering::SeqCst);
    }
}

/// A clock that stands until it is turned.
#[derive(Default)]
pub(super) struct HandClock {
    monotonic: AtomicU64,
    realtime: AtomicI64,
}

impl HandClock {
    pub(super) fn at(seconds: i64) -> Arc<Self> {
        Arc::new(Self { monotonic: AtomicU64::new(0), realtime: AtomicI64::new(seconds * 1_000_000_000) })
    }

    pub(super) fn advance(&self, nanoseconds: u64) {
        self.monotonic.fetch_add(nanoseconds, Ordering::SeqCst);
        self.realtime.fetch_add(nanoseconds as i64, Ordering::SeqCst);
    }
}

impl Clock for HandClock {
    fn monotonic(&self) -> u64 {
        self.monotonic.load(Ordering::SeqCst)
    }

    fn realtime(&self) -> i128 {
        i128::from(self.realtime.load(Ordering::SeqCst))
    }
}

pub(super) fn read8(device: &dyn BusDevice, offset: u64) -> u8 {
    let mut data = [0xa5];
    device.read(offset, &mut data);
    data[0]
}

pub(super) fn read16(device: &dyn BusDevice, offset: u64) -> u16 {
    let mut data = [0xa5; 2];
    device.read(offset, &mut data);
    u16::from_le_bytes(data)
}

pub(super) fn read32(device: &dyn BusDevice, offset: u64) -> u32 {
    let mut data = [0xa5; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub(super) fn write8(device: &dyn BusDevice, offset: u64, value: u8) -> Option<VmRequest> {
    device.write(offset, &[value])
}

pub(super) fn write16(device: &dyn BusDevice, offset: u64, value: u16) -> Option<VmRequest> {
    device.write(offset, &value.to_le_bytes())
}

#[derive(Default)]
struct Lines(Mutex<Vec<String>>);

impl DebugSink for Lines {
    fn line(&self, line: &str) {
        self.0.lock().unwrap().push(line.to_owned());
    }
}

/// A whole chipset on a bus, with its console and the sink of its debug console.
struct Machine {
    ports: Bus,
    chipset: Chipset,
    console: Console,
    debug: Arc<Lines>,
    sci: Arc<Line>,
}

fn machine() -> Machine {
    let console = Console::new(ConsoleMode::Off, &PlainThreads).unwrap();
    let (sci, debug) = (Arc::new(Line::default()), Arc::new(Lines::default()));
    let chipset = Chipset::new(ChipsetConfig {
        ram_below_4g: 2 << 30,
        ram_above_4g: 3 << 30,
        rtc_offset_seconds: 0,
        rtc: Arc::<Line>::default(),
        panics: Some(Arc::new(crate::NoNotifier)),
        watchdog: true,
        acpi_from_reset: true,
        smm: false,
        sci: Arc::clone(&sci) as _,
        serial: Some((Arc::new(Line::default()), console.output())),
        debug: Some(Arc::clone(&debug) as _),
    });
    let ports = Bus::new();
    chipset.attach(&ports).unwrap();
    ports.insert(u64::from(RESET_PORT), 1, Arc::clone(&chipset.reset_control) as _).unwrap();
    Machine { ports, chipset, console, debug, sci }
}

/// A byte read through the bus.
fn port(machine: &Machine, address: u64) -> u8 {
    let mut data = [0xa5];
    machine.ports.read(address, &mut data);
    data[0]
}

#[test]
fn each_part_is_found_at_its_port() {
    let machine = machine();
    machine.ports.write(0x3f8, b"A");
    assert_eq!(machine.console.recent(10), b"A");
    assert_eq!(machine.ports.write(0x604, &[0, 0x20]), Some(VmRequest::PowerOff));
    assert_eq!(port(&machine, 0x402), 0xe9);
    machine.ports.write(0x70, &[0x0d]);
    assert_eq!(port(&machine, 0x71), 0x80);
    assert_eq!(machine.ports.write(0x64, &[0xfe]), Some(VmRequest::Reset));
    assert_eq!(machine.ports.write(0xcf9, &[6]), Some(VmRequest::Reset));
    assert_eq!(machine.ports.write(0x92, &[1]), Some(VmRequest::Reset));
    machine.ports.write(0xb2, &[ACPI_DISABLE]);
    assert_eq!(port(&machine, 0x604) & 1, 0);
}

#[test]
fn a_reset_brings_every_part_back_to_power_on() {
    let machine = machine();
    machine.ports.write(0x602, &[0, 1]);
    machine.chipset.power.press_power_button();
    assert!(machine.sci.is_high());
    machine.ports.write(0xb2, &[ACPI_DISABLE]);
    machine.ports.write(0xcf9, &[2]);
    machine.ports.write(0x92, &[0]);
    machine.ports.write(0x3f9, &[0xf]);
    machine.ports.write(0x64, &[0x20]);
    machine.chipset.reset();
    assert!(!machine.sci.is_high());
    assert_eq!(port(&machine, 0x604) & 1, 1, "ACPI mode from reset, as configured");
    assert_eq!(port(&machine, 0x601) | port(&machine, 0x603), 0);
    assert_eq!((port(&machine, 0xcf9), port(&machine, 0x92), port(&machine, 0x3f9)), (0, 2, 0));
    assert_eq!((port(&machine, 0x64) & 1, port(&machine, 0x60), port(&machine, 0x64) & 1), (1, 0xfe, 0));
}

#[test]
fn the_reset_control_register_resets_on_bit_2_and_keeps_the_kind_of_reset() {
    let reset = ResetControl::new();
    // Linux' way: choose the kind of reset first, then set the bit.
    assert_eq!(write8(&reset, 0, 0x02), None);
    assert_eq!(read8(&reset, 0), 0x02);
    assert_eq!(write8(&reset, 0, 0x06), Some(VmRequest::Reset));
    assert_eq!(write8(&reset, 0, 0x0e), Some(VmRequest::Reset));
    assert_eq!(write8(&reset, 0, 0xfb), None);
    assert_eq!(read8(&reset, 0), 0x0a);
}

#[test]
fn port_92_resets_on_the_rising_edge_of_bit_0_only() {
    let port = Port92::new();
    assert_eq!(read8(&port, 0), 2);
    assert_eq!(write8(&port, 0, 0), None);
    assert_eq!(read8(&port, 0), 0);
    assert_eq!(write8(&port, 0, 0x3), Some(VmRequest::Reset));
    assert_eq!(write8(&port, 0, 0x3), None);
}

#[test]
fn the_keyboard_controller_answers_each_probe_at_once_and_is_never_busy() {
    let controller = Arc::new(I8042::new());
    let (data, command) = (i8042::DataPort(Arc::clone(&controller)), i8042::CommandPort(controller));
    let status = || read8(&command, 0);
    let output_full = 1;
    let input_full = 2;
    assert_eq!(status() & output_full, output_full, "edk2 does not wait for the byte that it reads first");
    assert_eq!(read8(&data, 0), 0xfe);
    assert_eq!(status() & (output_full | 0xc0), 0xc0, "edk2 looks for no keyboard");
    for (sent, answer) in [(0xaa, 0x55), (0xab, 0x01), (0xa9, 0x01), (0x20, 0x34), (0xd0, 0xdf)] {
        assert_eq!(write8(&command, 0, sent), None);
        assert_eq!(status() & (output_full | input_full | 0xc0), output_full, "command {sent:#x}");
        assert_eq!(read8(&data, 0), answer);
        assert_eq!(status() & output_full, 0);
    }
    // A byte for the absent keyboard: a time-out, now.
    write8(&data, 0, 0xff);
    assert_eq!(status() & 0x41, 0x41);
    assert_eq!(read8(&data, 0), 0xfe);
    assert_eq!(status() & 0x03, 0);
    write8(&command, 0, 0x60);
    write8(&data, 0, 0x45);
    write8(&command, 0, 0x20);
    assert_eq!(read8(&data, 0), 0x45);
    for command_byte in [0xfe, 0xf0] {
        assert_eq!(write8(&command, 0, command_byte), Some(VmRequest::Reset));
    }
    assert_eq!(write8(&command, 0, 0xff), None, "no line is pulsed");
    write8(&command, 0, 0xd1);
    assert_eq!(write8(&data, 0, 0xdf), None);
    write8(&command, 0, 0xd1);
    assert_eq!(write8(&data, 0, 0xde), Some(VmRequest::Reset));
}

#[test]
fn debug_output_arrives_by_line_and_long_or_binary_lines_stay_bounded() {
    let machine = machine();
    let debug = |bytes: &[u8]| {
        for byte in bytes {
            machine.ports.write(0x402, &[*byte]);
        }
    };
    debug(b"SecCoreStartup\r\n\r\nab\x1b\xffc\n");
    debug(&[b'x'; 600]);
    let lines = machine.debug.0.lock().unwrap();
    assert_eq!(lines[..2], ["SecCoreStartup", "ab..c"]);
    assert_eq!(lines[2..], ["x".repeat(256), "x".repeat(256)]);
}

/// A small generator of numbers that look random (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

const RANGES: [(u64, u64); 9] =
    [(0x60, 1), (0x64, 1), (0x70, 2), (0x92, 1), (0xb2, 2), (0x3f8, 8), (0x402, 1), (0x600, 0x80), (0xcf9, 1)];

#[test]
fn every_width_at_every_offset_is_answered() {
    let machine = machine();
    for (base, length) in RANGES {
        for offset in 0..length {
            for width in [1, 2, 4, 8] {
                let mut data = [0; 8];
                machine.ports.read(base + offset, &mut data[..width]);
                machine.ports.write(base + offset, &[0xff; 8][..width]);
                machine.ports.write(base + offset, &[0; 8][..width]);
            }
        }
    }
}

#[test]
fn a_million_random_accesses_do_no_harm() {
    let machine = machine();
    let mut dice = Dice(0x5eed);
    for round in 0..1_000_000u32 {
        let (base, length) = RANGES[(dice.roll() % RANGES.len() as u64) as usize];
        let address = base + dice.roll() % length;
        let width = 1 << (dice.roll() % 4);
        let mut data = dice.roll().to_le_bytes();
        if dice.roll().is_multiple_of(2) {
            machine.ports.read(address, &mut data[..width]);
        } else {
            machine.ports.write(address, &data[..width]);
        }
        if round % 1000 == 0 {
            machine.chipset.power.press_power_button();
            machine.chipset.power.raise_gpe(data[0]);
            crate::console::InputSink::push(&**machine.chipset.serial.as_ref().unwrap(), &data);
        }
    }
    machine.chipset.reset();
    assert!(!machine.sci.is_high());
}
