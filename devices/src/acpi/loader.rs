//! Tables for firmware that places them itself: files, and the commands by which it does it (QEMU's table loader,
//! `hw/acpi/bios-linker-loader.c`; little-endian).

use super::layout::put;
use super::{AcpiTables, GENERATION_PAGE};
use crate::firmware::fw_cfg::{FwCfgFile, padded};

/// The RSDP.
const RSDP: &str = "etc/acpi/rsdp";
/// The page with the generation ID, and where firmware says where it has put it.
const PAGE: &str = "etc/vmgenid_guid";
/// The file by which firmware tells the address of the page.
pub const PAGE_ADDRESS: &str = "etc/vmgenid_addr";
/// All other tables.
const TABLES: &str = "etc/acpi/tables";
/// The commands.
const LOADER: &str = "etc/table-loader";

/// Bytes of each command, with its number.
const COMMAND_SIZE: usize = 128;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
const WRITE_POINTER: u32 = 4;
/// Zones of memory to allocate from: below 4 GiB, and where a BIOS looks for the RSDP.
const ZONE_HIGH: u8 = 1;
const ZONE_FSEG: u8 = 2;

/// What [`AcpiTables::files`] makes.
struct Commands(Vec<u8>);

impl Commands {
    fn add(&mut self, number: u32, fields: &[&[u8]]) {
        let end = self.0.len() + COMMAND_SIZE;
        self.0.extend(number.to_le_bytes());
        fields.iter().for_each(|field| self.0.extend_from_slice(field));
        self.0.resize(end, 0);
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: u8) {
        self.add(ALLOCATE, &[&padded(file), &alignment.to_le_bytes(), &[zone]]);
    }

    fn add_pointer(&mut self, file: &str, target: &str, offset: u32, size: u8) {
        self.add(ADD_POINTER, &[&padded(file), &padded(target), &offset.to_le_bytes(), &[size]]);
    }

    fn write_pointer(&mut self, file: &str, target: &str) {
        let (offset, target_offset) = (0u32.to_le_bytes(), 0u32.to_le_bytes());
        self.add(WRITE_POINTER, &[&padded(file), &padded(target), &offset, &target_offset, &[8]]);
    }

    fn add_checksum(&mut self, file: &str, offset: u32, start: u32, length: u32) {
        let numbers = [offset, start, length].map(u32::to_le_bytes);
        self.add(ADD_CHECKSUM, &[&padded(file), numbers.as_flattened()]);
    }
}

impl AcpiTables {
    /// The files by which firmware gets the tables: what to do, the RSDP, and the others; then the page with the generation ID, if it is
    /// among them, whose address the firmware writes to [`PAGE_ADDRESS`].
    #[must_use]
    pub fn files(&self) -> Vec<FwCfgFile> {
        let places = self.places();
        let alignment = |size: u64| size as u32;
        let page = self.page();
        let file = |index: usize| match index {
            0 => RSDP,
            _ if Some(index) == page => PAGE,
            _ => TABLES,
        };
        let place = |index: usize| places.get(index).copied().unwrap_or_default();
        let in_file = |index: usize, offset: usize| place(index).saturating_add(offset as u32);
        let mut commands = Commands(Vec::new());
        let in_one = self.tables.iter().filter(|table| table.name != GENERATION_PAGE);
        let most = in_one.map(|table| table.alignment).max().unwrap_or(1);
        commands.allocate(RSDP, 16, ZONE_FSEG);
        commands.allocate(TABLES, alignment(most), ZONE_HIGH);
        if page.is_some() {
            commands.allocate(PAGE, alignment(crate::generation::PAGE as u64), ZONE_HIGH);
            commands.write_pointer(PAGE_ADDRESS, PAGE);
        }
        let mut tables = self.tables.clone();
        for pointer in &self.pointers {
            // The firmware adds where the target's file has come to lie.
            let target = u64::from(place(pointer.target)).to_le_bytes();
            put(&mut tables, pointer.table, pointer.offset, &target, pointer.size);
            let (at, size) = (in_file(pointer.table, pointer.offset), pointer.size as u8);
            commands.add_pointer(file(pointer.table), file(pointer.target), at, size);
        }
        for sum in &self.checksums {
            let at = in_file(sum.table, sum.offset);
            commands.add_checksum(file(sum.table), at, place(sum.table), sum.length as u32);
        }
        let mut files = [(RSDP, Vec::new()), (TABLES, Vec::new()), (PAGE, Vec::new())];
        for (index, (table, place)) in tables.into_iter().zip(&places).enumerate() {
            if let Some((_, content)) = files.iter_mut().find(|(name, _)| *name == file(index)) {
                content.resize(*place as usize, 0);
                content.extend(table.data);
            }
        }
        let files = files.into_iter().filter(|(_, content)| !content.is_empty());
        let loader = FwCfgFile::new(LOADER, commands.0);
        [loader].into_iter().chain(files.map(|(name, content)| FwCfgFile::new(name, content))).collect()
    }

    /// Which of the tables is the page with the generation ID.
    fn page(&self) -> Option<usize> {
        self.tables.iter().position(|table| table.name == GENERATION_PAGE)
    }

    /// Where each table is in its file.
    fn places(&self) -> Vec<u32> {
        let mut end = 0u64;
        let page = self.page();
        let place = |(index, table): (usize, &super::Table)| {
            if index == 0 || Some(index) == page {
                return 0;
            }
            let place = end.next_multiple_of(table.alignment);
            end = place + table.data.len() as u64;
            // 4096 processors need some 200 KiB.
            place as u32
        };
        self.tables.iter().enumerate().map(place).collect()
    }
}
