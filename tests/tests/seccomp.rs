//! Filters of system calls around a real VM. Whether each of their rules is needed is asked after all tests: see tests/run.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_tests::{Rackvisor, Swtpm, Tap, filtered_threads, linux, needs_kvm, skip, swtpm_is_missing, tell};

#[test]
fn every_thread_of_a_vm_with_everything_is_under_a_filter() {
    needs_kvm!();
    if let Some(why) = swtpm_is_missing() {
        return skip(why);
    }
    let logs = tempfile::tempdir().unwrap();
    let log = format!("file:{}", logs.path().join("log").display());
    let crash = logs.path().join("crash");
    let vmm = Rackvisor::start_with(&["--log-to", &log, "--crash-report", crash.to_str().unwrap()]);
    let tap = Tap::new();
    std::fs::create_dir(vmm.path("tpm")).unwrap();
    let swtpm = Swtpm::start(&vmm.path("tpm"));
    let mut config = linux();
    config.cpus.count = 2;
    config.disks = vec![vmm.image("data", &[0; 1 << 20])];
    config.disks[0].queues = 2;
    config.nics = vec![tap.nic()];
    config.tpm = Some(swtpm.config());
    let _guest = vmm.boot_linux(&config);
    let mut threads = filtered_threads(vmm.pid());
    threads.sort();
    let names: Vec<_> = threads.iter().map(|(name, _)| name.as_str()).collect();
    tell(&names.join(" "));
    for name in ["rackvisor", "api", "jobs", "log", "crash", "vcpu0", "vcpu1", "data.q0", "data.q1", "rng.q0", "rtc"] {
        assert!(names.contains(&name), "no {name}: {names:?}");
    }
    for name in ["net0.q0", "console", "tpm"] {
        assert!(names.contains(&name), "no {name}: {names:?}");
    }
    let unfiltered: Vec<_> = threads.iter().filter(|(_, filtered)| !filtered).collect();
    assert!(unfiltered.is_empty(), "{unfiltered:?}");
}
