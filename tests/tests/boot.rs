//! Machines of many shapes, seen from inside.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::config::{CpusConfig, Topology};
use rackvisor_api::problem::Code;
use rackvisor_api::size::ByteSize;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{Kernel, Rackvisor, Tiny, assert_nothing_more, check_tables, linux, linux_that_runs, needs_kvm};

/// Boots a Linux; checks what it finds.
fn boots(kernel: Kernel, cpus: u16, memory: ByteSize) {
    let script = "nproc; grep MemTotal: /proc/meminfo; dmesg | grep BIOS-e820";
    let mut config = linux_that_runs(script, "poweroff");
    config.boot.as_mut().unwrap().kernel = Some(kernel.path());
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

#[test]
fn the_guest_finds_the_machine_that_was_configured_and_tables_that_iasl_takes() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.cpus =
        CpusConfig { count: 4, topology: Some(Topology { sockets: 2, cores: 1, threads: 2 }), ..CpusConfig::default() };
    config.disks = vec![vmm.image("first", &[0; 4096]), vmm.image("second", &[0; 8192])];
    config.disks[1].slot = Some(9);
    let mut guest = vmm.boot_linux(&config);

    // Slots, by configuration order or as told; the RNG comes last.
    assert_eq!(guest.ok("ls /sys/bus/pci/devices | tr '\\n' ' '"), PCI_FUNCTIONS);
    for (disk, slot) in [("vda", "01"), ("vdb", "09")] {
        let device = guest.ok(&format!("readlink -f /sys/block/{disk}/device"));
        assert!(device.contains(&format!("/0000:00:{slot}.0/")), "{disk}: {device}");
    }
    assert_eq!(vmm.client.disk("second").unwrap().pci, "0000:00:09.0");
    let cpu = |name: &str| format!("cat /sys/devices/system/cpu/cpu*/topology/{name} | tr '\\n' ' '");
    assert_eq!(guest.ok(&cpu("physical_package_id")), "0 0 1 1 ");
    assert_eq!(guest.ok(&cpu("thread_siblings_list")), "0-1 0-1 2-3 2-3 ");
    assert_eq!(guest.ok("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"), "kvm-clock");
    assert_eq!(guest.ok("head -c 16 /dev/hwrng | wc -c"), "16");
    assert_eq!(guest.ok("dmesg | grep -iE 'acpi (error|bios error|warning)|firmware bug|call trace' || true"), "");

    assert_eq!(guest.ok("cat /sys/class/dmi/id/sys_vendor"), "Rackvisor");

    assert_eq!(check_tables(&mut guest, &vmm.path("")), ["APIC", "DSDT", "FACP", "FACS", "MCFG", "WAET"]);
}

/// Host bridge, the first disk, the RNG, the second disk, the LPC bridge.
const PCI_FUNCTIONS: &str = "0000:00:00.0 0000:00:01.0 0000:00:02.0 0000:00:09.0 0000:00:1f.0 ";

#[test]
fn linux_brings_up_16_vcpus() {
    needs_kvm!();
    let mut config = linux_that_runs("nproc", "poweroff");
    config.cpus.count = 16;
    let vmm = Rackvisor::start();
    assert_eq!(vmm.boot_with_console(&config).result(), (0, "16\n".into()));
    vmm.wait_for(VmState::Stopped);
}

#[test]
fn a_vm_has_hundreds_of_vcpus_and_at_most_1024() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let before = vmm.census();
    let mut config = Tiny::says(b"I am the first").config(&vmm.path(""));
    config.cpus.count = 300;
    let mut guest = vmm.boot_with_console(&config);
    guest.read_until("I am the first");
    let threads = vmm.census().threads;
    for index in 0..300 {
        assert_eq!(threads.get(&format!("vcpu{index}")), Some(&1), "vCPU {index}");
    }
    assert_eq!(vmm.client.describe().unwrap().vcpus, 300);
    vmm.client.act(Action::Pause).unwrap();
    vmm.client.act(Action::Resume).unwrap();
    vmm.client.act(Action::Nmi).unwrap();
    assert_eq!(vmm.client.act(Action::Shutdown).unwrap().vcpus, 0);
    assert_nothing_more(vmm.pid(), &before);

    config.cpus.count = 1025;
    let refused = vmm.client.define(&config).unwrap_err();
    assert_eq!(refused.code(), Some(Code::InvalidValue), "{refused}");
}
