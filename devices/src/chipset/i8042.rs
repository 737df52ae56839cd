//! A keyboard controller with nothing plugged in: enough to reset the machine and to answer each probe at once.
//!
//! The FADT says that there is none, so Linux and Windows do not look for it. What still touches it: reset code (command
//! 0xFE, after a wait for the input buffer to be empty), A20 code of boot loaders, firmware. Nothing here ever stays
//! busy: the input buffer is always empty, and a byte for the absent keyboard or mouse is answered by a time-out at once. While
//! nothing is to be read, the status shows a time-out together with a parity error: edk2 takes that for "no keyboard" and does not
//! spend a boot on asking for one. It reads a byte before it looks, and would wait 65 ms for it with two thousand reads here and five
//! thousand of the PM timer, a quarter of all exits of its boot: so there is one from power-on, the answer of nobody.

use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::{BusDevice, VmRequest};

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_TIMEOUT: u8 = 1 << 6;
const STATUS_PARITY: u8 = 1 << 7;

/// What the keyboard lines answer when nobody does: "resend".
const NO_DEVICE: u8 = 0xfe;
/// Output port: reset line high, A20 on.
const OUTPUT_PORT: u8 = 0xdf;
/// Configuration byte: system flag, both ports disabled.
const CONFIG_DEFAULT: u8 = 0x34;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Keyboard,
    Config,
    OutputPort,
    Echo,
    Nothing,
}

#[derive(Debug)]
struct State {
    config: u8,
    output: Option<u8>,
    last: u8,
    timeout: bool,
    command: bool,
    expect: Expect,
}

const POWER_ON: State = State {
    config: CONFIG_DEFAULT,
    output: Some(NO_DEVICE),
    last: 0,
    timeout: false,
    command: false,
    expect: Expect::Keyboard,
};

/// The keyboard controller. Its two ports are [`DataPort`] (0x60) and [`CommandPort`] (0x64).
#[derive(Debug)]
pub struct I8042(Mutex<State>);

impl I8042 {
    /// The controller at power-on.
    #[must_use]
    pub fn new() -> Self {
        Self(Mutex::new(POWER_ON))
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.with(|state| *state = POWER_ON);
    }

    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Default for I8042 {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn answer(&mut self, byte: u8) {
        self.output = Some(byte);
        self.timeout = false;
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_SYSTEM | STATUS_UNLOCKED;
        for (set, bit) in [
            (self.output.is_some(), STATUS_OUTPUT_FULL),
            (self.command, STATUS_COMMAND),
            (self.timeout, STATUS_TIMEOUT),
            (self.output.is_none(), STATUS_TIMEOUT | STATUS_PARITY),
        ] {
            status |= if set { bit } else { 0 };
        }
        status
    }

    fn read_data(&mut self) -> u8 {
        if let Some(byte) = self.output.take() {
            self.last = byte;
            self.timeout = false;
        }
        self.last
    }

    fn write_command(&mut self, command: u8) -> Option<VmRequest> {
        self.command = true;
        self.expect = Expect::Keyboard;
        match command {
            0x20 => self.answer(self.config),
            0x60 => self.expect = Expect::Config,
            // Disable and enable the mouse and keyboard ports.
            0xa7 => self.config |= 0x20,
            0xa8 => self.config &= !0x20,
            0xad => self.config |= 0x10,
            0xae => self.config &= !0x10,
            // Controller self test: passed. Port tests: clock line stuck low, that is, no port.
            0xaa => self.answer(0x55),
            0xa9 | 0xab => self.answer(0x01),
            0xd0 => self.answer(OUTPUT_PORT),
            0xd1 => self.expect = Expect::OutputPort,
            0xd2 | 0xd3 => self.expect = Expect::Echo,
            0xd4 => self.expect = Expect::Nothing,
            // Pulse output lines: bit 0 low pulses the reset line.
            0xf0..=0xff if command & 1 == 0 => return Some(VmRequest::Reset),
            _ => {}
        }
        None
    }

    fn write_data(&mut self, byte: u8) -> Option<VmRequest> {
        self.command = false;
        match std::mem::replace(&mut self.expect, Expect::Keyboard) {
            Expect::Config => self.config = byte & 0x7f,
            Expect::OutputPort if byte & 1 == 0 => return Some(VmRequest::Reset),
            Expect::OutputPort => {}
            Expect::Echo => self.answer(byte),
            Expect::Keyboard | Expect::Nothing => {
                self.answer(NO_DEVICE);
                self.timeout = true;
            }
        }
        None
    }
}

/// Port 0x60.
pub struct DataPort(pub Arc<I8042>);

impl BusDevice for DataPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0.with(State::read_data));
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<VmRequest> {
        let byte = *data.first()?;
        self.0.with(|state| state.write_data(byte))
    }
}

/// Port 0x64.
pub struct CommandPort(pub Arc<I8042>);

impl BusDevice for CommandPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0.with(|state| state.status()));
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<VmRequest> {
        let command = *data.first()?;
        self.0.with(|state| state.write_command(command))
    }
}
