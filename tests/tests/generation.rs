//! The generation ID, as Linux' driver sees it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::config::{Patch, VmPatch};
use rackvisor_api::problem::Code;
use rackvisor_api::state::Action;
use rackvisor_tests::{Rackvisor, linux, needs_kvm, skip, stock_kernel};

const FIRST: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";
const SECOND: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb88";
/// Where it lies after a direct boot, and how it looks there in words.
const WORDS: &str = "for at in 0xff028 0xff02c 0xff030 0xff034; do devmem $at; done | tr '\\n' ' '";
const EVENTS: &str = "awk '{ print $1 }' /sys/firmware/acpi/interrupts/gpe05";

fn patch(id: Option<&str>) -> VmPatch {
    VmPatch { generation_id: id.map_or(Patch::Clear, |id| Patch::Set(id.parse().unwrap())), ..VmPatch::default() }
}

#[test]
fn linux_takes_new_random_seeds_when_the_generation_id_changes_and_only_then() {
    needs_kvm!();
    // The guest's cloud kernel has no driver for it.
    let Some(kernel) = stock_kernel() else { return skip("there is no stock kernel /boot/vmlinuz-*-amd64") };
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.boot.as_mut().unwrap().kernel = Some(kernel);
    config.generation_id = Some(FIRST.parse().unwrap());
    let mut guest = vmm.boot_linux(&config);
    let reseeded = "dmesg | grep -c 'crng reseeded due to virtual machine fork' || true";
    assert_eq!(guest.ok("ls /sys/bus/acpi/drivers/vmgenid | grep RACK0001"), "RACK0001:00");
    assert_eq!(guest.ok(reseeded), "0");

    // The same ID is no news.
    vmm.client.patch(&patch(Some(FIRST))).unwrap();
    assert_eq!(guest.ok(EVENTS), "0");
    let vm = vmm.client.patch(&patch(Some(SECOND))).unwrap();
    assert_eq!(vm.config.generation_id.unwrap().to_string(), SECOND);
    guest.ok(&format!("until [ $({reseeded}) = 1 ]; do sleep 0.1; done"));
    assert_eq!(guest.ok(EVENTS), "1");

    // A change while it is paused, as after a restore, is told when it goes on.
    vmm.client.act(Action::Pause).unwrap();
    vmm.client.patch(&patch(Some(FIRST))).unwrap();
    vmm.client.act(Action::Resume).unwrap();
    guest.ok(&format!("until [ $({reseeded}) = 2 ]; do sleep 0.1; done"));
    assert_eq!(guest.ok("dmesg | grep -iE 'acpi (error|bios error|warning)|firmware bug|call trace' || true"), "");
}

#[test]
fn the_generation_id_lies_in_reserved_memory_and_outlives_a_reboot() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.generation_id = Some(FIRST.parse().unwrap());
    let mut guest = vmm.boot_linux(&config);
    assert_eq!(guest.ok(WORDS), "0x324E6EAF 0x4BF6D1D1 0xBBB941BF 0x87FB916C ");
    let map = guest.ok("dmesg | grep BIOS-e820");
    assert!(map.lines().any(|line| line.contains("-0x00000000000fffff] reserved")), "{map}");
    vmm.client.patch(&patch(Some(SECOND))).unwrap();
    assert_eq!(guest.ok(WORDS), "0x324E6EAF 0x4BF6D1D1 0xBBB941BF 0x88FB916C ");
    guest.send("reboot -f");
    guest.wait_ready();
    assert_eq!(guest.ok(WORDS), "0x324E6EAF 0x4BF6D1D1 0xBBB941BF 0x88FB916C ");
    assert_eq!(guest.ok("cat /sys/bus/acpi/devices/RACK0001:00/path"), "\\_SB_.VGEN");

    let refused = vmm.client.patch(&patch(None)).unwrap_err();
    assert_eq!(refused.code(), Some(Code::HotplugUnsupported), "{refused}");
    vmm.client.act(Action::Shutdown).unwrap();
    assert_eq!(vmm.client.patch(&patch(None)).unwrap().config.generation_id, None);
    let mut guest = vmm.boot_linux(&vmm.client.describe().unwrap().config);
    assert_eq!(guest.ok("ls /sys/bus/acpi/devices | grep -c RACK || true"), "0");
}
