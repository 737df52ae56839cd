//! The real programs without a guest: these tests need no KVM, and run outside of the laboratory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs;
use std::process::Command;

use rackvisor_api::state::VmState;
use rackvisor_tests::{Rackvisor, Tiny, assert_nothing_more, good, output, rackvisor_binary, spoil_everything};

#[test]
fn ten_thousand_bad_bodies_get_4xx_and_change_nothing() {
    let vmm = Rackvisor::start();
    let mut config = Tiny::idle().config(&vmm.path(""));
    config.disks.push(vmm.image("data", &[0; 4096]));
    vmm.client.define(&config).unwrap();
    let census = vmm.census();
    spoil_everything(&vmm, 2500);
    assert_nothing_more(vmm.pid(), &census);
}

#[test]
fn wrong_usage_and_wrong_files_are_told_apart_and_explained() {
    let folder = tempfile::tempdir().unwrap();
    let run =
        |line: &str| output(Command::new(rackvisor_binary()).args(line.split_whitespace()).current_dir(folder.path()));
    fs::write(folder.path().join("bad.json"), r#"{"name":"a","memory":{"size":"1KiB"}}"#).unwrap();
    for (line, status, told) in [
        ("", 2, "--api-socket"),
        ("--api-socket s --boot", 2, "--config"),
        ("explode", 2, "explode"),
        ("--api-socket s --config absent.json", 1, "absent.json"),
        ("--api-socket s --config bad.json", 1, "/memory/size"),
        ("--api-socket no/such/folder/s", 1, "no/such/folder"),
        ("run absent.json", 1, "absent.json"),
    ] {
        let (code, _, err) = run(line);
        assert!(code == status && err.contains(told), "rackvisor {line}: {code}: {err}");
    }
    assert!(!folder.path().join("s").exists(), "a socket is left behind");
    let (_, help, _) = run("--help");
    for text in ["--api-socket", "doctor", "Exit codes:"] {
        assert!(help.contains(text), "{help}");
    }
}

#[test]
fn a_second_process_does_not_take_the_socket_of_the_first() {
    let vmm = Rackvisor::start();
    let socket = vmm.client.socket().to_str().unwrap().to_owned();
    let (status, _, err) = output(Command::new(rackvisor_binary()).args(["--api-socket", &socket]));
    assert!(status == 1 && err.contains(&socket), "{err}");
    assert_eq!(vmm.state(), VmState::Undefined);
}

#[test]
fn completion_scripts_know_the_commands() {
    let vmm = Rackvisor::start();
    for shell in ["bash", "zsh", "fish"] {
        assert!(good(&vmm, &format!("completion {shell}")).contains("power-button"), "{shell}");
    }
    let script = good(&vmm, "completion bash");
    let (status, _, err) = output(Command::new("bash").args(["-n", "-c", &script]));
    assert_eq!(status, 0, "{err}");
}
