//! MSI-X: the vector table and pending bits of one function (PCI 3.0 §6.8.2).
//!
//! A route to the kernel costs a system call that stalls all vCPUs, so a vector's message is handed on only when the vector
//! becomes able to fire with a message other than the last one handed on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::interrupt::{MsiMessage, Vector};
use crate::throttle::Throttle;

/// Capability ID.
pub const MSIX_CAPABILITY: u8 = 0x11;
/// The most vectors that a function can have.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// Message control: MSI-X is used.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// Vector control: the vector is masked.
const ENTRY_MASKED: u32 = 1;

static ROUTE_LOG: Throttle = Throttle::new();

#[derive(Debug, Clone, Copy)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    /// What the kernel was told last.
    routed: Option<MsiMessage>,
}

/// A masked entry, as after power-on (PCI 3.0 §6.8.2.9).
const POWER_ON: Entry = Entry { message: MsiMessage { address: 0, data: 0 }, masked: true, routed: None };

#[derive(Debug)]
struct Table {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
}

/// Table and pending bits.
pub struct MsixTable {
    vectors: Arc<[Arc<Vector>]>,
    table: Mutex<Table>,
}

impl MsixTable {
    /// A table for `vectors`, all masked. Vectors above [`MAX_VECTORS`] are out of the guest's reach.
    #[must_use]
    pub fn new(vectors: Arc<[Arc<Vector>]>) -> Self {
        let entries = vec![POWER_ON; vectors.len().min(usize::from(MAX_VECTORS))];
        Self { vectors, table: Mutex::new(Table { entries, enabled: false, function_masked: false }) }
    }

    /// Takes over the message control register of the capability after a guest's write.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_FUNCTION_MASK != 0);
        if (table.enabled, table.function_masked) == (enabled, masked) {
            return;
        }
        table.enabled = enabled;
        table.function_masked = masked;
        for index in 0..table.entries.len() {
            self.apply(&mut table, index);
        }
    }

    /// Reads the table. Accesses that are not 4 or 8 aligned bytes read zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        let table = self.lock();
        for (offset, word) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            let (index, register) = split(offset);
            let Some(entry) = table.entries.get(index) else { return };
            let [a, b, c, d, e, f, g, h] = entry.message.address.to_le_bytes();
            word.copy_from_slice(&match register {
                0 => [a, b, c, d],
                4 => [e, f, g, h],
                8 => entry.message.data.to_le_bytes(),
                _ => u32::from(entry.masked).to_le_bytes(),
            });
        }
    }

    /// Writes the table. Accesses that are not 4 or 8 aligned bytes are dropped.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        let mut table = self.lock();
        let (index, _) = split(offset);
        for (offset, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let (Some(entry), Ok(word)) = (table.entries.get_mut(index), <[u8; 4]>::try_from(word)) else { return };
            let value = u32::from_le_bytes(word);
            let address = entry.message.address;
            match split(offset).1 {
                0 => entry.message.address = (address & !0xffff_ffff) | u64::from(value),
                4 => entry.message.address = (address & 0xffff_ffff) | u64::from(value) << 32,
                8 => entry.message.data = value,
                _ => entry.masked = value & ENTRY_MASKED != 0,
            }
        }
        self.apply(&mut table, index);
    }

    /// Reads the pending bits. Accesses that are not 4 or 8 aligned bytes read zero.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        let Ok(first) = usize::try_from(offset.saturating_mul(8)) else { return };
        for (position, byte) in data.iter_mut().enumerate() {
            let start = first.saturating_add(position * 8);
            for (bit, vector) in self.vectors.iter().skip(start).take(8).enumerate() {
                *byte |= u8::from(vector.is_pending()) << bit;
            }
        }
    }

    /// Forgets interrupts that wait for an unmasking: the device that raised them was reset.
    pub fn forget_pending(&self) {
        let table = self.lock();
        for (index, vector) in self.vectors.iter().enumerate() {
            if !table.live(index) {
                vector.reset();
            }
        }
    }

    /// Back to power-on: off, all vectors masked, nothing pending.
    pub fn reset(&self) {
        let mut table = self.lock();
        table.enabled = false;
        table.function_masked = false;
        for entry in &mut table.entries {
            // The kernel still has the old route: keep in mind which, it may be the one that is wanted next.
            *entry = Entry { routed: entry.routed, ..POWER_ON };
        }
        for vector in self.vectors.iter() {
            vector.reset();
        }
    }

    fn apply(&self, table: &mut Table, index: usize) {
        let live = table.live(index);
        let (Some(vector), Some(entry)) = (self.vectors.get(index), table.entries.get_mut(index)) else { return };
        if !live {
            return vector.mask();
        }
        if entry.routed != Some(entry.message) {
            if let Err(error) = vector.set_message(entry.message) {
                // Masked it stays pending; with the former route it would fire as another interrupt.
                vector.mask();
                if let Some(held_back) = ROUTE_LOG.pass() {
                    tracing::warn!(
                        index,
                        held_back,
                        "interrupt vector stays silent, no route for its message: {error}"
                    );
                }
                return;
            }
            entry.routed = Some(entry.message);
        }
        vector.unmask();
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Whether the vector fires when triggered.
    fn live(&self, index: usize) -> bool {
        self.enabled && !self.function_masked && self.entries.get(index).is_some_and(|entry| !entry.masked)
    }
}

fn aligned(offset: u64, length: usize) -> bool {
    (length == 4 && offset.is_multiple_of(4)) || (length == 8 && offset.is_multiple_of(8))
}

/// The table entry, and the offset in it.
fn split(offset: u64) -> (usize, u64) {
    (usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX), offset % ENTRY_SIZE)
}
