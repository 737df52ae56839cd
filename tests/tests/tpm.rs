//! A guest's TPM in front of a real swtpm.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::VmConfig;
use rackvisor_api::problem::Code;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{Guest, Rackvisor, Swtpm, eventually, linux_with_tpm, needs_kvm, sha256, skip, swtpm_is_missing};
use rustix::process::Signal;

/// A VM with a TPM, not booted.
fn machine() -> (Rackvisor, Swtpm, VmConfig) {
    let vmm = Rackvisor::start();
    std::fs::create_dir(vmm.path("tpm")).unwrap();
    let swtpm = Swtpm::start(&vmm.path("tpm"));
    let mut config = linux_with_tpm();
    config.tpm = Some(swtpm.config());
    (vmm, swtpm, config)
}

fn boot_again(vmm: &Rackvisor, config: &VmConfig) -> Guest {
    vmm.client.act(Action::Shutdown).unwrap();
    vmm.boot_linux(config)
}

fn pcr(guest: &mut Guest) -> String {
    guest.ok("cat /sys/class/tpm/tpm0/pcr-sha256/16").to_lowercase()
}

/// What a PCR of zeros becomes.
fn extended_by(digest: [u8; 32]) -> String {
    sha256(&[[0; 32], digest].concat())
}

const EXTEND: &str = "tpm2 pcrextend 16:sha256=0707070707070707070707070707070707070707070707070707070707070707";

#[test]
fn linux_finds_the_tpm_and_its_state_outlives_the_guest_while_pcrs_begin_anew() {
    needs_kvm!();
    if let Some(why) = swtpm_is_missing() {
        return skip(why);
    }
    let (vmm, _swtpm, config) = machine();
    let mut guest = vmm.boot_linux(&config);
    assert_eq!(guest.ok("cat /sys/class/tpm/tpm0/tpm_version_major"), "2");
    assert!(guest.ok("readlink -f /sys/class/tpm/tpm0/device/driver").ends_with("/tpm_crb"));
    let names = guest.ok("cd /sys/firmware/acpi/tables && ls -p | grep -v /");
    assert!(names.contains("TPM2"), "{names}");
    assert_eq!(guest.ok("dmesg | grep -iE 'acpi (error|bios error|warning)|firmware bug|call trace' || true"), "");
    assert_eq!(pcr(&mut guest), "0".repeat(64));
    guest.ok(EXTEND);
    assert_eq!(pcr(&mut guest), extended_by([7; 32]));
    let random = [guest.ok("tpm2 getrandom --hex 32"), guest.ok("tpm2 getrandom --hex 32")];
    assert_eq!((random[0].len(), random[0] == random[1]), (64, false), "{random:?}");
    guest.ok("tpm2 nvdefine 0x1500016 -C o -s 8 -a 'ownerread|ownerwrite'");
    guest.ok("printf 12345678 | tpm2 nvwrite 0x1500016 -C o -i -");

    // The guest's own reboot, then a power cycle.
    guest.send("reboot -f");
    guest.wait_ready();
    assert_eq!(pcr(&mut guest), "0".repeat(64));
    assert_eq!(guest.ok("tpm2 nvread 0x1500016 -C o -s 8"), "12345678");
    guest.ok(EXTEND);
    let mut guest = boot_again(&vmm, &config);
    assert_eq!(pcr(&mut guest), "0".repeat(64));
    assert_eq!(guest.ok("tpm2 nvread 0x1500016 -C o -s 8"), "12345678");
    assert!(vmm.counted(&["tpm_commands_total"]) > 10);
    assert_eq!(vmm.counted(&["tpm_failures_total"]), 0);
    assert!(vmm.events("device-error").is_empty());
}

#[test]
fn a_secret_sealed_to_pcrs_opens_after_a_power_cycle_with_the_same_pcrs_alone() {
    needs_kvm!();
    if let Some(why) = swtpm_is_missing() {
        return skip(why);
    }
    let (vmm, mut swtpm, config) = machine();
    let mut guest = vmm.boot_linux(&config);
    guest.ok("cd /tmp && tpm2 createprimary -Q -C o -G ecc -c parent && tpm2 flushcontext -t");
    guest.ok(EXTEND);
    guest.ok("cd /tmp && tpm2 createpolicy -Q --policy-pcr -l sha256:16 -L policy");
    guest.ok("cd /tmp && printf sesame | tpm2 create -Q -C parent -i - -L policy -u public -r private");
    guest.ok("cd /tmp && tpm2 load -Q -C parent -u public -r private -c sealed");
    guest.ok("cd /tmp && tpm2 evictcontrol -Q -C o -c sealed 0x81000001");
    const UNSEAL: &str = "tpm2 unseal -c 0x81000001 -p pcr:sha256:16";
    assert_eq!(guest.ok(UNSEAL), "sesame");

    // swtpm may be another process, as after a reboot of the host.
    vmm.client.act(Action::Shutdown).unwrap();
    swtpm.start_again();
    let mut guest = vmm.boot_linux(&config);
    let (status, said) = guest.run(UNSEAL);
    assert!(status != 0 && !said.contains("sesame"), "{said}");
    guest.ok(EXTEND);
    assert_eq!(guest.ok(UNSEAL), "sesame");
    guest.ok(EXTEND);
    let (status, said) = guest.run(UNSEAL);
    assert!(status != 0 && !said.contains("sesame"), "{said}");
}

#[test]
fn a_physical_presence_request_that_firmware_supports_outlives_a_reboot_and_others_are_refused() {
    needs_kvm!();
    if let Some(why) = swtpm_is_missing() {
        return skip(why);
    }
    let (vmm, _swtpm, config) = machine();
    let mut guest = vmm.boot_linux(&config);
    let ppi = "/sys/class/tpm/tpm0/ppi";
    // As firmware says that it supports operation 5; before the guest's ACPI code maps the memory, which must not be mapped twice.
    guest.ok("devmem 0xfed45005 8 4");
    assert_eq!(guest.ok(&format!("cat {ppi}/version")), "1.3");
    assert_eq!(guest.ok(&format!("cat {ppi}/transition_action")), "2: Reboot");
    assert_eq!(guest.ok(&format!("cat {ppi}/request")), "0");
    let (status, said) = guest.run(&format!("echo 6 > {ppi}/request"));
    assert_ne!(status, 0, "{said}");
    guest.ok(&format!("echo 5 > {ppi}/request"));
    assert_eq!(guest.ok(&format!("cat {ppi}/request")), "5");
    // Firmware finds it after a reboot.
    guest.send("reboot -f");
    guest.wait_ready();
    assert_eq!(guest.ok(&format!("cat {ppi}/request")), "5");
    assert_eq!(guest.ok("dmesg | grep -iE 'acpi (error|bios error|warning)' || true"), "");
}

#[test]
fn a_vm_outlives_its_swtpm_and_gets_the_tpm_back_with_a_reset() {
    needs_kvm!();
    if let Some(why) = swtpm_is_missing() {
        return skip(why);
    }
    let (vmm, mut swtpm, config) = machine();
    let mut guest = vmm.boot_linux(&config);
    swtpm.kill();
    let said = vmm.wait_for_event("device-error", |data| data["device"] == "tpm");
    assert!(said["detail"].as_str().unwrap().contains("swtpm closed the connection"), "{said}");
    let (status, said) = guest.run("tpm2 getrandom --hex 8");
    assert_ne!(status, 0, "{said}");
    assert_eq!(guest.ok("echo alive"), "alive");
    assert_eq!(vmm.state(), VmState::Running);
    // Another swtpm must not serve this guest: its PCRs would not be this guest's.
    swtpm.start_again();
    assert_ne!(guest.run("tpm2 getrandom --hex 8").0, 0);
    vmm.client.act(Action::Reset).unwrap();
    vmm.wait_for_event("device-restored", |data| data["device"] == "tpm");
    guest.wait_ready();
    assert_eq!(guest.ok("tpm2 getrandom --hex 8").len(), 16);

    vmm.client.act(Action::Shutdown).unwrap();
    swtpm.kill();
    let refused = vmm.client.act(Action::Boot).unwrap_err();
    assert_eq!(refused.code(), Some(Code::Unusable), "{refused}");
    assert!(refused.to_string().contains("swtpm.sock"), "{refused}");
}

#[test]
fn a_pause_waits_for_a_swtpm_that_hangs_and_says_so() {
    needs_kvm!();
    if let Some(why) = swtpm_is_missing() {
        return skip(why);
    }
    let (vmm, swtpm, config) = machine();
    let mut guest = vmm.boot_linux(&config);
    let before = vmm.counted(&["tpm_commands_total"]);
    swtpm.signal(Signal::STOP);
    guest.send("tpm2 getrandom --hex 8");
    eventually("the guest has given the TPM a command", || {
        (vmm.counted(&["tpm_commands_total"]) > before).then_some(())
    });
    let busy = vmm.client.act(Action::Pause).unwrap_err();
    assert_eq!(busy.code(), Some(Code::StillBusy), "{busy}");
    assert!(busy.to_string().contains("on tpm"), "{busy}");
    swtpm.signal(Signal::CONT);
    vmm.wait_for(VmState::Paused);
    vmm.client.act(Action::Resume).unwrap();
    // Its driver may have given the command up meanwhile.
    guest.result();
    assert_eq!(guest.ok("tpm2 getrandom --hex 8").len(), 16);
}
