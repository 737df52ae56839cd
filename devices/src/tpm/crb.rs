//! The registers (PTP 1.05 §6.5.3.2, table 25), and what a vCPU shares with the worker.
//!
//! | offset | register | |
//! |---|---|---|
//! | 0x00 | LOC_STATE | tpmEstablished (0: has been), locAssigned, activeLocality, tpmRegValidSts |
//! | 0x08 | LOC_CTRL | write: 1 requestAccess, 2 relinquish; reads zero |
//! | 0x0c | LOC_STS | granted |
//! | 0x30 | INTF_ID | CRB version 1, locality 0 only, 64-byte transfers; vendor 1014 (libtpms) |
//! | 0x40 | CTRL_REQ | write: 1 cmdReady, 2 goIdle; reads zero: both take effect at once |
//! | 0x44 | CTRL_STS | tpmIdle |
//! | 0x48 | CTRL_CANCEL | ignored: swtpm cannot cancel a command, and the profile lets it end by itself |
//! | 0x4c | CTRL_START | write: 1 starts; reads 1 until the response is there |
//! | 0x58 | CTRL_CMD_SIZE, _LADDR, _HADDR, CTRL_RSP_SIZE, _ADDR | where the buffer is; writes are ignored |
//! | 0x80 | DATA_BUFFER | 3968 bytes, for the command and then for the response |
//!
//! What is not listed reads zero and ignores writes. Any access width at any offset works byte by byte; a register that acts on
//! a write sees zeros where no byte was written. While a command is executed the buffer reads zero and ignores writes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::worker::Message;
use super::{BASE, CONTROL_AREA, LENGTH};
use crate::bus::{BusDevice, VmRequest};
use crate::metrics::{Counter, Latency, MetricSource, Sample, Value};
use crate::virtio::StillBusy;
use crate::{DeviceEvent, DeviceNotifier};

const LOC_STATE: u64 = 0x00;
const LOC_CTRL: u64 = 0x08;
const LOC_STS: u64 = 0x0c;
const INTF_ID: u64 = 0x30;
const INTF_ID_HIGH: u64 = 0x34;
const CTRL_REQ: u64 = CONTROL_AREA;
const CTRL_STS: u64 = 0x44;
const CTRL_START: u64 = 0x4c;
const CTRL_CMD_SIZE: u64 = 0x58;
const CTRL_CMD_LADDR: u64 = 0x5c;
const CTRL_RSP_SIZE: u64 = 0x64;
const CTRL_RSP_ADDR: u64 = 0x68;
const DATA_BUFFER: u64 = 0x80;

const LOC_ASSIGNED: u32 = 1 << 1;
const REG_VALID: u32 = 1 << 7;
const NOT_ESTABLISHED: u32 = 1 << 0;
const REQUEST_ACCESS: u32 = 1 << 0;
const RELINQUISH: u32 = 1 << 1;
const GRANTED: u32 = 1 << 0;
/// Interface type CRB, version 1; transfers of 64 bytes; CapCRB; the CRB is selected.
const INTERFACE: u32 = 1 | 1 << 4 | 3 << 11 | 1 << 14 | 1 << 17;
const VENDOR: u32 = 0x1014;
const CMD_READY: u32 = 1 << 0;
const GO_IDLE: u32 = 1 << 1;
const IDLE: u32 = 1 << 1;
const START: u32 = 1 << 0;

/// Bytes of the buffer.
pub(super) const BUFFER: usize = (LENGTH - DATA_BUFFER) as usize;
/// Bytes of the header that each command and response begins with: tag, size, code (TPM 2.0 Library part 1 §18).
pub(super) const HEADER: usize = 10;
/// TPM_RC_FAILURE: the TPM is in failure mode (part 2 §6.6.3).
pub(super) const RC_FAILURE: u32 = 0x101;
/// TPM_RC_COMMAND_SIZE: the size in the header is wrong.
const RC_COMMAND_SIZE: u32 = 0x142;

/// The size that the header of a command or response gives, if there is one.
pub(super) fn size_of(message: &[u8]) -> Option<usize> {
    let size = message.get(2..6)?.try_into().map(u32::from_be_bytes).ok()?;
    usize::try_from(size).ok()
}

/// A response that is an error and nothing else.
pub(super) fn error_response(code: u32) -> [u8; HEADER] {
    let [a, b, c, d] = code.to_be_bytes();
    [0x80, 0x01, 0, 0, 0, HEADER as u8, a, b, c, d]
}

struct State {
    granted: bool,
    idle: bool,
    /// Since when a command is executed.
    executing: Option<Instant>,
    /// Whether somebody waits for its end.
    draining: bool,
    established: bool,
    buffer: Box<[u8; BUFFER]>,
}

impl State {
    fn power_on(established: bool) -> Self {
        let buffer = Box::new([0; BUFFER]);
        Self { granted: false, idle: true, executing: None, draining: false, established, buffer }
    }

    fn respond(&mut self, response: &[u8]) {
        self.buffer.fill(0);
        for (to, from) in self.buffer.iter_mut().zip(response) {
            *to = *from;
        }
    }

    /// The 32 bits at `offset`, a multiple of 4 below the buffer.
    fn register(&self, offset: u64) -> u32 {
        let bit = |set, bit| if set { bit } else { 0 };
        match offset {
            LOC_STATE => REG_VALID | bit(self.granted, LOC_ASSIGNED) | bit(!self.established, NOT_ESTABLISHED),
            LOC_STS => bit(self.granted, GRANTED),
            INTF_ID => INTERFACE,
            INTF_ID_HIGH => VENDOR,
            CTRL_STS => bit(self.idle, IDLE),
            CTRL_START => bit(self.executing.is_some(), START),
            CTRL_CMD_SIZE | CTRL_RSP_SIZE => BUFFER as u32,
            CTRL_CMD_LADDR | CTRL_RSP_ADDR => (BASE + DATA_BUFFER) as u32,
            _ => 0,
        }
    }

    fn byte(&self, offset: u64) -> u8 {
        match offset.checked_sub(DATA_BUFFER) {
            Some(_) if self.executing.is_some() => 0,
            Some(at) => usize::try_from(at).ok().and_then(|at| self.buffer.get(at)).copied().unwrap_or(0),
            None => {
                let register = self.register(offset & !3).to_le_bytes();
                register.get((offset & 3) as usize).copied().unwrap_or(0)
            }
        }
    }

    fn put(&mut self, offset: u64, value: u8) {
        let at = offset.checked_sub(DATA_BUFFER).and_then(|at| usize::try_from(at).ok());
        if let Some(byte) = at.and_then(|at| self.buffer.get_mut(at))
            && self.executing.is_none()
        {
            *byte = value;
        }
    }

    /// The guest wrote `value` to the register at `offset`; says whether a command is to be started.
    fn act(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            LOC_CTRL if value & RELINQUISH != 0 => self.granted = false,
            LOC_CTRL if value & REQUEST_ACCESS != 0 => self.granted = true,
            CTRL_REQ if self.executing.is_some() => {}
            CTRL_REQ if value & CMD_READY != 0 => self.idle = false,
            CTRL_REQ if value & GO_IDLE != 0 => self.idle = true,
            CTRL_START => return value & START != 0 && self.granted && self.executing.is_none(),
            _ => {}
        }
        false
    }
}

/// What vCPUs, the worker and the owner of the TPM share.
pub struct Shared {
    id: String,
    state: Mutex<State>,
    notifier: Arc<dyn DeviceNotifier>,
    wake: EventFd,
    ending: AtomicBool,
    commands: Counter,
    failures: Counter,
    latency: Latency,
}

impl Shared {
    pub(super) fn new(id: String, notifier: Arc<dyn DeviceNotifier>, wake: EventFd, established: bool) -> Self {
        Self {
            id,
            state: Mutex::new(State::power_on(established)),
            notifier,
            wake,
            ending: AtomicBool::new(false),
            commands: Counter::default(),
            failures: Counter::default(),
            latency: Latency::default(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn notify(&self, event: DeviceEvent) {
        self.notifier.notify(&self.id, event);
    }

    /// Wakes the worker.
    pub(super) fn wake(&self) {
        // It fails only when the counter is full, and then the worker is awake.
        let _ = self.wake.write(1);
    }

    pub(super) fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    /// Forgets a wake-up; says whether the worker is to end.
    pub(super) fn is_ending(&self) -> bool {
        // It fails only where nothing was there to be forgotten.
        let _ = self.wake.read();
        self.ending.load(Ordering::SeqCst)
    }

    /// The worker is to end, also in the midst of a command.
    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    pub(super) fn stop(&self) -> Result<(), StillBusy> {
        let mut state = self.lock();
        let Some(since) = state.executing else { return Ok(()) };
        state.draining = true;
        Err(StillBusy { requests: 1, oldest: since.elapsed() })
    }

    /// The command is done: gives the guest its response.
    pub(super) fn complete(&self, response: Result<&[u8], u32>) {
        let mut state = self.lock();
        match response {
            Ok(response) => state.respond(response),
            Err(code) => {
                self.failures.increment();
                state.respond(&error_response(code));
            }
        }
        if let Some(since) = state.executing.take() {
            self.latency.record(since.elapsed());
        }
        let draining = std::mem::take(&mut state.draining);
        drop(state);
        if draining {
            self.notify(DeviceEvent::Drained);
        }
    }

    /// All registers as at power-on.
    pub(super) fn power_on(&self, established: bool) {
        *self.lock() = State::power_on(established);
    }
}

impl MetricSource for Shared {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        let labels = || vec![("tpm", self.id.clone())];
        let counter = |counter: &Counter| Value::Counter(counter.value());
        let latency = Value::Latency(Box::new(self.latency.snapshot()));
        let (commands, failures) = (counter(&self.commands), counter(&self.failures));
        for (name, help, value) in [
            ("tpm_commands", "Commands that the guest gave the TPM.", commands),
            ("tpm_failures", "Commands that the TPM failed because of the host or of their form.", failures),
            ("tpm_command_seconds", "How long the TPM took for a command.", latency),
        ] {
            visit(Sample { name, help, labels: labels(), value });
        }
    }
}

/// The registers on the bus.
pub struct Crb {
    shared: Arc<Shared>,
    messages: Sender<Message>,
}

impl Crb {
    pub(super) fn new(shared: Arc<Shared>, messages: Sender<Message>) -> Self {
        Self { shared, messages }
    }

    /// Hands the command in the buffer to the worker.
    fn start(&self, state: &mut State) {
        self.shared.commands.increment();
        let fits = |size: &usize| (HEADER..=BUFFER).contains(size);
        let size = size_of(&state.buffer[..]).filter(fits);
        let Some(command) = size.and_then(|size| state.buffer.get(..size)) else {
            self.shared.failures.increment();
            return state.respond(&error_response(RC_COMMAND_SIZE));
        };
        if self.messages.send(Message::Command(command.into())).is_err() {
            self.shared.failures.increment();
            return state.respond(&error_response(RC_FAILURE));
        }
        state.executing = Some(Instant::now());
        self.shared.wake();
    }
}

impl BusDevice for Crb {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.lock();
        for (offset, byte) in (offset..).zip(data) {
            *byte = state.byte(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        let mut state = self.shared.lock();
        let mut bytes = (offset..).zip(data).peekable();
        while let Some((at, &value)) = bytes.next() {
            if at >= DATA_BUFFER {
                state.put(at, value);
                continue;
            }
            let register = at & !3;
            let mut word = u32::from(value) << ((at & 3) * 8);
            while let Some((at, &value)) = bytes.next_if(|(at, _)| at & !3 == register) {
                word |= u32::from(value) << ((at & 3) * 8);
            }
            if state.act(register, word) {
                self.start(&mut state);
            }
        }
        None
    }
}
