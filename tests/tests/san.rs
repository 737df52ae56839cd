//! Disks on LUNs with two paths: what guests, their data and the API are when cables are pulled, and when a LUN grows.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, thread};

use rackvisor_api::config::DiskConfig;
use rackvisor_tests::{
    Guest, Laps, Rackvisor, San, assert_same_bytes, eventually, linux, linux_with_fio, needs_san, skip,
};
use serde_json::Value;

/// Waits until the guest has written so many times more.
fn wait_for_writes(vmm: &Rackvisor, id: &str, more: u64) {
    let writes = || vmm.client.disk(id).unwrap().counters.writes;
    let before = writes();
    eventually("the guest writes", || (writes() >= before + more).then_some(()));
}

/// What the guest's kernel has to say about its disks.
fn assert_no_complaint(guest: &mut Guest) {
    assert_eq!(guest.ok("dmesg | grep -iE 'i/o error|blocked for more|critical' || true"), "");
}

#[test]
fn a_guest_notices_nothing_when_one_path_dies_and_returns() {
    needs_san!();
    let san = San::take();
    let vmm = Rackvisor::start();
    let mut config = linux_with_fio();
    config.disks = vec![san.disk("root", San::RETRIES)];
    let mut guest = vmm.boot_linux(&config);
    let laps = Laps::start(&mut guest, "/dev/vda");
    wait_for_writes(&vmm, "root", 50);
    san.fail_path(0);
    san.wait_paths(1);
    wait_for_writes(&vmm, "root", 50);
    san.restore_path(0);
    san.wait_paths(2);
    wait_for_writes(&vmm, "root", 50);
    assert!(laps.finish(&mut guest) > 0);
    assert_no_complaint(&mut guest);
    assert_eq!(vmm.client.disk("root").unwrap().counters.errors, 0);
    assert_eq!(vmm.events("disk-error"), [] as [Value; 0]);
}

/// A sector that says what it is.
fn record(number: usize) -> String {
    format!("record {number:<504}\n")
}

#[test]
fn a_kill_in_mid_write_loses_no_record_whose_flush_was_acknowledged() {
    needs_san!();
    let san = San::take();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.disks = vec![san.disk("root", San::RETRIES)];
    let mut guest = vmm.boot_linux(&config);
    let flushes = || -> u64 {
        let stat = san.attribute(San::RETRIES, "stat");
        stat.split_whitespace().nth(15).unwrap().parse().unwrap()
    };
    let before = flushes();
    guest.ok("dd if=/dev/zero of=/dev/vda bs=64k count=16 oflag=direct conv=notrunc");
    // Something else to be in the midst of.
    let load = "dd if=/dev/zero of=/dev/vda bs=64k seek=64 count=64 oflag=direct conv=notrunc";
    guest.ok(&format!("(while :; do {load}; done) >/dev/null 2>&1 &"));
    guest.send(
        "i=0; while printf 'record %-504d\\n' $i >/tmp/record && \
         dd if=/tmp/record of=/dev/vda bs=512 seek=$i conv=notrunc,fsync 2>/dev/null; do echo \"ack $i;\"; i=$((i + 1)); done",
    );
    guest.read_until("ack 100;");
    let _folder = vmm.kill();
    // What the guest was told is on the LUN: nobody has it in memory any more.
    let said = guest.read_to_end();
    let acknowledged = said.split("ack ").skip(1).filter(|rest| rest.contains(';')).count();
    assert!(acknowledged > 100);
    let disk = san.read(San::RETRIES, 1);
    for (number, sector) in disk.chunks(512).take(acknowledged).enumerate() {
        assert_eq!(String::from_utf8_lossy(sector), record(number), "of {acknowledged}");
    }
    let flushed = flushes() - before;
    assert!(flushed >= acknowledged as u64, "the LUN saw {flushed} flushes for {acknowledged} records");
}

/// A disk of scsi_debug that emulates physical blocks of 4096 bytes with logical ones of 512.
struct Emulated(PathBuf);

impl Emulated {
    fn new() -> Option<Self> {
        let options = ["scsi_debug", "sector_size=512", "physblk_exp=3", "lbpu=1", "dev_size_mb=32", "delay=0"];
        Command::new("modprobe").args(options).status().ok().filter(|status| status.success())?;
        let find = || {
            let hosts = fs::read_dir("/sys/bus/pseudo/drivers/scsi_debug/adapter0").ok()?;
            let host =
                hosts.filter_map(Result::ok).find(|entry| entry.file_name().to_string_lossy().starts_with("host"))?;
            let name = host.file_name().to_string_lossy().trim_start_matches("host").to_owned();
            let block = fs::read_dir(format!("/sys/class/scsi_disk/{name}:0:0:0/device/block")).ok()?;
            let path = Path::new("/dev").join(block.filter_map(Result::ok).next()?.file_name());
            path.exists().then_some(path)
        };
        Some(Self(eventually("scsi_debug makes a disk", find)))
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        // udev may still have a look at what was closed just now.
        for _ in 0..50 {
            if Command::new("modprobe").args(["--quiet", "--remove", "scsi_debug"]).status().is_ok_and(|s| s.success())
            {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[test]
fn luns_of_large_blocks_whether_native_or_emulated_look_so_to_the_guest_and_hold_file_systems() {
    needs_san!();
    let san = San::take();
    let Some(emulated) = Emulated::new() else { return skip("there is no scsi_debug") };
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.disks = vec![san.disk("native", San::FAILS), DiskConfig::new("emulated", &emulated.0)];
    let mut guest = vmm.boot_linux(&config);
    for (id, device, logical) in [("native", "vda", 4096), ("emulated", "vdb", 512)] {
        let disk = vmm.client.disk(id).unwrap();
        assert_eq!((disk.logical_block_size, disk.physical_block_size), (Some(logical), Some(4096)));
        let blocks = guest.ok(&format!("cd /sys/block/{device}/queue && cat logical_block_size physical_block_size"));
        assert_eq!(blocks, format!("{logical}\n4096"), "{id}");
        // Something old below the file system, some of it discarded.
        guest.ok(&format!(
            "dd if=/dev/urandom of=/dev/{device} bs=1M count=16 oflag=direct && blkdiscard -l 8388608 /dev/{device}"
        ));
        guest.ok(&format!("mke2fs -q -b 4096 /dev/{device} 4096 && mount -t ext4 /dev/{device} /mnt"));
        guest.ok(
            "seq 1 100000 >/mnt/numbers && dd if=/mnt/numbers of=/mnt/aligned bs=4k oflag=direct conv=sync && sync",
        );
        guest.ok(&format!("umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/{device} /mnt"));
        guest.ok("seq 1 100000 | cmp - /mnt/numbers && head -c $(stat -c %s /mnt/numbers) /mnt/aligned | cmp - /mnt/numbers && umount /mnt");
        assert_eq!(vmm.client.disk(id).unwrap().counters.errors, 0, "{id}");
    }
    // A block on the LUN is a block in the guest.
    guest.ok("seq 1 2000 | head -c 4096 >/tmp/block && dd if=/tmp/block of=/dev/vda bs=4k seek=3 oflag=direct conv=notrunc,fsync");
    let text: String = (1..=2000).map(|number| format!("{number}\n")).collect();
    assert_same_bytes(&san.read(San::FAILS, 1)[3 * 4096..4 * 4096], &text.as_bytes()[..4096], "the fourth block");
}
