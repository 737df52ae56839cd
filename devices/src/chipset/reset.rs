//! The two reset registers that are not in the PM block: RST_CNT at 0xCF9 and port 0x92.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::{BusDevice, VmRequest};

/// RST_CPU: its rising edge resets; the kind of reset makes no difference to a virtual machine.
const RST_CPU: u8 = 1 << 2;
/// SYS_RST and FULL_RST: kept until the reset.
const RST_KEPT: u8 = 1 << 1 | 1 << 3;

/// The reset control register (ICH9 datasheet §13.7.5): a write with bit 2 set resets the machine.
#[derive(Debug, Default)]
pub struct ResetControl(AtomicU8);

impl ResetControl {
    /// The register at power-on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.0.load(Ordering::Relaxed);
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<VmRequest> {
        let value = *data.first()?;
        self.0.store(value & RST_KEPT, Ordering::Relaxed);
        (value & RST_CPU != 0).then_some(VmRequest::Reset)
    }
}

const FAST_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

/// System control port A at 0x92 (ICH9 datasheet §13.7.3): bit 0 resets on its rising edge, bit 1 is the A20 gate, which
/// is kept but gates nothing: A20 is always on.
#[derive(Debug)]
pub struct Port92(AtomicU8);

impl Port92 {
    /// The port at power-on, A20 on.
    #[must_use]
    pub fn new() -> Self {
        Self(AtomicU8::new(A20))
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.0.store(A20, Ordering::Relaxed);
    }
}

impl Default for Port92 {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for Port92 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0.load(Ordering::Relaxed));
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<VmRequest> {
        let value = *data.first()?;
        let before = self.0.swap(value & (A20 | FAST_RESET), Ordering::Relaxed);
        (value & !before & FAST_RESET != 0).then_some(VmRequest::Reset)
    }
}
