//! Tables, what in them depends on their place, and placing them.

use super::{AcpiError, AcpiTables};

/// One table. Addresses and checksums in it are zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its signature; `"RSDP"` for the root pointer, `"VGEN"` for the page with the generation ID.
    pub name: &'static str,
    /// What its address must be a multiple of: a power of two, at most 64, or 4096 for a page.
    pub alignment: u64,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// A field that holds the address of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pointer {
    /// Index of the table that the field is in.
    pub table: usize,
    /// Offset of the field in bytes.
    pub offset: usize,
    /// Size of the field: 4 or 8 bytes, little-endian.
    pub size: usize,
    /// Index of the table pointed to.
    pub target: usize,
}

/// A byte that makes the sum of the bytes from the table's start to `length` zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    /// Index of the table.
    pub table: usize,
    /// Offset of the checksum byte.
    pub offset: usize,
    /// How many bytes are summed.
    pub length: usize,
}

/// Tables at their place in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Guest-physical address of the image.
    pub base: u64,
    /// Guest-physical address of the RSDP: the image's start.
    pub rsdp: u64,
    /// The bytes to be copied to `base`. The guest's RAM map must show them as ACPI data or reserved.
    pub image: Vec<u8>,
}

#[derive(Default)]
pub(super) struct Builder {
    tables: Vec<Table>,
    pointers: Vec<Pointer>,
    checksums: Vec<Checksum>,
}

impl Builder {
    pub(super) fn add(&mut self, name: &'static str, alignment: u64, data: Vec<u8>) -> usize {
        self.tables.push(Table { name, alignment, data });
        self.tables.len() - 1
    }

    /// Adds a table with the common header, whose checksum covers all of it.
    pub(super) fn add_checked(&mut self, name: &'static str, data: Vec<u8>) -> usize {
        let length = data.len();
        let table = self.add(name, 16, data);
        self.checksum(table, 9, length);
        table
    }

    pub(super) fn point(&mut self, table: usize, offset: usize, size: usize, target: usize) {
        self.pointers.push(Pointer { table, offset, size, target });
    }

    pub(super) fn checksum(&mut self, table: usize, offset: usize, length: usize) {
        self.checksums.push(Checksum { table, offset, length });
    }

    /// Clears all fields that depend on the place.
    pub(super) fn finish(mut self) -> AcpiTables {
        for pointer in &self.pointers {
            put(&mut self.tables, pointer.table, pointer.offset, &[0; 8], pointer.size);
        }
        for checksum in &self.checksums {
            put(&mut self.tables, checksum.table, checksum.offset, &[0], 1);
        }
        AcpiTables { tables: self.tables, pointers: self.pointers, checksums: self.checksums }
    }
}

pub(super) fn put(tables: &mut [Table], table: usize, offset: usize, bytes: &[u8], size: usize) {
    let field = tables.get_mut(table).and_then(|table| table.data.get_mut(offset..)).unwrap_or_default();
    for (to, from) in field.iter_mut().zip(bytes).take(size) {
        *to = *from;
    }
}

impl AcpiTables {
    /// One image of all tables for the guest-physical address `base`, the RSDP at its start. For a BIOS-style search of
    /// the RSDP `base` is to be in 0xE0000–0xFFFFF.
    ///
    /// # Errors
    /// [`AcpiError::Place`] if `base` is no multiple of 64 or the image would go beyond 4 GiB.
    pub fn place(&self, base: u64) -> Result<Placed, AcpiError> {
        let mut addresses = Vec::with_capacity(self.tables.len());
        let mut size = 0u64;
        for table in &self.tables {
            size = size.next_multiple_of(table.alignment);
            addresses.push(base.saturating_add(size));
            size += table.data.len() as u64;
        }
        if !base.is_multiple_of(64) || base.checked_add(size).is_none_or(|end| end > 1 << 32) {
            return Err(AcpiError::Place { base, size });
        }
        let mut tables = self.tables.clone();
        for pointer in &self.pointers {
            let address = addresses.get(pointer.target).copied().unwrap_or_default();
            put(&mut tables, pointer.table, pointer.offset, &address.to_le_bytes(), pointer.size);
        }
        for checksum in &self.checksums {
            let bytes = tables.get(checksum.table).and_then(|table| table.data.get(..checksum.length));
            let sum = bytes.unwrap_or_default().iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            put(&mut tables, checksum.table, checksum.offset, &[sum.wrapping_neg()], 1);
        }
        let mut image = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        for (table, address) in tables.iter().zip(addresses) {
            image.resize(usize::try_from(address - base).unwrap_or_default(), 0);
            image.extend_from_slice(&table.data);
        }
        Ok(Placed { base, rsdp: base, image })
    }
}
