//! Guests that start by Debian's unmodified OVMF with system management mode: Secure Boot that holds against the guest's kernel.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rackvisor_api::config::{CpusConfig, VmConfig};
use rackvisor_api::state::Action;
use rackvisor_tests::{
    Guest, Keys, Loader, Rackvisor, Random, assert_secure_boot, boot_entries, boot_order, boot_past_unsigned_loader,
    make_boot_entry, mount_variables, needs_kvm, tell, uefi_disk, uefi_with_smm,
};

/// How often it is killed.
const KILLS: &str = "RACKVISOR_KILLS";
/// How long the guest changes variables at most before it is killed.
const LONGEST: usize = 3000;

fn boot_again(vmm: &Rackvisor, config: &VmConfig) -> Guest {
    let mut guest = vmm.boot_linux(config);
    mount_variables(&mut guest);
    guest
}

#[test]
fn with_smm_unsigned_programs_are_refused_and_variables_survive_power_cycles_and_kill_9_at_any_moment() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = uefi_with_smm(&vmm, Keys::Microsoft);
    let mut guest = boot_past_unsigned_loader(&vmm, &mut config);
    make_boot_entry(&mut guest, "first");
    make_boot_entry(&mut guest, "second");
    let both = |guest: &mut Guest| ["first", "second"].map(|label| boot_entries(guest, label).concat());
    let [first, second] = both(&mut guest);
    vmm.client.act(Action::Shutdown).unwrap();

    // Only the signed one from now on: the boot entries come first.
    config.disks.remove(0);
    config.disks[0].boot_index = None;
    let mut guest = boot_again(&vmm, &config);
    assert_secure_boot(&mut guest);
    assert_eq!(both(&mut guest), [&*first, &*second]);
    let others: Vec<_> =
        boot_order(&mut guest).into_iter().filter(|entry| ![&first, &second].contains(&entry)).collect();
    let order = |head: [&String; 2]| [&head.map(String::clone)[..], &others].concat();
    let orders = [order([&first, &second]), order([&second, &first])];
    let [one, other] = orders.clone().map(|order| order.join(","));
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let kills = std::env::var(KILLS).map_or(1, |kills| kills.parse().unwrap());
    tell(&format!("seed {seed}, {kills} kills ({KILLS} says how many)"));
    let mut random = Random(seed | 1);
    let (mut vmm, mut folders) = (vmm, Vec::new());
    for kill in 0..kills {
        // A variable of a kind that Linux lets root rewrite, of many sizes: the firmware now and then makes room by erasing.
        let fill = "printf '\\7\\0\\0\\0%0'$((n % 9 * 200 + 9))'d' $n >filler-cfc8fc79-be2e-4ddc-97f0-9f98bfe298a0";
        let change = format!("efibootmgr -q -o {one} && {fill} && efibootmgr -q -o {other} && {fill}");
        guest.send(&format!("cd /sys/firmware/efi/efivars; n=0; while {change}; do n=$((n + 1)); done"));
        let wait = random.below(LONGEST);
        std::thread::sleep(Duration::from_millis(wait as u64));
        // The files of the VM are there.
        folders.push(vmm.kill());
        vmm = Rackvisor::start();
        guest = boot_again(&vmm, &config);
        assert_secure_boot(&mut guest);
        assert_eq!(both(&mut guest), [&*first, &*second]);
        let found = boot_order(&mut guest);
        assert!(orders.contains(&found), "{found:?} is none of {orders:?}");
        tell(&format!("kill {kill}, after {wait} ms: {found:?}"));
    }
}

/// The byte at a guest-physical address, as the guest's root reads it, or writes it first.
fn memory(guest: &mut Guest, address: u64, value: Option<u8>) -> u64 {
    if let Some(value) = value {
        guest.ok(&format!("devmem {address:#x} 8 {value:#x}"));
    }
    let read = guest.ok(&format!("devmem {address:#x} 8"));
    u64::from_str_radix(read.trim_start_matches("0x"), 16).unwrap()
}

/// Writes a byte of a file of the guest that stands for registers, and gives what is read there then.
fn register(guest: &mut Guest, file: &str, at: u64, value: &str) -> String {
    guest.ok(&format!("printf '\\x{value}' | dd of={file} bs=1 seek={at} conv=notrunc 2>/dev/null"));
    guest.ok(&format!("dd if={file} bs=1 skip={at} count=1 2>/dev/null | hexdump -v -e '1/1 \"%02x\"'"))
}

#[test]
fn with_smm_the_kernel_of_the_guest_changes_no_variable_and_sees_nothing_of_the_firmwares_memory() {
    needs_kvm!();
    const VARS: u64 = 0xffc0_0000;
    const HOST_BRIDGE: &str = "/sys/bus/pci/devices/0000:00:00.0/config";
    const LPC: &str = "/sys/bus/pci/devices/0000:00:1f.0/config";
    let vmm = Rackvisor::start();
    // Without keys nothing keeps root from what only the kernel may do.
    let mut config = uefi_with_smm(&vmm, Keys::None);
    // The firmware waits a second for each processor that an SMI does not reach.
    config.cpus = CpusConfig { count: 2, ..CpusConfig::default() };
    config.disks = vec![uefi_disk(&vmm, "root", Loader::Signed, 1)];
    let mut guest = boot_again(&vmm, &config);
    assert_eq!(guest.ok("nproc"), "2");
    let stored = std::fs::read(vmm.path("vars.fd")).unwrap();

    // The commands that program and erase, wherever there is something to lose.
    for at in (0..stored.len()).step_by(0x1000).filter(|at| stored[*at] != 0xff).take(2) {
        let (address, before) = (VARS + at as u64, u64::from(stored[at]));
        for command in [0x10, 0x00, 0x40, 0x00, 0x20, 0xd0, 0x70, 0x50, 0xff] {
            assert_eq!(memory(&mut guest, address, Some(command)), before, "{command:#x} at {address:#x}");
        }
    }
    assert!(std::fs::read(vmm.path("vars.fd")).unwrap() == stored, "the variables on the host are what they were");

    // TSEG, the last 16 MiB of RAM, and the registers that would open it.
    let end = config.memory.size.bytes();
    for address in [end - (16 << 20), end - 1] {
        assert_eq!(memory(&mut guest, address, Some(0x5a)), 0xff, "{address:#x}");
    }
    let before = guest.ok(&format!("hexdump -v -s 156 -n 4 -e '1/1 \"%02x\"' {HOST_BRIDGE}"));
    for (at, value) in [(0x9d, "4a"), (0x9d, "02"), (0x9e, "00"), (0xaf, "ff")] {
        register(&mut guest, HOST_BRIDGE, at, value);
        assert_eq!(guest.ok(&format!("hexdump -v -s 156 -n 4 -e '1/1 \"%02x\"' {HOST_BRIDGE}")), before, "{at:#x}");
    }
    assert_eq!(register(&mut guest, LPC, 0xa0, "00"), "10", "SMI_LOCK");

    // The firmware still does it when it is asked.
    make_boot_entry(&mut guest, "asked");
    assert_eq!(boot_entries(&mut guest, "asked").len(), 1);
    assert!(std::fs::read(vmm.path("vars.fd")).unwrap() != stored);
}
