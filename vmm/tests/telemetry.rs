//! What operators look at: the metrics are those of resources/metrics.md, and the dashboard shows no others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use rackvisor::{Action, Vm};
use rackvisor_api::config::BalloonConfig;
use serde_json::Value;
use support::{PATIENCE, Place, SPIN, nic, queues};

const DOCUMENT: &str = include_str!("../../resources/metrics.md");
const DASHBOARD: &str = include_str!("../../resources/grafana/rackvisor.json");

/// Metrics of what a test machine may lack: vhost-net, a TPM, and a guest with a driver.
const RARE: [&str; 9] = [
    "rackvisor_balloon_guest_faults",
    "rackvisor_balloon_guest_memory_bytes",
    "rackvisor_balloon_guest_swap_bytes",
    "rackvisor_net_vhost_engaged",
    "rackvisor_net_vhost_errors_total",
    "rackvisor_net_vhost_hold_microseconds",
    "rackvisor_tpm_commands_total",
    "rackvisor_tpm_failures_total",
    "rackvisor_tpm_command_seconds",
];

/// What an exposition has, as rows of the document: name, type, labels, meaning.
fn exported(text: &str) -> BTreeMap<String, String> {
    let (mut kinds, mut helps, mut labels) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for line in text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            kinds.insert(name, kind);
        } else if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            helps.insert(name, help);
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = kinds.keys().filter(|family| name.starts_with(**family)).max_by_key(|family| family.len());
            let inside =
                line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(inside, _)| inside);
            let names = inside.split("\",").filter_map(|label| label.split_once('=')).map(|(name, _)| name);
            let names = names.filter(|name| !matches!(*name, "le" | "")).collect::<Vec<_>>();
            labels.entry(*family.unwrap()).or_insert_with(Vec::new).clone_from(&names);
        }
    }
    let row = |(name, kind): (&&str, &&str)| {
        let shown = format!("{name}{}", if *kind == "counter" { "_total" } else { "" });
        let labels = labels.get(name).map(|names: &Vec<&str>| names.join(", ")).unwrap_or_default();
        let row = format!("| `{shown}` | {kind} | {labels} | {} |", helps[name]);
        (shown, row)
    };
    kinds.iter().map(row).collect()
}

fn documented() -> BTreeMap<String, String> {
    let rows = DOCUMENT.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| (row.split('`').nth(1).unwrap().to_owned(), row.to_owned())).collect()
}

#[test]
fn every_metric_is_documented_and_every_documented_one_is_there() {
    let Some(place) = Place::new() else { return };
    let Some(tap) = queues("tel", 1) else { return };
    let mut config = place.config(SPIN);
    config.disks = vec![place.disk("root")];
    config.nics.push(nic("net0", 1, 1));
    config.balloon = Some(BalloonConfig::default());
    let vm = Vm::define_with_fds(config, tap).unwrap();
    vm.boot().unwrap();
    let exported = exported(&vm.control().metrics());
    let mut documented = documented();
    documented.retain(|name, _| exported.contains_key(name) || !RARE.contains(&name.as_str()));
    let missing: Vec<_> = exported.iter().filter(|(name, row)| documented.get(*name) != Some(row)).collect();
    let rows: Vec<_> = missing.iter().map(|(_, row)| row.as_str()).collect();
    assert!(rows.is_empty(), "not as in resources/metrics.md:\n{}", rows.join("\n"));
    let gone: Vec<_> = documented.keys().filter(|name| !exported.contains_key(*name)).collect();
    assert!(gone.is_empty(), "in resources/metrics.md, but not there: {gone:?}");
}

#[test]
fn every_metric_of_the_dashboard_is_documented() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() >= 8);
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let used: BTreeSet<&str> = DASHBOARD.split(|c| !is_part(c)).filter(|word| word.starts_with("rackvisor_")).collect();
    assert!(used.len() >= 15, "{used:?}");
    let documented = documented();
    for name in used {
        let family = ["_bucket", "_count", "_sum"].iter().find_map(|suffix| name.strip_suffix(suffix));
        assert!(documented.contains_key(name) || family.is_some_and(|f| documented.contains_key(f)), "{name}");
    }
}

#[test]
fn the_tree_of_states_tells_what_each_part_is_doing_and_has_no_other_parts() {
    let Some(place) = Place::new() else { return };
    let mut config = place.config(SPIN);
    config.disks = vec![place.disk("root")];
    let vm = Vm::define(config).unwrap();
    let control = vm.control();
    let look = |path: &str| control.inspect(path).unwrap_or_else(|| panic!("there is no {path}"));
    assert_eq!((look("control/state"), look("vcpus")), ("defined".into(), Value::Array(Vec::new())));
    vm.boot().unwrap();
    assert_eq!(look("control/state"), "running");
    // A vCPU says so itself, a moment after it was told.
    let until = |running: bool| {
        let end = Instant::now() + PATIENCE;
        while look("vcpus/0/running") != running {
            assert!(Instant::now() < end, "vCPU 0 is not running: {running}");
            std::thread::yield_now();
        }
    };
    until(true);
    assert_eq!((look("devices/root/pci"), look("devices/root/phase")), ("0000:00:01.0".into(), "stopped".into()));
    assert_eq!(look("devices/root/queues/0/enabled"), false);
    assert_eq!(look("devices/root/counters/disk_requests/queue=0,op=read"), 0);
    let names: BTreeSet<String> =
        look("threads").as_array().unwrap().iter().map(|thread| thread["name"].as_str().unwrap().to_owned()).collect();
    for name in ["control", "jobs", "vcpu0", "root.q0", "rtc"] {
        assert!(names.contains(name), "{name} is not in {names:?}");
    }
    vm.act(Action::Pause).unwrap();
    assert_eq!(look("control/state"), "paused");
    until(false);
    let whole = look("");
    assert_eq!(whole["vcpus"][0]["exits"], look("vcpus/0/exits"));
    for path in ["absent", "devices/absent", "vcpus/1", "vcpus/x", "control/state/x", "tpm"] {
        assert_eq!(control.inspect(path), None, "{path}");
    }
    vm.act(Action::Resume).unwrap();
    vm.act(Action::Shutdown).unwrap();
    assert_eq!(look("devices"), serde_json::json!({}));
}
