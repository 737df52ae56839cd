//! A VMM that may open what its command line names, and nothing else.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::client::ClientError;
use rackvisor_api::config::DiskConfig;
use rackvisor_api::problem::Code;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{Rackvisor, guest_folder, linux, needs_kvm};

#[test]
fn a_confined_vm_boots_with_its_disk_and_another_is_refused_with_the_option_and_changes_nothing() {
    needs_kvm!();
    let guest = guest_folder();
    let vmm = Rackvisor::start_with(&["--landlock", ".", "--landlock-ro", guest.to_str().unwrap()]);
    let mut config = linux();
    config.disks = vec![vmm.image("data", &[b'x'; 1 << 20])];
    let mut guest = vmm.boot_linux(&config);
    assert_eq!(guest.ok("head -c 4 /dev/vda"), "xxxx");
    vmm.client.act(Action::Shutdown).unwrap();

    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("other");
    std::fs::write(&path, [0; 1 << 20]).unwrap();
    vmm.client.put_disk(&DiskConfig::new("other", &path)).unwrap();
    let Err(ClientError::Problem(problem)) = vmm.client.act(Action::Boot) else { panic!("it boots") };
    assert_eq!((problem.code, problem.pointer.as_deref()), (Code::Unusable, Some("/disks/1/path")));
    assert!(problem.detail.contains(path.to_str().unwrap()) && problem.remedy.contains("--landlock PATH"), "{problem}");
    assert_eq!(vmm.state(), VmState::Stopped);
    vmm.client.delete_disk("other").unwrap();
    vmm.boot_linux(&config);
}
