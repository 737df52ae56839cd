//! A guest that does nothing but abuse its machine, as fast as it can.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::time::{Duration, Instant, SystemTime};

use rackvisor_api::config::{BalloonConfig, HypervConfig, VmConfig, WatchdogAction, WatchdogConfig};
use rackvisor_api::size::ByteSize;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{Rackvisor, Tap, Tiny, assert_nothing_more, needs_kvm, tell};

/// What the VMM may have in memory beside the guest's RAM.
const OWN_MIB: u64 = 64;
/// The most that it may log: what a guest causes is rate-limited.
const LOG_LIMIT: usize = 1 << 20;

/// A number of the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

/// A machine with all that a direct boot can have.
fn everything(seed: u64, vmm: &Rackvisor, tap: &Tap) -> VmConfig {
    let mut config = Tiny::abuses(seed).config(&vmm.path(""));
    config.cpus.count = 3;
    config.memory.prefault = true;
    let mut disk = vmm.image("data", &[0; 1 << 20]);
    disk.queues = 2;
    config.disks = vec![disk];
    config.nics = vec![tap.nic()];
    config.cpus.hyperv = HypervConfig::Switch(true);
    config.watchdog = Some(WatchdogConfig { action: WatchdogAction::Nmi });
    config.pvpanic = true;
    config.balloon =
        Some(BalloonConfig { size: ByteSize::mib(16), free_page_reporting: true, ..BalloonConfig::default() });
    config.generation_id = Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87".parse().unwrap());
    config
}

fn resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// Exits of all vCPUs of this boot; none if it is over.
fn exits_of(vmm: &Rackvisor) -> u64 {
    let metrics = vmm.client.metrics().unwrap();
    let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap();
    metrics.lines().filter(|line| line.starts_with("rackvisor_vcpu_exits_total")).map(value).sum()
}

/// RACKVISOR_ABUSE_SECONDS is how long, RACKVISOR_ABUSE_SEED takes up an earlier run.
#[test]
fn a_guest_that_abuses_everything_leaves_the_vmm_alive_small_quiet_and_answering() {
    needs_kvm!();
    let seconds = number("RACKVISOR_ABUSE_SECONDS").unwrap_or(12);
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = number("RACKVISOR_ABUSE_SEED").unwrap_or_else(now);
    tell(&format!("RACKVISOR_ABUSE_SEED={seed} RACKVISOR_ABUSE_SECONDS={seconds}"));
    let (vmm, tap) = (Rackvisor::start(), Tap::new());
    let before = vmm.census();
    let mut config = everything(seed, &vmm, &tap);
    let (mut boots, mut answers, mut longest, mut most, mut exits) = (0, 0_u64, Duration::ZERO, 0, 0);
    let mut ends = Vec::new();
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        let asked = Instant::now();
        let info = vmm.client.describe();
        longest = longest.max(asked.elapsed());
        answers += 1;
        match info.map(|info| (info.state, info.cause)) {
            Ok((VmState::Running, _)) => {}
            Ok((VmState::Paused, _)) => drop(vmm.client.act(Action::Resume)),
            other => {
                // It has ended itself, or has not begun: on with other numbers.
                ends.extend(other.ok().and_then(|(_, cause)| cause));
                boots += 1;
                config.boot = Tiny::abuses(seed.wrapping_add(boots)).config(&vmm.path("")).boot;
                vmm.boot(&config);
            }
        }
        exits = exits.max(exits_of(&vmm));
        most = most.max(resident_mib(vmm.pid()));
        if answers.is_multiple_of(20) {
            // It may end in the midst of it.
            let _ = vmm.client.act(Action::Pause).and_then(|_| vmm.client.act(Action::Resume));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let log = vmm.log();
    let resets = vmm.client.describe().unwrap().resets;
    tell(&format!(
        "{boots} boots, {resets} resets in the last; {exits} exits in the longest; {answers} answers, longest {} ms; {most} MiB; {} KiB of log; ends: {ends:?}",
        longest.as_millis(),
        log.len() >> 10,
    ));
    // As Rust says it of its own threads; guests panic, too.
    assert!(!log.contains("panicked at"), "{log}");
    assert!(log.len() < LOG_LIMIT, "{} KiB of log", log.len() >> 10);
    assert!(most < 128 + OWN_MIB, "{most} MiB are resident");

    // Whatever it has left behind, the next guest finds a machine that works, and nothing stays.
    let _ = vmm.client.act(Action::Shutdown);
    vmm.boot(&Tiny::power_off().config(&vmm.path("")));
    vmm.wait_for(VmState::Stopped);
    vmm.client.forget().unwrap();
    assert_nothing_more(vmm.pid(), &before);
}
