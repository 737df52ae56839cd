//! Two hosts and one LUN: who may write it. Each host is an initiator of its own with a `rackvisor` of its own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, also in its helpers"
)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rackvisor_api::VmConfig;
use rackvisor_api::client::ClientError;
use rackvisor_api::config::{DiskConfig, ReservationConfig};
use rackvisor_api::events::EventKind;
use rackvisor_api::problem::{Code, Problem};
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{
    Jail, PrHelper, Rackvisor, San, Tiny, assert_same_bytes, eventually, guest_folder, linux, needs_jail, needs_san,
};

/// Keys of the two hosts.
const ONE: &str = "0xa1";
const TWO: &str = "0xb2";

/// One LUN, free of keys when the test begins.
struct Lun {
    san: San,
}

impl Lun {
    const INDEX: usize = San::RETRIES;

    fn take() -> Self {
        let lun = Self { san: San::take() };
        if !lun.keys().is_empty() {
            // A test that failed left them. Both commands have to take the same path.
            let device = fs::canonicalize(lun.san.lun(Self::INDEX)).unwrap();
            let paths = Path::new("/sys/class/block").join(device.file_name().unwrap()).join("slaves");
            let path = fs::read_dir(paths).unwrap().next().unwrap().unwrap();
            let path = Path::new("/dev").join(path.file_name());
            persist(&path, &["--out", "--register-ignore", "--param-sark=0xc1ea4"]);
            persist(&path, &["--out", "--clear", "--param-rk=0xc1ea4"]);
        }
        assert_eq!(lun.keys(), [""; 0]);
        lun
    }

    fn persist(&self, arguments: &[&str]) -> String {
        persist(&self.san.lun(Self::INDEX), arguments)
    }

    /// What is registered: a key for each path.
    fn keys(&self) -> Vec<String> {
        let said = self.persist(&["--in", "--read-keys"]);
        said.lines().map(str::trim).filter(|line| line.starts_with("0x")).map(str::to_owned).collect()
    }

    fn has_no_reservation(&self) -> bool {
        self.persist(&["--in", "--read-reservation"]).contains("NO reservation")
    }

    fn disk(&self, key: &str) -> DiskConfig {
        let disk = match key {
            ONE => self.san.disk("root", Self::INDEX),
            _ => self.san.disk_of_second_host("root", Self::INDEX),
        };
        DiskConfig { reservation: Some(reservation(key, false)), ..disk }
    }

    fn snapshot(&self) -> Vec<u8> {
        self.san.read(Self::INDEX, 4)
    }
}

/// What sg_persist says. A path says first what others did, and a dead one says nothing.
fn persist(device: &Path, arguments: &[&str]) -> String {
    eventually("sg_persist", || {
        let output = Command::new("sg_persist").arg("--no-inquiry").args(arguments).arg(device).output().unwrap();
        if !output.status.success() {
            eprintln!("sg_persist {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    })
}

fn reservation(key: &str, preempt: bool) -> ReservationConfig {
    ReservationConfig { key: key.parse().unwrap(), preempt, helper: None }
}

fn idle(folder: &Path, disk: DiskConfig) -> VmConfig {
    let mut config = Tiny::idle().config(folder);
    config.disks = vec![disk];
    config
}

/// Boots an idle guest on the disk.
fn boot(vmm: &Rackvisor, disk: DiskConfig) {
    vmm.boot(&idle(&vmm.path(""), disk));
}

fn refused(vmm: &Rackvisor, disk: DiskConfig) -> Problem {
    vmm.client.define(&idle(&vmm.path(""), disk)).unwrap();
    match vmm.client.act(Action::Boot).expect_err("the VM is refused") {
        ClientError::Problem(problem) => *problem,
        error => panic!("{error}"),
    }
}

#[test]
fn a_second_host_is_refused_until_the_first_has_ended_its_vm() {
    needs_san!();
    let lun = Lun::take();
    let (first, second) = (Rackvisor::start(), Rackvisor::start());
    boot(&first, lun.disk(ONE));
    assert_eq!(lun.keys(), [ONE, ONE], "a key for each path");
    let held = lun.persist(&["--in", "--read-reservation"]);
    assert!(held.contains(ONE) && held.contains("Write Exclusive, registrants only"), "{held}");

    let problem = refused(&second, lun.disk(TWO));
    assert_eq!(problem.code, Code::InUse);
    assert!(problem.detail.contains("disk \"root\"") && problem.detail.contains("reserved by another host (key 0xa1)"));
    assert_eq!(lun.keys(), [ONE, ONE], "it left nothing behind");

    assert_eq!(first.client.act(Action::Shutdown).unwrap().state, VmState::Stopped);
    assert!(lun.keys().is_empty() && lun.has_no_reservation());
    assert_eq!(second.client.act(Action::Boot).unwrap().state, VmState::Running);
    assert_eq!(lun.keys(), [TWO, TWO]);
    assert_eq!(second.terminate().0.code(), Some(0));
    assert!(lun.keys().is_empty() && lun.has_no_reservation());
}

#[test]
fn after_kill_9_the_same_host_goes_on_and_the_other_has_to_preempt() {
    needs_san!();
    let lun = Lun::take();
    let killed = Rackvisor::start();
    boot(&killed, lun.disk(ONE));
    drop(killed);
    assert_eq!(lun.keys(), [ONE, ONE]);
    let second = Rackvisor::start();
    assert_eq!(refused(&second, lun.disk(TWO)).code, Code::InUse);

    let again = Rackvisor::start();
    boot(&again, lun.disk(ONE));
    drop(again);
    let preempting = DiskConfig { reservation: Some(reservation(TWO, true)), ..lun.disk(TWO) };
    boot(&second, preempting);
    assert_eq!(lun.keys(), [TWO, TWO]);
    assert_eq!(second.client.act(Action::Shutdown).unwrap().state, VmState::Stopped);
    assert!(lun.keys().is_empty());
}

#[test]
fn a_wrong_lun_is_refused_before_a_key_is_registered_and_the_right_one_is_known_on_each_host() {
    needs_san!();
    let lun = Lun::take();
    let generation = |said: String| said.split_once("generation=").unwrap().1.split(',').next().unwrap().to_owned();
    let before = generation(lun.persist(&["--in", "--read-keys"]));
    let vmm = Rackvisor::start();
    let with_wwid = |key, wwid: &str| DiskConfig { wwid: Some(wwid.into()), ..lun.disk(key) };
    let uuid = lun.san.attribute(Lun::INDEX, "dm/uuid");
    let (_, wwid) = uuid.split_once('-').unwrap();
    for wrong in ["naa.60014050000000000000000000000000", &wwid[..32], "lun0"] {
        let problem = refused(&vmm, with_wwid(ONE, wrong));
        assert_eq!(problem.code, Code::Unusable);
        assert!(problem.detail.contains(wrong) && problem.detail.contains(&wwid[1..]), "{}", problem.detail);
    }
    // Each registration would have counted.
    assert_eq!(generation(lun.persist(&["--in", "--read-keys"])), before);

    // As multipath, scsi_id and the array write it.
    boot(&vmm, with_wwid(ONE, wwid));
    vmm.client.act(Action::Shutdown).unwrap();
    boot(&vmm, with_wwid(ONE, &format!("naa.{}", wwid[1..].to_uppercase())));
    vmm.client.act(Action::Shutdown).unwrap();
    // The other host's device has no identifier of its own: its paths have.
    boot(&vmm, with_wwid(TWO, &format!("0x{}", &wwid[1..])));
    vmm.client.act(Action::Shutdown).unwrap();
    let image = vmm.image("image", &[0; 4096]);
    let problem = refused(&vmm, DiskConfig { wwid: Some(wwid.into()), ..image });
    assert!(problem.detail.contains("is a file"), "{}", problem.detail);
}

#[test]
fn the_host_that_is_preempted_writes_not_one_more_byte_and_its_vm_ends_with_the_cause() {
    needs_san!();
    let lun = Lun::take();
    let (first, second) = (Rackvisor::start(), Rackvisor::start());
    fail_over(&lun, [&first, &second], [lun.disk(ONE), lun.disk(TWO)]);
}

#[test]
fn a_jailed_vm_without_capabilities_has_a_helper_reserve_its_lun_and_take_it_over() {
    needs_san!();
    needs_jail!();
    let lun = Lun::take();
    let mut helpers = [PrHelper::new(), PrHelper::new()];
    let disks = [0, 1].map(|host| by_helper(lun.disk([ONE, TWO][host]), &helpers[host]));
    let guest = guest_folder();
    let [first, second] = [0, 1].map(|host| {
        let [lun, guest] = [&disks[host].path, &guest].map(|path| path.to_str().unwrap());
        let options = ["--device", lun, "--share-ro", guest, "--share-ro", helpers[host].folder()];
        Rackvisor::start_jailed(Jail::new(), &options, &[])
    });
    let status = fs::read_to_string(format!("/proc/{}/status", first.pid())).unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    fail_over(&lun, [&first, &second], disks.clone());

    // It looks after the reservation again when the helper is back, and a VM without one does not start.
    boot(&second, disks[1].clone());
    helpers[1].kill();
    let unknown = "cannot tell whether the disk is still reserved";
    eventually("it says so", || second.log().contains(unknown).then_some(()));
    helpers[1].start_again();
    eventually("it looks again", || helpers[1].is_connected().then_some(()));
    let problem = refused(&first, disks[0].clone());
    assert_eq!(problem.code, Code::InUse);
    assert_eq!(second.client.act(Action::Shutdown).unwrap().state, VmState::Stopped);
    assert!(lun.keys().is_empty() && lun.has_no_reservation());
    helpers[1].kill();
    let problem = refused(&second, disks[1].clone());
    assert!(problem.detail.contains(helpers[1].folder()) && problem.detail.contains("start qemu-pr-helper"));
}

fn by_helper(disk: DiskConfig, helper: &PrHelper) -> DiskConfig {
    let reservation =
        disk.reservation.map(|reservation| ReservationConfig { helper: Some(helper.socket()), ..reservation });
    DiskConfig { reservation, ..disk }
}

/// The VM of the first host writes its LUN, and the second host takes it.
fn fail_over(lun: &Lun, [first, second]: [&Rackvisor; 2], [one, two]: [DiskConfig; 2]) {
    let mut config = linux();
    config.disks = vec![one];
    let mut guest = first.boot_linux(&config);
    // Each lap writes its number all over the first 4 MiB.
    guest.send(
        "lap=0; while lap=$((lap + 1)); do yes $lap | head -c 4194304 | dd of=/dev/vda bs=64k oflag=direct conv=notrunc; done",
    );
    let written = || first.client.disk("root").unwrap().counters.written_bytes;
    eventually("the guest writes", || (written() > 8 << 20).then_some(()));

    assert_eq!(lun.keys(), [ONE, ONE], "a key for each path");
    assert_eq!(refused(second, two.clone()).code, Code::InUse);
    let taking = two.reservation.clone().map(|reservation| ReservationConfig { preempt: true, ..reservation });
    boot(second, DiskConfig { reservation: taking, ..two });
    let taken = lun.snapshot();
    assert_eq!(lun.keys(), [TWO, TWO]);
    let vm = first.wait_for(VmState::Crashed);
    let cause = "disk \"root\": another host (key 0xb2) took the reservation";
    assert_eq!(vm.cause.as_deref(), Some(cause));
    let events: Vec<_> = first.client.events(Some(0), false).unwrap().map(|event| event.unwrap().what).collect();
    let lost = EventKind::ReservationLost { device: "root".into(), holder: TWO.parse().ok() };
    assert_eq!(events.iter().filter(|event| **event == lost).count(), 1, "{events:?}");
    assert!(events.contains(&EventKind::Crashed { cause: cause.into() }));
    // Whatever was still under way somewhere has its time to arrive.
    thread::sleep(Duration::from_secs(3));
    assert_same_bytes(&lun.snapshot(), &taken, "the LUN after it was taken");
    assert_eq!(lun.keys(), [TWO, TWO], "the end of the first VM touched nothing");

    assert_eq!(first.client.act(Action::Boot).unwrap_err().code(), Some(Code::InUse));
    assert_eq!(second.client.act(Action::Shutdown).unwrap().state, VmState::Stopped);
    assert_eq!(first.client.act(Action::Boot).unwrap().state, VmState::Running);
    first.client.act(Action::Shutdown).unwrap();
    assert!(lun.keys().is_empty());
}

#[test]
fn a_vm_that_is_paused_or_idle_ends_as_well_when_its_lun_is_taken() {
    needs_san!();
    let lun = Lun::take();
    let (first, second) = (Rackvisor::start(), Rackvisor::start());
    for paused in [true, false] {
        boot(&first, lun.disk(ONE));
        if paused {
            first.client.act(Action::Pause).unwrap();
        }
        boot(&second, DiskConfig { reservation: Some(reservation(TWO, true)), ..lun.disk(TWO) });
        let vm = first.wait_for(VmState::Crashed);
        assert!(vm.cause.unwrap().contains("(key 0xb2) took the reservation"));
        assert_eq!(second.client.act(Action::Shutdown).unwrap().state, VmState::Stopped);
        assert!(lun.keys().is_empty());
    }
}

#[test]
fn a_path_that_is_dead_at_the_end_leaves_no_key_behind_and_keeps_a_vm_from_starting() {
    needs_san!();
    let lun = Lun::take();
    let vmm = Rackvisor::start();
    boot(&vmm, lun.disk(ONE));
    lun.san.fail_path(0);
    lun.san.wait_paths(1);
    assert_eq!(vmm.client.act(Action::Shutdown).unwrap().state, VmState::Stopped);
    assert!(lun.keys().is_empty() && lun.has_no_reservation());
    let problem = refused(&vmm, lun.disk(ONE));
    assert!(problem.detail.contains("all paths to the LUN have to work"), "{}", problem.detail);
    assert!(lun.keys().is_empty());
    lun.san.restore_all_paths();
    boot(&vmm, lun.disk(ONE));
    assert_eq!(lun.keys(), [ONE, ONE]);
    vmm.client.act(Action::Shutdown).unwrap();
}
