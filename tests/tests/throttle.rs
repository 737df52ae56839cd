//! Disks with limits: the guest gets what it may, no more and no less.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::thread;
use std::time::{Duration, Instant};

use rackvisor_api::config::{DiskConfig, DiskPatch};
use rackvisor_tests::{NullBlk, Rackvisor, eventually, linux_with_fio, needs_kvm, skip};
use serde_json::{Value, json};

fn limited(id: &str, disk: &NullBlk, limits: &Value) -> DiskConfig {
    serde_json::from_value(json!({ "id": id, "path": disk.path, "limits": limits })).unwrap()
}

/// Operations of the one disk, and bytes of the other, so far.
fn look(vmm: &Rackvisor) -> (Instant, u64, u64) {
    let counters = |id| vmm.client.disk(id).unwrap().counters;
    (Instant::now(), counters("operations").reads, counters("bytes").written_bytes)
}

/// What fio in the guest gets of the two disks: operations per second of the one, bytes per second of the other.
fn rates(vmm: &Rackvisor, seconds: u64) -> (f64, f64) {
    // What the former limits let through is over.
    thread::sleep(Duration::from_secs(1));
    let (begin, reads, written) = look(vmm);
    thread::sleep(Duration::from_secs(seconds));
    let (end, reads_then, written_then) = look(vmm);
    let per_second = |count: u64| count as f64 / (end - begin).as_secs_f64();
    (per_second(reads_then - reads), per_second(written_then - written))
}

fn assert_near(found: f64, wanted: f64, what: &str) {
    println!("{what}: {found:.1} per second where {wanted:.0} are allowed");
    assert!((found / wanted - 1.0).abs() <= 0.05, "{what}: {found:.1} per second where {wanted:.1} are allowed");
}

#[test]
fn a_limited_disk_does_what_it_may_within_5_percent_and_a_patch_changes_that_at_once() {
    const MIB: f64 = 1_048_576.0;
    needs_kvm!();
    let (Some(first), Some(second)) = (NullBlk::new(128), NullBlk::new(128)) else {
        return skip("null_blk needs root");
    };
    let vmm = Rackvisor::start_for(&[&first.path, &second.path]);
    let mut config = linux_with_fio();
    // With bursts of a second, fits of the laboratory are made up for.
    config.disks = vec![
        limited("operations", &first, &json!({ "ops_per_second": 100, "ops_burst": 100 })),
        limited("bytes", &second, &json!({ "bytes_per_second": "2MiB", "bytes_burst": "2MiB" })),
    ];
    let mut guest = vmm.boot_linux(&config);
    // Deep enough that there is always something to do.
    guest.ok("fio --name=global --ioengine=libaio --direct=1 --iodepth=64 --size=64m --time_based --runtime=1000 \
         --name=operations --filename=/dev/vda --rw=randread --bs=4k \
         --name=bytes --filename=/dev/vdb --rw=write --bs=32k >/dev/null 2>&1 &");
    eventually("fio works", || {
        let (_, reads, written) = look(&vmm);
        (reads > 150 && written > 3 << 20).then_some(())
    });
    let (operations, bytes) = rates(&vmm, 10);
    assert_near(operations, 100.0, "operations");
    assert_near(bytes, 2.0 * MIB, "bytes");

    let patch = |id: &str, limits: Value| {
        let patch: DiskPatch = serde_json::from_value(json!({ "limits": limits })).unwrap();
        vmm.client.patch_disk(id, &patch).unwrap();
    };
    patch("operations", json!({ "ops_per_second": 200, "ops_burst": 200 }));
    patch("bytes", json!({ "bytes_per_second": "4MiB", "bytes_burst": "4MiB" }));
    let (operations, bytes) = rates(&vmm, 10);
    assert_near(operations, 200.0, "operations");
    assert_near(bytes, 4.0 * MIB, "bytes");

    patch("operations", Value::Null);
    patch("bytes", Value::Null);
    let (operations, bytes) = rates(&vmm, 2);
    assert!(operations > 220.0 && bytes > 5.0 * MIB, "without a limit: {operations} operations, {bytes} bytes");
}
