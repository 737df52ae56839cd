//! What operators and host agents rely on, with the real programs and without a guest: outside of the laboratory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs;

use rackvisor_tests::{Rackvisor, Tiny, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

#[test]
fn the_log_is_json_in_a_file_that_is_opened_anew_on_sighup() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.log");
    let to = format!("file:{}", path.display());
    let vmm = Rackvisor::start_with(&["--log-format", "json", "--log-to", &to]);
    let lines = |path: &std::path::Path| -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let config = Tiny::idle().config(&vmm.path(""));
    vmm.client.define(&config).unwrap();
    let first = eventually("a line of the log", || lines(&path).into_iter().next());
    assert_eq!(
        (&first["level"], &first["message"], &first["to"]),
        (&"INFO".into(), &"state changed".into(), &"defined".into())
    );
    assert_eq!(first["vm"], config.name.as_str());
    assert!(first["timestamp"].is_string(), "{first}");

    let old = folder.path().join("vm.log.1");
    fs::rename(&path, &old).unwrap();
    kill_process(Pid::from_raw(vmm.pid().try_into().unwrap()).unwrap(), Signal::HUP).unwrap();
    let before = lines(&old).len();
    eventually("the log is opened anew", || {
        // Until the signal has come, lines go to the old file.
        vmm.client.forget().unwrap();
        vmm.client.define(&config).unwrap();
        lines(&path).into_iter().next()
    });
    assert!(lines(&old).len() >= before);
    assert_eq!(vmm.log(), "", "nothing goes to standard error");
}
