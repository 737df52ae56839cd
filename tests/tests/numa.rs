//! NUMA nodes, as Linux sees them.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::config::NumaNode;
use rackvisor_api::problem::Code;
use rackvisor_api::size::ByteSize;
use rackvisor_api::state::Action;
use rackvisor_tests::{Rackvisor, linux, needs_kvm};

fn node(cpus: Option<&str>, memory: ByteSize, distances: &[u8]) -> NumaNode {
    let cpus = cpus.map(|cpus| cpus.parse().unwrap());
    NumaNode { cpus, memory, distances: distances.to_vec(), host_nodes: Vec::new() }
}

#[test]
fn linux_sees_the_configured_nodes_with_their_vcpus_memory_and_distances() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.cpus.count = 4;
    // The second node lies on both sides of the hole below 4 GiB.
    config.memory.size = ByteSize::mib(3 << 10);
    config.numa = vec![
        node(Some("0,2"), ByteSize::mib(1 << 10), &[10, 20, 30]),
        node(Some("1"), ByteSize::mib(1536), &[20, 10, 40]),
        node(Some("3"), ByteSize::mib(512), &[30, 40, 10]),
    ];
    config.numa[0].host_nodes = vec![0];
    let mut guest = vmm.boot_linux(&config);
    let mut all = |name: &str| guest.ok(&format!("cat /sys/devices/system/node/node*/{name} | tr '\\n' ';'"));
    assert_eq!(all("cpulist"), "0,2;1;3;");
    assert_eq!(all("distance"), "10 20 30;20 10 40;30 40 10;");
    let sizes = guest.ok("sed -n 's/.*MemTotal: *\\([0-9]*\\) kB/\\1/p' /sys/devices/system/node/node*/meminfo");
    let sizes: Vec<u64> = sizes.lines().map(|line| line.parse().unwrap()).collect();
    // What the kernel takes of the first node for itself, and 1/64 for page descriptors.
    for (size, mib) in sizes.iter().zip([1 << 10, 1536, 512]) {
        assert!((mib * 9 / 10..=mib).contains(&(size >> 10)), "{sizes:?}");
    }
    assert_eq!(guest.ok("dmesg | grep -iE 'srat|slit' | grep -iE 'bad|invalid|not|overlap|conflict' || true"), "");
    let names = guest.ok("cd /sys/firmware/acpi/tables && ls -p | grep -v /");
    assert!(names.contains("SRAT") && names.contains("SLIT"), "{names}");
    // Its RAM really is on that node.
    let maps = std::fs::read_to_string(format!("/proc/{}/numa_maps", vmm.pid())).unwrap();
    assert!(maps.contains(" bind:0 "), "{maps}");
}

#[test]
fn a_node_of_the_host_that_does_not_exist_is_named_when_the_vm_boots() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.numa = vec![node(Some("0"), config.memory.size, &[])];
    config.numa[0].host_nodes = vec![1000];
    vmm.client.define(&config).unwrap();
    let refused = vmm.client.act(Action::Boot).unwrap_err();
    assert_eq!(refused.code(), Some(Code::OutOfResources), "{refused}");
    assert!(refused.to_string().contains("host_nodes"), "{refused}");
}
