//! Builds the guests that are too long to be written as bytes, with the C compiler that links Rust's programs too.
#![allow(clippy::expect_used, reason = "a build fails by panicking")]

use std::path::Path;
use std::process::Command;

/// The address of the first byte, see `Tiny::abuses` in `src/tiny.rs`.
const START: u32 = 0x10_2014;

fn main() {
    let out = std::env::var("OUT_DIR").expect("cargo sets it");
    let flags = "-m32 -march=i686 -O1 -Wall -Wextra -Wno-parentheses -ffreestanding -fno-pic -fno-stack-protector \
        -fcf-protection=none -fno-asynchronous-unwind-tables -mgeneral-regs-only -nostdlib -static \
        -Wl,--oformat=binary,--build-id=none,-e,start";
    let status = Command::new("gcc")
        .args(flags.split_whitespace())
        .arg(format!("-Wl,-Ttext={START:#x}"))
        .args(["guests/entry.S", "guests/abuse.c", "-o"])
        .arg(Path::new(&out).join("abuse.bin"))
        .status();
    match status {
        Ok(status) if status.success() => println!("cargo::rerun-if-changed=guests"),
        Ok(status) => println!("cargo::error=gcc cannot build tests/guests/abuse.c: {status}"),
        Err(error) => println!("cargo::error=gcc is missing, run tests/setup: {error}"),
    }
}
