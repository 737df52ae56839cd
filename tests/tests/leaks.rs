//! What is left behind: nothing. One test at a time lives in this process, as it counts its own threads.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rackvisor::{Action, Vm, VmConfig, VmState};
use rackvisor_api::config::{DiskConfig, SerialConfig, SerialMode};
use rackvisor_tests::{Census, Mappings, PATIENCE, Rackvisor, Tap, Tiny, assert_nothing_more, linux, needs_kvm};

/// Cycles after which all that is made once has been made.
const WARM_UP: usize = 20;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What process `pid` holds, and which files stand in `folder`.
fn holdings(pid: u32, folder: &Path) -> (Census, Mappings, Vec<String>) {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    (Census::of(pid), Mappings::of(pid), files)
}

/// A VM with some of everything: a tiny guest, or a Linux in each tenth cycle.
fn everything(cycle: usize, folder: &Path, tap: &Tap) -> VmConfig {
    let program = match cycle % 3 {
        0 => Tiny::idle(),
        1 => Tiny::says(b"hello"),
        _ => Tiny::triple_fault(),
    };
    // A Linux has one vCPU: 20 boots more with several are nothing new.
    let (mut config, cpus) = if cycle % 10 == 9 { (linux(), 1) } else { (program.config(folder), 2) };
    config.cpus.count = cpus;
    config.memory.shared = cycle.is_multiple_of(2);
    config.disks = vec![DiskConfig::new("data", folder.join("data"))];
    config.disks[0].queues = 2;
    config.nics = vec![tap.nic()];
    config.serial = match cycle % 4 {
        0 => SerialConfig { mode: SerialMode::Socket, path: Some(folder.join("console.sock")) },
        1 => SerialConfig { mode: SerialMode::File, path: Some(folder.join("console.log")) },
        2 => SerialConfig { mode: SerialMode::Pty, path: None },
        _ => SerialConfig::default(),
    };
    config
}

/// Compares what was held after the warm-up with what is held at the end. The allocator's arenas and the stacks that
/// the C library keeps for new threads come and go (none, as a rule); even a leak in each tenth cycle would be beyond them.
fn assert_nothing_left(before: &(Census, Mappings, Vec<String>), pid: u32, folder: &Path) {
    assert_nothing_more(pid, &before.0);
    let after = holdings(pid, folder);
    assert_eq!(after.2, before.2);
    let (was, is) = (&before.1, &after.1);
    assert!(is.count < was.count + 10, "{was} → {is}");
    assert!(is.virtual_kib < was.virtual_kib + (100 << 10), "{was} → {is}");
}

#[test]
fn two_hundred_vms_in_one_process_leave_no_thread_descriptor_file_or_mapping() {
    needs_kvm!();
    let (_alone, tap, vmm) = (alone(), Tap::new(), Rackvisor::start());
    std::fs::write(vmm.path("data"), vec![0; 1 << 20]).unwrap();
    let mut before = None;
    for cycle in 0..200 {
        vmm.boot(&everything(cycle, &vmm.path(""), &tap));
        // A guest that crashes by itself may be faster.
        let _ = vmm.client.act(Action::Shutdown);
        vmm.client.wait_for(&[VmState::Stopped, VmState::Crashed], Some(PATIENCE)).unwrap();
        vmm.client.forget().unwrap();
        if cycle + 1 == WARM_UP {
            before = Some(holdings(vmm.pid(), &vmm.path("")));
        }
    }
    assert_nothing_left(&before.unwrap(), vmm.pid(), &vmm.path(""));
}

#[test]
fn embedded_vms_leave_no_thread_descriptor_file_or_mapping() {
    needs_kvm!();
    let (_alone, tap) = (alone(), Tap::new());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("data"), vec![0; 1 << 20]).unwrap();
    let mut before = None;
    for cycle in 0..60 {
        let vm = Vm::define(everything(cycle, folder.path(), &tap)).unwrap();
        vm.boot().unwrap();
        // Half of them are shut down; dropping must do for the others.
        if cycle.is_multiple_of(2) {
            let _ = vm.act(Action::Shutdown);
        }
        drop(vm);
        if cycle + 1 == WARM_UP {
            before = Some(holdings(std::process::id(), folder.path()));
        }
    }
    assert_nothing_left(&before.unwrap(), std::process::id(), folder.path());
}
