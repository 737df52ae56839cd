//! The platform around the processors, as a Linux sees and uses it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::ops::RangeInclusive;
use std::time::{SystemTime, UNIX_EPOCH};

use rackvisor_api::config::{ClockConfig, CpuModelName, VmConfig, WatchdogAction, WatchdogConfig};
use rackvisor_api::events::PanicSource;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{Guest, Rackvisor, Tiny, linux, needs_kvm, tell};

/// A Linux that is not as the others.
fn linux_with(change: impl FnOnce(&mut VmConfig)) -> VmConfig {
    let mut config = linux();
    change(&mut config);
    config
}

fn now() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

/// What the guest's clock is beyond that of the host, which is the lab's: at least and at most, as the guest's answer is from some
/// moment while it was waited for.
fn rtc_offset(guest: &mut Guest) -> RangeInclusive<i64> {
    let before = now();
    let shown: i64 = guest.ok("cat /sys/class/rtc/rtc0/since_epoch").parse().unwrap();
    shown - now()..=shown - before
}

/// Whether that may be `offset`, to two seconds.
fn is_about(seen: &RangeInclusive<i64>, offset: i64) -> bool {
    *seen.start() <= offset + 2 && *seen.end() >= offset - 2
}

/// Interrupts of IRQ 8 so far.
fn clock_interrupts(guest: &mut Guest) -> u64 {
    let line = guest.ok("grep rtc0 /proc/interrupts");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn the_clock_shows_what_is_configured_wakes_the_guest_and_keeps_what_it_sets() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_linux(&linux_with(|config| config.clock = ClockConfig::Offset(7200)));
    let seen = rtc_offset(&mut guest);
    assert!(is_about(&seen, 7200), "{seen:?}");
    assert_eq!(vmm.client.describe().unwrap().clock_offset, Some(7200));
    let before = clock_interrupts(&mut guest);
    guest.ok("echo +2 >/sys/class/rtc/rtc0/wakealarm; while [ -s /sys/class/rtc/rtc0/wakealarm ] && \
              [ -n \"$(cat /sys/class/rtc/rtc0/wakealarm)\" ]; do sleep 0.2; done");
    assert!(clock_interrupts(&mut guest) > before, "the alarm is an interrupt");
    // hwclock waits for the end of a second by an update interrupt.
    guest.ok("hwclock -u -r");
    // A day ahead, as an administrator sets it.
    guest.ok("date -s @$(($(date +%s) + 86400)) && hwclock -u -w");
    let set = vmm.client.describe().unwrap().clock_offset.unwrap();
    let system: i64 = guest.ok("date +%s").parse().unwrap();
    assert!((set - (system - now())).abs() <= 2, "{set}");
    guest.send("reboot -f");
    guest.wait_ready();
    let seen = rtc_offset(&mut guest);
    assert!(is_about(&seen, set), "{seen:?} {set}");
    vmm.client.act(Action::Shutdown).unwrap();
    assert_eq!(vmm.client.describe().unwrap().clock_offset, Some(set), "for whoever keeps it");
    vmm.client.act(Action::Boot).unwrap();
    assert_eq!(vmm.client.describe().unwrap().clock_offset, Some(set));
    vmm.client.act(Action::Shutdown).unwrap();
}

#[test]
fn a_panic_is_told_by_pvpanic() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_linux(&linux_with(|config| {
        config.pvpanic = true;
        // To see that the VM goes on after the panic.
        config.boot.as_mut().unwrap().cmdline += " panic=0";
    }));
    guest.send("echo c >/proc/sysrq-trigger");
    let told = vmm.wait_for_event("guest-panicked", |_| true);
    assert_eq!((&told["source"], &told["dumping"]), (&"pvpanic".into(), &false.into()));
    let vm = vmm.client.describe().unwrap();
    assert_eq!((vm.state, vm.guest_panic.unwrap().source), (VmState::Running, PanicSource::Pvpanic));
    guest.read_until("end Kernel panic");
    assert_eq!(vmm.client.act(Action::Reset).unwrap().guest_panic, None);
    guest.wait_ready();
    vmm.client.act(Action::Shutdown).unwrap();
}

/// A Linux that feeds its watchdog of four seconds until it is told not to.
fn with_watchdog(vmm: &Rackvisor, action: WatchdogAction) -> Guest {
    let config = linux_with(|config| config.watchdog = Some(WatchdogConfig { action }));
    let mut guest = vmm.boot_linux(&config);
    assert_eq!(guest.ok("cat /sys/class/watchdog/watchdog0/identity 2>/dev/null || dmesg | grep -i wdat"), "wdat_wdt");
    guest.ok("watchdog -T 4 -t 1 /dev/watchdog0; sleep 8");
    assert!(vmm.events("watchdog-expired").is_empty(), "it was fed");
    guest.ok("killall -STOP watchdog");
    guest
}

#[test]
fn a_watchdog_that_nobody_feeds_resets_the_guest_which_learns_why() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut guest = with_watchdog(&vmm, WatchdogAction::Reset);
    let told = vmm.wait_for_event("watchdog-expired", |_| true);
    assert_eq!(told["action"], "reset");
    guest.wait_ready();
    assert_eq!(vmm.client.describe().unwrap().resets, 1);
    // WDIOF_CARDRESET
    assert_eq!(guest.ok("cat /sys/class/watchdog/watchdog0/bootstatus"), "32");
    vmm.client.act(Action::Shutdown).unwrap();
}

#[test]
fn a_watchdog_can_pause_or_stop_the_vm_and_its_time_stands_still_with_the_vm() {
    needs_kvm!();
    for (action, state) in [(WatchdogAction::Pause, VmState::Paused), (WatchdogAction::Shutdown, VmState::Stopped)] {
        let vmm = Rackvisor::start();
        let _guest = with_watchdog(&vmm, action);
        vmm.client.act(Action::Pause).unwrap();
        std::thread::sleep(std::time::Duration::from_secs(6));
        assert!(vmm.events("watchdog-expired").is_empty());
        vmm.client.act(Action::Resume).unwrap();
        assert_eq!(vmm.wait_for(state).cause.as_deref(), Some("the watchdog expired"));
    }
}

#[test]
fn a_watchdog_can_leave_it_to_the_guest_by_an_nmi_or_to_whoever_reads_events() {
    needs_kvm!();
    for action in [WatchdogAction::Nmi, WatchdogAction::None] {
        let vmm = Rackvisor::start();
        let mut guest = with_watchdog(&vmm, action);
        vmm.wait_for_event("watchdog-expired", |_| true);
        if action == WatchdogAction::Nmi {
            guest.read_until("Dazed and confused, but trying to continue");
        }
        guest.ok("sleep 3");
        assert_eq!((vmm.state(), vmm.events("watchdog-expired").len()), (VmState::Running, 1));
        vmm.client.act(Action::Shutdown).unwrap();
    }
}

#[test]
fn a_named_cpu_model_is_what_it_says_whatever_the_host_is_and_what_the_host_lacks_is_told() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let show = "sed -n '1,/^$/p' /proc/cpuinfo";
    let mut guest = vmm.boot_linux(&linux_with(|config| config.cpus.model = CpuModelName::X86_64V2));
    let shown = guest.ok(show);
    let flags: Vec<_> = shown.lines().find(|line| line.starts_with("flags")).unwrap().split(' ').collect();
    assert!(
        shown.contains("Rackvisor CPU x86-64-v2") && shown.contains("40 bits physical, 48 bits virtual"),
        "{shown}"
    );
    for flag in ["sse4_2", "popcnt", "cx16", "lahf_lm", "x2apic", "hypervisor"] {
        assert!(flags.contains(&flag), "{flag}: {shown}");
    }
    for flag in ["avx", "aes", "svm", "vmx", "smap", "rdrand", "fsgsbase", "xsave"] {
        assert!(!flags.contains(&flag), "{flag}: {shown}");
    }
    tell(&flags.join(" "));
    vmm.client.act(Action::Shutdown).unwrap();

    let mut config = Tiny::idle().config(&vmm.path(""));
    config.cpus.model = CpuModelName::X86_64V4;
    vmm.client.define(&config).unwrap();
    if let Err(error) = vmm.client.act(Action::Boot) {
        let text = error.to_string();
        assert!(text.contains("x86-64-v4") && text.contains("avx512f"), "{text}");
    }
    config.cpus.model = CpuModelName::Host;
    config.cpus.phys_bits = Some(36);
    vmm.client.define(&config).unwrap();
    let refused = vmm.client.act(Action::Boot).unwrap_err();
    assert!(refused.to_string().contains("physical addresses"), "{refused}");
}

#[test]
fn nesting_is_there_only_where_it_is_asked_for() {
    needs_kvm!();
    let nested = |on: bool| {
        let vmm = Rackvisor::start();
        let mut guest = vmm.boot_linux(&linux_with(|config| config.cpus.nested = on));
        let flags = guest.ok("grep -m 1 ^flags /proc/cpuinfo");
        vmm.client.act(Action::Shutdown).unwrap();
        flags.split(' ').any(|flag| flag == "svm" || flag == "vmx")
    };
    assert!(!nested(false));
    // The lab's KVM offers it, others may not.
    let vmm = Rackvisor::start();
    let mut config = Tiny::idle().config(&vmm.path(""));
    config.cpus.nested = true;
    vmm.client.define(&config).unwrap();
    match vmm.client.act(Action::Boot) {
        Ok(_) => assert!(nested(true)),
        Err(error) => assert!(error.to_string().contains("cpus.nested"), "{error}"),
    }
}

#[test]
fn the_sleep_button_reaches_the_guest() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_linux(&linux());
    let presses = |guest: &mut Guest| -> u64 {
        guest.ok("awk '{ print $1 }' /sys/firmware/acpi/interrupts/ff_slp_btn").parse().unwrap()
    };
    let before = presses(&mut guest);
    vmm.client.act(Action::SleepButton).unwrap();
    rackvisor_tests::eventually("the press arrives", || (presses(&mut guest) > before).then_some(()));
    vmm.client.act(Action::Shutdown).unwrap();
}
