//! The Watchdog Action Table (Microsoft, Hardware Watchdog Timers Design Specification 1.01 §3): how to drive the registers of
//! [`crate::chipset::watchdog`].

use acpi_tables::Aml;
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::fixed::table;
use crate::chipset::watchdog::{CONTROL, COUNT, LEFT, MAX_COUNT, RELOAD, STATUS, UNIT_MS, WATCHDOG_BASE};

/// Instructions (table 3-4).
const READ_VALUE: u8 = 0;
const READ_COUNTDOWN: u8 = 1;
const WRITE_VALUE: u8 = 2;
const WRITE_COUNTDOWN: u8 = 3;

/// Action (table 3-3), instruction, register, its bits, value, mask.
type Entry = (u8, u8, u8, u8, u32, u32);

const COUNTS: u32 = MAX_COUNT as u32;
const ENTRIES: [Entry; 10] = [
    // Reset; query current countdown; query, set countdown.
    (0x01, WRITE_VALUE, RELOAD, 8, 1, 1),
    (0x04, READ_COUNTDOWN, LEFT, 16, 0, COUNTS),
    (0x05, READ_COUNTDOWN, COUNT, 16, 0, COUNTS),
    (0x06, WRITE_COUNTDOWN, COUNT, 16, 0, COUNTS),
    // Query, set running; query, set stopped.
    (0x08, READ_VALUE, CONTROL, 8, 1, 1),
    (0x09, WRITE_VALUE, CONTROL, 8, 1, 1),
    (0x0a, READ_VALUE, CONTROL, 8, 0, 1),
    (0x0b, WRITE_VALUE, CONTROL, 8, 0, 1),
    // Query, clear the status: whether it was the watchdog that reset the machine.
    (0x20, READ_VALUE, STATUS, 8, 1, 1),
    (0x21, WRITE_VALUE, STATUS, 8, 1, 1),
];

pub(super) fn wdat() -> Vec<u8> {
    const HEADER_LENGTH: u32 = 32;
    const NOT_PCI: [u8; 8] = [0xff, 0, 0xff, 0xff, 0xff, 0, 0, 0];
    const ENABLED: u32 = 1;
    let mut body = HEADER_LENGTH.to_le_bytes().to_vec();
    body.extend(NOT_PCI);
    // A count of 0 is possible, and of no use to anybody.
    for word in [UNIT_MS, COUNTS, 1, ENABLED, ENTRIES.len() as u32] {
        body.extend(word.to_le_bytes());
    }
    for (action, instruction, register, bits, value, mask) in ENTRIES {
        body.extend([action, instruction, 0, 0]);
        let access = if bits == 8 { AccessSize::ByteAccess } else { AccessSize::WordAccess };
        let port = u64::from(WATCHDOG_BASE) + u64::from(register);
        GAS::new(AddressSpace::SystemIo, bits, 0, access, port).to_aml_bytes(&mut body);
        body.extend(value.to_le_bytes());
        body.extend(mask.to_le_bytes());
    }
    table(*b"WDAT", 1, &body)
}
