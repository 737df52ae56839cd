//! Guests that see a Hyper-V.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::config::{HypervConfig, HypervFeatures, VmConfig};
use rackvisor_api::events::PanicSource;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{Guest, Rackvisor, Tiny, Trace, exits, linux_with_fio, needs_kvm, skip, tell};

/// Flushes of the TLB and interrupts between vCPUs (TLFS appendix A).
const FLUSHES: [&str; 4] = ["code 0x2 ", "code 0x3 ", "code 0x13 ", "code 0x14 "];
const INTERRUPTS: [&str; 2] = ["code 0xb ", "code 0x15 "];

/// A Linux with two vCPUs that takes `hyperv` for what it runs on.
fn linux(hyperv: HypervConfig) -> VmConfig {
    let mut config = linux_with_fio();
    config.cpus.count = 2;
    config.cpus.hyperv = hyperv;
    config
}

/// Hyper-V and nothing of KVM: Linux prefers the latter.
fn alone() -> HypervConfig {
    HypervConfig::Features(HypervFeatures { kvm: false, ..HypervFeatures::default() })
}

/// Threads of one process that map and unmap, and sleep: their processors flush each other's TLBs.
fn work(guest: &mut Guest) {
    guest.ok(
        "fio --name=w --directory=/tmp --thread --numjobs=4 --ioengine=mmap --rw=randrw --size=2m --bs=4k --loops=4 \
              --fsync=64 --thinktime=200 --thinktime_blocks=16 --minimal",
    );
}

/// Interrupts of this kind that all processors had.
fn interrupts(guest: &mut Guest, kind: &str) -> u64 {
    let line = guest.ok(&format!("grep ' *{kind}:' /proc/interrupts"));
    line.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum()
}

#[test]
fn linux_detects_hyper_v_and_uses_its_clock_timers_and_hypercalls() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let trace = Trace::of("kvm_hv_hypercall");
    let mut guest = vmm.boot_linux(&linux(alone()));
    let log = guest.ok("dmesg");
    for said in
        ["Hypervisor detected: Microsoft Hyper-V", "Using hypercall for remote TLB flush", "Using IPI hypercalls"]
    {
        assert!(log.contains(said), "{said}: {log}");
    }
    let clock = guest.ok("cat /sys/devices/system/clocksource/clocksource0/current_clocksource");
    assert_eq!(clock, "hyperv_clocksource_tsc_page", "{log}");
    let ticks = interrupts(&mut guest, "HVS");
    work(&mut guest);
    let more = interrupts(&mut guest, "HVS");
    assert!(more > ticks && ticks > 0, "synthetic timers tick: {ticks}, {more}");
    let local = interrupts(&mut guest, "LOC");
    tell(&format!("{more} interrupts of synthetic timers, {local} of the local timer"));
    if let Some(trace) = trace {
        let lines = trace.lines();
        let count = |codes: &[&str]| lines.iter().filter(|line| codes.iter().any(|code| line.contains(code))).count();
        let (flushes, interrupts) = (count(&FLUSHES), count(&INTERRUPTS));
        tell(&format!("{flushes} hypercalls flush TLBs, {interrupts} interrupt other vCPUs"));
        assert!(flushes > 0 && interrupts > 0, "{lines:?}");
    }
    // All of it begins anew after a reboot, of which the guest is not the only one to be told.
    for _ in 0..2 {
        guest.send("reboot -f");
        guest.wait_ready();
        let clock = guest.ok("cat /sys/devices/system/clocksource/clocksource0/current_clocksource");
        assert_eq!(clock, "hyperv_clocksource_tsc_page");
        assert!(interrupts(&mut guest, "HVS") > 0);
    }
    vmm.client.act(Action::Pause).unwrap();
    vmm.client.act(Action::Resume).unwrap();
    guest.ok("sleep 0.1");
    vmm.client.act(Action::Shutdown).unwrap();
}

#[test]
fn exits_with_and_without_hyper_v_are_counted_for_the_same_work() {
    needs_kvm!();
    // "Nothing" is what a Windows finds without Hyper-V.
    for (name, hyperv, more) in [
        ("nothing", HypervConfig::Switch(false), " nopv"),
        ("Hyper-V", alone(), ""),
        ("KVM", HypervConfig::Switch(false), ""),
        ("KVM and Hyper-V", HypervConfig::Switch(true), ""),
    ] {
        let vmm = Rackvisor::start();
        let mut config = linux(hyperv);
        config.boot.as_mut().unwrap().cmdline += more;
        let mut guest = vmm.boot_linux(&config);
        let detected = guest.ok("dmesg | grep 'Hypervisor detected' || true");
        assert_eq!(detected.contains("Hyper-V"), name == "Hyper-V", "{name}: {detected}");
        let Some(before) = exits(vmm.pid()) else { return skip("the kernel does not count exits (debugfs)") };
        work(&mut guest);
        let after = exits(vmm.pid()).unwrap();
        tell(&format!("{name}: {before} exits to boot, {} for the work", after - before));
        vmm.client.act(Action::Shutdown).unwrap();
    }
}

#[test]
fn what_the_host_lacks_is_named_and_there_is_no_guest_then() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = Tiny::idle().config(&vmm.path(""));
    let features = HypervFeatures { tlbflush_ext: true, ..HypervFeatures::default() };
    config.cpus.hyperv = HypervConfig::Features(features);
    vmm.client.define(&config).unwrap();
    match vmm.client.act(Action::Boot) {
        // A newer kernel than the lab's.
        Ok(vm) => assert_eq!(vm.state, VmState::Running),
        Err(error) => {
            assert!(error.to_string().contains("lacks Hyper-V enlightenments: tlbflush_ext;"), "{error}");
            assert_eq!(vmm.state(), VmState::Defined);
        }
    }
}

#[test]
fn a_guest_that_tells_of_its_crash_is_heard_once_and_goes_on() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let parameters = [0x7e_u64, 0xffff_ffff_c000_0005, 2, 3, 4];
    let mut msrs: Vec<_> = (0x4000_0100..).zip(parameters).collect();
    msrs.extend([(0x4000_0105, 1 << 63); 3]);
    let mut config = Tiny::writes_msrs(&msrs, b"dumped").config(&vmm.path(""));
    config.cpus.hyperv = HypervConfig::Switch(true);
    let mut guest = vmm.boot_with_console(&config);
    guest.read_until("dumped");
    let told = vmm.wait_for_event("guest-panicked", |_| true);
    let words = ["0x7e", "0xffffffffc0000005", "0x2", "0x3", "0x4"];
    assert_eq!((&told["source"], &told["parameters"]), (&"hyperv".into(), &serde_json::json!(words)));
    let vm = vmm.client.describe().unwrap();
    let panic = vm.guest_panic.unwrap();
    assert_eq!(
        (vm.state, panic.source, panic.parameters),
        (VmState::Running, PanicSource::Hyperv, words.map(String::from).to_vec())
    );
    assert_eq!(vmm.events("guest-panicked").len(), 1);
    // Each guest may tell once.
    vmm.client.act(Action::Reset).unwrap();
    guest.read_until("dumped");
    assert_eq!(vmm.events("guest-panicked").len(), 2);
    vmm.client.act(Action::Shutdown).unwrap();
}
