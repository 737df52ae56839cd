//! The TPM's registers on one side, and a swtpm that answers with anything on the other.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rackvisor_devices::bus::BusDevice;
use rackvisor_devices::tpm::double::{Mode, Swtpm};
use rackvisor_devices::tpm::{LENGTH, Tpm, TpmOptions};
use rackvisor_devices::{NoNotifier, PlainThreads};

use crate::input::Input;

const ACTIONS: usize = 64;
/// How long a guest looks at a command before it does something else.
const SOON: Duration = Duration::from_millis(1);
/// Registers that mean something, and the command itself.
const REGISTERS: [u64; 12] = [0x00, 0x08, 0x0c, 0x30, 0x40, 0x44, 0x48, 0x4c, 0x58, 0x80, 0x84, 0xffc];

/// One for all inputs: it takes one connection after the other.
static SWTPM: Mutex<Option<Swtpm>> = Mutex::new(None);

/// Plays a guest and a swtpm.
pub fn play(data: &[u8]) {
    let mut swtpm = SWTPM.lock().unwrap_or_else(PoisonError::into_inner);
    let swtpm = swtpm.get_or_insert_with(Swtpm::start);
    {
        let mut script = swtpm.script();
        script.mode = Mode::Echo;
        script.controls.clear();
        script.commands.clear();
    }
    let options = TpmOptions { id: "tpm".to_owned(), socket: swtpm.socket().to_owned() };
    let tpm = Tpm::new(options, &PlainThreads, Arc::new(NoNotifier)).unwrap();
    let registers = tpm.registers();
    let mut input = Input::new(data);
    for _ in 0..ACTIONS {
        if input.is_empty() {
            break;
        }
        act(&mut input, &tpm, registers.as_ref(), swtpm);
    }
}

fn act(input: &mut Input<'_>, tpm: &Tpm, registers: &dyn BusDevice, swtpm: &Swtpm) {
    match input.below(8) {
        0..2 => {
            let (at, width) = place(input);
            let value = input.u64().to_le_bytes();
            let _ = registers.write(at, &value[..width]);
        }
        2 => {
            let (at, width) = place(input);
            registers.read(at, &mut [0; 8][..width]);
        }
        3 => command(input, registers),
        4 => {
            let answer = input.bytes().to_vec();
            swtpm.script().mode = match answer.first() {
                None => Mode::Echo,
                Some(0xff) => Mode::Die,
                Some(0xfe) => Mode::Hang,
                _ => Mode::Say(answer),
            };
        }
        5 => swtpm.script().established = input.byte() & 1 != 0,
        6 => {
            let end = Instant::now() + SOON;
            while tpm.stop().is_err() && Instant::now() < end {
                std::thread::yield_now();
            }
        }
        // As the VMM does it: only when nothing is in flight, and with a swtpm that answers, else it takes 20 s.
        _ => {
            if tpm.stop().is_ok() && swtpm.script().mode == Mode::Echo {
                tpm.reset();
            }
        }
    }
}

fn place(input: &mut Input<'_>) -> (u64, usize) {
    let width = 1 << input.below(4);
    let at = match usize::from(input.byte()) {
        known if known < REGISTERS.len() => REGISTERS[known],
        other => other as u64 * 16 + u64::from(input.byte() % 16),
    };
    (at.min(LENGTH - width as u64), width)
}

/// A command as drivers send it, in any of its states.
fn command(input: &mut Input<'_>, registers: &dyn BusDevice) {
    let write = |at: u64, value: u32| {
        let _ = registers.write(at, &value.to_le_bytes());
    };
    write(0x08, 1);
    write(0x40, 1);
    for (at, byte) in (0x80..).zip(input.bytes()) {
        let _ = registers.write(at, &[*byte]);
    }
    write(0x4c, 1);
    let end = Instant::now() + SOON;
    let mut start = [1; 4];
    while start != [0; 4] && Instant::now() < end {
        registers.read(0x4c, &mut start);
        std::thread::yield_now();
    }
}
