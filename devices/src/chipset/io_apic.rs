//! The I/O APIC, which turns each of its pins into a message to local APICs, for machines in which KVM's own does not reach
//! all of these: it has only eight bits for the destination.
//!
//! Registers are those of the 82093AA (datasheet 290566, §3), and as chipsets since the ICH have it, version 0x20 with an
//! EOI register (82801DB datasheet §9.5). What goes beyond these is the destination: bits 55:49 of a redirection entry, reserved
//! there, are bits 14:8 of the APIC ID, as in bits 11:5 of a message's address. So Linux defines the "extended destination ID"
//! (`virt_destid_8_14`, KVM_FEATURE_MSI_EXT_DEST_ID in Documentation/virt/kvm/x86/cpuid.rst), and Hyper-V an "extended IOAPIC RTE".

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::{BusDevice, VmRequest};
use crate::interrupt::{InterruptLine, MsiMessage};
use crate::throttle::Throttle;

/// Pins, and so redirection entries.
pub const PINS: usize = 24;
/// Bytes of registers.
pub const LENGTH: u64 = 0x100;

/// Registers in memory (82801DB §9.5.1).
const INDEX: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;
/// Registers behind the window.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const TABLE: u8 = 0x10;
/// Version 0x20, and the number of the last entry.
const VERSION_VALUE: u32 = 0x20 | (PINS as u32 - 1) << 16;
const ID_BITS: u32 = 0xf << 24;

/// A redirection entry (82093AA §3.2.4).
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const ACTIVE_LOW: u64 = 1 << 13;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const EXTENDED_SHIFT: u32 = 49;
const DESTINATION_SHIFT: u32 = 56;
/// Bits that the guest sets. The delivery status is never "pending": messages are sent at once.
const WRITABLE: u64 = VECTOR | DELIVERY_MODE | LOGICAL | ACTIVE_LOW | LEVEL | MASKED | u64::MAX << EXTENDED_SHIFT;

/// A message of an interrupt (Intel SDM vol. 3 §11.11).
const MSI_ADDRESS: u64 = 0xfee0_0000;
const MSI_DESTINATION_SHIFT: u32 = 12;
const MSI_EXTENDED_SHIFT: u32 = 5;
const MSI_LOGICAL: u64 = 1 << 2;
const MSI_ASSERT: u32 = 1 << 14;
const MSI_LEVEL: u32 = 1 << 15;

/// Sends the messages of pins. Whoever takes a level-triggered one has to say when it has been served:
/// [`IoApic::end_of_interrupt`].
pub trait PinMessages: Send + Sync {
    /// `pin` sends `message` from now on.
    ///
    /// # Errors
    /// What the kernel answered; the former message stays then.
    fn route(&self, pin: u8, message: MsiMessage) -> io::Result<()>;

    /// Sends the message of `pin`.
    fn send(&self, pin: u8);
}

/// The I/O APIC. Its lines, its registers and ends of interrupts may be used by any thread.
pub struct IoApic {
    messages: Box<dyn PinMessages>,
    state: Mutex<State>,
}

struct State {
    index: u8,
    id: u32,
    pins: [Pin; PINS],
}

#[derive(Clone, Copy)]
struct Pin {
    entry: u64,
    asserted: bool,
    /// What `PinMessages` has for it.
    routed: Option<MsiMessage>,
}

impl Pin {
    const AT_POWER_ON: Self = Self { entry: MASKED, asserted: false, routed: None };

    fn has(&self, bit: u64) -> bool {
        self.entry & bit != 0
    }

    /// Whether the line has the level that the guest says is an interrupt.
    fn is_active(&self) -> bool {
        self.asserted != self.has(ACTIVE_LOW)
    }

    fn message(&self) -> MsiMessage {
        let destination = (self.entry >> DESTINATION_SHIFT) << MSI_DESTINATION_SHIFT;
        let extended = (self.entry >> EXTENDED_SHIFT & 0x7f) << MSI_EXTENDED_SHIFT;
        let logical = if self.has(LOGICAL) { MSI_LOGICAL } else { 0 };
        let level = if self.has(LEVEL) { MSI_LEVEL | MSI_ASSERT } else { 0 };
        MsiMessage {
            address: MSI_ADDRESS | destination | extended | logical,
            data: (self.entry & (DELIVERY_MODE | VECTOR)) as u32 | level,
        }
    }

    /// The half of the entry that register `index` is: where it begins, and its bits.
    fn half(index: u8) -> (u32, u64) {
        if index & 1 == 0 { (0, u64::from(u32::MAX)) } else { (32, u64::from(u32::MAX) << 32) }
    }
}

static ROUTE_LOG: Throttle = Throttle::new();

impl IoApic {
    /// At power-on: every pin is masked.
    #[must_use]
    pub fn new(messages: Box<dyn PinMessages>) -> Self {
        Self { messages, state: Mutex::new(State { index: 0, id: 0, pins: [Pin::AT_POWER_ON; PINS] }) }
    }

    /// The line that leads to `pin` (0 to 23); one to no pin at all does nothing.
    #[must_use]
    pub fn line(self: &Arc<Self>, pin: u8) -> Arc<dyn InterruptLine> {
        Arc::new(PinLine { io_apic: Arc::clone(self), pin })
    }

    /// A local APIC says that an interrupt with this vector has been served, which it says of level-triggered ones. A line that is
    /// still asserted interrupts again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = self.state();
        for (number, pin) in (0u8..).zip(&mut state.pins) {
            if pin.has(REMOTE_IRR) && pin.entry & VECTOR == u64::from(vector) {
                pin.entry &= !REMOTE_IRR;
                self.serve(number, pin);
            }
        }
    }

    /// Back to power-on. Lines stay as those have them that they come from.
    pub fn reset(&self) {
        let mut state = self.state();
        (state.index, state.id) = (0, 0);
        state.pins.iter_mut().for_each(|pin| pin.entry = MASKED);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_line(&self, number: u8, asserted: bool) {
        let mut state = self.state();
        let Some(pin) = state.pins.get_mut(usize::from(number)) else { return };
        let was_active = pin.is_active();
        pin.asserted = asserted;
        if pin.has(LEVEL) {
            self.serve(number, pin);
        } else if pin.is_active() && !was_active && !pin.has(MASKED) {
            // An edge at a masked pin is lost (82093AA §3.2.4).
            self.send(number, pin);
        }
    }

    /// Interrupts if the pin is level-triggered, active, and neither masked nor waiting for the end of its last interrupt.
    fn serve(&self, number: u8, pin: &mut Pin) {
        if pin.has(LEVEL) && pin.is_active() && !pin.has(MASKED | REMOTE_IRR) {
            // No end will come of what is not sent.
            pin.entry |= if self.send(number, pin) { REMOTE_IRR } else { 0 };
        }
    }

    /// Sends the message of the pin; says whether it has a route, and not a former one.
    fn send(&self, number: u8, pin: &Pin) -> bool {
        let has_route = pin.routed == Some(pin.message());
        if has_route {
            self.messages.send(number);
        }
        has_route
    }

    /// A masked pin keeps its route: the interrupt that it has sent last may still be served, and ends with that vector.
    fn route(&self, number: u8, pin: &mut Pin) {
        let message = pin.message();
        if pin.has(MASKED) || pin.routed == Some(message) {
            return;
        }
        match self.messages.route(number, message) {
            Ok(()) => pin.routed = Some(message),
            Err(error) => {
                if let Some(held_back) = ROUTE_LOG.pass() {
                    tracing::warn!(pin = number, held_back, "pin of the I/O APIC stays silent, no route: {error}");
                }
            }
        }
    }

    fn write_entry(&self, number: u8, pin: &mut Pin, half: (u32, u64), value: u32) {
        let (shift, bits) = half;
        let writable = WRITABLE & bits;
        pin.entry = pin.entry & !writable | u64::from(value) << shift & writable;
        if !pin.has(LEVEL) {
            // So Linux ends an interrupt where there is no EOI register.
            pin.entry &= !REMOTE_IRR;
        }
        self.route(number, pin);
        self.serve(number, pin);
    }

    fn read_window(&self) -> u32 {
        let state = self.state();
        match state.index {
            ID | ARBITRATION => state.id,
            VERSION => VERSION_VALUE,
            index => state.pin(index).map_or(0, |(_, pin)| {
                let (shift, _) = Pin::half(index);
                (pin.entry >> shift) as u32
            }),
        }
    }

    fn write_window(&self, value: u32) {
        let state = &mut *self.state();
        match state.index {
            ID => state.id = value & ID_BITS,
            // The version is read-only, which does not keep Windows from writing it.
            index => {
                if let Some((number, _)) = state.pin(index)
                    && let Some(pin) = state.pins.get_mut(usize::from(number))
                {
                    self.write_entry(number, pin, Pin::half(index), value);
                }
            }
        }
    }
}

impl State {
    /// The pin that register `index` belongs to, if it does to one.
    fn pin(&self, index: u8) -> Option<(u8, &Pin)> {
        let number = index.checked_sub(TABLE)? / 2;
        Some((number, self.pins.get(usize::from(number))?))
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            INDEX => u32::from(self.state().index),
            WINDOW => self.read_window(),
            _ => 0,
        };
        let bytes = value.to_le_bytes().into_iter().chain(std::iter::repeat(0));
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        let value = data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        let [low, ..] = value.to_le_bytes();
        match offset {
            INDEX => self.state().index = low,
            WINDOW => self.write_window(value),
            EOI => self.end_of_interrupt(low),
            _ => {}
        }
        None
    }
}

/// A line to a pin.
struct PinLine {
    io_apic: Arc<IoApic>,
    pin: u8,
}

impl InterruptLine for PinLine {
    fn set(&self, asserted: bool) {
        self.io_apic.set_line(self.pin, asserted);
    }
}

#[cfg(test)]
mod tests;
