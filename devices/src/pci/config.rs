//! Configuration space of one function: type-0 header, capability list and BARs (PCI 3.0 §6).
//!
//! Invariant: the guest changes only bits that were declared writable, so what the device side reads back is always one of
//! the values that it allowed.

use thiserror::Error;

/// Bytes of configuration space that ECAM reaches (PCIe 5.0 §7.2.2).
pub const CONFIG_SPACE_SIZE: u16 = 4096;

/// Offset of the command register.
pub const COMMAND: u16 = 0x04;
/// Command register: the function answers at its I/O BARs.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command register: the function answers at its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may access memory.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: the function must not assert its line.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Offset of BAR 0; each BAR takes 4 bytes.
pub const BAR0: u16 = 0x10;
/// Number of BAR registers in a type-0 header.
pub const BAR_COUNT: u8 = 6;

const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Error bits of the status register, cleared by writing one.
const STATUS_ERRORS: u16 = 0xf900;
const CACHE_LINE_SIZE: u16 = 0x0c;
const CAPABILITIES_POINTER: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const FIRST_CAPABILITY: u16 = 0x40;
const CAPABILITIES_END: u16 = 0x100;

const BAR_IO: u32 = 1;
const BAR_MEMORY_64: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;

/// Who the function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, subclass and programming interface, `0xBBSSPP`.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What a BAR decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32 {
        /// Reads have no side effects and writes may be merged.
        prefetchable: bool,
    },
    /// Memory anywhere; takes this BAR register and the next one.
    Memory64 {
        /// Reads have no side effects and writes may be merged.
        prefetchable: bool,
    },
    /// Memory at an address that a register other than a BAR decides (PCIEXBAR). Never assigned by [`super::Root`].
    Fixed,
}

/// A mistake in how a device describes its function.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The BAR register does not exist or is taken.
    #[error("BAR {0} does not exist or is taken: use a free one of 0..=5 (two in a row for 64 bits)")]
    BadBar(u8),
    /// BAR sizes are powers of two of at least 4 ports or 16 bytes of memory.
    #[error("BAR {index} cannot have {length:#x} bytes: use a power of two that its kind can hold")]
    BadBarLength {
        /// BAR register.
        index: u8,
        /// Bytes asked for.
        length: u64,
    },
    /// The 192 bytes for capabilities are used up, or the capability is not a whole one.
    #[error("capability {id:#04x} of {length} bytes does not fit into configuration space")]
    NoRoom {
        /// Capability ID.
        id: u8,
        /// Bytes, with ID and next pointer.
        length: usize,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct Byte {
    value: u8,
    reset: u8,
    writable: u8,
    clear_by_one: u8,
    locked: u8,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    kind: BarKind,
    length: u64,
}

/// Registers of one function.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Vec<Byte>,
    bars: [Option<Bar>; BAR_COUNT as usize],
    next_capability: u16,
    last_link: u16,
}

impl ConfigSpace {
    /// A single-function type-0 header without BARs, capabilities or interrupt line.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: vec![Byte::default(); usize::from(CONFIG_SPACE_SIZE)],
            bars: [None; BAR_COUNT as usize],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES_POINTER,
        };
        space.define(0x00, &identity.vendor.to_le_bytes());
        space.define(0x02, &identity.device.to_le_bytes());
        let class = (identity.class << 8) | u32::from(identity.revision);
        space.define(0x08, &class.to_le_bytes());
        space.define(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.define(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.make_writable(COMMAND, &command.to_le_bytes());
        space.make_clear_by_one(STATUS, &STATUS_ERRORS.to_le_bytes());
        space.make_writable(CACHE_LINE_SIZE, &[0xff]);
        space.make_writable(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Sets the value that registers have now and after a reset.
    pub fn define(&mut self, offset: u16, value: &[u8]) {
        for (byte, value) in self.range_mut(offset, value.len()).zip(value) {
            byte.value = *value;
            byte.reset = *value;
        }
    }

    /// Sets registers from the device side, whatever the guest may write.
    pub fn set(&mut self, offset: u16, value: &[u8]) {
        for (byte, value) in self.range_mut(offset, value.len()).zip(value) {
            byte.value = *value;
        }
    }

    /// Adds the bits of `mask` to those that the guest may write.
    pub fn make_writable(&mut self, offset: u16, mask: &[u8]) {
        for (byte, mask) in self.range_mut(offset, mask.len()).zip(mask) {
            byte.writable |= mask;
        }
    }

    /// Keeps the guest from changing the bits of `mask` until a reset.
    pub fn lock(&mut self, offset: u16, mask: &[u8]) {
        for (byte, mask) in self.range_mut(offset, mask.len()).zip(mask) {
            byte.locked |= mask;
        }
    }

    /// Adds the bits of `mask` to those that the guest clears by writing one.
    pub fn make_clear_by_one(&mut self, offset: u16, mask: &[u8]) {
        for (byte, mask) in self.range_mut(offset, mask.len()).zip(mask) {
            byte.clear_by_one |= mask;
        }
    }

    /// Adds a BAR of `length` bytes at register `index`; it is unassigned.
    ///
    /// # Errors
    /// [`ConfigError`] if the register is taken or the length is none that a BAR can have.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, length: u64) -> Result<(), ConfigError> {
        let wide = matches!(kind, BarKind::Memory64 { .. });
        if kind == BarKind::Fixed || index >= BAR_COUNT - u8::from(wide) || self.bar_registers_taken(index, wide) {
            return Err(ConfigError::BadBar(index));
        }
        let (least, most) = match kind {
            BarKind::Io => (4, 1 << 8),
            BarKind::Memory32 { .. } => (16, 1 << 31),
            BarKind::Memory64 { .. } | BarKind::Fixed => (16, 1 << 62),
        };
        if !length.is_power_of_two() || length < least || length > most {
            return Err(ConfigError::BadBarLength { index, length });
        }
        let (flags, decode) = match kind {
            BarKind::Io => (BAR_IO, COMMAND_IO),
            BarKind::Memory32 { prefetchable } => (prefetchable_flag(prefetchable), COMMAND_MEMORY),
            BarKind::Memory64 { prefetchable } => (BAR_MEMORY_64 | prefetchable_flag(prefetchable), COMMAND_MEMORY),
            BarKind::Fixed => (0, COMMAND_MEMORY),
        };
        let register = bar_register(index);
        self.define(register, &flags.to_le_bytes());
        // The sizing protocol (PCI 3.0 §6.2.5.1) is nothing but address bits below the size that stay zero.
        let mask = !(length - 1);
        self.make_writable(register, &low_dword(mask).to_le_bytes());
        if wide {
            self.make_writable(register + 4, &high_dword(mask).to_le_bytes());
        }
        self.make_writable(COMMAND, &decode.to_le_bytes());
        if let Some(bar) = self.bars.get_mut(usize::from(index)) {
            *bar = Some(Bar { kind, length });
        }
        Ok(())
    }

    /// Appends a capability whose bytes after ID and next pointer are `body`; gives its offset. The guest may write the
    /// bits of `writable`, which starts where `body` starts and may be shorter.
    ///
    /// # Errors
    /// [`ConfigError::NoRoom`] when the capability area is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, ConfigError> {
        let length = body.len() + 2;
        let error = ConfigError::NoRoom { id, length };
        let offset = self.next_capability;
        let Some(end) = u16::try_from(length).ok().and_then(|l| offset.checked_add(l)) else { return Err(error) };
        if end > CAPABILITIES_END || writable.len() > body.len() {
            return Err(error);
        }
        self.define(offset, &[id, 0]);
        self.define(offset + 2, body);
        self.make_writable(offset + 2, writable);
        self.define(self.last_link, &[offset.to_le_bytes()[0]]);
        self.define(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_link = offset + 1;
        self.next_capability = end.next_multiple_of(4);
        Ok(offset)
    }

    /// Reads registers; bytes past the end are all-ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        for (to, byte) in data.iter_mut().zip(self.range(offset)) {
            *to = byte.value;
        }
    }

    /// A guest's write of any length; bytes past the end are dropped. Says whether a BAR answers at another address now.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        let before = self.decoded();
        for (byte, new) in self.range_mut(offset, data.len()).zip(data) {
            let writable = byte.writable & !byte.locked;
            byte.value = (byte.value & !writable) | (new & writable);
            byte.value &= !(new & byte.clear_by_one & !byte.locked);
        }
        before != self.decoded()
    }

    /// The 16-bit register at `offset`.
    #[must_use]
    pub fn word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The 32-bit register at `offset`.
    #[must_use]
    pub fn dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Where the BAR answers: `None` while its decoding is off, while it is unassigned (address zero) and while its address
    /// plus its length runs past the address space.
    #[must_use]
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        let bar = self.bars.get(usize::from(index)).copied().flatten()?;
        let needed = if bar.kind == BarKind::Io { COMMAND_IO } else { COMMAND_MEMORY };
        if self.word(COMMAND) & needed == 0 {
            return None;
        }
        let low = u64::from(self.dword(bar_register(index)));
        let high = match bar.kind {
            BarKind::Memory64 { .. } => u64::from(self.dword(bar_register(index) + 4)) << 32,
            BarKind::Io | BarKind::Memory32 { .. } | BarKind::Fixed => 0,
        };
        let address = (high | low) & !(bar.length - 1);
        (address != 0 && address.checked_add(bar.length).is_some()).then_some(address)
    }

    /// The declared BARs: register, kind, bytes.
    pub fn bars(&self) -> impl Iterator<Item = (u8, BarKind, u64)> + '_ {
        (0..BAR_COUNT).zip(&self.bars).filter_map(|(index, bar)| bar.map(|bar| (index, bar.kind, bar.length)))
    }

    /// All registers back to power-on.
    pub fn reset(&mut self) {
        for byte in &mut self.bytes {
            (byte.value, byte.locked) = (byte.reset, 0);
        }
    }

    fn decoded(&self) -> [Option<u64>; BAR_COUNT as usize] {
        let mut addresses = [None; BAR_COUNT as usize];
        for (index, address) in (0..BAR_COUNT).zip(&mut addresses) {
            *address = self.bar_address(index);
        }
        addresses
    }

    fn bar_registers_taken(&self, index: u8, wide: bool) -> bool {
        let taken_by = |first: u8| self.bars.get(usize::from(first)).copied().flatten();
        let below = index.checked_sub(1).and_then(taken_by);
        taken_by(index).is_some()
            || (wide && taken_by(index + 1).is_some())
            || below.is_some_and(|bar| matches!(bar.kind, BarKind::Memory64 { .. }))
    }

    fn range(&self, offset: u16) -> impl Iterator<Item = &Byte> {
        self.bytes.get(usize::from(offset)..).unwrap_or_default().iter()
    }

    fn range_mut(&mut self, offset: u16, length: usize) -> impl Iterator<Item = &mut Byte> {
        self.bytes.get_mut(usize::from(offset)..).unwrap_or_default().iter_mut().take(length)
    }
}

/// Offset of the BAR register with this index.
#[must_use]
pub fn bar_register(index: u8) -> u16 {
    BAR0 + 4 * u16::from(index)
}

fn prefetchable_flag(prefetchable: bool) -> u32 {
    if prefetchable { BAR_PREFETCHABLE } else { 0 }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
fn low_dword(value: u64) -> u32 {
    value as u32
}

fn high_dword(value: u64) -> u32 {
    low_dword(value >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_00_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    fn space() -> ConfigSpace {
        ConfigSpace::new(&IDENTITY)
    }

    fn with_bars() -> ConfigSpace {
        let mut space = space();
        space.add_bar(0, BarKind::Memory64 { prefetchable: true }, 0x1_0000).unwrap();
        space.add_bar(2, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
        space.add_bar(3, BarKind::Io, 0x20).unwrap();
        space
    }

    #[test]
    fn identity_is_read_at_its_place_and_cannot_be_written() {
        let mut space = space();
        assert!(!space.write(0, &[0; 16]));
        assert_eq!(space.dword(0), 0x1042_1af4);
        assert_eq!(space.dword(8), 0x0100_0001);
        assert_eq!(space.dword(0x2c), 0x1100_1af4);
        assert_eq!(space.dword(0x0c) & 0xff_0000, 0, "header type 0, single function");
    }

    #[test]
    fn sizing_a_bar_reads_back_its_size_and_its_kind() {
        let mut space = with_bars();
        for index in 0..4 {
            assert!(!space.write(bar_register(index), &[0xff; 4]), "no address is decoded, so none can change");
        }
        assert_eq!(space.dword(0x10), 0xffff_000c);
        assert_eq!(space.dword(0x14), 0xffff_ffff);
        assert_eq!(space.dword(0x18), 0xffff_f000);
        assert_eq!(space.dword(0x1c), 0xffff_ffe1);
        space.write(bar_register(4), &[0xff; 8]);
        assert_eq!((space.dword(0x20), space.dword(0x24)), (0, 0), "a BAR that does not exist reads zero");
    }

    #[test]
    fn a_bar_answers_only_while_the_command_register_lets_it() {
        let mut space = with_bars();
        space.write(0x10, &0x0000_0012_3456_0000_u64.to_le_bytes());
        space.write(0x18, &0xfe00_0000_u32.to_le_bytes());
        space.write(0x1c, &0xc000_u32.to_le_bytes());
        assert_eq!(space.bar_address(0), None);
        assert!(space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes()));
        assert_eq!(space.bar_address(0), Some(0x12_3456_0000));
        assert_eq!(space.bar_address(2), Some(0xfe00_0000));
        assert_eq!(space.bar_address(3), None);
        assert!(!space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes()), "nothing changed");
        assert!(space.write(COMMAND, &COMMAND_IO.to_le_bytes()));
        assert_eq!((space.bar_address(0), space.bar_address(3)), (None, Some(0xc000)));
        space.reset();
        assert_eq!((space.word(COMMAND), space.dword(0x14)), (0, 0));
    }

    #[test]
    fn a_bar_at_zero_or_past_the_end_of_memory_is_not_decoded() {
        let mut space = with_bars();
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.bar_address(0), None);
        space.write(0x10, &[0xff; 8]);
        assert_eq!(space.bar_address(0), None);
        space.write(0x10, &0xffff_ffff_fffe_0000_u64.to_le_bytes());
        assert_eq!(space.bar_address(0), Some(0xffff_ffff_fffe_0000));
    }

    #[test]
    fn capabilities_are_a_list_in_the_order_they_were_added_until_the_room_is_used_up() {
        let mut space = space();
        assert_eq!(space.word(STATUS) & STATUS_CAPABILITIES, 0);
        assert_eq!(space.add_capability(0x11, &[0; 10], &[0, 0xc0]), Ok(0x40));
        assert_eq!(space.add_capability(0x09, &[0x5a; 15], &[]), Ok(0x4c));
        assert_eq!(space.add_capability(0x05, &[0; 2], &[]), Ok(0x60));
        let links: Vec<u16> = [0x34, 0x41, 0x4d, 0x61].map(|link| space.word(link) & 0xff).to_vec();
        assert_eq!(links, [0x40, 0x4c, 0x60, 0]);
        assert_ne!(space.word(STATUS) & STATUS_CAPABILITIES, 0);
        space.write(0x40, &[0xff; 0x20]);
        assert_eq!(space.word(0x42), 0xc000);
        assert_eq!(space.word(0x4e), 0x5a5a);
        assert_eq!(space.add_capability(9, &[0; 200], &[]), Err(ConfigError::NoRoom { id: 9, length: 202 }));
    }

    #[test]
    fn status_bits_are_cleared_by_writing_one_and_kept_by_writing_zero() {
        let mut space = space();
        space.set(STATUS, &0xf910_u16.to_le_bytes());
        space.write(STATUS, &0x1000_u16.to_le_bytes());
        assert_eq!(space.word(STATUS), 0xe910);
        space.write(STATUS, &[0xff, 0xff]);
        assert_eq!(space.word(STATUS), 0x0010);
    }

    #[test]
    fn what_is_locked_stays_as_it_is_until_a_reset() {
        let mut space = space();
        space.make_writable(0x40, &[0xff; 2]);
        space.write(0x40, &[0x12, 0x34]);
        space.lock(0x40, &[0x0f]);
        space.write(0x40, &[0xff; 2]);
        assert_eq!(space.word(0x40), 0xfff2);
        space.reset();
        space.write(0x40, &[0xff; 2]);
        assert_eq!(space.word(0x40), 0xffff);
    }

    #[test]
    fn bars_that_no_device_can_have_are_refused() {
        let memory = BarKind::Memory64 { prefetchable: false };
        let mut space = with_bars();
        for (index, kind) in
            [(0, BarKind::Io), (1, BarKind::Io), (2, memory), (1, memory), (5, memory), (6, BarKind::Io)]
        {
            assert_eq!(space.add_bar(index, kind, 0x100), Err(ConfigError::BadBar(index)));
        }
        assert_eq!(space.add_bar(4, BarKind::Fixed, 0x100), Err(ConfigError::BadBar(4)));
        for length in [0, 8, 24, 1 << 63] {
            assert_eq!(space.add_bar(4, memory, length), Err(ConfigError::BadBarLength { index: 4, length }));
        }
    }

    #[test]
    fn accesses_at_the_end_read_all_ones_beyond_it_and_write_nothing_there() {
        let mut space = space();
        let mut data = [0; 8];
        space.read(CONFIG_SPACE_SIZE - 4, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        space.write(CONFIG_SPACE_SIZE - 4, &[0xff; 8]);
        space.write(u16::MAX, &[0xff; 8]);
        space.read(u16::MAX, &mut data);
        assert_eq!(data, [0xff; 8]);
    }
}
