//! Guests that start by Debian's unmodified OVMF.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::config::{CpusConfig, FirmwareConfig};
use rackvisor_api::problem::Code;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{
    Keys, Loader, Rackvisor, boot_entries, boot_past_unsigned_loader, booted_disk, make_boot_entry, mount_variables,
    needs_kvm, uefi, uefi_disk,
};

#[test]
fn firmware_starts_shim_grub_and_linux_which_finds_the_machine_that_was_configured() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = uefi(&vmm, Keys::None);
    config.cpus = CpusConfig { count: 2, ..CpusConfig::default() };
    config.disks = vec![uefi_disk(&vmm, "root", Loader::Signed, 7)];
    config.smbios.manufacturer = Some("ACME".into());
    config.smbios.serial = Some("0815".into());
    config.smbios.uuid = Some("6f1d2c3b-4a59-4e68-8776-95a4b3c2d1e0".parse().unwrap());
    let mut guest = vmm.boot_linux(&config);
    assert_eq!(booted_disk(&mut guest), "7");
    assert_eq!(guest.ok("nproc"), "2");
    for (name, value) in
        [("sys_vendor", "ACME"), ("product_serial", "0815"), ("product_uuid", "6f1d2c3b-4a59-4e68-8776-95a4b3c2d1e0")]
    {
        assert_eq!(guest.ok(&format!("cat /sys/class/dmi/id/{name}")), value, "{name}");
    }
    let names = guest.ok("cd /sys/firmware/acpi/tables && ls -p | grep -v /");
    for name in ["APIC", "DSDT", "FACP", "FACS", "MCFG", "WAET"] {
        assert!(names.split_whitespace().any(|other| other == name), "{name}: {names}");
    }
    assert_eq!(guest.ok("dmesg | grep -iE 'acpi (error|bios error|warning)|firmware bug|call trace' || true"), "");
    let mmconfig = guest.ok("dmesg | grep -i 'mmconfig.*reserved'");
    // Where Debian 12's firmware puts it, and where newer builds do.
    assert!(["0xb0000000", "0xe0000000"].iter().any(|base| mmconfig.to_lowercase().contains(base)), "{mmconfig}");
    assert_eq!(
        guest.ok("dmesg | grep -E \"pci .*can't claim\" || true"),
        "",
        "BARs lie in the windows that ACPI tells"
    );

    // The reboot goes through the firmware again, and the power button works.
    guest.send("reboot -f");
    guest.wait_ready();
    assert_eq!(booted_disk(&mut guest), "7");
    vmm.client.act(Action::PowerButton).unwrap();
    assert_eq!(vmm.wait_for(VmState::Stopped).cause.as_deref(), Some("guest power-off"));
}

#[test]
fn boot_entries_survive_kill_9_and_a_power_cycle() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = uefi(&vmm, Keys::None);
    config.disks = vec![uefi_disk(&vmm, "root", Loader::Signed, 1)];
    let mut guest = vmm.boot_linux(&config);
    mount_variables(&mut guest);
    make_boot_entry(&mut guest, "first");
    let _folder = vmm.kill();

    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_linux(&config);
    mount_variables(&mut guest);
    assert_eq!(boot_entries(&mut guest, "first").len(), 1);
    make_boot_entry(&mut guest, "second");
    vmm.client.act(Action::Shutdown).unwrap();

    let mut guest = vmm.boot_linux(&config);
    mount_variables(&mut guest);
    assert_eq!((boot_entries(&mut guest, "first").len(), boot_entries(&mut guest, "second").len()), (1, 1));
    let current = guest.ok("efibootmgr | sed -n 's/^BootCurrent: //p'");
    assert_eq!(boot_entries(&mut guest, "second"), [current], "what was made last is started first");
}

#[test]
fn the_boot_order_chooses_the_disk() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = uefi(&vmm, Keys::None);
    config.disks = vec![uefi_disk(&vmm, "first", Loader::Signed, 1), uefi_disk(&vmm, "second", Loader::Unsigned, 2)];
    for (indices, wanted) in [([Some(5), Some(3)], "2"), ([Some(5), None], "1")] {
        for (disk, index) in config.disks.iter_mut().zip(indices) {
            disk.boot_index = index;
        }
        let mut guest = vmm.boot_linux(&config);
        assert_eq!(booted_disk(&mut guest), wanted);
        vmm.client.act(Action::Shutdown).unwrap();
    }
}

#[test]
fn with_the_keys_of_microsoft_secure_boot_is_on_and_an_unsigned_program_is_not_started() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    boot_past_unsigned_loader(&vmm, &mut uefi(&vmm, Keys::Microsoft));
}

#[test]
fn firmware_and_variables_that_do_not_fit_are_refused_with_a_reason() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let config = uefi(&vmm, Keys::None);
    let refused = |change: &dyn Fn(&mut FirmwareConfig)| {
        let mut config = config.clone();
        change(config.boot.as_mut().unwrap().firmware.as_mut().unwrap());
        vmm.client.define(&config).unwrap();
        vmm.client.act(Action::Boot).unwrap_err()
    };
    std::fs::write(vmm.path("short"), [0; 4096]).unwrap();
    for (change, told) in [
        (&(|f: &mut FirmwareConfig| f.code = "absent".into()) as &dyn Fn(&mut _), "absent"),
        (&|f: &mut FirmwareConfig| f.code = vmm.path("short"), "OVMF_CODE"),
        (&|f: &mut FirmwareConfig| f.vars = vmm.path("short"), "OVMF_VARS"),
        (&|f: &mut FirmwareConfig| f.vars = "absent".into(), "absent"),
    ] {
        let error = refused(change);
        assert_eq!(error.code(), Some(Code::BadImage), "{error}");
        assert!(error.to_string().contains(told), "{error}");
    }
    // The variables belong to one VM at a time.
    vmm.boot(&config);
    let other = Rackvisor::start();
    other.client.define(&config).unwrap();
    assert_eq!(other.client.act(Action::Boot).unwrap_err().code(), Some(Code::InUse));
}
