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
const COUNT: u16 = 125;
/// The vCPU with ID 292.
const LAST: u16 = 124;
const GPE: &str = "awk '{ print $1 }' /sys/firmware/acpi/interrupts/gpe05";

/// A Linux with that many vCPUs that brings up the first one only: the others are too many for the processors of a laboratory.
fn config() -> VmConfig {
    let mut config = linux();
    config.cpus = CpusConfig { count: COUNT, topology: Some(SHAPE), ..CpusConfig::default() };
    config.memory.size = ByteSize::mib(384);
    config.boot.as_mut().unwrap().cmdline += " maxcpus=1";
    config
}

/// Interrupts called `name` that the last vCPU has had.
fn interrupts(guest: &mut Guest, name: &str) -> u64 {
    let column = "NR == 1 { for (at = 1; at <= NF; at++) if ($at == cpu) column = at + 1 }";
    let command = format!("awk -v cpu=CPU{LAST} '{column} $NF == \"{name}\" {{ print $column }}' /proc/interrupts");
    guest.ok(&command).parse().unwrap()
}

/// Sends those called `name` to the last vCPU from now on.
fn steer(guest: &mut Guest, name: &str) {
    guest.ok(&format!(
        "irq=$(awk '$NF == \"{name}\" {{ sub(\":\", \"\"); print $1 }}' /proc/interrupts) && \
                       echo {LAST} >/proc/irq/$irq/smp_affinity_list"
    ));
}

#[test]
fn interrupts_of_devices_and_of_the_chipset_reach_processors_with_apic_ids_above_255() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = config();
    config.generation_id = Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb80".parse().unwrap());
    let mut guest = vmm.boot_linux(&config);
    assert_eq!(guest.ok("cat /sys/devices/system/cpu/present"), "0-124");
    for cpu in [1, 100, LAST] {
        guest.ok(&format!("echo 1 >/sys/devices/system/cpu/cpu{cpu}/online"));
    }
    assert_eq!(guest.ok("sed -n 's/^apicid.*: //p' /proc/cpuinfo | tr '\\n' ' '"), "0 1 256 292 ");

    steer(&mut guest, "virtio0-input");
    let before = interrupts(&mut guest, "virtio0-input");
    guest.ok("head -c 256 /dev/hwrng >/dev/null");
    assert!(interrupts(&mut guest, "virtio0-input") > before, "a virtio queue");

    steer(&mut guest, "ttyS0");
    let before = interrupts(&mut guest, "ttyS0");
    guest.ok("true");
    assert!(interrupts(&mut guest, "ttyS0") > before, "an edge at the I/O APIC");

    steer(&mut guest, "acpi");
    // Linux moves it when the next one comes.
    for times in 1..=3 {
        let id = format!("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb8{times}");
        vmm.client.patch(&VmPatch { generation_id: Patch::Set(id.parse().unwrap()), ..VmPatch::default() }).unwrap();
        guest.ok(&format!("until [ $({GPE}) = {times} ]; do sleep 0.1; done"));
        assert_eq!(interrupts(&mut guest, "acpi"), times - 1, "a level at the I/O APIC");
    }
    assert_eq!(guest.ok("dmesg | grep -iE 'acpi (error|bios error|warning)|firmware bug|call trace' || true"), "");
    assert_eq!(check_tables(&mut guest, &vmm.path("")), ["APIC", "DSDT", "FACP", "FACS", "MCFG", "WAET"]);

    vmm.client.act(Action::Pause).unwrap();
    vmm.client.act(Action::Resume).unwrap();
    guest.send("reboot -f");
    guest.wait_ready();
    vmm.client.act(Action::PowerButton).unwrap();
    assert_eq!(vmm.wait_for(VmState::Stopped).cause.as_deref(), Some("guest power-off"));
}
