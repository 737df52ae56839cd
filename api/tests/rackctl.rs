//! The real `rackctl` against a real server.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use rackvisor_api::config::TapFds;
use rackvisor_api::events::Event;
use rackvisor_api::state::{GuestEvent, VmState};
use serde_json::Value;
use support::{Stage, stage};

fn command(stage: &Stage, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rackctl"));
    command.args(line.split_whitespace()).env("RACKVISOR_SOCKET", &stage.socket).current_dir(stage.folder.path());
    command
}

/// Runs a command line; gives exit status, standard output and standard error.
fn rackctl(stage: &Stage, line: &str) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command(stage, line).stdin(Stdio::null()).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn good(stage: &Stage, line: &str) -> String {
    let (status, out, err) = rackctl(stage, line);
    assert_eq!((status, err.as_str()), (0, ""), "{line}");
    out
}

fn defined() -> Stage {
    let stage = stage();
    for example in ["linux.json", "full.toml"] {
        let from = format!("{}/../resources/examples/{example}", env!("CARGO_MANIFEST_DIR"));
        std::fs::copy(from, stage.folder.path().join(example)).unwrap();
    }
    assert_eq!(good(&stage, "define linux.json"), "db01 is defined\n");
    stage
}

#[test]
fn a_vm_is_driven_from_its_definition_to_its_end() {
    let stage = defined();
    for (line, out) in [
        ("boot", "db01 is running (boot)\n"),
        ("pause", "db01 is paused (pause)\n"),
        ("resume", "db01 is running (resume)\n"),
        ("wait running", "running\n"),
        ("shutdown", "db01 is stopped (shutdown)\n"),
        ("define full.toml", "db01 is defined\n"),
        ("forget", "the VM is forgotten\n"),
    ] {
        assert_eq!(good(&stage, line), out, "{line}");
    }
    let events = good(&stage, "events --after 2");
    assert!(events.lines().next().unwrap().ends_with("state-changed  running → paused (pause)"), "{events}");
    assert_eq!(good(&stage, "metrics"), "# EOF\n");
    assert!(good(&stage, "version").starts_with("rackctl "));
}

#[test]
fn tables_are_for_people_and_json_is_for_programs() {
    let stage = defined();
    good(&stage, "disk add --read-only data /dev/sdb --queues 4 --direct=false");
    let table = good(&stage, "disk list");
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ID", "PCI", "STATE", "SIZE", "READ", "WRITTEN", "ERRORS", "PATH"]);
    assert_eq!(lines[2], ["data", "0000:00:02.0", "configured", "-", "0B", "0B", "0", "/dev/sdb"]);
    let disks: Value = serde_json::from_str(&good(&stage, "--json disk list")).unwrap();
    assert_eq!((&disks[1]["config"]["queues"], &disks[1]["config"]["read_only"]), (&4.into(), &true.into()));

    good(&stage, "disk patch data --unset queues --serial S1");
    let disk: Value = serde_json::from_str(&good(&stage, "disk show data --json")).unwrap();
    assert_eq!((&disk["config"]["queues"], &disk["config"]["serial"]), (&1.into(), &"S1".into()));
    good(&stage, "disk remove data");
    good(&stage, "nic add net1 tap1 52:54:00:00:00:02 --mtu 9000");
    good(&stage, "nic patch net1 --link down");
    assert!(good(&stage, "nic list").contains("down"));
    assert!(good(&stage, "nic show net1").contains("mtu       9000"));
    let shown = good(&stage, "show");
    assert!(shown.contains("memory   2GiB, pages thp\n") && shown.contains("(link down)"), "{shown}");
    let vm: Value = serde_json::from_str(&good(&stage, "show --json")).unwrap();
    assert_eq!(vm["config"]["memory"]["size"], "2GiB");
}

#[test]
fn descriptors_that_rackctl_was_started_with_are_passed_on() {
    let stage = defined();
    let mut config = rackvisor_api::testing::small_config();
    (config.nics[0].tap, config.nics[0].tap_fds) = (None, Some(TapFds::Passed(1)));
    std::fs::write(stage.folder.path().join("passed.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    if let Err(error) = std::fs::File::open("/dev/net/tun") {
        return eprintln!("SKIPPED: this test needs /dev/net/tun: {error}");
    }
    let run = |line: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("exec {} {line} 7<>/dev/net/tun", env!("CARGO_BIN_EXE_rackctl"))]);
        shell.env("RACKVISOR_SOCKET", &stage.socket).current_dir(stage.folder.path());
        let Output { status, stdout, stderr } = shell.stdin(Stdio::null()).output().unwrap();
        (status.code().unwrap(), [stdout, stderr].concat())
    };
    let (status, told) = run("define passed.json --tap-fd 7");
    assert_eq!((status, told.as_slice()), (0, b"vm1 is defined\n".as_slice()), "{}", String::from_utf8_lossy(&told));
    assert!(good(&stage, "show").contains("on a tap 1 passed"), "{}", good(&stage, "show"));
    for (line, told) in [
        ("define passed.json --tap-fd 8", "descriptor 8"),
        ("define passed.json", "bad-descriptors"),
        ("define passed.json --tap-fd 7 --tap-fd 7", "bad-descriptors"),
        ("define linux.json --tap-fd 7", "bad-descriptors"),
    ] {
        let (status, answer) = run(line);
        let answer = String::from_utf8(answer).unwrap();
        assert!(status == 1 && answer.contains(told), "{line}: {answer}");
    }
}

#[test]
fn a_refusal_says_what_where_and_what_to_do_and_exits_with_1() {
    let stage = defined();
    let (status, out, err) = rackctl(&stage, "pause");
    assert_eq!((status, out.as_str()), (1, ""));
    assert_eq!(
        err,
        "rackctl: the VM is defined: pause is not possible\n  remedy:  legal in: running; boot the VM first\n  code:    wrong-state (409)\n"
    );
    let (status, _, err) = rackctl(&stage, "disk add b x --queues 99");
    assert_eq!(status, 1);
    assert!(err.contains("field:   /queues\n") && err.contains("choose 1 to 32"), "{err}");
    let (_, _, err) = rackctl(&stage, "--json disk show none");
    assert_eq!(serde_json::from_str::<Value>(&err).unwrap()["code"], "no-such-disk");
    std::fs::write(stage.folder.path().join("bad.json"), r#"{"name":"a","mem":1}"#).unwrap();
    let (status, _, err) = rackctl(&stage, "define bad.json");
    assert!(status == 1 && err.contains("bad.json") && err.contains("/mem"), "{err}");
}

#[test]
fn the_other_exit_codes_tell_usage_absence_and_time_apart() {
    let stage = defined();
    assert_eq!(rackctl(&stage, "explode").0, 2);
    assert_eq!(rackctl(&stage, "-s nowhere.sock show").0, 3);
    assert_eq!(rackctl(&stage, "wait crashed --timeout 0.05").0, 4);
    let status = command(&stage, "show").env_remove("RACKVISOR_SOCKET").stderr(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn waiting_commands_end_when_the_guest_does() {
    let stage = defined();
    good(&stage, "boot");
    let mut waiting = command(&stage, "power-button --wait").stdout(Stdio::piped()).spawn().unwrap();
    // The button, and then the guest's answer to it.
    let mut events = stage.client.events(Some(0), true).unwrap();
    while stage.client.describe().unwrap().cause.as_deref() != Some("power-button") {
        std::thread::yield_now();
    }
    stage.machine.guest(GuestEvent::Shutdown);
    assert!(waiting.wait().unwrap().success());
    assert!(events.any(|event| matches!(event.unwrap(), Event { id: 3, .. })));
    assert_eq!(stage.client.state().unwrap(), VmState::Stopped);
}

#[test]
fn events_are_followed_as_they_come_and_a_closed_pipe_is_no_error() {
    let stage = defined();
    let mut following = command(&stage, "events --follow --json").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(following.stdout.take().unwrap()).lines();
    let first: Event = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(first.id, 1);
    good(&stage, "boot");
    let second: Event = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!((second.id, second.what.name()), (2, "state-changed"));
    drop(lines);
    // A process that another test forks just now has the pipe too, until it executes its program: one event may not do.
    let status = ["pause", "resume"].into_iter().cycle().take(1000).find_map(|action| {
        good(&stage, action);
        following.try_wait().unwrap()
    });
    assert_eq!(status.expect("it ends when it cannot write").code(), Some(0));
}

#[test]
fn help_names_the_commands_and_completion_knows_them() {
    let stage = defined();
    let help = good(&stage, "--help");
    for text in ["power-button", "RACKVISOR_SOCKET", "Exit codes:", "completion"] {
        assert!(help.contains(text), "{text}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(good(&stage, &format!("completion {shell}")).contains("power-button"), "{shell}");
    }
}

/// The command that makes each operation's request.
const COMMANDS: [(&str, &str); 32] = [
    ("version", "version"),
    ("openapi", "openapi"),
    ("metrics", "metrics"),
    ("inspect", "inspect"),
    ("inspectPart", "inspect control/state"),
    ("followEvents", "events"),
    ("define", "define full.toml"),
    ("describe", "show"),
    ("patch", "patch --generation-id 324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"),
    ("listDisks", "disk list"),
    ("showDisk", "disk show root"),
    ("putDisk", "disk add extra extra.img"),
    ("patchDisk", "disk patch extra --queues 2"),
    ("deleteDisk", "disk remove extra"),
    ("listDiskGroups", "group list"),
    ("showDiskGroup", "group show silver"),
    ("patchDiskGroup", "group patch silver --ops 100"),
    ("listNics", "nic list"),
    ("showNic", "nic show net0"),
    ("putNic", "nic add extra tap9 52:54:00:00:00:99"),
    ("patchNic", "nic patch extra --link down"),
    ("deleteNic", "nic remove extra"),
    ("boot", "boot"),
    ("announceNic", "nic announce net0"),
    ("pause", "pause"),
    ("resume", "resume"),
    ("reset", "reset"),
    ("nmi", "nmi"),
    ("powerButton", "power-button"),
    ("sleepButton", "sleep-button"),
    ("shutdown", "shutdown"),
    ("forget", "forget"),
];

#[test]
fn rackctl_has_a_command_for_every_operation_of_the_api() {
    let stage = defined();
    let document = stage.client.openapi().unwrap();
    let operations =
        document["paths"].as_object().unwrap().values().flat_map(|path| path.as_object().unwrap().values());
    let mut operations: Vec<&str> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    let mut commands: Vec<&str> = COMMANDS.iter().map(|(operation, _)| *operation).collect();
    operations.sort_unstable();
    commands.sort_unstable();
    assert_eq!(commands, operations);
    for (operation, line) in COMMANDS {
        let (status, _, err) = rackctl(&stage, line);
        assert_eq!((status, err.as_str()), (0, ""), "{operation}: {line}");
    }
}
