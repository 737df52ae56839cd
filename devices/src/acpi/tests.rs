use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vmm_sys_util::tempdir::TempDir;

use super::*;

fn config(processors: u32) -> AcpiConfig {
    AcpiConfig {
        apic_ids: (0..processors).collect(),
        ecam: Ecam { base: 0xb000_0000, last_bus: 255 },
        mmio32: vec![Window { first: 0xc000_0000, last: 0xfebf_ffff }],
        mmio64: Some(Window { first: 0x40_0000_0000, last: 0x7f_ffff_ffff }),
        serial: true,
        pvpanic: true,
        watchdog: true,
        ioapic: AcpiConfig::IOAPIC,
        ioapic_id: 0,
        pc_chips: true,
        tpm: false,
        generation_id: None,
        numa: Vec::new(),
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// The table at a guest-physical address, as an operating system finds it.
fn table_at(placed: &Placed, address: u64) -> &[u8] {
    let start = (address - placed.base) as usize;
    let length = u32_at(&placed.image, start + 4) as usize;
    &placed.image[start..start + length]
}

/// The tables that the XSDT lists.
fn listed(placed: &Placed) -> Vec<&[u8]> {
    let xsdt = table_at(placed, u64_at(&placed.image, 24));
    xsdt[36..].chunks(8).map(|entry| table_at(placed, u64_at(entry, 0))).collect()
}

fn table<'a>(placed: &'a Placed, signature: &[u8; 4]) -> &'a [u8] {
    listed(placed).into_iter().find(|table| table.starts_with(signature)).unwrap()
}

fn placed(config: &AcpiConfig) -> Placed {
    AcpiTables::build(config).unwrap().place(0xe0000).unwrap()
}

#[test]
fn an_operating_system_finds_every_table_from_the_rsdp_with_valid_checksums() {
    for processors in [1, 4, 254] {
        let placed = placed(&config(processors));
        let rsdp = &placed.image[..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(rsdp[15], 2);
        assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
        assert_eq!(placed.rsdp % 16, 0);
        for signature in [b"FACP", b"APIC", b"MCFG", b"WAET", b"WDAT"] {
            assert_eq!(sum(table(&placed, signature)), 0);
        }
        let fadt = table(&placed, b"FACP");
        let dsdt = table_at(&placed, u64_at(fadt, 140));
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
        assert!(dsdt.starts_with(b"DSDT"));
        assert_eq!(sum(dsdt), 0);
        let facs = u64::from(u32_at(fadt, 36));
        assert_eq!(facs % 64, 0);
        assert!(table_at(&placed, facs).starts_with(b"FACS"));
        assert_eq!(u64_at(fadt, 132), 0, "one FACS address only");
    }
}

#[test]
fn all_tables_carry_our_identifiers() {
    let tables = AcpiTables::build(&config(2)).unwrap();
    for table in tables.tables().iter().filter(|table| !["RSDP", "FACS"].contains(&table.name)) {
        assert_eq!(&table.data[..4], table.name.as_bytes());
        assert_eq!(u32_at(&table.data, 4) as usize, table.data.len());
        assert_eq!(&table.data[10..24], b"RACKVMRACKVISR");
    }
    assert_eq!(&tables.tables()[0].data[9..15], b"RACKVM");
}

#[test]
fn unplaced_tables_hold_no_address_and_no_checksum() {
    let tables = AcpiTables::build(&config(2)).unwrap();
    for pointer in tables.pointers() {
        assert!(tables.tables()[pointer.table].data[pointer.offset..][..pointer.size].iter().all(|byte| *byte == 0));
    }
    for checksum in tables.checksums() {
        assert_eq!(tables.tables()[checksum.table].data[checksum.offset], 0);
    }
    let (low, high) = (tables.place(0xe0000).unwrap(), tables.place(0x7ff0_0000).unwrap());
    assert_eq!(low.image.len(), high.image.len());
    assert_eq!(u64_at(&high.image, 24) - u64_at(&low.image, 24), 0x7ff0_0000 - 0xe0000);
}

#[test]
fn the_fadt_describes_the_full_hardware_model() {
    let placed = placed(&config(1));
    let fadt = table(&placed, b"FACP");
    assert_eq!(fadt.len(), 276);
    assert_eq!((fadt[46], u32_at(fadt, 48), fadt[52], fadt[53]), (9, 0xb2, 2, 3));
    assert_eq!((u32_at(fadt, 56), u32_at(fadt, 64), u32_at(fadt, 76), u32_at(fadt, 80)), (0x600, 0x604, 0x608, 0x620));
    assert_eq!(fadt[88..95], [4, 2, 0, 4, 16, 0, 0]);
    assert_eq!(fadt[108], 0x32, "century");
    assert_eq!(fadt[109] & 0b10, 0, "no 8042");
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & (1 << 20), 0, "not hardware-reduced");
    assert_eq!(flags & (1 << 4 | 1 << 5), 0, "the power button and the sleep button are fixed ones");
    for bit in [0, 2, 8, 10] {
        assert_ne!(flags & (1 << bit), 0, "flag {bit}");
    }
    assert_eq!(flags & (1 << 18), 0);
    let reset = &fadt[116..129];
    assert_eq!((reset[0], u64_at(reset, 4), reset[12]), (1, 0xcf9, 6));
    // The extended addresses agree with the short ones.
    for (short, long) in [(56, 148), (64, 172), (76, 208), (80, 220)] {
        assert_eq!(u64::from(u32_at(fadt, short)), u64_at(fadt, long + 4));
    }
    let many = self::placed(&config(9));
    assert_ne!(u32_at(table(&many, b"FACP"), 112) & (1 << 18), 0, "cluster model beyond 8 processors");
}

#[test]
fn the_wdat_says_how_to_drive_the_registers_of_the_watchdog() {
    use crate::bus::BusDevice;
    use crate::chipset::watchdog::{WATCHDOG_BASE, WATCHDOG_LENGTH, Watchdog};

    let placed = placed(&config(1));
    let wdat = table(&placed, b"WDAT");
    assert_eq!((u32_at(wdat, 36), &wdat[40..45]), (32, &[0xff, 0, 0xff, 0xff, 0xff][..]), "no PCI device");
    assert_eq!((u32_at(wdat, 48), u32_at(wdat, 64) as usize), (1000, (wdat.len() - 68) / 24));
    let watchdog = Watchdog::new(Arc::new(crate::chipset::HostClock::new()));
    // As Linux' and Windows' drivers do it: a value to a register, or from it.
    let run = |action: u8, count: u16| {
        let entry = wdat[68..].chunks(24).find(|entry| entry[0] == action).unwrap();
        let (instruction, bytes, port) = (entry[1], usize::from(entry[5] / 8), u64_at(entry, 8));
        let offset = port - u64::from(WATCHDOG_BASE);
        assert!(entry[4] == 1 && offset + bytes as u64 <= u64::from(WATCHDOG_LENGTH));
        let (value, mask) = (u32_at(entry, 16), u32_at(entry, 20));
        let mut data = vec![0; bytes];
        match instruction {
            0 | 1 => {
                watchdog.read(offset, &mut data);
                let read = data.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)) & mask;
                if instruction == 0 { u32::from(read == value) } else { read }
            }
            _ => {
                let written = if instruction == 2 { value } else { u32::from(count) } & mask;
                watchdog.write(offset, &written.to_le_bytes()[..bytes]);
                written
            }
        }
    };
    assert_eq!((run(0x08, 0), run(0x0a, 0), run(0x20, 0)), (0, 1, 0), "stopped, and not expired");
    run(0x06, 300);
    assert_eq!(run(0x05, 0), 300);
    run(0x09, 0);
    run(0x01, 0);
    assert_eq!((run(0x08, 0), run(0x0a, 0), run(0x04, 0)), (1, 0, 300));
    run(0x0b, 0);
    assert_eq!(run(0x0a, 0), 1);
    run(0x06, 0);
    run(0x09, 0);
    assert!(watchdog.expires());
    assert_eq!(run(0x20, 0), 1);
    run(0x21, 0);
    assert_eq!(run(0x20, 0), 0);
}

fn madt_entries(madt: &[u8]) -> Vec<&[u8]> {
    let (mut entries, mut rest) = (Vec::new(), &madt[44..]);
    while !rest.is_empty() {
        let (entry, after) = rest.split_at(usize::from(rest[1]));
        entries.push(entry);
        rest = after;
    }
    entries
}

#[test]
fn the_madt_lists_processors_io_apic_overrides_and_nmi() {
    let placed = placed(&config(3));
    let madt = table(&placed, b"APIC");
    assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
    let entries = madt_entries(madt);
    assert_eq!(entries[2], [0, 8, 2, 2, 1, 0, 0, 0]);
    assert_eq!(entries[3], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(entries[4], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(entries[5], [2, 10, 0, 9, 9, 0, 0, 0, 13, 0]);
    assert_eq!(entries[6], [4, 6, 0xff, 0, 0, 1]);
    assert_eq!(entries.len(), 7);
}

#[test]
fn apic_ids_above_254_get_x2apic_entries() {
    let mut config = config(2);
    config.apic_ids = vec![0, 254, 255, 300];
    let placed = placed(&config);
    let entries = madt_entries(table(&placed, b"APIC"));
    let kinds: Vec<u8> = entries.iter().map(|entry| entry[0]).collect();
    assert_eq!(kinds, [0, 0, 9, 9, 1, 2, 2, 4, 10]);
    assert_eq!(entries[1], [0, 8, 1, 254, 1, 0, 0, 0]);
    assert_eq!(entries[3], [9, 16, 0, 0, 44, 1, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0], "ID 300, UID 3");
    assert_eq!(entries[7], [4, 6, 0xff, 0, 0, 1]);
    assert_eq!(entries[8], [10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
}

#[test]
fn without_the_chips_of_a_pc_nothing_is_said_of_them() {
    let placed = placed(&AcpiConfig { pc_chips: false, ..config(3) });
    let madt = table(&placed, b"APIC");
    assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 0));
    let entries = madt_entries(madt);
    assert_eq!(entries[4], [2, 10, 0, 9, 9, 0, 0, 0, 13, 0]);
    assert_eq!(entries.len(), 6);
}

/// Two nodes; the second one has a processor whose ID is too large for an xAPIC.
fn two_nodes() -> Vec<Node> {
    let gib = |first: u64, last: u64| Window { first: first << 30, last: (last << 30) - 1 };
    vec![
        Node {
            apic_ids: vec![0, 254],
            memory: vec![Window { first: 0, last: 0x9_ffff }, gib(1, 2)],
            distances: vec![10, 21],
        },
        Node { apic_ids: vec![255], memory: vec![gib(4, 8)], distances: vec![22, 10] },
    ]
}

#[test]
fn the_srat_lists_processors_and_memory_of_each_node_and_the_slit_the_distances() {
    let mut config = config(1);
    config.apic_ids = vec![0, 254, 255];
    config.numa = two_nodes();
    let placed = placed(&config);
    let (srat, slit) = (table(&placed, b"SRAT"), table(&placed, b"SLIT"));
    assert_eq!((sum(srat), sum(slit), u32_at(srat, 36)), (0, 0, 1));
    let (mut entries, mut rest) = (Vec::new(), &srat[48..]);
    while !rest.is_empty() {
        let (entry, after) = rest.split_at(usize::from(rest[1]));
        entries.push(entry);
        rest = after;
    }
    assert_eq!(entries[0], [0, 16, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(entries[1][..5], [0, 16, 0, 254, 1]);
    let wide = [2, 24, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(entries[2], wide, "domain 1, ID 255");
    let memory = |entry: &[u8]| (entry[0], u32_at(entry, 2), u64_at(entry, 8), u64_at(entry, 16), u32_at(entry, 28));
    assert_eq!(memory(entries[3]), (1, 0, 0, 0xa_0000, 1));
    assert_eq!(memory(entries[4]), (1, 0, 1 << 30, 1 << 30, 1));
    assert_eq!(memory(entries[5]), (1, 1, 4 << 30, 4 << 30, 1));
    assert_eq!(entries.len(), 6);
    assert_eq!((u64_at(slit, 36), &slit[44..]), (2, &[10, 21, 22, 10][..]));
    config.numa[1].distances.pop();
    assert_eq!(AcpiTables::build(&config), Err(AcpiError::Node(1)));
}

#[test]
fn mcfg_and_waet_say_what_the_machine_has() {
    let placed = placed(&config(1));
    let mcfg = table(&placed, b"MCFG");
    assert_eq!((u64_at(mcfg, 44), mcfg[54], mcfg[55]), (0xb000_0000, 0, 255));
    assert_eq!(u32_at(table(&placed, b"WAET"), 36), 3);
}

#[test]
fn configurations_that_tables_cannot_express_are_refused() {
    let build = |change: fn(&mut AcpiConfig)| {
        let mut config = config(1);
        change(&mut config);
        AcpiTables::build(&config).unwrap_err()
    };
    assert_eq!(build(|c| c.apic_ids.clear()), AcpiError::Processors(0));
    assert_eq!(build(|c| c.ecam.base = 0xb000_0001), AcpiError::Ecam(0xb000_0001));
    assert_eq!(build(|c| c.ecam.base = 0u64.wrapping_sub(1 << 20)), AcpiError::Ecam(0u64.wrapping_sub(1 << 20)));
    assert!(matches!(build(|c| c.mmio32[0].last = 1), AcpiError::Window { name: "32-bit", .. }));
    assert!(matches!(build(|c| c.mmio32[0].first = 0xbfff_ffff), AcpiError::Window { name: "32-bit", .. }));
    assert!(matches!(build(|c| c.mmio64 = Some(c.mmio32[0])), AcpiError::Window { name: "64-bit", .. }));
    let tables = AcpiTables::build(&config(1)).unwrap();
    assert!(matches!(tables.place(0xe0001), Err(AcpiError::Place { .. })));
    assert!(matches!(tables.place(0xffff_ffc0), Err(AcpiError::Place { .. })));
    assert!(matches!(tables.place(u64::MAX - 63), Err(AcpiError::Place { .. })));
}

#[test]
fn the_dsdt_stays_small() {
    let size = |processors| {
        let tables = AcpiTables::build(&config(processors)).unwrap();
        tables.tables().iter().find(|table| table.name == "DSDT").unwrap().data.len()
    };
    assert!(size(1) < 700, "{} bytes", size(1));
    assert!(size(101) - size(1) <= 100 * 32, "{} bytes for each processor", (size(101) - size(1)) / 100);
    assert!(placed(&config(254)).image.len() < 0x10000, "the E segment holds tables for 254 processors");
    assert!(placed(&config(1024)).image.len() < 0x10000, "and for 1024");
}

/// Runs a program of ACPICA's; gives its output, or fails the test with it.
fn acpica(program: &str, folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}:\n{text}");
    text
}

fn iasl(folder: &Path, arguments: &[&str]) -> String {
    acpica("iasl", folder, arguments)
}

/// Has `check` look at the tables of machines of several kinds, in a folder and by their signatures.
fn with_tables_in_files(check: impl Fn(&Path, &[(String, &[u8])])) {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("SKIPPED: ACPICA is not installed (Debian package acpica-tools); it did not check the ACPI tables");
        return;
    }
    let without = AcpiConfig { serial: false, mmio64: None, ..config(1) };
    let full =
        AcpiConfig { tpm: true, generation_id: Some(GenerationPage::At(0xf_f000)), numa: two_nodes(), ..config(2) };
    let wide = AcpiConfig { pc_chips: false, ..config(300) };
    for config in [config(1), wide, without, full] {
        let folder = TempDir::new().unwrap();
        let placed = placed(&config);
        let fadt = table(&placed, b"FACP");
        let pointed = [table_at(&placed, u64_at(fadt, 140)), table_at(&placed, u64::from(u32_at(fadt, 36)))];
        let all = listed(&placed).into_iter().chain(pointed).chain([table_at(&placed, u64_at(&placed.image, 24))]);
        let named = all.map(|table| (String::from_utf8(table[..4].to_vec()).unwrap().to_lowercase(), table));
        let named: Vec<_> = named.collect();
        for (signature, table) in &named {
            std::fs::write(folder.as_path().join(format!("{signature}.aml")), table).unwrap();
        }
        check(folder.as_path(), &named);
    }
}

#[test]
fn iasl_disassembles_every_table_and_compiles_it_again_without_error_or_warning() {
    with_tables_in_files(|folder, tables| {
        for (signature, table) in tables {
            let text = iasl(folder, &["-d", &format!("{signature}.aml")]);
            assert!(!text.to_lowercase().contains("error") && !text.contains("Warning"), "{text}");
            let text = iasl(folder, &["-p", "again", &format!("{signature}.dsl")]);
            assert!(text.contains(" 0 Errors, 0 Warnings"), "{signature}: {text}");
            // The region of one byte whose address is an argument of the method: else each call would read 256 of them.
            let explained = |line: &&str| line.contains("2173") && line.contains("inefficient");
            let remarks: Vec<_> = text.lines().filter(|line| line.starts_with("Remark")).collect();
            let unexplained: Vec<_> = remarks.iter().filter(|line| !explained(line)).collect();
            assert_eq!(unexplained, [&""; 0], "{signature}: {text}");
            let compiled = std::fs::read(folder.join("again.aml")).unwrap();
            if signature == "dsdt" {
                assert_eq!(compiled[36..], table[36..], "iasl compiles other code from our DSDT");
            }
        }
    });
}

/// What `fwts method` does: Debian has no fwts, but the interpreter that it is built around.
#[test]
fn acpica_evaluates_each_predefined_object_and_decodes_all_resources() {
    with_tables_in_files(|folder, _| {
        let told = acpica("acpiexec", folder, &["-dr", "-b", "execute predefined", "dsdt.aml", "facp.aml"]);
        // Without -dr it mends what objects return and does not say so. What it hands to methods itself is of other types than
        // they want.
        let passed = |line: &&str| line.contains("type mismatch") && line.contains("Argument #");
        let complaints: Vec<_> = told.lines().filter(|line| line.starts_with("ACPI ") && !passed(line)).collect();
        let complaints: Vec<_> =
            complaints.iter().filter(|line| line.contains("Warning") || line.contains("Error")).collect();
        assert_eq!(complaints, [&""; 0], "{told}");
        let returned: Vec<_> = told.lines().filter(|line| line.contains(" returned AE_")).collect();
        assert!(returned.len() > 15 && returned.iter().all(|line| line.ends_with("AE_OK")), "{told}");

        let told = acpica("acpiexec", folder, &["-b", "resources", "dsdt.aml", "facp.aml"]);
        // The program also tries to set them, which no device of ours offers.
        let failed =
            told.lines().find(|line| line.contains("failed: AE_") && !line.contains("AcpiSetCurrentResources"));
        assert_eq!(failed, None, "{told}");
        assert!(told.contains("16-Bit WORD Address Space Resource"), "{told}");
    });
}

/// Does what firmware does with the files of the table loader; gives the RSDP and the other files at their places, and what it writes.
fn load(tables: &AcpiTables, places: &[u64]) -> (Vec<Vec<u8>>, Vec<(String, u64)>) {
    let given = tables.files();
    let (loader, given) = given.split_first().unwrap();
    let names: Vec<_> = given.iter().map(|file| file.name).collect();
    let mut files: Vec<_> = given.iter().map(|file| file.data.to_vec()).collect();
    let mut written = Vec::new();
    let index = |name: &[u8]| names.iter().position(|n| name.starts_with(format!("{n}\0").as_bytes())).unwrap();
    let mut allocated = Vec::new();
    for command in loader.data.chunks(128) {
        if u32_at(command, 0) == 4 {
            let name = String::from_utf8(command[4..60].to_vec()).unwrap();
            assert_eq!((u32_at(command, 116), u32_at(command, 120), command[124]), (0, 0, 8));
            written.push((name.trim_end_matches('\0').to_owned(), places[index(&command[60..116])]));
            continue;
        }
        let first = index(&command[4..60]);
        match u32_at(command, 0) {
            1 => {
                assert!(places[first].is_multiple_of(u64::from(u32_at(command, 60))));
                allocated.push((first, command[64]));
            }
            2 => {
                let (offset, size) = (u32_at(command, 116) as usize, usize::from(command[120]));
                let mut value = [0; 8];
                value[..size].copy_from_slice(&files[first][offset..offset + size]);
                let value = u64::from_le_bytes(value) + places[index(&command[60..116])];
                files[first][offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            3 => {
                let [at, start, length] = [60, 64, 68].map(|offset| u32_at(command, offset) as usize);
                files[first][at] = sum(&files[first][start..start + length]).wrapping_neg();
            }
            other => panic!("command {other}"),
        }
    }
    let wanted = [(0, 2), (1, 1), (2, 1)];
    assert_eq!(allocated, wanted[..files.len()], "the RSDP where a BIOS looks for it, the others below 4 GiB");
    (files, written)
}

#[test]
fn firmware_that_loads_the_files_gets_the_tables_that_a_direct_boot_has() {
    for processors in [1, 4, 254] {
        let tables = AcpiTables::build(&config(processors)).unwrap();
        let placed = tables.place(0xf0000).unwrap();
        // The file of the others begins with the FACS, which a direct boot has 64 bytes behind the RSDP.
        let (files, written) = load(&tables, &[0xf0000, 0xf0040]);
        assert_eq!((files.len(), written.len()), (2, 0));
        assert_eq!(files[0], placed.image[..36]);
        assert!(files[1] == placed.image[64..], "{processors}");
    }
}

#[test]
fn firmware_places_the_page_with_the_generation_id_by_itself_and_tells_where() {
    let page: Vec<u8> = (0..4096).map(|at| if at == 0x28 { 7 } else { 0 }).collect();
    let with = |page| AcpiTables::build(&AcpiConfig { generation_id: Some(page), ..config(2) }).unwrap();
    let (files, written) = load(&with(GenerationPage::Content(page.clone())), &[0xf0000, 0xf0040, 0x7e12_3000]);
    assert_eq!(files[2], page);
    assert_eq!(written, [(PAGE_ADDRESS.to_owned(), 0x7e12_3000)]);
    // The tables are those for a page at that place.
    let placed = with(GenerationPage::At(0x7e12_3000)).place(0xf0000).unwrap();
    assert_eq!(files[0], placed.image[..36]);
    assert!(files[1] == placed.image[64..]);
}

#[test]
fn several_windows_below_4_gib_leave_the_configuration_space_out() {
    let mut config = config(1);
    config.ecam.base = 0xe000_0000;
    config.mmio32 =
        vec![Window { first: 0x8000_0000, last: 0xdfff_ffff }, Window { first: 0xf000_0000, last: 0xfbff_ffff }];
    let tables = AcpiTables::build(&config).unwrap();
    let dsdt = &tables.tables().iter().find(|table| table.name == "DSDT").unwrap().data;
    for window in &config.mmio32 {
        let bounds = [window.first as u32, window.last as u32].map(u32::to_le_bytes);
        assert!(dsdt.windows(8).any(|bytes| bytes == bounds.as_flattened()), "{window:x?}");
    }
    config.mmio32[1].first -= 1;
    assert!(matches!(AcpiTables::build(&config), Err(AcpiError::Window { .. })));
}
