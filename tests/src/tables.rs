//! ACPI tables as a guest has them.

use std::path::Path;
use std::process::Command;

use crate::{Guest, skip};

/// Reads all ACPI tables of `guest` and checks that each has a valid checksum, and that iasl disassembles it and compiles it
/// again without an error or a warning. Gives their names. `folder` is for what iasl makes.
pub fn check_tables(guest: &mut Guest, folder: &Path) -> Vec<String> {
    let names = guest.ok("cd /sys/firmware/acpi/tables && ls -p | grep -v /");
    let names: Vec<String> = names.split_whitespace().map(str::to_owned).collect();
    if Command::new("iasl").arg("-v").output().is_err() {
        skip("iasl is not installed (Debian package acpica-tools): the tables are not compiled again");
        return names;
    }
    for name in names.iter().filter(|name| *name != "FACS") {
        let table = guest.bytes(&format!("/sys/firmware/acpi/tables/{name}"));
        assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum of {name}");
        std::fs::write(folder.join(format!("{name}.dat")), table).unwrap();
        iasl(folder, &["-d", &format!("{name}.dat")]);
        let told = iasl(folder, &[&format!("{name}.dsl")]);
        assert!(told.contains(" 0 Errors, 0 Warnings"), "{name}: {told}");
    }
    names
}

fn iasl(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("iasl").args(arguments).current_dir(folder).output().unwrap();
    let told = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "iasl {arguments:?}: {told}");
    told
}
