//! The memory balloon, as Linux' driver plays along.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::config::{BalloonConfig, BalloonPatch, Patch, VmPatch};
use rackvisor_api::problem::Code;
use rackvisor_api::size::ByteSize;
use rackvisor_tests::{Rackvisor, eventually, linux, needs_kvm};

const MIB: u64 = 1 << 20;

/// Asks for another size and waits until the guest has followed.
fn resize(vmm: &Rackvisor, size: ByteSize) {
    let patch = VmPatch { balloon: Patch::Set(BalloonPatch::size(size)), ..VmPatch::default() };
    assert_eq!(vmm.client.patch(&patch).unwrap().config.balloon.unwrap().size, size);
    eventually("the guest follows", || (held(vmm) == size.bytes()).then_some(()));
}

fn held(vmm: &Rackvisor) -> u64 {
    vmm.client.describe().unwrap().balloon.unwrap()
}

fn resident(vmm: &Rackvisor) -> u64 {
    vmm.counted(&["rackvisor_process_resident_memory_bytes"])
}

#[test]
fn linux_gives_memory_to_the_host_by_the_balloon_and_as_free_pages_and_takes_it_again() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.balloon = Some(BalloonConfig { free_page_reporting: true, ..BalloonConfig::default() });
    config.memory.size = ByteSize::mib(256);
    let mut guest = vmm.boot_linux(&config);
    let free = "awk '$1 == \"MemFree:\" { print $2 * 1024 }' /proc/meminfo";
    let before: u64 = guest.ok(free).parse().unwrap();
    assert_eq!(held(&vmm), 0);

    // What the guest has used once and does not use any more goes back without being asked for.
    guest.ok("dd if=/dev/zero of=/tmp/used bs=1M count=96 2>/dev/null");
    let used = resident(&vmm);
    guest.ok("rm /tmp/used");
    eventually("free pages go back", || (resident(&vmm) + 64 * MIB < used).then_some(()));
    assert!(vmm.counted(&["rackvisor_balloon_reported_bytes_total"]) >= 64 * MIB);

    resize(&vmm, ByteSize::mib(96));
    let left: u64 = guest.ok(free).parse().unwrap();
    assert!(left + 80 * MIB < before, "{before} bytes were free before and {left} are now");
    assert_eq!(vmm.counted(&["rackvisor_balloon_inflated_bytes_total"]), 96 * MIB);
    // The second look has what the first one asked for.
    let told = || vmm.client.metrics().unwrap().contains("rackvisor_balloon_guest_memory_bytes{");
    eventually("the guest tells of its memory", || told().then_some(()));
    assert!(vmm.counted(&["rackvisor_balloon_guest_memory_bytes", "total"]) > 128 * MIB);

    // The next driver begins with what the host wants.
    guest.send("reboot -f");
    guest.wait_ready();
    eventually("the guest follows", || (held(&vmm) == 96 * MIB).then_some(()));
    resize(&vmm, ByteSize(0));
    guest.ok("dd if=/dev/zero of=/tmp/used bs=1M count=96 2>/dev/null && rm /tmp/used");
    assert_eq!(vmm.counted(&["rackvisor_balloon_refused_bytes_total"]), 0);
    let refused = vmm.client.patch(&VmPatch { balloon: Patch::Clear, ..VmPatch::default() }).unwrap_err();
    assert_eq!(refused.code(), Some(Code::HotplugUnsupported), "{refused}");
}
