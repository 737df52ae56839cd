//! Disks on LUNs with two paths: what guests, their data and the API are when cables are pulled, and when a LUN grows.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use rackvisor_api::client::Client;
use rackvisor_api::config::{DiskConfig, DiskPatch, VmConfig};
use rackvisor_api::problem::Code;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{
    Guest, Laps, Mapped, Rackvisor, San, assert_same_bytes, eventually, linux, linux_with_fio, needs_kvm, needs_san,
    skip,
};
use serde_json::{Value, json};

/// The disk with these fields besides.
fn with(disk: &DiskConfig, fields: Value) -> DiskConfig {
    let mut disk = serde_json::to_value(disk).unwrap();
    let fields = fields.as_object().unwrap().clone();
    disk.as_object_mut().unwrap().extend(fields);
    serde_json::from_value(disk).unwrap()
}

/// Waits until the guest has written so many times more.
fn wait_for_writes(vmm: &Rackvisor, id: &str, more: u64) {
    let writes = || vmm.client.disk(id).unwrap().counters.writes;
    let before = writes();
    eventually("the guest writes", || (writes() >= before + more).then_some(()));
}

/// Waits until the oldest request on the disk is some seconds old.
fn wait_for_hanging(vmm: &Rackvisor, id: &str) {
    eventually("the disk hangs", || (vmm.client.disk(id).unwrap().oldest_request_ms > 2000).then_some(()));
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
    let mut guest = vmm.boot_linux(&VmConfig { disks: vec![san.disk("root", San::RETRIES)], ..linux_with_fio() });
    let laps = Laps::fio(&mut guest, "/dev/vda");
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

#[test]
fn without_a_path_a_vm_that_stops_on_errors_pauses_and_goes_on_as_if_nothing_had_been_and_another_is_told() {
    needs_san!();
    let san = San::take();
    // Two VMs, one outage.
    let (stops, reports) = (Rackvisor::start(), Rackvisor::start());
    let mut guest = stops.boot_linux(&VmConfig {
        disks: vec![with(&san.disk("root", San::RETRIES), json!({ "on_error": "stop" }))],
        ..linux_with_fio()
    });
    let mut other = reports.boot_linux(&VmConfig { disks: vec![san.disk("data", San::FAILS)], ..linux() });

    let laps = Laps::fio(&mut guest, "/dev/vda");
    other.send("i=0; while dd if=/dev/zero of=/dev/vda bs=4k seek=$i count=1 oflag=direct; do i=$((i + 1)); done 2>&1 | grep rror");
    wait_for_writes(&stops, "root", 100);
    san.fail_all_paths();

    // The guest of the one is told.
    let (_, said) = other.result();
    assert!(said.contains("nput/output error"), "{said}");
    let error = reports.wait_for_event("disk-error", |_| true);
    assert_eq!((&error["device"], &error["operation"]), (&json!("data"), &json!("write")));
    assert_eq!((&error["action"], reports.state()), (&json!("reported"), VmState::Running));

    // The other stands still.
    let vm = stops.wait_for(VmState::Paused);
    let error = stops.wait_for_event("disk-error", |error| error["action"] == "stopped");
    assert_eq!(error["device"], "root");
    assert!(error["sector"].as_u64().unwrap() * 512 < Laps::AREA, "{error}");
    assert!(error["errno"].as_i64().unwrap() > 0 && !error["detail"].as_str().unwrap().is_empty(), "{error}");
    let cause = vm.cause.unwrap();
    assert!(cause.contains("root"), "{cause}");
    assert!(stops.client.disk("root").unwrap().held > 0);

    // Too early: it fails again, and nothing is lost by that.
    let before = stops.events("disk-error").len();
    stops.client.act(Action::Resume).unwrap();
    eventually("it fails again", || (stops.events("disk-error").len() > before).then_some(()));
    stops.wait_for(VmState::Paused);

    san.restore_all_paths();
    assert_eq!(stops.client.act(Action::Resume).unwrap().cause, None);
    wait_for_writes(&stops, "root", 100);
    assert!(laps.finish(&mut guest) > 0);
    assert_no_complaint(&mut guest);
    assert_eq!(stops.state(), VmState::Running);
    assert!(!other.ok("dmesg | grep 'I/O error'").is_empty());
}

/// How long the answers to what one asks of a VM all day took, in rising order.
fn ask_until(client: &Client, done: &AtomicBool) -> Vec<Duration> {
    let mut answers = Vec::new();
    while !done.load(Ordering::SeqCst) {
        let questions: [fn(&Client); 4] = [
            |client| drop(client.describe().unwrap()),
            |client| drop(client.disks().unwrap()),
            |client| drop(client.disk("root").unwrap()),
            |client| drop(client.metrics().unwrap()),
        ];
        for ask in questions {
            let begin = Instant::now();
            ask(client);
            answers.push(begin.elapsed());
        }
        thread::sleep(Duration::from_millis(50));
    }
    answers.sort();
    answers
}

#[test]
fn while_a_lun_without_a_path_keeps_its_requests_the_api_answers_and_a_pause_that_was_too_late_comes_by_itself() {
    needs_san!();
    let san = San::take();
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_linux(&VmConfig {
        disks: vec![with(&san.disk("root", San::QUEUES), json!({ "stall_after": "3s" }))],
        ..linux_with_fio()
    });
    let laps = Laps::fio(&mut guest, "/dev/vda");
    wait_for_writes(&vmm, "root", 50);
    san.fail_all_paths();

    let stalled = vmm.wait_for_event("disk-stalled", |_| true);
    assert_eq!(stalled["device"], "root");
    assert!(stalled["requests"].as_u64().unwrap() > 0 && stalled["oldest_ms"].as_u64().unwrap() >= 3000, "{stalled}");
    san.wait_paths(0);
    let gauge = || {
        let metrics = vmm.client.metrics().unwrap();
        let line = metrics.lines().find(|line| line.starts_with("rackvisor_disk_stalled{")).map(str::to_owned);
        line.unwrap().ends_with(" 1.0")
    };
    let disk = vmm.client.disk("root").unwrap();
    assert!(gauge() && disk.stalled && disk.in_flight > 0 && disk.oldest_request_ms >= 3000, "{disk:?}");

    let done = AtomicBool::new(false);
    let answers = thread::scope(|scope| {
        let asker = scope.spawn(|| ask_until(&vmm.client, &done));
        let busy = vmm.client.act(Action::Pause).unwrap_err();
        assert_eq!(busy.code(), Some(Code::StillBusy), "{busy}");
        let busy = busy.to_string();
        assert!(busy.contains("request") && busy.contains("oldest") && busy.contains("on root"), "{busy}");
        let pending = vmm.client.describe().unwrap().pending.unwrap();
        assert!(pending.contains("pause") && pending.contains("on root"), "{pending}");
        done.store(true, Ordering::SeqCst);
        asker.join().unwrap()
    });
    let (count, slowest) = (answers.len(), answers[answers.len() - 1]);
    println!("{count} answers while the LUN hung, the slowest after {} ms", slowest.as_millis());
    // A limit of time, as the sentence is about one. The laboratory has fits of a second; a disk that is waited for takes 20.
    let usual = answers[count * 98 / 100];
    assert!(count > 20 && usual < Duration::from_secs(1) && slowest < Duration::from_secs(5), "{answers:?}");

    san.restore_all_paths();
    vmm.wait_for(VmState::Paused);
    let recovered = vmm.wait_for_event("disk-recovered", |_| true);
    assert_eq!(recovered["device"], "root");
    assert!(recovered["stalled_ms"].as_u64().unwrap() > 0 && !gauge(), "{recovered}");
    vmm.client.act(Action::Resume).unwrap();
    wait_for_writes(&vmm, "root", 50);
    assert!(laps.finish(&mut guest) > 0);
    assert_eq!(vmm.events("disk-error"), [] as [Value; 0]);
}

#[test]
fn a_reset_and_a_shutdown_that_a_hung_lun_holds_up_say_so_and_come_by_themselves() {
    needs_san!();
    let san = San::take();
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_linux(&VmConfig { disks: vec![san.disk("root", San::QUEUES)], ..linux() });
    let writes = "dd if=/dev/zero of=/dev/vda bs=4k oflag=direct";
    for action in [Action::Reset, Action::Shutdown] {
        guest.send(writes);
        wait_for_writes(&vmm, "root", 20);
        san.fail_all_paths();
        wait_for_hanging(&vmm, "root");
        let busy = vmm.client.act(action).unwrap_err();
        assert_eq!(busy.code(), Some(Code::StillBusy), "{action}: {busy}");
        let pending = vmm.client.describe().unwrap().pending.unwrap();
        assert!(pending.contains("on root"), "{action}: {pending}");
        san.restore_all_paths();
        if action == Action::Reset {
            eventually("the reset comes", || (vmm.client.describe().unwrap().resets == 1).then_some(()));
            guest.wait_ready();
        }
    }
    assert_eq!(vmm.wait_for(VmState::Stopped).cause, None);
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
    let mut guest = vmm.boot_linux(&VmConfig { disks: vec![san.disk("root", San::RETRIES)], ..linux() });
    let flushes = || -> u64 {
        let stat = san.attribute(San::RETRIES, "stat");
        stat.split_whitespace().nth(15).unwrap().parse().unwrap()
    };
    let before = flushes();
    guest.ok("dd if=/dev/zero of=/dev/vda bs=64k count=16 oflag=direct conv=notrunc");
    // Something else to be in the midst of.
    guest.ok("dd if=/dev/zero of=/dev/vda bs=64k seek=64 count=4000 oflag=direct conv=notrunc >/dev/null 2>&1 &");
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
    let mut guest = vmm.boot_linux(&VmConfig {
        disks: vec![san.disk("native", San::FAILS), DiskConfig::new("emulated", &emulated.0)],
        ..linux()
    });
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

/// Waits until the guest's disk has this many bytes.
fn wait_for_size(guest: &mut Guest, bytes: u64) {
    let sectors = bytes / 512;
    guest.ok(&format!("until read -r size </sys/block/vda/size && [ $size = {sectors} ]; do sleep 0.1; done"));
}

/// Grows a LUN, and says how long after its host the guest knew it.
fn grow_unannounced(san: &San, lun: usize, bytes: u64, guest: &mut Guest) -> Duration {
    thread::scope(|scope| {
        let grower = scope.spawn(|| san.grow(lun, &bytes.to_string()));
        let host = scope.spawn(|| eventually("the host knows it", || (san.size(lun) == bytes).then(Instant::now)));
        wait_for_size(guest, bytes);
        let seen = Instant::now();
        grower.join().unwrap();
        seen.saturating_duration_since(host.join().unwrap())
    })
}

#[test]
fn a_lun_that_grows_under_a_mounted_file_system_is_seen_in_two_seconds_without_a_word_or_at_once_by_an_empty_patch() {
    const GIB: u64 = 1 << 30;
    needs_san!();
    let san = San::take();
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_linux(&VmConfig { disks: vec![san.disk("root", San::QUEUES)], ..linux_with_fio() });
    let small = vmm.client.disk("root").unwrap().capacity.unwrap();
    guest.ok(
        "mke2fs -q -b 4096 -i 1048576 /dev/vda && mount -t ext4 /dev/vda /mnt && seq 1 200000 >/mnt/numbers && sync",
    );
    let kibibytes = "df -k /mnt | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2";
    let before: u64 = guest.ok(kibibytes).parse().unwrap();

    let sizes = [small + GIB / 4, small + GIB / 2, small + GIB];
    let mut delays = sizes.map(|bytes| grow_unannounced(&san, San::QUEUES, bytes, &mut guest));
    println!("the guest saw the LUN grow {delays:?} after its host");
    delays.sort();
    // It is looked for once a second. The laboratory has fits of a second: what is usual counts.
    assert!(delays[1] < Duration::from_secs(2), "{delays:?}");
    let told = sizes.map(|bytes| json!({ "device": "root", "capacity": bytes }));
    assert_eq!(vmm.events("disk-resized"), told);
    guest.ok("resize2fs /dev/vda 2>&1");
    let after: u64 = guest.ok(kibibytes).parse().unwrap();
    assert!(after - before > GIB / 1024 * 9 / 10, "{before} KiB, then {after} KiB");
    guest.ok("seq 1 200000 | cmp - /mnt/numbers && cp /mnt/numbers /mnt/again && sync && umount /mnt");
    guest.ok("mount -t ext4 /dev/vda /mnt && cmp /mnt/numbers /mnt/again && umount /mnt");

    san.grow(San::QUEUES, &(small + 2 * GIB).to_string());
    let disk = vmm.client.patch_disk("root", &DiskPatch::default()).unwrap();
    assert_eq!(disk.capacity, Some(small + 2 * GIB), "the answer to the patch knows it");
    wait_for_size(&mut guest, small + 2 * GIB);
}

#[test]
fn a_disk_that_shrinks_keeps_its_size_for_the_guest_and_that_is_reported() {
    needs_kvm!();
    let Some(mapped) = Mapped::new(64) else { return skip("device-mapper needs root and /dev/mapper/control") };
    const MIB: u64 = 1 << 20;
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_linux(&VmConfig { disks: vec![DiskConfig::new("data", &mapped.path)], ..linux() });
    mapped.resize(32);
    let refused = vmm.client.patch_disk("data", &DiskPatch::default()).unwrap_err().to_string();
    assert!(refused.contains("shrank") && refused.contains("data"), "{refused}");
    assert_eq!(vmm.client.disk("data").unwrap().capacity, Some(64 * MIB));
    assert_eq!(guest.ok("blockdev --getsize64 /dev/vda"), (64 * MIB).to_string());
    let reported = vmm.wait_for_event("device-error", |error| error["device"] == "data");
    assert!(reported["detail"].as_str().unwrap().contains("shrank"), "{reported}");
    guest.ok("dd if=/dev/vda of=/dev/null bs=1M count=32 iflag=direct");
    let (status, _) = guest.run("dd if=/dev/vda of=/dev/null bs=1M skip=32 count=1 iflag=direct");
    assert_ne!(status, 0, "what is not there is read");
    // Once it has its size again all is well.
    mapped.resize(64);
    assert_eq!(vmm.client.patch_disk("data", &DiskPatch::default()).unwrap().capacity, Some(64 * MIB));
    guest.ok("dd if=/dev/vda of=/dev/null bs=1M count=64 iflag=direct");
}
