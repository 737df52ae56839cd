//! For tests only (feature `testing`): a controller without a VM, and a generator of bad documents.

mod machine;
mod mutate;

pub use machine::Machine;
pub use mutate::{Mutation, Mutations};

use crate::config::VmConfig;

/// A configuration that uses every field, as JSON. Valid as it is.
pub fn full_config() -> serde_json::Value {
    serde_json::json!({
        "name": "db01",
        "cpus": { "count": 4, "topology": { "sockets": 1, "cores": 2, "threads": 2 } },
        "memory": { "size": "2GiB", "shared": true, "hugepages": "off", "prefault": true },
        "numa": [
            { "cpus": "0-1", "memory": "1GiB", "distances": [10, 21], "host_nodes": [0] },
            { "cpus": "2-3", "memory": "1GiB", "distances": [21, 10], "host_nodes": [1] }
        ],
        "boot": { "kernel": "/boot/vmlinuz", "initrd": "/boot/initrd.img", "cmdline": "console=ttyS0" },
        "disks": [
            { "id": "root", "path": "/dev/mapper/mpatha", "queues": 2, "queue_size": 128, "direct": true,
              "serial": "S1", "slot": 5, "cache": "writethrough", "read_only": false, "on_error": "stop", "stall_after": "1m 30s",
              "limits": { "ops_per_second": 1000, "ops_burst": 2000, "bytes_per_second": "100MiB", "bytes_burst": "200MiB" },
              "group": "silver", "affinity": ["0-1", "2,4"] },
            { "id": "data", "path": "/dev/mapper/mpathb" }
        ],
        "disk_groups": [ { "id": "silver", "limits": { "bytes_per_second": "1GiB" } } ],
        "nics": [
            { "id": "net0", "tap": "tap0", "mac": "52:54:00:00:00:01", "queues": 2, "queue_size": 512,
              "mtu": 9000, "link": "down", "slot": 7, "antispoof": true, "rss": true,
              "rx_limits": { "packets_per_second": 1000, "packets_burst": 2000 },
              "tx_limits": { "bytes_per_second": "10MiB", "bytes_burst": "1MiB" } },
            { "id": "net1", "tap_fds": { "inherited": [3, 4] }, "mac": "52:54:00:00:00:02", "queues": 2, "vhost": true }
        ],
        "rng": true,
        "balloon": { "size": "512MiB", "deflate_on_oom": false, "free_page_reporting": true },
        "generation_id": "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
        "tpm": { "socket": "/run/swtpm.sock" },
        "serial": { "mode": "socket", "path": "/run/console.sock" },
        "on_reboot": "stop"
    })
}

/// A small configuration that is valid, and names files that need not exist.
///
/// # Panics
/// Never: the configuration is valid.
#[expect(clippy::expect_used, reason = "this module is for tests")]
pub fn small_config() -> VmConfig {
    let document = br#"{"name":"vm1","memory":{"size":"128MiB"},"boot":{"kernel":"vmlinux"},
        "disks":[{"id":"root","path":"disk.img"}],
        "nics":[{"id":"net0","tap":"tap0","mac":"52:54:00:00:00:01"}]}"#;
    VmConfig::from_json(document).expect("the small configuration is valid")
}
