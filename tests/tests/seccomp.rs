//! Filters of system calls around a real VM. Whether each of their rules is needed is asked after all tests: see tests/run.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::{fs, panic};

use rackvisor::assembly::HostOptions;
use rackvisor::control::{ControlLoop, Lifetime};
use rackvisor::seccomp::{Filters, Mode};
use rackvisor::telemetry::crash::report_panics;
use rackvisor_devices::{ThreadKind, ThreadSpawner};
use rackvisor_tests::{
    PATIENCE, Rackvisor, Swtpm, Tap, Tiny, eventually, filtered_threads, linux, needs_kvm, skip, swtpm_is_missing, tell,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

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
    fs::create_dir(vmm.path("tpm")).unwrap();
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

fn a_bug(kind: ThreadKind) {
    panic!("a bug of {}", kind.name());
}

#[test]
fn a_thread_of_any_kind_that_panics_under_its_filter_leaves_a_report_with_the_names_of_functions() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("crash");
    let filters = Filters::new(Mode::On).unwrap();
    let control = ControlLoop::new(Arc::new(filters.clone()), Lifetime::Served, HostOptions::default()).unwrap();
    let former = panic::take_hook();
    report_panics(&report, control.handle().telemetry, &filters).unwrap();
    let ends = |kind: ThreadKind| filters.spawn(kind, "a-thread", Box::new(move || a_bug(kind))).unwrap().join();
    let all_panicked = ThreadKind::ALL.into_iter().all(|kind| ends(kind).is_err());
    panic::set_hook(former);
    assert!(all_panicked);
    let reports = fs::read_to_string(&report).unwrap();
    let reports: Vec<Value> = reports.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> = reports.iter().map(|report| report["message"].as_str().unwrap()).collect();
    assert_eq!(told, ThreadKind::ALL.map(|kind| format!("a bug of {}", kind.name())));
    for report in &reports {
        let backtrace = report["backtrace"].as_array().unwrap();
        assert!(backtrace.iter().any(|line| line.as_str().unwrap().contains("a_bug")), "{report}");
    }
}

#[test]
fn the_filter_of_the_log_lets_it_write_to_a_new_file_after_sighup() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let vmm = Rackvisor::start_with(&["--log-to", &format!("file:{}", path.display())]);
    fs::rename(&path, folder.path().join("old")).unwrap();
    kill_process(Pid::from_raw(vmm.pid().cast_signed()).unwrap(), Signal::HUP).unwrap();
    let config = Tiny::idle().config(&vmm.path(""));
    eventually("the log is opened anew", || {
        vmm.client.define(&config).unwrap();
        vmm.client.forget().unwrap();
        fs::read_to_string(&path).ok()
    });
}

#[test]
fn the_filter_of_the_log_lets_it_write_to_daemons() {
    for (to, socket) in [("journald", "/run/systemd/journal/socket"), ("syslog", "/dev/log")] {
        let socket = Path::new(socket);
        if std::env::var_os("LAB").is_none() || socket.exists() {
            return skip("only the lab has a place for another log daemon");
        }
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let daemon = UnixDatagram::bind(socket).unwrap();
        daemon.set_read_timeout(Some(PATIENCE)).unwrap();
        let vmm = Rackvisor::start_with(&["--log-to", to]);
        vmm.client.define(&Tiny::idle().config(&vmm.path(""))).unwrap();
        let mut line = [0; 512];
        let length = daemon.recv(&mut line).unwrap();
        fs::remove_file(socket).unwrap();
        assert!(String::from_utf8_lossy(&line[..length]).contains("state changed"), "{to}");
    }
}
