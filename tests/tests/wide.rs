//! Processors that the eight bits of an interrupt's destination do not reach.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::VmConfig;
use rackvisor_api::config::{CpusConfig, Patch, Topology, VmPatch};
use rackvisor_api::size::ByteSize;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{Guest, Rackvisor, check_tables, linux, needs_kvm};

/// The fewest vCPUs of which some have APIC IDs above 255: five takes three bits, so each socket has 64 IDs, and the last one those
/// from 256 to 292.
const SHAPE: Topology = Topology { sockets: 5, cores: 5, threads: 5 };
const CPUS: u16 = 125;
const LAST: usize = 124;
const IDS: [&str; 2] = ["256", "512"];

/// Interrupts called `name` that CPU `cpu` had so far.
fn interrupts(guest: &mut Guest, name: &str, cpu: usize) -> u64 {
    let line = guest.ok(&format!("grep '{name}$' /proc/interrupts"));
    line.split_whitespace().nth(1 + cpu).unwrap().parse().unwrap()
}

/// Sends those called `name` to CPU `cpu` from now on.
fn steer(guest: &mut Guest, name: &str, cpu: usize) {
    let number = guest.ok(&format!("sed -n 's/^ *\\([0-9]*\\):.*{name}$/\\1/p' /proc/interrupts"));
    guest.ok(&format!("echo {cpu} >/proc/irq/{number}/smp_affinity_list"));
}

fn config() -> VmConfig {
    let mut config = linux();
    let boot = config.boot.as_mut().unwrap();
    boot.cmdline += &std::env::var("RACKVISOR_CMDLINE").unwrap_or_default();
    config.cpus = CpusConfig { count: CPUS, topology: Some(SHAPE), ..CpusConfig::default() };
    config.memory.size = ByteSize::mib(512);
    config
}

#[test]
fn interrupts_of_devices_and_of_the_chipset_reach_processors_with_apic_ids_above_255() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = config();
    config.generation_id = Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87".parse().unwrap());
    let mut guest = vmm.boot_linux(&config);
    println!("{}", guest.ok("cat /proc/uptime"));
    println!("{}", guest.ok("cat /sys/devices/system/cpu/{possible,present}; ls /sys/devices/system/cpu; dmesg | grep -iE 'apic|smp|pic|timer|tsc|cpu' | cut -c1-150 | head -150; cat /proc/uptime"));
    for cpu in std::env::var("ONLINE").unwrap_or_default().split_whitespace() {
        guest.ok(&format!("echo 1 >/sys/devices/system/cpu/cpu{cpu}/online"));
    }
    println!("{}", guest.ok("nproc; cat /proc/uptime"));
    println!("{}", guest.ok("dmesg | grep -iE 'apic|smp|pic|timer|tsc' | head -60; cat /proc/uptime"));
    println!("{}", guest.ok("awk '{ print $1, $2, $NF }' /proc/interrupts"));
    let last = guest.ok("sed -n 's/^apicid.*: //p' /proc/cpuinfo | tail -n 1");
    assert_eq!(last, "292", "{IDS:?}");

    steer(&mut guest, "virtio0-input", LAST);
    let before = interrupts(&mut guest, "virtio0-input", LAST);
    guest.ok("head -c 256 /dev/hwrng >/dev/null");
    assert!(interrupts(&mut guest, "virtio0-input", LAST) > before, "a virtio queue");

    steer(&mut guest, "ttyS0", LAST);
    let before = interrupts(&mut guest, "ttyS0", LAST);
    guest.ok("true");
    assert!(interrupts(&mut guest, "ttyS0", LAST) > before, "an edge at the I/O APIC");

    steer(&mut guest, "acpi", LAST);
    for times in 1..=2 {
        let id = format!("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb8{times}");
        vmm.client.patch(&VmPatch { generation_id: Patch::Set(id.parse().unwrap()), ..VmPatch::default() }).unwrap();
        let seen = "awk '{ print $1 }' /sys/firmware/acpi/interrupts/gpe05";
        guest.ok(&format!("until [ $({seen}) = {times} ]; do sleep 0.1; done"));
        assert_eq!(interrupts(&mut guest, "acpi", LAST), times, "a level at the I/O APIC");
    }
    assert_eq!(check_tables(&mut guest, &vmm.path("")), ["APIC", "DSDT", "FACP", "FACS", "MCFG", "WAET"]);
    guest.send("reboot -f");
    guest.wait_ready();
    vmm.client.act(Action::Pause).unwrap();
    vmm.client.act(Action::Resume).unwrap();
    guest.send("poweroff -f");
    vmm.wait_for(VmState::Stopped);
}
