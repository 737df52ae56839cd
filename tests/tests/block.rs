//! Disks, seen from both sides.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use rackvisor_api::config::{CacheMode, DiskConfig};
use rackvisor_api::state::VmState;
use rackvisor_tests::{Rackvisor, assert_same_bytes, linux, linux_that_runs, linux_with_fio, needs_kvm, noise, skip};

const MIB: usize = 1 << 20;

/// What `seq first step last` prints.
fn seq(first: u64, step: u64, last: u64) -> Vec<u8> {
    (first..=last).step_by(usize::try_from(step).unwrap()).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

#[test]
fn what_the_guest_writes_is_found_on_the_host_byte_for_byte() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let source = noise(1, 2 * MIB);
    // A made-up text, then noise from another disk in pieces of odd sizes at odd places, through two queues.
    let script = "set -e
        seq 70001 7 1400000 | dd of=/dev/vda bs=64k conv=notrunc
        dd if=/dev/vdb of=/dev/vda bs=1000 skip=100 seek=3000 count=1500 conv=notrunc
        dd if=/dev/vdb of=/dev/vda bs=512 skip=1 seek=12001 count=2001 conv=notrunc
        cmp /dev/vdb /dev/vdc
        blockdev --getsize64 /dev/vda; ls /sys/block/vda/mq | wc -l; cat /sys/block/vda/serial; echo";
    let mut config = linux_that_runs(script, "poweroff");
    config.cpus.count = 2;
    let before = noise(2, 8 * MIB);
    config.disks = vec![vmm.image("target", &before), vmm.image("source", &source), vmm.image("again", &source)];
    config.disks[0].queues = 2;
    config.disks[0].serial = Some("S/N 4711".into());
    config.disks[2].cache = CacheMode::Writethrough;
    config.disks[2].read_only = true;

    let mut guest = vmm.boot_with_console(&config);
    let (status, output) = guest.result();
    assert_eq!(status, 0, "{output}");
    assert!(output.ends_with(&format!("{}\n2\nS/N 4711\n", 8 * MIB)), "{output}");
    vmm.wait_for(VmState::Stopped);

    let mut wanted = before;
    let text = seq(70_001, 7, 1_400_000);
    wanted[..text.len()].copy_from_slice(&text);
    wanted[3_000_000..4_500_000].copy_from_slice(&source[100_000..1_600_000]);
    wanted[12_001 * 512..14_002 * 512].copy_from_slice(&source[512..2002 * 512]);
    assert_same_bytes(&fs::read(vmm.path("target")).unwrap(), &wanted, "the disk");
    assert_same_bytes(&fs::read(vmm.path("source")).unwrap(), &source, "the disk that was only read");
}

#[test]
fn fio_finds_again_what_it_wrote_at_random_through_two_queues() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux_with_fio();
    config.cpus.count = 2;
    config.disks = vec![vmm.image("data", &vec![0; 8 * MIB])];
    config.disks[0].queues = 2;
    let mut guest = vmm.boot_linux(&config);
    guest.ok("fio --name=a --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=32 \
        --io_size=8m --size=8m --verify=crc32c --verify_fatal=1 --output-format=terse --output=/tmp/said || cat /tmp/said");
}

#[test]
fn a_running_guests_disks_obey_sync_refuse_writes_when_read_only_and_count_what_they_do() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let content = noise(3, MIB);
    let mut config = linux();
    config.disks = vec![vmm.image("data", &vec![0; 8 * MIB]), vmm.image("fixed", &content)];
    config.disks[1].read_only = true;
    let mut guest = vmm.boot_linux(&config);

    let before = vmm.client.disk("data").unwrap();
    guest.ok("dd if=/dev/vdb of=/dev/vda bs=64k seek=3 conv=notrunc,fsync");
    let after = vmm.client.disk("data").unwrap();
    assert_same_bytes(&fs::read(vmm.path("data")).unwrap()[3 << 16..][..MIB], &content, "what was synced");
    assert_eq!(after.counters.written_bytes - before.counters.written_bytes, MIB as u64);
    assert!(after.counters.writes > before.counters.writes && after.counters.flushes > before.counters.flushes);
    assert_eq!(after.counters.errors, 0);
    assert_eq!(after.capacity, Some(8 << 20));

    assert_eq!(guest.ok("cat /sys/block/vdb/ro"), "1");
    let (status, _) = guest.run("dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync");
    assert_ne!(status, 0, "a write to a read-only disk succeeds");
    assert_same_bytes(&fs::read(vmm.path("fixed")).unwrap(), &content, "the read-only disk");

    // A file system on it, seen again after a discard elsewhere and a clean unmount.
    guest.ok("mke2fs -q /dev/vda && mount -t ext4 /dev/vda /mnt && seq 1 100000 >/mnt/numbers && umount /mnt");
    assert_eq!(guest.ok("mount -t ext4 /dev/vda /mnt && sha256sum </mnt/numbers && umount /mnt").len(), 64 + 3);
    guest.ok("blkdiscard -o 4194304 -l 1048576 /dev/vda");
    let data = fs::read(vmm.path("data")).unwrap();
    assert!(data[4 * MIB..5 * MIB].iter().all(|byte| *byte == 0), "a discarded range of a file reads as zeroes");

    // It grows while in use.
    File::options().write(true).open(vmm.path("data")).unwrap().set_len(16 << 20).unwrap();
    vmm.client.patch_disk("data", &rackvisor_api::config::DiskPatch::default()).unwrap();
    let size = "for i in $(seq 500); do [ $(cat /sys/block/vda/size) = 32768 ] && exit 0; sleep 0.1; done; exit 1";
    guest.ok(size);
}

/// A loop device: a block device with a volatile cache that counts its flushes.
struct Loop(String);

impl Loop {
    fn new(image: &Path) -> Option<Self> {
        let _ = Command::new("modprobe").arg("loop").status();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(image).output().ok()?;
        let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        output.status.success().then_some(Self(device))
    }

    /// Field 16 of the statistics (Documentation/block/stat.rst).
    fn flushes(&self) -> u64 {
        let stat = fs::read_to_string(self.0.replace("/dev/", "/sys/block/") + "/stat").unwrap();
        stat.split_whitespace().nth(15).unwrap().parse().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn sigterm_ends_the_vm_with_everything_flushed_and_exit_code_0() {
    needs_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, vec![0; 8 * MIB]).unwrap();
    let Some(device) = Loop::new(&image) else { return skip("loop devices need root") };
    let vmm = Rackvisor::start_for(&[Path::new(&device.0)]);
    let content = noise(4, MIB);
    let mut config = linux();
    config.disks = vec![DiskConfig::new("data", &device.0), vmm.image("source", &content)];
    let mut guest = vmm.boot_linux(&config);
    // Written past the guest's cache, and never synced by the guest.
    guest.ok("dd if=/dev/vdb of=/dev/vda bs=64k oflag=direct conv=notrunc");
    let before = device.flushes();

    let socket = vmm.client.socket().to_owned();
    let (status, _files) = vmm.terminate();
    assert_eq!(status.code(), Some(0));
    assert!(device.flushes() > before, "the disk was not flushed");
    assert!(!socket.exists(), "the API socket is left behind");
    assert_same_bytes(&fs::read(&device.0).unwrap()[..MIB], &content, "the disk");
    guest.read_to_end();
}
