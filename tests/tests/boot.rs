//! Machines of many shapes, seen from inside.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::size::ByteSize;
use rackvisor_api::state::VmState;
use rackvisor_tests::{Kernel, Rackvisor, linux_that_runs, needs_kvm};

/// Boots a Linux; checks what it finds.
fn boots(kernel: Kernel, cpus: u8, memory: ByteSize) {
    let script = "nproc; grep MemTotal: /proc/meminfo; dmesg | grep BIOS-e820";
    let mut config = linux_that_runs(script, "poweroff");
    config.boot.as_mut().unwrap().kernel = kernel.path();
    config.cpus.count = cpus;
    config.memory.size = memory;
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_with_console(&config);
    let (status, output) = guest.result();
    assert_eq!(status, 0, "{output}");
    let mut lines = output.lines();
    assert_eq!(lines.next().unwrap(), cpus.to_string());
    let kib: u64 = lines.next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    // What the kernel takes for itself: its image, and 1/64 for its page descriptors.
    let (least, most) = (memory.bytes() / 64 * 61 - (80 << 20), memory.bytes());
    assert!((least..most).contains(&(kib << 10)), "{} MiB of {memory} are usable", kib >> 10);
    check_memory_map(lines, memory.bytes());
    let vm = vmm.wait_for(VmState::Stopped);
    assert_eq!(vm.cause.as_deref(), Some("guest power-off"));
}

/// The usable parts of an e820 map are all of the memory but the hole below 1 MiB, without overlaps.
fn check_memory_map<'a>(lines: impl Iterator<Item = &'a str>, memory: u64) {
    let mut usable = Vec::new();
    for line in lines {
        let range = line.split_once("[mem ").and_then(|(_, rest)| rest.split_once(']'));
        let ((first, last), kind) = range.map(|(range, kind)| (range.split_once('-').unwrap(), kind.trim())).unwrap();
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        if kind == "usable" {
            usable.push((number(first), number(last) + 1));
        }
    }
    let total: u64 = usable.iter().map(|(start, end)| end - start).sum();
    assert!((memory - (1 << 20)..memory).contains(&total), "{usable:x?}");
    assert!(usable.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{usable:x?}");
    let beyond: u64 = usable.iter().filter(|(start, _)| *start >= 4 << 30).map(|(start, end)| end - start).sum();
    assert_eq!(beyond, memory.saturating_sub(2 << 30), "{usable:x?}");
    assert!(!usable.iter().any(|(start, end)| *end > 2 << 30 && *start < 4 << 30), "{usable:x?}");
}

// Each kernel with each number of vCPUs and with each size of memory.

#[test]
fn vmlinux_boots_with_1_vcpu_and_128_mib() {
    needs_kvm!();
    boots(Kernel::Vmlinux, 1, ByteSize::mib(128));
}

#[test]
fn vmlinux_boots_with_2_vcpus_and_512_mib() {
    needs_kvm!();
    boots(Kernel::Vmlinux, 2, ByteSize::mib(512));
}

#[test]
fn vmlinux_boots_with_4_vcpus_and_5_gib() {
    needs_kvm!();
    boots(Kernel::Vmlinux, 4, ByteSize::gib(5));
}

#[test]
fn vmlinuz_boots_with_1_vcpu_and_512_mib() {
    needs_kvm!();
    boots(Kernel::Vmlinuz, 1, ByteSize::mib(512));
}

#[test]
fn vmlinuz_boots_with_2_vcpus_and_5_gib() {
    needs_kvm!();
    boots(Kernel::Vmlinuz, 2, ByteSize::gib(5));
}

#[test]
fn vmlinuz_boots_with_4_vcpus_and_128_mib() {
    needs_kvm!();
    boots(Kernel::Vmlinuz, 4, ByteSize::mib(128));
}
