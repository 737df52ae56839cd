//! A 16550A UART (National Semiconductor PC16550D datasheet) whose line is the console.
//!
//! Sending takes no time: the transmitter is always empty. Input waits in a bounded backlog behind the 16-byte receive
//! FIFO, which is filled again as the guest reads, so that nothing overruns. The far end is always there: CTS, DSR and DCD
//! are on. The interrupt line is high as long as an enabled condition is pending.
//!
//! The backlog is not part of the UART: what the guest clears is the FIFO only.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::{BusDevice, VmRequest};
use crate::console::{ConsoleOutput, InputSink};
use crate::interrupt::InterruptLine;

/// Ports of the UART.
pub const LENGTH: u64 = 8;

/// Bytes of the FIFOs.
const FIFO: usize = 16;
/// Bytes of input that wait for the guest; then the console stops to read its clients.
const BACKLOG: usize = 4096;

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVED: u8 = 1 << 1;
const FCR_TRIGGER_SHIFT: u32 = 6;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_SENT: u8 = 1 << 5 | 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

#[derive(Debug)]
struct State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: [u8; 2],
    /// Change bits of the MSR: cleared by reading it.
    msr_changes: u8,
    overrun: bool,
    /// The "transmitter empty" interrupt: set when it becomes empty, cleared when the guest was told.
    empty_pending: bool,
    received: VecDeque<u8>,
    backlog: VecDeque<u8>,
    level: bool,
    /// Input was refused: the console waits to be told of room.
    refused: bool,
}

/// The UART. It is the console's [`InputSink`].
pub struct Serial {
    state: Mutex<State>,
    line: Arc<dyn InterruptLine>,
    output: ConsoleOutput,
}

impl Serial {
    /// A UART at power-on that raises `line` and sends to `output`.
    #[must_use]
    pub fn new(line: Arc<dyn InterruptLine>, output: ConsoleOutput) -> Self {
        Self { state: Mutex::new(State::power_on()), line, output }
    }

    /// Back to power-on; the interrupt falls and input that the guest has not read is forgotten.
    pub fn reset(&self) {
        let mut state = self.lock();
        let before = (state.level, state.refused);
        *state = State::power_on();
        (state.level, state.refused) = before;
        self.settle(state);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refills the FIFO, brings the interrupt line up to date and tells the console of room.
    fn settle(&self, mut state: MutexGuard<'_, State>) {
        state.refill();
        let level = state.cause() != IIR_NONE;
        if std::mem::replace(&mut state.level, level) != level {
            self.line.set(level);
        }
        let room = state.refused && state.backlog.len() <= BACKLOG / 2;
        if room {
            state.refused = false;
        }
        drop(state);
        if room {
            self.output.wake_input();
        }
    }
}

impl InputSink for Serial {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = bytes.len().min(BACKLOG.saturating_sub(state.backlog.len()));
        state.backlog.extend(bytes.iter().take(taken));
        state.refused = taken < bytes.len();
        self.settle(state);
        taken
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        for (offset, byte) in (offset..).zip(data) {
            *byte = state.read(offset);
        }
        self.settle(state);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        let mut state = self.lock();
        for (offset, &byte) in (offset..).zip(data) {
            if let Some(sent) = state.write(offset, byte) {
                self.output.append(&[sent]);
            }
        }
        self.settle(state);
        None
    }
}

impl State {
    fn power_on() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: [12, 0],
            msr_changes: 0,
            overrun: false,
            empty_pending: false,
            received: VecDeque::new(),
            backlog: VecDeque::new(),
            level: false,
            refused: false,
        }
    }

    fn fifo_enabled(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled() { FIFO } else { 1 }
    }

    /// Bytes in the FIFO that make a "received" interrupt; fewer make a time-out, at once.
    fn trigger(&self) -> usize {
        match (self.fifo_enabled(), self.fcr >> FCR_TRIGGER_SHIFT) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    fn refill(&mut self) {
        // In loopback the line is cut off.
        if self.mcr & MCR_LOOP != 0 {
            return;
        }
        let room = self.capacity().saturating_sub(self.received.len()).min(self.backlog.len());
        self.received.extend(self.backlog.drain(..room));
        if self.backlog.is_empty() && self.backlog.capacity() > FIFO {
            self.backlog = VecDeque::new();
        }
    }

    /// The pending enabled condition of the highest priority (datasheet §8.6.1).
    fn cause(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && self.received.len() >= self.trigger() {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && !self.received.is_empty() {
            IIR_TIMEOUT
        } else if self.ier & IER_EMPTY != 0 && self.empty_pending {
            IIR_EMPTY
        } else if self.ier & IER_MODEM != 0 && self.msr_changes != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// The modem lines: from the far end, or in loopback from our own outputs.
    fn modem_lines(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .into_iter()
            .filter(|(output, _)| self.mcr & output != 0)
            .fold(0, |lines, (_, input)| lines | input)
    }

    fn set_mcr(&mut self, value: u8) {
        let before = self.modem_lines();
        self.mcr = value & 0x1f;
        let after = self.modem_lines();
        // RI counts only when it ends (TERI), the others whenever they change.
        let changed = (before ^ after) & (MSR_CTS | MSR_DSR | MSR_DCD) | before & !after & MSR_RI;
        self.msr_changes |= changed >> 4;
    }

    fn set_fcr(&mut self, value: u8) {
        let switched = (self.fcr ^ value) & FCR_ENABLE != 0;
        if switched || value & FCR_CLEAR_RECEIVED != 0 {
            self.received.clear();
            self.overrun = false;
        }
        // The trigger level is writable only together with the enable bit.
        self.fcr = if value & FCR_ENABLE != 0 { value & (FCR_ENABLE | 3 << FCR_TRIGGER_SHIFT) } else { 0 };
    }

    fn set_ier(&mut self, value: u8) {
        let enabled = value & !self.ier;
        self.ier = value & 0x0f;
        // Enabling the interrupt while the transmitter is empty, which it always is, raises it.
        if enabled & IER_EMPTY != 0 {
            self.empty_pending = true;
        }
    }

    fn read(&mut self, offset: u64) -> u8 {
        let divisor = self.lcr & LCR_DLAB != 0;
        let [low, high] = self.divisor;
        match offset {
            DATA if divisor => low,
            IER if divisor => high,
            DATA => self.received.pop_front().unwrap_or(0),
            IER => self.ier,
            IIR_FCR => {
                let cause = self.cause();
                if cause == IIR_EMPTY {
                    self.empty_pending = false;
                }
                cause | if self.fifo_enabled() { IIR_FIFO } else { 0 }
            }
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => {
                let data = if self.received.is_empty() { 0 } else { LSR_DATA };
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                LSR_SENT | data | overrun
            }
            MSR => self.modem_lines() | std::mem::take(&mut self.msr_changes),
            SCR => self.scr,
            _ => 0xff,
        }
    }

    /// Returns the byte that goes out on the line, if one does.
    fn write(&mut self, offset: u64, value: u8) -> Option<u8> {
        let divisor = self.lcr & LCR_DLAB != 0;
        let [low, high] = &mut self.divisor;
        match offset {
            DATA if divisor => *low = value,
            IER if divisor => *high = value,
            DATA => return self.send(value),
            IER => self.set_ier(value),
            IIR_FCR => self.set_fcr(value),
            LCR => self.lcr = value,
            MCR => self.set_mcr(value),
            SCR => self.scr = value,
            // LSR and MSR are for factory tests only.
            _ => {}
        }
        None
    }

    fn send(&mut self, value: u8) -> Option<u8> {
        // It is sent before the next instruction: empty again.
        self.empty_pending = true;
        if self.mcr & MCR_LOOP == 0 {
            return Some(value);
        }
        if self.received.len() < self.capacity() {
            self.received.push_back(value);
        } else {
            self.overrun = true;
            // Without a FIFO the new byte replaces the old one (datasheet §8.5).
            if !self.fifo_enabled() {
                self.received.clear();
                self.received.push_back(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
