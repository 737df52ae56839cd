//! The programs as people and scripts use them.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs;
use std::process::Command;

use rackvisor_api::config::{SerialConfig, SerialMode};
use rackvisor_api::state::VmState;
use rackvisor_tests::{Guest, Rackvisor, Tiny, good, linux, needs_kvm, output, rackctl, rackvisor_binary};
use serde_json::Value;

#[test]
fn rackctl_takes_a_linux_from_its_definition_to_its_end() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.name = "db01".into();
    config.disks = vec![vmm.image("root", &vec![0; 1 << 20])];
    config.serial = SerialConfig { mode: SerialMode::Socket, path: Some("console.sock".into()) };
    fs::write(vmm.path("vm.json"), serde_json::to_vec(&config).unwrap()).unwrap();

    assert_eq!(good(&vmm, "define vm.json"), "db01 is defined\n");
    good(&vmm, "boot");
    let mut guest = Guest::connect(&vmm.path("console.sock"));
    guest.wait_ready();
    guest.ok("dd if=/dev/vda of=/dev/null bs=64k");
    let vm: Value = serde_json::from_str(&good(&vmm, "show --json")).unwrap();
    assert_eq!((vm["state"].as_str(), vm["vcpus"].as_u64()), (Some("running"), Some(1)));
    let disks = good(&vmm, "disk list");
    let row: Vec<_> = disks.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..3], ["root", "0000:00:01.0", "active"], "{disks}");
    let disk: Value = serde_json::from_str(&good(&vmm, "disk show root --json")).unwrap();
    assert!(disk["counters"]["read_bytes"].as_u64().unwrap() >= 1 << 20, "{disk}");

    let (status, _, err) = rackctl(&vmm, "boot");
    assert!(status == 1 && err.contains("wrong-state (409)"), "{err}");
    assert_eq!(rackctl(&vmm, "wait crashed --timeout 0.1").0, 4);
    good(&vmm, "power-button --wait --timeout 120");
    assert_eq!(good(&vmm, "wait stopped"), "stopped\n");
    let events = good(&vmm, "events");
    assert!(events.contains("running → stopped"), "{events}");
    let metrics = good(&vmm, "metrics");
    assert!(metrics.ends_with("# EOF\n") && metrics.contains("rackvisor_process_threads"), "{metrics}");
    assert_eq!(good(&vmm, "forget"), "the VM is forgotten\n");
    assert_eq!(rackctl(&vmm, "show").0, 1);
}

#[test]
fn a_configuration_file_boots_at_once_if_told_to() {
    needs_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.json");
    fs::write(&file, serde_json::to_vec(&Tiny::idle().config(folder.path())).unwrap()).unwrap();
    let file = file.to_str().unwrap();
    let vmm = Rackvisor::start_with(&["--config", file, "--boot"]);
    assert_eq!(vmm.wait_for(VmState::Running).vcpus, 1);
    assert_eq!(Rackvisor::start_with(&["--config", file]).state(), VmState::Defined);
}

#[test]
fn a_vm_that_does_not_boot_ends_the_process_that_was_to_boot_it() {
    needs_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let mut config = Tiny::idle().config(folder.path());
    config.boot.as_mut().unwrap().kernel = Some("absent".into());
    fs::write(folder.path().join("vm.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    let arguments = ["--api-socket", "api.sock", "--config", "vm.json", "--boot"];
    let (status, _, err) = output(Command::new(rackvisor_binary()).args(arguments).current_dir(folder.path()));
    assert_eq!(status, 1, "{err}");
    assert!(err.lines().last().unwrap().contains("kernel absent: "), "{err}");
    assert!(!folder.path().join("api.sock").exists(), "the API socket is left behind");
}
