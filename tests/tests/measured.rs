//! What stock UEFI firmware measures, and what it hands over to a Linux: TPM, event log, generation ID, tables, memory map.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::ops::Range;

use rackvisor_api::VmConfig;
use rackvisor_api::config::{DiskConfig, NumaNode, Patch, Topology, VmPatch};
use rackvisor_api::size::ByteSize;
use rackvisor_api::state::Action;
use rackvisor_tests::{
    EventLog, Guest, Keys, Rackvisor, Swtpm, check_tables, guest_folder, mark_disk, needs_kvm, skip, stock_kernel,
    swtpm_is_missing, tell, uefi, uefi_disk_with,
};

const FIRST: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";
const SECOND: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb88";
/// The registers that the firmware's code, boot loaders, keys, and GRUB's commands and files go to. Not 1 and 5, which tell of the
/// firmware's settings too.
const BOOT_PATH: &str = "sha256:0,2,4,7,8,9";
const LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";
/// EV_EFI_BOOT_SERVICES_APPLICATION.
const BOOT_PROGRAM: u32 = 0x8000_0003;

/// A VM with all that firmware passes on, whose disk is yet to come.
fn machine() -> (Rackvisor, Swtpm, VmConfig) {
    let vmm = Rackvisor::start_with(&["--log", "info,rackvisor_devices::generation=debug"]);
    let swtpm = Swtpm::start_new(&vmm.path("tpm"));
    let mut config = uefi(&vmm, Keys::Microsoft);
    config.tpm = Some(swtpm.config());
    config.generation_id = Some(FIRST.parse().unwrap());
    // A socket on each node: Linux warns of cores that share a cache and not a node.
    config.cpus.count = 2;
    config.cpus.topology = Some(Topology { sockets: 2, cores: 1, threads: 1 });
    let node = |cpu: &str, distances: [u8; 2]| NumaNode {
        cpus: Some(cpu.parse().unwrap()),
        memory: ByteSize::mib(192),
        distances: distances.to_vec(),
        host_nodes: Vec::new(),
    };
    config.memory.size = ByteSize::mib(384);
    config.numa = vec![node("0", [10, 20]), node("1", [20, 10])];
    (vmm, swtpm, config)
}

/// A disk that starts a Linux with a driver for the generation ID, and tpm2-tools. It needs no modules.
fn disk(vmm: &Rackvisor) -> Option<DiskConfig> {
    let kernel = stock_kernel()?;
    let mut initrd = std::fs::read(guest_folder().join("initrd-tpm.img")).unwrap();
    // Of two archives the later one counts: no modules of another kernel are tried.
    initrd.extend(empty_file("lib/modules/order"));
    std::fs::write(vmm.path("initrd"), initrd).unwrap();
    Some(uefi_disk_with(vmm, "disk", &kernel, &vmm.path("initrd")))
}

/// A cpio archive with an empty file (Documentation/driver-api/early-userspace/buffer-format.rst).
fn empty_file(path: &str) -> Vec<u8> {
    let mut archive = Vec::new();
    for (number, name, mode) in [(1, path, 0o100_644), (0, "TRAILER!!!", 0)] {
        let fields = [number, mode, 0, 0, 1, 0, 0, 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        archive.extend(fields.iter().flat_map(|field| format!("{field:08X}").into_bytes()));
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

#[test]
fn firmware_measures_the_boot_and_hands_over_its_log_the_tables_and_the_generation_id() {
    needs_kvm!();
    if let Some(why) = swtpm_is_missing() {
        return skip(why);
    }
    let (vmm, _swtpm, mut config) = machine();
    let Some(disk) = disk(&vmm) else { return skip("there is no stock kernel /boot/vmlinuz-*-amd64") };
    config.disks = vec![disk];
    let mut guest = vmm.boot_linux(&config);
    the_log_replays_to_the_registers(&mut guest);
    the_generation_id_lies_in_memory_of_acpi_and_its_change_is_noticed(&vmm, &mut guest);
    memory_map_and_nodes_agree(&mut guest);
    let names = check_tables(&mut guest, &vmm.path(""));
    for name in ["APIC", "DSDT", "FACP", "MCFG", "SLIT", "SRAT", "TPM2", "WAET"] {
        assert!(names.iter().any(|other| other == name), "{name}: {names:?}");
    }
    the_firmware_takes_requests_of_physical_presence(&mut guest);
    assert_eq!(
        guest.ok("dmesg | grep -iE -B 4 -A 20 'acpi (error|bios error|warning)|firmware bug|call trace' || true"),
        ""
    );

    a_secret_opens_after_the_same_boot_alone(&vmm, &config, guest);
}

fn a_secret_opens_after_the_same_boot_alone(vmm: &Rackvisor, config: &VmConfig, mut guest: Guest) {
    let refused = |guest: &mut Guest| {
        let (status, said) = guest.run(UNSEAL);
        assert!(status != 0 && !said.contains("sesame"), "{said}");
    };
    let registers = |guest: &mut Guest| guest.ok("cd /sys/class/tpm/tpm0/pcr-sha256 && cat 0 2 4 7 8 9");
    seal(&mut guest);
    let sealed = registers(&mut guest);
    // GRUB is told another command line for the same kernel: what it says, and the file that says so, differ.
    vmm.client.act(Action::Shutdown).unwrap();
    mark_disk(&config.disks[0], 2);
    let mut guest = vmm.boot_linux(config);
    refused(&mut guest);
    let other = registers(&mut guest);
    let same: Vec<bool> = sealed.lines().zip(other.lines()).map(|(one, other)| one == other).collect();
    assert_eq!(same, [true, true, true, true, false, false], "{sealed}\n{other}");
    vmm.client.act(Action::Shutdown).unwrap();
    mark_disk(&config.disks[0], 1);
    let mut guest = vmm.boot_linux(config);
    assert_eq!(registers(&mut guest), sealed);
    assert_eq!(guest.ok(UNSEAL), "sesame");
    guest.ok("tpm2 pcrextend 8:sha256=0707070707070707070707070707070707070707070707070707070707070707");
    refused(&mut guest);
}

const UNSEAL: &str = "tpm2 unseal -c 0x81000001 -p pcr:sha256:0,2,4,7,8,9";

fn seal(guest: &mut Guest) {
    guest.ok("cd /tmp && tpm2 createprimary -Q -C o -G ecc -c parent && tpm2 flushcontext -t");
    guest.ok(&format!("cd /tmp && tpm2 createpolicy -Q --policy-pcr -l {BOOT_PATH} -L policy"));
    guest.ok("cd /tmp && printf sesame | tpm2 create -Q -C parent -i - -L policy -u public -r private");
    guest.ok("cd /tmp && tpm2 load -Q -C parent -u public -r private -c sealed");
    guest.ok("cd /tmp && tpm2 evictcontrol -Q -C o -c sealed 0x81000001");
    assert_eq!(guest.ok(UNSEAL), "sesame");
}

fn the_log_replays_to_the_registers(guest: &mut Guest) {
    guest.ok("mount -t securityfs securityfs /sys/kernel/security");
    let log = EventLog::parse(&guest.bytes(LOG));
    let registers = guest.ok("cd /sys/class/tpm/tpm0/pcr-sha256 && cat 0 1 2 3 4 5 6 7 8 9");
    for (pcr, value) in (0..).zip(registers.lines()) {
        assert_eq!(log.replay(pcr), value.to_lowercase(), "register {pcr}");
    }
    tell(&format!("{} events", log.0.len()));
    // The firmware's own code; shim, GRUB and the kernel as programs, and what GRUB says of kernel and initrd.
    assert_ne!(registers.lines().next().unwrap(), "0".repeat(64));
    let programs = log.0.iter().filter(|event| event.pcr == 4 && event.kind == BOOT_PROGRAM).count();
    assert!(programs >= 2, "{programs} programs");
    assert!(log.tells(8, "kernel_cmdline: /vmlinuz console=ttyS0"));
    assert!(log.tells(9, "/vmlinuz") && log.tells(9, "/initrd.img"));
}

/// Numbers of ranges such as `[mem 0x0000000000000000-0x000000000009ffff]` in the lines of the kernel's log with `word`.
fn ranges(guest: &mut Guest, word: &str) -> Vec<Range<u64>> {
    let lines = guest.ok(&format!("dmesg | grep -E '{word}'"));
    let range = |line: &str| {
        let (_, range) = line.split_once("[mem ")?;
        let (first, last) = range.split_once(']')?.0.split_once('-')?;
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        Some(number(first)?..number(last)? + 1)
    };
    lines.lines().map(|line| range(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

fn the_generation_id_lies_in_memory_of_acpi_and_its_change_is_noticed(vmm: &Rackvisor, guest: &mut Guest) {
    let log = vmm.log();
    let (_, page) = log.rsplit_once("page=0x").unwrap();
    let page = u64::from_str_radix(page.split_whitespace().next().unwrap(), 16).unwrap();
    let kept = ranges(guest, "BIOS-e820: .*(ACPI NVS|reserved)");
    assert!(kept.iter().any(|range| range.contains(&page) && range.contains(&(page + 0xfff))), "{page:#x}: {kept:x?}");
    assert_eq!(guest.ok("ls /sys/bus/acpi/drivers/vmgenid | grep RACK0001"), "RACK0001:00");
    let reseeded = "dmesg | grep -c 'crng reseeded due to virtual machine fork' || true";
    assert_eq!(guest.ok(reseeded), "0");
    vmm.client.patch(&VmPatch { generation_id: Patch::Set(SECOND.parse().unwrap()), ..VmPatch::default() }).unwrap();
    guest.ok(&format!("until [ $({reseeded}) = 1 ]; do sleep 0.1; done"));
}

fn memory_map_and_nodes_agree(guest: &mut Guest) {
    let mut nodes = ranges(guest, "SRAT: Node .*mem ");
    nodes.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in nodes {
        match joined.last_mut().filter(|last| last.end == range.start) {
            Some(last) => last.end = range.end,
            None => joined.push(range),
        }
    }
    // All that the firmware calls RAM, and all that ACPI has of it.
    for ram in ranges(guest, "BIOS-e820: .*(usable|ACPI)") {
        assert!(joined.iter().any(|node| node.start <= ram.start && ram.end <= node.end), "{ram:x?}: {joined:x?}");
    }
    assert_eq!(guest.ok("cat /sys/devices/system/node/node*/cpulist | tr '\\n' ';'"), "0;1;");
    assert_eq!(guest.ok("dmesg | grep -iE 'srat|slit|numa' | grep -iE 'bad|invalid|not|overlap|warn' || true"), "");
}

fn the_firmware_takes_requests_of_physical_presence(guest: &mut Guest) {
    let ppi = "/sys/class/tpm/tpm0/ppi";
    // 4: without the user; 3: the firmware asks the user for it.
    let operations = guest.ok(&format!("cat {ppi}/tcg_operations"));
    assert!(operations.lines().any(|line| line.starts_with("5 ") && !line.contains("not")), "{operations}");
    guest.ok(&format!("echo 0 > {ppi}/request"));
    assert_eq!(guest.ok(&format!("cat {ppi}/transition_action")), "2: Reboot");
}
