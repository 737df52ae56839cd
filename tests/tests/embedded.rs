//! Rackvisor as a library: VMs in this process.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor::{Action, Vm, VmState};
use rackvisor_api::config::{SerialConfig, SerialMode};
use rackvisor_tests::{PATIENCE, Tiny, linux_that_runs, needs_kvm};

#[test]
fn an_embedded_vm_is_defined_booted_and_waited_for() {
    needs_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("console");
    let mut config = linux_that_runs("uname", "poweroff");
    config.serial = SerialConfig { mode: SerialMode::File, path: Some(log.clone()) };
    let vm = Vm::define(config).unwrap();
    vm.boot().unwrap();
    vm.wait_for(VmState::Stopped, PATIENCE).unwrap();
    let said = std::fs::read_to_string(log).unwrap();
    assert!(said.contains("@@RV-BEGIN@@\nLinux\n@@RV-END status=0@@"), "{said}");
    assert_eq!(vm.describe().unwrap().cause.as_deref(), Some("guest power-off"));
}

#[test]
fn several_embedded_vms_live_side_by_side() {
    needs_kvm!();
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let vms: Vec<_> = folders.iter().map(|f| Vm::define(Tiny::idle().config(f.path())).unwrap()).collect();
    for vm in &vms {
        vm.boot().unwrap();
    }
    vms[1].act(Action::Shutdown).unwrap();
    let states: Vec<_> = vms.iter().map(|vm| vm.describe().unwrap().state).collect();
    assert_eq!(states, [VmState::Running, VmState::Stopped, VmState::Running]);
    let refused = vms[1].act(Action::Pause).unwrap_err();
    assert_eq!(refused.code.as_str(), "wrong-state");
}
