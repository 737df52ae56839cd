//! The whole VM in this process, with a guest of a few integer instructions: that much any KVM can run, also a software
//! one. What a real guest sees is proved in `tests/`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use rackvisor::{Action, Problem, Vm, VmState};
use rackvisor_api::config::{CpusConfig, DiskConfig, HugePages, MemoryConfig, NicConfig, NicPatch, TapFds, Topology};
use rackvisor_api::control::{DeviceState, Request, Response};
use rackvisor_api::descriptors::Descriptors;
use rackvisor_api::problem::Code;
use rackvisor_api::state::{RequestKind, decide};
use support::{PATIENCE, Place, SPIN, nic, queues, tap_name};

/// `mov dx, 0x604; mov ax, 0x2000; out dx, ax; jmp $`: ACPI S5 through PM1a_CNT.
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xeb, 0xfe];
/// `mov dx, 0xcf9; mov al, 6; out dx, al; jmp $`
const RESET: &[u8] = &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0xfe];
/// `lidt` with limit 0, `ud2`: a triple fault.
const TRIPLE_FAULT: &[u8] = &[0x0f, 0x01, 0x1d, 0x09, 0x00, 0x10, 0x00, 0x0f, 0x0b, 0, 0, 0, 0, 0, 0];

fn is_there(name: &str) -> bool {
    Path::new("/sys/class/net").join(tap_name(name)).exists()
}

fn state(vm: &Vm) -> VmState {
    vm.describe().map_or(VmState::Undefined, |info| info.state)
}

fn code(result: Result<impl std::fmt::Debug, Problem>) -> Code {
    result.expect_err("must be refused").code
}

#[test]
fn a_guest_that_powers_off_is_stopped_and_can_be_booted_again() {
    let Some(place) = Place::new() else { return };
    let vm = Vm::define(place.config(POWER_OFF)).unwrap();
    for _ in 0..3 {
        vm.boot().unwrap();
        vm.wait_for(VmState::Stopped, PATIENCE).unwrap();
        assert_eq!(vm.describe().unwrap().cause.as_deref(), Some("guest power-off"));
    }
}

#[test]
fn a_guest_that_resets_itself_starts_again_in_the_same_machine() {
    let Some(place) = Place::new() else { return };
    let vm = Vm::define(place.config(RESET)).unwrap();
    vm.boot().unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while vm.describe().unwrap().resets < 20 {
        assert!(std::time::Instant::now() < deadline, "{:?}", vm.describe());
        std::thread::yield_now();
    }
    assert_eq!(state(&vm), VmState::Running);
    vm.act(Action::Shutdown).unwrap();
    assert_eq!(state(&vm), VmState::Stopped);
}

#[test]
fn a_triple_fault_is_a_crash_with_its_cause() {
    let Some(place) = Place::new() else { return };
    let vm = Vm::define(place.config(TRIPLE_FAULT)).unwrap();
    vm.boot().unwrap();
    vm.wait_for(VmState::Crashed, PATIENCE).unwrap();
    let cause = vm.describe().unwrap().cause.unwrap();
    assert!(cause.starts_with("vCPU 0: "), "{cause}");
}

/// Brings a VM into `wanted`.
fn vm_in(place: &Place, wanted: VmState) -> Vm {
    let mut config = place.config(if wanted == VmState::Crashed { TRIPLE_FAULT } else { SPIN });
    config.disks.push(place.disk("root"));
    let vm = Vm::define(config).unwrap();
    let act = |actions: &[Action]| actions.iter().for_each(|action| vm.act(*action).unwrap());
    match wanted {
        VmState::Undefined => drop(vm.request(Request::Forget).unwrap()),
        VmState::Defined => {}
        VmState::Running => act(&[Action::Boot]),
        VmState::Paused => act(&[Action::Boot, Action::Pause]),
        VmState::Stopped => act(&[Action::Boot, Action::Shutdown]),
        VmState::Crashed => {
            act(&[Action::Boot]);
            vm.wait_for(VmState::Crashed, PATIENCE).unwrap();
        }
    }
    assert_eq!(state(&vm), wanted);
    vm
}

fn request(kind: RequestKind, place: &Place) -> Request {
    match kind {
        RequestKind::Define => Request::Define(Box::new(place.config(SPIN)), Descriptors::default()),
        RequestKind::Forget => Request::Forget,
        RequestKind::Query => Request::Describe,
        RequestKind::EditDevices => Request::PutDisk(Box::new(place.disk("data"))),
        RequestKind::PatchDevice => Request::PatchDisk("root".into(), Box::default()),
        RequestKind::Act(action) => Request::Act(action),
    }
}

#[test]
fn every_request_in_every_state_does_what_the_state_table_says() {
    let Some(place) = Place::new() else { return };
    for from in VmState::ALL {
        for kind in RequestKind::ALL {
            let vm = vm_in(&place, from);
            if (from, kind) == (VmState::Crashed, RequestKind::Act(Action::Boot)) {
                // It would crash again at once: the table says where the boot leads, not what the guest does there.
                vm.request(Request::Define(Box::new(place.config(SPIN)), Descriptors::default())).unwrap();
            }
            let outcome = vm.request(request(kind, &place));
            match decide(from, kind) {
                Ok(transition) => {
                    outcome.unwrap_or_else(|problem| panic!("{kind:?} in {from}: {problem}"));
                    assert_eq!(state(&vm), transition.to, "{kind:?} in {from}");
                }
                Err(illegal) => {
                    assert_eq!(code(outcome), Problem::from(illegal).code, "{kind:?} in {from}");
                    assert_eq!(state(&vm), from, "{kind:?} in {from}");
                }
            }
        }
    }
}

/// Threads, descriptors, files and mappings of this process.
fn belongings() -> (usize, usize, usize) {
    let count = |path| fs::read_dir(path).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    // The allocator's own arenas and stacks come and go; what a VM maps has a name or is large.
    let named = maps.lines().filter(|l| l.contains("anon_inode") || l.contains("rackvisor") || l.contains("memfd"));
    (count("/proc/self/task"), count("/proc/self/fd"), named.count())
}

#[test]
fn two_hundred_define_boot_and_shutdown_cycles_leave_nothing_behind() {
    let Some(place) = Place::new() else { return };
    // The other tests of this file run beside this one in the same process: a child of its own counts alone.
    if std::env::var_os("RACKVISOR_ALONE").is_none() {
        let name = "two_hundred_define_boot_and_shutdown_cycles_leave_nothing_behind";
        let me = std::env::current_exe().unwrap();
        let child =
            std::process::Command::new(me).args(["--exact", name]).env("RACKVISOR_ALONE", "1").output().unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
        return;
    }
    let cycle = || {
        let mut config = place.config(SPIN);
        config.disks.push(place.disk("root"));
        let vm = Vm::define(config).unwrap();
        vm.boot().unwrap();
        drop(vm);
    };
    cycle();
    let before = belongings();
    (0..200).for_each(|_| cycle());
    // A thread that was joined leaves /proc a moment later.
    let deadline = std::time::Instant::now() + PATIENCE;
    while belongings() != before && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(belongings(), before);
}

#[test]
fn a_failed_boot_says_what_is_wrong_and_changes_nothing() {
    let Some(place) = Place::new() else { return };
    let mut config = place.config(SPIN);
    config.disks.push(DiskConfig::new("gone", Path::new("/nowhere/disk")));
    let vm = Vm::define(config.clone()).unwrap();
    let problem = vm.boot().unwrap_err();
    assert_eq!(problem.code, Code::Unusable);
    assert!(problem.detail.contains("\"gone\"") && problem.detail.contains("/nowhere/disk"), "{problem}");
    assert_eq!(state(&vm), VmState::Defined);

    config.disks[0] = place.disk("gone");
    fs::write(place.folder.path().join("kernel"), b"not a kernel").unwrap();
    vm.request(Request::Define(Box::new(config), Descriptors::default())).unwrap();
    assert_eq!(code(vm.boot()), Code::BadImage);
    assert_eq!(state(&vm), VmState::Defined);
}

#[test]
fn a_disk_that_is_in_use_by_one_vm_is_refused_to_another_and_free_afterwards() {
    let Some(place) = Place::new() else { return };
    let mut config = place.config(SPIN);
    config.disks.push(place.disk("root"));
    let (first, second) = (Vm::define(config.clone()).unwrap(), Vm::define(config).unwrap());
    first.boot().unwrap();
    let problem = second.boot().unwrap_err();
    assert_eq!(problem.code, Code::InUse, "{problem}");
    first.act(Action::Shutdown).unwrap();
    second.boot().unwrap();
}

#[test]
fn a_disk_that_grows_is_shown_with_its_new_size() {
    let Some(place) = Place::new() else { return };
    let vm = vm_in(&place, VmState::Running);
    fs::File::options().write(true).open(place.folder.path().join("root")).unwrap().set_len(1 << 20).unwrap();
    let patched = vm.request(Request::PatchDisk("root".into(), Box::default())).unwrap();
    let Response::Disk(info) = patched else { panic!("not a disk") };
    assert_eq!((info.capacity, info.state), (Some(1 << 20), DeviceState::Idle));
}

#[test]
fn a_vm_of_1024_vcpus_runs_and_a_topology_that_needs_x2apic_ids_too() {
    let Some(place) = Place::new() else { return };
    let shape = Topology { sockets: 84, cores: 3, threads: 1 };
    for (count, topology) in [(254, None), (252, Some(shape)), (1024, None)] {
        let mut config = place.config(SPIN);
        config.cpus = CpusConfig { count, topology, ..CpusConfig::default() };
        let vm = Vm::define(config).unwrap();
        vm.boot().unwrap();
        assert_eq!(vm.describe().unwrap().vcpus, count);
        vm.act(Action::Pause).unwrap();
        vm.act(Action::Resume).unwrap();
        vm.act(Action::Reset).unwrap();
    }
}

#[test]
fn every_kind_of_memory_carries_a_guest_and_huge_pages_that_are_not_there_are_refused_with_a_remedy() {
    let Some(place) = Place::new() else { return };
    for shared in [false, true] {
        for hugepages in [HugePages::Off, HugePages::Thp, HugePages::Size2M] {
            let mut config = place.config(POWER_OFF);
            config.memory = MemoryConfig { shared, hugepages, prefault: true, ..config.memory };
            let vm = Vm::define(config).unwrap();
            match vm.boot() {
                Ok(()) => vm.wait_for(VmState::Stopped, PATIENCE).unwrap(),
                Err(problem) => {
                    assert_eq!((hugepages, problem.code), (HugePages::Size2M, Code::OutOfResources), "{problem}");
                    assert!(problem.detail.contains("vm.nr_hugepages"), "{problem}");
                }
            }
        }
    }
}

#[test]
fn a_tap_that_was_passed_serves_one_boot_after_the_other_until_its_nic_goes() {
    let Some(place) = Place::new() else { return };
    let Some(tap) = queues("rva", 2) else { return };
    let vm = Vm::define_with_fds(place.with_nic(2), tap).unwrap();
    let shown = |vm: &Vm| match vm.request(Request::GetNic("net0".into())).unwrap() {
        Response::Nic(info) => info.tap,
        other => panic!("{other:?}"),
    };
    assert_eq!(shown(&vm), Some(tap_name("rva")));
    for _ in 0..3 {
        vm.boot().unwrap();
        vm.act(Action::Pause).unwrap();
        vm.act(Action::Resume).unwrap();
        vm.act(Action::Shutdown).unwrap();
        assert!(is_there("rva"));
    }
    // What is not about the descriptors leaves them alone; what comes without its own changes nothing.
    let patch: NicPatch = rackvisor_api::config::json(br#"{"mtu":1400}"#).unwrap();
    vm.request(Request::PatchNic("net0".into(), Box::new(patch))).unwrap();
    let again = Request::PutNic(Box::new(nic("net0", 1, 2)), Descriptors::default());
    assert_eq!(code(vm.request(again)), Code::BadDescriptors);
    assert_eq!(vm.describe().unwrap().config.nics[0].mtu, Some(1400));
    vm.boot().unwrap();
    vm.act(Action::Shutdown).unwrap();

    let other = queues("rvb", 1).unwrap();
    vm.request(Request::PutNic(Box::new(nic("net0", 1, 1)), other.into())).unwrap();
    assert!(!is_there("rva"), "an answer comes when the descriptors are closed");
    assert_eq!(shown(&vm), Some(tap_name("rvb")));
    vm.boot().unwrap();
    vm.act(Action::Shutdown).unwrap();
    vm.request(Request::DeleteNic("net0".into())).unwrap();
    assert!(!is_there("rvb"));

    for last_word in
        [Some(Request::Forget), Some(Request::Define(place.config(SPIN).into(), Descriptors::default())), None]
    {
        let vm = Vm::define_with_fds(place.with_nic(1), queues("rva", 1).unwrap()).unwrap();
        match last_word {
            Some(request) => drop(vm.request(request).unwrap()),
            None => drop(vm),
        }
        assert!(!is_there("rva"));
    }
}

#[test]
fn descriptors_that_cannot_be_used_are_refused_with_the_definition_and_change_nothing() {
    let Some(place) = Place::new() else { return };
    let Some(tap) = queues("rvc", 2) else { return };
    let theirs = tap[1].try_clone().unwrap();
    let vm = Vm::define_with_fds(place.with_nic(1), vec![tap[0].try_clone().unwrap()]).unwrap();
    let before = vm.describe().unwrap().config;
    let other = queues("rvd", 2).unwrap();
    let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
    let null = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let tun = || OwnedFd::from(fs::File::open("/dev/net/tun").unwrap());
    let single = queues("rve", 1).unwrap();
    for (fds, wanted, told) in [
        (vec![null()], Code::Unusable, "descriptor 0"),
        (vec![copy(&other[0]), tun()], Code::Unusable, "descriptor 1"),
        (vec![copy(&other[0]), copy(&other[0])], Code::Unusable, "are one queue of tap rvd"),
        (vec![copy(&other[0]), copy(&tap[1])], Code::Unusable, "both tap rvd"),
        (vec![copy(&single[0]), copy(&single[0])], Code::Unusable, "IFF_MULTI_QUEUE"),
        (vec![theirs], Code::Duplicate, "is also that of NIC \"net0\""),
    ] {
        let nic = nic("net1", 2, fds.len().try_into().unwrap());
        let problem = vm.request(Request::PutNic(Box::new(nic), fds.into())).unwrap_err();
        assert_eq!((problem.code, problem.pointer.as_deref()), (wanted, Some("/tap_fds")), "{problem}");
        assert!(problem.detail.contains("\"net1\"") && problem.detail.contains(told), "{problem}");
        assert_eq!(vm.describe().unwrap().config, before);
    }
    let problem = Vm::define_with_fds(place.with_nic(1), vec![null()]).err().unwrap();
    assert_eq!((problem.code, problem.pointer.as_deref()), (Code::Unusable, Some("/nics/0/tap_fds")), "{problem}");
    let mut config = place.config(SPIN);
    config.nics.push(NicConfig { tap_fds: Some(TapFds::Inherited(vec![1000])), ..nic("net0", 1, 1) });
    let problem = Vm::define(config).err().unwrap();
    assert!(problem.detail.contains("1000") && problem.detail.contains("\"net0\""), "{problem}");
    drop((tap, other, single));
    vm.boot().unwrap();
    drop(vm);
    assert!(!["rvc", "rvd", "rve"].into_iter().any(is_there));
}
