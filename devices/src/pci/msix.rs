//! MSI-X: the vector table and pending bits of one function (PCI 3.0 §6.8.2).
//!
//! A route to the kernel costs a system call that stalls all vCPUs, so a vector's message is handed on only when the vector
//! becomes able to fire with a message other than the last one handed on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::interrupt::{MsiMessage, Vector};
use crate::shown::Shown;
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

/// A table as it is at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MsixView {
    /// Whether the driver uses MSI-X.
    pub enabled: bool,
    /// Whether it has masked all vectors at once.
    pub function_masked: bool,
    /// The vectors.
    pub vectors: Vec<VectorView>,
}

/// A vector as it is at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorView {
    /// Where and what it writes.
    pub message: MsiMessage,
    /// Whether the driver has masked it.
    pub masked: bool,
    /// Whether an interrupt waits for an unmasking.
    pub pending: bool,
}

/// Table and pending bits.
pub struct MsixTable {
    vectors: Arc<[Arc<Vector>]>,
    table: Mutex<Table>,
    /// For those who must not wait while the kernel changes its routes. It knows of no pending interrupts.
    shown: Shown<MsixView>,
}

impl MsixTable {
    /// A table for `vectors`, all masked. Vectors above [`MAX_VECTORS`] are out of the guest's reach.
    #[must_use]
    pub fn new(vectors: Arc<[Arc<Vector>]>) -> Self {
        let entries = vec![POWER_ON; vectors.len().min(usize::from(MAX_VECTORS))];
        let table = Table { entries, enabled: false, function_masked: false };
        Self { vectors, shown: Shown::new(table.view()), table: Mutex::new(table) }
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
        self.shown.show(table.view());
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
        self.shown.show(table.view());
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

    /// The table as it is now, for whoever wants to look at it. Waits for nothing.
    #[must_use]
    pub fn view(&self) -> MsixView {
        let mut view = self.shown.state();
        for (shown, vector) in view.vectors.iter_mut().zip(self.vectors.iter()) {
            shown.pending = vector.is_pending();
        }
        view
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
        self.shown.show(table.view());
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
    fn view(&self) -> MsixView {
        let vectors = self.entries.iter().map(|entry| VectorView {
            message: entry.message,
            masked: entry.masked,
            pending: false,
        });
        MsixView { enabled: self.enabled, function_masked: self.function_masked, vectors: vectors.collect() }
    }

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

#[cfg(test)]
mod tests {
    use std::io;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::interrupt::MsiSource;

    /// A source that records its routes, and refuses them on demand.
    struct Source {
        event: EventFd,
        routes: Arc<Mutex<Vec<MsiMessage>>>,
        /// Each route takes until it may be locked.
        slow: Arc<Mutex<()>>,
    }

    /// The data of a message that the kernel refuses.
    const REFUSED: u32 = 0xdead;

    impl MsiSource for Source {
        fn set_message(&self, message: MsiMessage) -> io::Result<()> {
            if message.data == REFUSED {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            self.routes.lock().unwrap().push(message);
            drop(self.slow.lock());
            Ok(())
        }

        fn event(&self) -> &EventFd {
            &self.event
        }

        fn connect(&self, _event: &EventFd) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn disconnect(&self, _event: &EventFd) {}
    }

    struct Setup {
        table: MsixTable,
        vectors: Arc<[Arc<Vector>]>,
        events: Vec<EventFd>,
        routes: Arc<Mutex<Vec<MsiMessage>>>,
        slow: Arc<Mutex<()>>,
    }

    impl Setup {
        fn new(count: usize) -> Self {
            let (routes, slow) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(())));
            let events: Vec<EventFd> = (0..count).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
            let source = |event: &EventFd| Source {
                event: event.try_clone().unwrap(),
                routes: Arc::clone(&routes),
                slow: Arc::clone(&slow),
            };
            let vectors: Arc<[_]> = events.iter().map(|event| Arc::new(Vector::new(Box::new(source(event))))).collect();
            Self { table: MsixTable::new(Arc::clone(&vectors)), vectors, events, routes, slow }
        }

        fn program(&self, vector: u64, data: u32, masked: bool) {
            self.table.write_table(vector * ENTRY_SIZE, &0xfee0_0000_u64.to_le_bytes());
            self.table.write_table(vector * ENTRY_SIZE + 8, &data.to_le_bytes());
            self.table.write_table(vector * ENTRY_SIZE + 12, &u32::from(masked).to_le_bytes());
        }

        fn fired(&self, vector: usize) -> bool {
            self.events[vector].read().is_ok()
        }

        fn pending(&self) -> u64 {
            let mut bits = [0; 8];
            self.table.read_pending(0, &mut bits);
            u64::from_le_bytes(bits)
        }

        fn routed(&self) -> Vec<u32> {
            self.routes.lock().unwrap().iter().map(|message| message.data).collect()
        }
    }

    #[test]
    fn a_vector_fires_only_when_enabled_unmasked_and_not_function_masked() {
        let setup = Setup::new(3);
        setup.program(1, 0x41, false);
        for control in [0, CONTROL_FUNCTION_MASK, CONTROL_ENABLE | CONTROL_FUNCTION_MASK] {
            setup.table.set_control(control);
            setup.vectors[1].trigger();
            assert!(!setup.fired(1), "control {control:#x}");
            assert_eq!(setup.pending(), 0b10);
        }
        setup.table.set_control(CONTROL_ENABLE);
        assert!(setup.fired(1), "what was pending fires");
        assert_eq!(setup.pending(), 0);
        setup.program(1, 0x41, true);
        setup.vectors[1].trigger();
        assert!(!setup.fired(1));
        setup.table.write_table(ENTRY_SIZE + 12, &[0; 4]);
        assert!(setup.fired(1));
    }

    #[test]
    fn a_route_is_set_only_when_a_vector_comes_alive_with_another_message() {
        let setup = Setup::new(2);
        setup.program(0, 0x30, false);
        setup.program(0, 0x31, true);
        assert!(setup.routed().is_empty(), "nothing can fire yet");
        setup.table.set_control(CONTROL_ENABLE);
        setup.table.write_table(12, &[0; 4]);
        assert_eq!(setup.routed(), [0x31]);
        for _ in 0..10 {
            setup.table.write_table(12, &[1, 0, 0, 0]);
            setup.table.write_table(12, &[0; 4]);
            setup.table.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
            setup.table.set_control(CONTROL_ENABLE);
        }
        assert_eq!(setup.routed(), [0x31], "masking and unmasking is free");
        setup.table.write_table(12, &[1, 0, 0, 0]);
        setup.table.write_table(8, &0x32_u32.to_le_bytes());
        setup.table.write_table(8, &0x33_u32.to_le_bytes());
        assert_eq!(setup.routed(), [0x31]);
        setup.table.write_table(12, &[0; 4]);
        assert_eq!(setup.routed(), [0x31, 0x33]);
    }

    #[test]
    fn a_vector_whose_route_is_refused_keeps_its_interrupt_pending() {
        let setup = Setup::new(1);
        setup.table.set_control(CONTROL_ENABLE);
        setup.program(0, REFUSED, false);
        setup.vectors[0].trigger();
        assert!(!setup.fired(0));
        assert_eq!(setup.pending(), 1);
        setup.program(0, 0x40, false);
        assert!(setup.fired(0));
        setup.table.write_table(8, &REFUSED.to_le_bytes());
        setup.vectors[0].trigger();
        assert!(!setup.fired(0), "it must not fire as the interrupt that it was");
        assert_eq!(setup.pending(), 1);
    }

    #[test]
    fn the_table_reads_back_what_was_written_and_ignores_odd_accesses() {
        let setup = Setup::new(2);
        setup.table.write_table(16, &0xfee0_1000_0000_0001_u64.to_le_bytes());
        setup.table.write_table(24, &0xffff_fffe_0000_0077_u64.to_le_bytes());
        let mut data = [0; 8];
        setup.table.read_table(16, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0xfee0_1000_0000_0001);
        setup.table.read_table(24, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x77, "only the mask bit of vector control exists");
        for (offset, length) in [(16, 1), (16, 2), (18, 4), (20, 8), (17, 4)] {
            setup.table.write_table(offset, &vec![0xff; length]);
            let mut data = vec![0xaa; length];
            setup.table.read_table(offset, &mut data);
            assert_eq!(data, vec![0; length]);
        }
        setup.table.read_table(16, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0xfee0_1000_0000_0001);
        for offset in [32, u64::MAX - 7, u64::MAX - 3] {
            setup.table.write_table(offset, &[0xff; 8]);
            setup.table.write_table(offset, &[0xff; 4]);
            setup.table.read_table(offset, &mut data);
            setup.table.read_pending(offset, &mut data);
            assert_eq!(data, [0; 8], "past the end");
        }
    }

    #[test]
    fn a_table_of_2048_vectors_shows_each_pending_bit_at_its_place() {
        let vectors = (0..2048).map(|_| {
            let event = EventFd::new(EFD_NONBLOCK).unwrap();
            let source = Source { event, routes: Arc::default(), slow: Arc::default() };
            Arc::new(Vector::new(Box::new(source)))
        });
        // Descriptors may be scarce where tests run, so take few and repeat them.
        let few: Vec<Arc<Vector>> = vectors.take(16).collect();
        let all: Arc<[Arc<Vector>]> = few.iter().cycle().take(2048).cloned().collect();
        let table = MsixTable::new(all);
        few[5].trigger();
        let mut bits = [0; 4];
        table.read_pending(2048 / 8 - 4, &mut bits);
        assert_eq!(u32::from_le_bytes(bits), 0x0020_0020);
        let mut entry = [0; 8];
        table.read_table(2047 * ENTRY_SIZE + 8, &mut entry);
        assert_eq!(u64::from_le_bytes(entry), 1 << 32, "masked at power-on");
    }

    #[test]
    fn who_looks_at_the_table_sees_what_was_written_and_does_not_wait_for_the_kernel() {
        let setup = Setup::new(2);
        setup.program(1, 0x41, false);
        std::thread::scope(|scope| {
            let slow = setup.slow.lock().unwrap();
            let guest = scope.spawn(|| setup.table.set_control(CONTROL_ENABLE));
            while setup.routed().is_empty() {
                std::thread::yield_now();
            }
            let (told, seen) = std::sync::mpsc::channel();
            let table = &setup.table;
            scope.spawn(move || told.send(table.view()));
            let view = seen.recv_timeout(std::time::Duration::from_secs(20)).expect("who looks waits");
            assert!(view.enabled && !view.function_masked);
            assert!(view.vectors[0].masked && !view.vectors[1].masked);
            assert_eq!(view.vectors[1].message, MsiMessage { address: 0xfee0_0000, data: 0x41 });
            assert!(!guest.is_finished(), "the kernel has not answered yet");
            drop(slow);
        });
        setup.program(1, 0x41, true);
        setup.vectors[1].trigger();
        assert!(setup.table.view().vectors[1].pending);
        setup.table.reset();
        let view = setup.table.view();
        assert!(!view.enabled && view.vectors.iter().all(|vector| vector.masked && !vector.pending));
    }

    #[test]
    fn a_reset_masks_everything_and_forgets_what_was_pending() {
        let setup = Setup::new(1);
        setup.table.set_control(CONTROL_ENABLE);
        setup.program(0, 0x40, false);
        setup.table.reset();
        setup.vectors[0].trigger();
        assert!(!setup.fired(0));
        setup.table.reset();
        setup.table.set_control(CONTROL_ENABLE);
        setup.program(0, 0x40, false);
        assert!(!setup.fired(0));
        assert_eq!(setup.routed(), [0x40], "the old route is known to be right still");
    }
}
