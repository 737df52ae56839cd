//! SIGKILL at random moments of a VM's life, again and again on the same disk, flash memory, tap, sockets and jail.
//!
//! RACKVISOR_KILLS is how many, RACKVISOR_KILLS_SEED (printed) repeats a run.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rackvisor_api::config::{DiskConfig, SerialConfig, SerialMode, TapFds, VmConfig};
use rackvisor_tests::{
    Guest, Jail, Keys, Loader, Rackvisor, Random, San, Tap, assert_same_bytes, boot_entries, boot_order, eventually,
    guest_folder, linux_that_runs, make_boot_entry, mount_variables, needs_jail, needs_kvm, rackvisor_binary,
    san_is_missing, tell, uefi, uefi_disk,
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;

/// How often a VM is killed where nobody says how often.
const KILLS: usize = 2;
/// Each so many-th VM starts by firmware.
const FIRMWARE: usize = 4;
/// Records on the disk; the next one takes the place of the oldest.
const SLOTS: usize = 64;
const RECORD: usize = 4096;

/// What the guest writes, in one request.
fn record(life: usize, number: usize) -> Vec<u8> {
    format!("{:<4095}\n", format!("life {life} record {number}")).into_bytes()
}

/// The shell function `put N` of a guest, which writes record N to `device`, flushes, and says so.
fn put(life: usize, device: &str) -> String {
    format!(
        "put() {{ printf '%-4095s\\n' \"life {life} record $1\" >/tmp/r && \
         dd if=/tmp/r of={device} bs={RECORD} seek=$(($1 % {SLOTS})) conv=notrunc,fsync 2>/dev/null && echo \"ack $1;\"; }}; "
    )
}

/// That the disk has each record that the guest of this life knows to be there, all whole, and else what was there before.
/// Gives how many it has written.
fn check_records(before: &[u8], after: &[u8], life: usize, told: usize) -> usize {
    let prefix = format!("life {life} record ");
    let number = |slot: &[u8]| -> Option<usize> {
        String::from_utf8_lossy(slot).strip_prefix(&prefix)?.split_whitespace().next()?.parse().ok()
    };
    // One was begun after the flush of the one before it was acknowledged. The console may not have told us of the last few.
    let written = after.chunks(RECORD).filter_map(number).max().map_or(0, |newest| newest + 1);
    assert!(written >= told, "life {life}: of {told} flushed records the disk has {written}");
    for (slot, (found, old)) in after.chunks(RECORD).zip(before.chunks(RECORD)).enumerate() {
        let newest = (0..written).rev().find(|number| number % SLOTS == slot);
        let wanted = newest.map_or_else(|| old.to_vec(), |number| record(life, number));
        assert_same_bytes(found, &wanted, &format!("life {life}, slot {slot} of {written} records"));
    }
    written
}

/// What the VM is in the midst of when it is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    Boot,
    Io,
    Pause,
}

/// How the VM was started, and who is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Vmm,
    JailedVmm,
    Jailer,
}

/// The disk with the records.
enum Disk {
    Lun(San),
    File(PathBuf),
}

impl Disk {
    const LUN: usize = San::RETRIES;

    fn path(&self) -> PathBuf {
        match self {
            Self::Lun(san) => san.lun(Self::LUN),
            Self::File(path) => path.clone(),
        }
    }

    fn records(&self) -> Vec<u8> {
        let mut content = match self {
            Self::Lun(san) => san.read(Self::LUN, 1),
            Self::File(path) => fs::read(path).unwrap(),
        };
        content.truncate(SLOTS * RECORD);
        content
    }
}

/// What one VM after the other has.
struct Host {
    folder: TempDir,
    disk: Disk,
    tap: Tap,
    jail: Jail,
    /// The VM with firmware.
    firmware: VmConfig,
    /// What its boot order may be.
    orders: [String; 2],
    random: Random,
}

/// A started VM.
struct Life {
    process: Child,
    victim: Victim,
    socket: PathBuf,
    console: PathBuf,
    /// The VMM that a killed jailer's note tells of.
    earlier: Option<u32>,
}

impl Life {
    /// Its console, once there is one: the socket of the VM before it stays where it was until then.
    fn console(&mut self) -> Guest {
        eventually("the VM has a console", || {
            assert_eq!(self.process.try_wait().unwrap(), None, "the VM does not start after a kill");
            UnixStream::connect(&self.console).ok()
        });
        Guest::connect(&self.console)
    }

    /// Asks without waiting for the answer.
    fn ask(&self, action: &str) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        write!(stream, "POST /v1/vm/{action} HTTP/1.1\r\nhost: vm\r\n\r\n").unwrap();
    }
}

fn is_alive(pid: u32) -> bool {
    test_kill_process(Pid::from_raw(pid.cast_signed()).unwrap()).is_ok()
}

impl Host {
    /// A VM with firmware that has two boot entries, and a disk without records.
    fn new(seed: u64) -> Self {
        let san = san_is_missing().is_none().then(San::take);
        let lun = san.as_ref().map(|san| san.lun(Disk::LUN));
        let vmm = Rackvisor::start_for(&lun.iter().map(PathBuf::as_path).collect::<Vec<_>>());
        let disk = san.map_or_else(|| Disk::File(vmm.image("data", &vec![0; 64 << 20]).path), Disk::Lun);
        let wiped = File::options().write(true).open(disk.path()).unwrap();
        (&wiped).write_all(&vec![0; SLOTS * RECORD]).unwrap();
        wiped.sync_all().unwrap();
        let mut firmware = uefi(&vmm, Keys::None);
        firmware.disks = vec![uefi_disk(&vmm, "root", Loader::Signed, 1), DiskConfig::new("data", disk.path())];
        let mut guest = vmm.boot_linux(&firmware);
        mount_variables(&mut guest);
        let [first, second] = ["first", "second"].map(|label| {
            make_boot_entry(&mut guest, label);
            boot_entries(&mut guest, label).concat()
        });
        let order = boot_order(&mut guest);
        let others: Vec<_> = order.into_iter().filter(|entry| ![&first, &second].contains(&entry)).collect();
        let orders =
            [[&first, &second], [&second, &first]].map(|head| [&head.map(String::clone)[..], &others].concat());
        let orders = orders.map(|order| order.join(","));
        guest.ok(&format!("efibootmgr -q -o {}", orders[0]));
        let (status, folder) = vmm.terminate();
        assert!(status.success());
        let host = Self { folder, disk, tap: Tap::new(), jail: Jail::new(), firmware, orders, random: Random(seed) };
        for path in ["", "vars.fd", "root", "data"].map(|name| host.folder.path().join(name)) {
            // What a jailed VM writes to; one without a jail is root's.
            if path.exists() {
                host.jail.give(&path);
            }
        }
        host
    }

    fn wait(&mut self, milliseconds: usize) {
        let wait = self.random.below(milliseconds);
        sleep(Duration::from_millis(wait as u64));
    }

    /// A VM that writes records as soon as it has booted, beside a lot of other writing.
    fn direct(&self, life: usize) -> VmConfig {
        let device = "/dev/vda";
        let bulk = format!("dd if=/dev/zero of={device} bs=64k seek=64 count=200 oflag=direct conv=notrunc");
        let script = put(life, device)
            + &format!("(while {bulk} 2>/dev/null; do :; done) & n=0; while put $n; do n=$((n + 1)); done");
        let mut config = linux_that_runs(&script, "hang");
        config.disks = vec![DiskConfig::new("data", self.disk.path())];
        config
    }

    /// Starts it. Everything is where it was for the one before.
    fn start(&self, mut config: VmConfig, victim: Victim) -> Life {
        let (own, file) = (self.folder.path(), self.folder.path().join("vm.json"));
        let is_jailed = !matches!(victim, Victim::Vmm);
        let (sockets, seen) =
            if is_jailed { (self.jail.folder().join("run"), Path::new("/run")) } else { (own.to_owned(), own) };
        config.serial = SerialConfig { mode: SerialMode::Socket, path: Some(seen.join("console.sock")) };
        if config.boot.as_ref().unwrap().firmware.is_none() {
            let fds = TapFds::Inherited(vec![3]);
            config.nics = vec![if is_jailed { self.tap.nic_with(fds) } else { self.tap.nic() }];
        }
        fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (guest, tap) = (text(&guest_folder()), format!("{}=3", self.tap.name));
        let mut options =
            vec!["--share", own.to_str().unwrap(), "--share-ro", &guest, "--tap", &tap, "--cgroup", "pids.max=128"];
        let disk = text(&self.disk.path());
        if matches!(self.disk, Disk::Lun(_)) {
            options.extend(["--device", &disk]);
        }
        let mut command = if is_jailed { self.jail.command(&options) } else { Command::new(rackvisor_binary()) };
        let log = File::options().create(true).append(true).open(own.join("log")).unwrap();
        command.arg("--api-socket").arg(seen.join("api.sock")).arg("--config").arg(file).arg("--boot");
        command.current_dir(own).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let earlier = self.jail.vmm();
        let process = command.spawn().unwrap();
        Life { process, victim, socket: sockets.join("api.sock"), console: sockets.join("console.sock"), earlier }
    }

    /// Kills it, and waits until nothing of it is left that could write.
    fn kill(&self, life: &mut Life) {
        let vmm = self.jail.vmm().filter(|vmm| Some(*vmm) != life.earlier);
        match (life.victim, vmm) {
            (Victim::JailedVmm, Some(vmm)) => {
                let _ = kill_process(Pid::from_raw(vmm.cast_signed()).unwrap(), Signal::KILL);
            }
            // It may be too early for the jailer to have one.
            _ => life.process.kill().unwrap(),
        }
        life.process.wait().unwrap();
        if let Some(vmm) = vmm {
            eventually("the VMM ends with its jailer", || (!is_alive(vmm)).then_some(()));
        }
    }

    /// That firmware and Linux find the boot entries, in one order or the other.
    fn check_variables(&self, guest: &mut Guest) {
        guest.wait_ready();
        mount_variables(guest);
        for label in ["first", "second"] {
            assert_eq!(boot_entries(guest, label).len(), 1, "{label}");
        }
        let order = boot_order(guest).join(",");
        assert!(self.orders.contains(&order), "{order} is none of {:?}", self.orders);
    }

    /// Starts a VM, kills it at `moment`, and looks at what it leaves. Gives how many records it wrote.
    fn live(&mut self, number: usize, moment: Moment, victim: Victim) -> usize {
        let with_firmware = number.is_multiple_of(FIRMWARE);
        let before = self.disk.records();
        let config = if with_firmware { self.firmware.clone() } else { self.direct(number) };
        let mut life = self.start(config, victim);
        let mut guest = None;
        if matches!(moment, Moment::Boot) {
            self.wait(if with_firmware { 12_000 } else { 4000 });
        } else {
            let console = guest.insert(life.console());
            if with_firmware {
                self.check_variables(console);
                let [one, other] = &self.orders;
                let flip = |order: &str| format!("efibootmgr -q -o {order} && put $n && n=$((n + 1))");
                console.send(&format!(
                    "{} n=0; while {} && {}; do :; done",
                    put(number, "/dev/vdb"),
                    flip(other),
                    flip(one)
                ));
            }
            console.read_until("ack 2;");
            self.wait(1000);
        }
        if matches!(moment, Moment::Pause) {
            life.ask("pause");
            self.wait(100);
            if self.random.below(2) == 0 {
                life.ask("resume");
                self.wait(100);
            }
        }
        self.kill(&mut life);
        let said = guest.map(|mut guest| guest.read_to_end()).unwrap_or_default();
        let told = said.split("ack ").skip(1).filter(|rest| rest.contains(';')).count();
        check_records(&before, &self.disk.records(), number, told)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- end of the log\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

#[test]
fn sigkill_at_random_moments_leaves_disk_and_flash_consistent_and_the_next_start_works() {
    needs_kvm!();
    needs_jail!();
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let kills = number("RACKVISOR_KILLS").map_or(KILLS, |kills| usize::try_from(kills).unwrap());
    let seed = number("RACKVISOR_KILLS_SEED")
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64);
    tell(&format!("{kills} kills with RACKVISOR_KILLS_SEED={seed}"));
    let mut host = Host::new(seed);
    let (mut records, mut counts) = (0, BTreeMap::new());
    for life in 1..=kills {
        let moment = [Moment::Boot, Moment::Io, Moment::Pause][host.random.below(3)];
        let victim = [Victim::Vmm, Victim::JailedVmm, Victim::Jailer][host.random.below(3)];
        println!("kill {life}: {moment:?}, {victim:?}");
        records += host.live(life, moment, victim);
        *counts.entry(format!("{moment:?}, {victim:?}")).or_insert(0) += 1;
    }
    // All that the killed ones left is no hindrance to one that is let be, and goes with it.
    let mut life = host.start(host.firmware.clone(), Victim::JailedVmm);
    host.check_variables(&mut life.console());
    kill_process(Pid::from_child(&life.process), Signal::TERM).unwrap();
    assert!(life.process.wait().unwrap().success());
    assert!(!host.jail.folder().exists());
    tell(&format!("{records} records written, none lost or torn; killed in the midst of {counts:?}"));
}
