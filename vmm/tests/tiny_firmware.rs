//! The whole VM in this process, with a firmware of a few instructions: that much any KVM can run that has read-only memory.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rackvisor::kvm::KvmError;
use rackvisor::{Vm, VmConfig, VmState};
use rackvisor_api::config::BootConfig;
use rackvisor_api::problem::Code;
use rackvisor_api::size::ByteSize;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

/// Sizes of the code and its variables: together 16 KiB below 4 GiB.
const CODE: usize = 0x3000;
const VARS: usize = 0x1000;

/// `jmp 0xff00` at 0xFFFFFFF0, where the processor starts in real mode with CS at 0xFFFF0000.
const START: [u8; 3] = [0xe9, 0x0d, 0xff];
/// Programs one byte of the variables and resets the machine, or, if the byte has its value already, powers off.
#[rustfmt::skip]
const PROGRAM: [u8; 43] = [
    0x2e, 0x80, 0x3e, 0x23, 0xc1, 0x5a, // cmp byte cs:[0xc123], 0x5a
    0x74, 0x1a,                         // je off
    0x2e, 0xc6, 0x06, 0x23, 0xc1, 0x10, // mov byte cs:[0xc123], 0x10
    0x2e, 0xc6, 0x06, 0x23, 0xc1, 0x5a, // mov byte cs:[0xc123], 0x5a
    0x2e, 0xc6, 0x06, 0x23, 0xc1, 0xff, // mov byte cs:[0xc123], 0xff
    0xba, 0xf9, 0x0c,                   // mov dx, 0xcf9
    0xb0, 0x06, 0xee,                   // mov al, 6; out dx, al
    0xeb, 0xfe,                         // jmp $
    0xba, 0x04, 0x06,                   // off: mov dx, 0x604
    0xb8, 0x00, 0x20, 0xef,             // mov ax, 0x2000; out dx, ax
    0xeb, 0xfe,                         // jmp $
];

/// A VM with that firmware, and its variables.
fn vm(folder: &TempDir) -> (VmConfig, PathBuf) {
    let (code, vars) = (folder.path().join("code"), folder.path().join("vars"));
    let mut image = vec![0xf4; CODE];
    image[CODE - 0x10..][..START.len()].copy_from_slice(&START);
    image[CODE - 0x100..][..PROGRAM.len()].copy_from_slice(&PROGRAM);
    fs::write(&code, image).unwrap();
    fs::write(&vars, [0xff; VARS]).unwrap();
    let mut config = VmConfig::new("tiny", ByteSize::mib(128));
    config.boot = Some(BootConfig::with_firmware(code, &vars));
    (config, vars)
}

#[test]
fn firmware_starts_at_the_reset_vector_after_each_reset_and_keeps_what_it_programs() {
    if let Err(error) = rackvisor::kvm::open().and_then(|kvm| rackvisor::kvm::rom::check(&kvm)) {
        return eprintln!("SKIPPED: a VM with a tiny firmware: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let (config, vars) = vm(&folder);
    for resets in [1, 0] {
        let vm = Vm::define(config.clone()).unwrap();
        vm.boot().unwrap();
        vm.wait_for(VmState::Stopped, PATIENCE).unwrap();
        let info = vm.describe().unwrap();
        assert_eq!((info.cause.as_deref(), info.resets), (Some("guest power-off"), resets));
        let mut wanted = [0xff; VARS];
        wanted[0x123] = 0x5a;
        assert!(fs::read(&vars).unwrap() == wanted);
    }
}

#[test]
fn with_smm_what_the_firmware_writes_outside_of_it_reaches_no_variable_and_a_host_without_it_refuses_the_vm() {
    let checked = rackvisor::kvm::open().and_then(|kvm| rackvisor::kvm::smm::check(&kvm));
    let folder = tempfile::tempdir().unwrap();
    let (mut config, vars) = vm(&folder);
    config.boot.as_mut().unwrap().firmware.as_mut().unwrap().smm = true;
    let vm = Vm::define(config).unwrap();
    match checked {
        // It resets the machine over and over, as it never finds what it programmed.
        Ok(()) => {
            vm.boot().unwrap();
            let resets = || vm.describe().unwrap().resets;
            let deadline = std::time::Instant::now() + PATIENCE;
            while resets() < 3 {
                assert!(std::time::Instant::now() < deadline, "the firmware does not run");
                std::thread::yield_now();
            }
            assert!(fs::read(&vars).unwrap() == [0xff; VARS]);
        }
        Err(KvmError::NoSmm(_)) => {
            let problem = vm.boot().unwrap_err();
            assert_eq!(problem.code, Code::Unusable);
            assert!(problem.detail.contains("boot.firmware.smm"), "{problem}");
        }
        Err(error) => eprintln!("SKIPPED: a VM with a tiny firmware and SMM: {error}"),
    }
}
