//! Guests that start by UEFI firmware: Debian's OVMF and the disks of `resources/guest/build --uefi`.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rackvisor_api::config::{BootConfig, DiskConfig, VmConfig};
use rackvisor_api::size::ByteSize;

use crate::{Guest, Rackvisor, linux};

/// What stands on the kernel's command line before the mark of the disk that was started.
const MARK: &[u8] = b"rv.disk=";
/// Global variables (UEFI 2.10 §3.3).
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// Which variables the firmware starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// None: Secure Boot is off.
    None,
    /// Microsoft's: Secure Boot is on.
    Microsoft,
}

/// What the disk starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loader {
    /// Debian's shim and GRUB, both signed.
    Signed,
    /// A GRUB without signature.
    Unsigned,
}

fn file(name: &str) -> PathBuf {
    let path = linux::guest_folder().join("efi").join(name);
    assert!(path.exists(), "no {}: run resources/guest/build --uefi", path.display());
    path
}

/// A VM without disks that starts by firmware, with variables of its own in the folder of `vmm`.
pub fn uefi(vmm: &Rackvisor, keys: Keys) -> VmConfig {
    let vars = vmm.path("vars.fd");
    let name = if keys == Keys::None { "OVMF_VARS_4M.fd" } else { "OVMF_VARS_4M.ms.fd" };
    std::fs::copy(file(name), &vars).unwrap();
    vmm.give("vars.fd");
    let mut config = VmConfig::new("uefi", ByteSize::mib(256));
    config.boot = Some(BootConfig::with_firmware(file("OVMF_CODE_4M.fd"), vars));
    config
}

/// The same with Debian's build for system management mode, which alone can change the variables.
pub fn uefi_with_smm(vmm: &Rackvisor, keys: Keys) -> VmConfig {
    let mut config = uefi(vmm, keys);
    // The firmware keeps more for itself, and GRUB finds no room for the kernel in 256 MiB.
    config.memory.size = ByteSize::mib(384);
    if let Some(firmware) = config.boot.as_mut().and_then(|boot| boot.firmware.as_mut()) {
        (firmware.code, firmware.smm) = (file("OVMF_CODE_4M.secboot.fd"), true);
    }
    config
}

/// A VM whose disk with an unsigned loader would be tried before the one with signed loaders, marked 2; starts it as far as it
/// goes, past the refusal of the one to the Linux of the other, which must find Secure Boot to be on.
pub fn boot_past_unsigned_loader(vmm: &Rackvisor, config: &mut VmConfig) -> Guest {
    config.disks = vec![uefi_disk(vmm, "unsigned", Loader::Unsigned, 1), uefi_disk(vmm, "signed", Loader::Signed, 2)];
    config.disks[0].boot_index = Some(1);
    config.disks[1].boot_index = Some(2);
    let mut guest = vmm.boot_with_console(config);
    guest.read_until("Access Denied");
    guest.wait_ready();
    assert_eq!(booted_disk(&mut guest), "2");
    mount_variables(&mut guest);
    assert_secure_boot(&mut guest);
    guest
}

/// Asserts that firmware, mokutil and kernel say that Secure Boot is on. Variables must be mounted.
pub fn assert_secure_boot(guest: &mut Guest) {
    assert_eq!(global_variable(guest, "SecureBoot"), "0600000001");
    assert_eq!(guest.ok("mokutil --sb-state"), "SecureBoot enabled");
    let told = guest.ok("dmesg | grep -i 'secure boot'");
    assert!(told.contains("Secure boot enabled"), "{told}");
}

/// Numbers of the boot entries called `label`. Variables must be mounted.
pub fn boot_entries(guest: &mut Guest, label: &str) -> Vec<String> {
    let listed = guest.ok("efibootmgr");
    let of_label = listed.lines().filter(|line| line.contains(label));
    of_label.filter_map(|line| Some(line.strip_prefix("Boot")?.get(..4)?.to_owned())).collect()
}

/// The boot order as `efibootmgr` prints it. Variables must be mounted.
pub fn boot_order(guest: &mut Guest) -> Vec<String> {
    guest.ok("efibootmgr | sed -n 's/^BootOrder: //p'").split(',').map(str::to_owned).collect()
}

/// Makes a boot entry called `label` for the first disk.
pub fn make_boot_entry(guest: &mut Guest, label: &str) {
    let entry = format!("-L {label} -l '\\EFI\\BOOT\\BOOTX64.EFI'");
    guest.ok(&format!("efibootmgr --quiet --create -d /dev/vda -p 1 {entry}"));
}

/// A disk that starts the Linux with the agent. [`booted_disk`] tells `mark`.
pub fn uefi_disk(vmm: &Rackvisor, id: &str, loader: Loader, mark: u8) -> DiskConfig {
    let name = if loader == Loader::Signed { "disk.img" } else { "disk-unsigned.img" };
    let content = std::fs::read(file(name)).unwrap();
    let disk = vmm.image(id, &content);
    mark_disk(&disk, mark);
    disk
}

/// Gives a disk another mark: GRUB starts the same kernel with another command line.
pub fn mark_disk(disk: &DiskConfig, mark: u8) {
    let content = std::fs::read(&disk.path).unwrap();
    let marked = |window: &[u8]| window.starts_with(MARK) && window.last().is_some_and(u8::is_ascii_digit);
    let at = content.windows(MARK.len() + 1).position(marked).unwrap();
    let file = OpenOptions::new().write(true).open(&disk.path).unwrap();
    file.write_all_at(&[b'0' + mark], (at + MARK.len()) as u64).unwrap();
}

/// As [`uefi_disk`] with another kernel and initrd, which the firmware measures.
///
/// # Panics
/// Without mcopy (Debian package mtools).
pub fn uefi_disk_with(vmm: &Rackvisor, id: &str, kernel: &Path, initrd: &Path) -> DiskConfig {
    let disk = uefi_disk(vmm, id, Loader::Signed, 1);
    // The EFI system partition begins there.
    let partition = format!("{}@@1M", vmm.path(id).display());
    for (from, to) in [(kernel, "::vmlinuz"), (initrd, "::initrd.img")] {
        let status = Command::new("mcopy").args(["-o", "-i", &partition]).arg(from).arg(to).status().unwrap();
        assert!(status.success(), "mcopy {} {to}", from.display());
    }
    disk
}

/// The mark of the disk that the guest was started from.
pub fn booted_disk(guest: &mut Guest) -> String {
    guest.ok("tr ' ' '\\n' </proc/cmdline | sed -n 's/^rv.disk=//p'")
}

/// The bytes of a global variable in hexadecimal, its attributes first.
pub fn global_variable(guest: &mut Guest, name: &str) -> String {
    guest.ok(&format!("hexdump -v -e '1/1 \"%02x\"' /sys/firmware/efi/efivars/{name}-{GLOBAL}"))
}

/// Makes the variables visible in the guest.
pub fn mount_variables(guest: &mut Guest) {
    guest.ok("mount -t efivarfs efivarfs /sys/firmware/efi/efivars");
}
