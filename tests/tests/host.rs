//! The real programs without a guest: these tests need no KVM, and run outside of the laboratory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs;
use std::process::Command;

use rackvisor_api::VmConfig;
use rackvisor_api::config::{NicConfig, TapFds};
use rackvisor_api::problem::Code;
use rackvisor_api::state::VmState;
use rackvisor_tests::{
    Rackvisor, Tap, Tiny, assert_nothing_more, good, output, rackvisor_binary, skip, spoil_everything, taps_are_missing,
};

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

/// A NIC beside the one of the first tap.
fn second(nic: NicConfig) -> NicConfig {
    NicConfig { id: "net1".into(), mac: "52:54:00:12:34:57".parse().unwrap(), ..nic }
}

#[test]
fn taps_that_the_vmm_was_started_with_or_was_passed_need_no_privilege() {
    if let Some(why) = taps_are_missing() {
        return skip(&why);
    }
    let (inherited, passed, late) = (Tap::new(), Tap::new(), Tap::new());
    let folder = tempfile::tempdir().unwrap();
    let mut config = Tiny::idle().config(folder.path());
    config.nics = vec![inherited.nic_with(TapFds::Inherited(vec![3]))];
    let file = folder.path().join("vm.json");
    fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
    let vmm = Rackvisor::start_unprivileged(inherited.queue(), &["--config", file.to_str().unwrap()]);
    assert_eq!(vmm.client.nic("net0").unwrap().tap, Some(inherited.name.clone()));
    let census = vmm.census();

    let by_fd = second(passed.nic_with(TapFds::Passed(1)));
    for tap in [&passed, &late] {
        let put = vmm.client.put_nic_with_fds(&by_fd, vec![tap.queue()]).unwrap();
        assert_eq!(put.tap, Some(tap.name.clone()));
    }
    assert_eq!(vmm.client.put_nic_with_fds(&by_fd, Vec::new()).unwrap_err().code(), Some(Code::BadDescriptors));
    // Its first tap is free again, and the one that it inherited may be named in another definition.
    drop(passed.queue());
    vmm.client.define(&config).unwrap();
    drop(late.queue());
    config.name = "other".into();
    vmm.client.define(&config).unwrap();
    // No descriptor of its own is taken for one that it inherited.
    for number in 4..40 {
        let nic = second(late.nic_with(TapFds::Inherited(vec![number])));
        let refused = vmm.client.put_nic(&nic).unwrap_err();
        assert_eq!(refused.code(), Some(Code::Unusable), "{refused}");
        assert!(refused.to_string().contains(&format!("descriptor {number} ")), "{refused}");
    }
    assert_eq!(vmm.client.describe().unwrap().config, config);
    assert_nothing_more(vmm.pid(), &census);
    vmm.client.forget().unwrap();
    vmm.client.define(&config).unwrap();
}

#[test]
fn a_configuration_file_that_names_descriptors_which_are_not_there_ends_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let mut config: VmConfig = Tiny::idle().config(folder.path());
    let mac = "52:54:00:12:34:56".parse().unwrap();
    for (tap_fds, told) in [
        (TapFds::Inherited(vec![3]), "descriptor 3 is no tap that the VMM was started with"),
        (TapFds::Passed(1), "a configuration file can only name inherited ones"),
    ] {
        config.nics = vec![NicConfig { tap: None, tap_fds: Some(tap_fds), ..NicConfig::new("net0", "", mac) }];
        fs::write(folder.path().join("vm.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        for line in ["run vm.json", "--api-socket s --config vm.json", "--api-socket s --config vm.json --boot"] {
            let words = line.split_whitespace();
            let (status, _, err) = output(Command::new(rackvisor_binary()).args(words).current_dir(folder.path()));
            assert!(status == 1 && err.contains(told), "rackvisor {line}: {status}: {err}");
        }
    }
    assert!(!folder.path().join("s").exists(), "a socket is left behind");
}
