//! The API of the real binary, with real guests behind it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use hyper::Method;
use rackvisor_api::VmConfig;
use rackvisor_api::client::Answer;
use rackvisor_api::config::DiskConfig;
use rackvisor_api::control::VmInfo;
use rackvisor_api::problem::{Code, MEDIA_TYPE, Problem};
use rackvisor_api::state::{Action, RequestKind, VmState, decide};
use rackvisor_tests::{Rackvisor, Tiny, assert_nothing_more, needs_kvm, spoil_everything};
use serde_json::{Value, json};

/// A small guest with one disk.
fn tiny(vmm: &Rackvisor, program: &Tiny) -> VmConfig {
    let mut config = program.config(vmm.path("").as_path());
    config.disks.push(vmm.image("data", &[0; 4096]));
    config
}

/// Brings the VM from wherever it is to `state`.
fn enter(vmm: &Rackvisor, state: VmState) {
    if matches!(vmm.state(), VmState::Running | VmState::Paused) {
        // A guest that crashes by itself may be faster.
        let _ = vmm.client.act(Action::Shutdown);
        vmm.client.wait_for(&[VmState::Stopped, VmState::Crashed], None).unwrap();
    }
    if vmm.state() != VmState::Undefined {
        vmm.client.forget().unwrap();
    }
    let idle = tiny(vmm, &Tiny::idle());
    match state {
        VmState::Undefined => {}
        VmState::Defined => drop(vmm.client.define(&idle).unwrap()),
        VmState::Running => drop(vmm.boot(&idle)),
        VmState::Paused => {
            vmm.boot(&idle);
            vmm.client.act(Action::Pause).unwrap();
        }
        VmState::Stopped => {
            vmm.boot(&idle);
            vmm.client.act(Action::Shutdown).unwrap();
        }
        VmState::Crashed => {
            vmm.boot(&tiny(vmm, &Tiny::triple_fault()));
            vmm.wait_for(VmState::Crashed);
        }
    }
    assert_eq!(vmm.state(), state);
}

/// The requests of a kind, in an order in which all are possible.
fn requests(vmm: &Rackvisor, kind: RequestKind) -> Vec<(Method, String, Option<Value>)> {
    let disk = |name: &str| serde_json::to_value(DiskConfig::new(name, vmm.path("another"))).unwrap();
    match kind {
        RequestKind::Define => {
            let config = tiny(vmm, &Tiny::idle());
            vec![(Method::PUT, "/v1/vm".into(), Some(serde_json::to_value(config).unwrap()))]
        }
        RequestKind::Forget => vec![(Method::DELETE, "/v1/vm".into(), None)],
        RequestKind::Query => ["/v1/vm", "/v1/vm/disks", "/v1/vm/disks/data", "/v1/vm/nics"]
            .map(|path| (Method::GET, path.into(), None))
            .to_vec(),
        RequestKind::EditDevices => vec![
            (Method::PUT, "/v1/vm/disks/more".into(), Some(disk("more"))),
            (Method::DELETE, "/v1/vm/disks/more".into(), None),
        ],
        RequestKind::PatchDevice => vec![(Method::PATCH, "/v1/vm/disks/data".into(), Some(json!({})))],
        RequestKind::Act(action) => vec![(Method::POST, format!("/v1/vm/{action}"), None)],
    }
}

fn send(vmm: &Rackvisor, (method, path, body): (Method, String, Option<Value>)) -> Answer {
    vmm.client.exchange(method, &path, body.map(|body| body.to_string().into_bytes())).unwrap()
}

#[test]
fn every_request_in_every_state_answers_what_the_state_table_says() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    for state in VmState::ALL {
        for kind in RequestKind::ALL {
            enter(&vmm, state);
            for request in requests(&vmm, kind) {
                let told = format!("{} {} in {state}", request.0, request.1);
                let answer = send(&vmm, request);
                match decide(state, kind) {
                    Ok(transition) => {
                        assert!((200..300).contains(&answer.status), "{told}: {}", answer.status);
                        // The answer and not a look: a guest that crashes may have done so again since.
                        match answer.json::<VmInfo>() {
                            Ok(vm) => assert_eq!(vm.state, transition.to, "{told}"),
                            Err(_) => assert_eq!(vmm.state(), transition.to, "{told}"),
                        }
                    }
                    Err(illegal) => {
                        let wanted = Problem::from(illegal);
                        let problem: Problem = answer.json().unwrap();
                        assert_eq!((answer.status, problem.code), (wanted.status, wanted.code), "{told}");
                        assert_eq!(answer.content_type, MEDIA_TYPE, "{told}");
                        assert_eq!(vmm.state(), state, "{told}");
                    }
                }
            }
        }
    }
}

#[test]
fn bad_bodies_get_4xx_and_change_nothing_while_a_guest_runs() {
    needs_kvm!();
    // The kernel is asked of each connection whose it is.
    let vmm = Rackvisor::start_with(&["--api-allow-uid", &rustix::process::geteuid().as_raw().to_string()]);
    vmm.boot(&tiny(&vmm, &Tiny::idle()));
    spoil_everything(&vmm, 40);
}

#[test]
fn a_vm_that_cannot_boot_says_why_and_stays_as_it_was() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let good = tiny(&vmm, &Tiny::idle());
    std::fs::write(vmm.path("text"), "a kernel this is not").unwrap();
    type Spoil = fn(&mut VmConfig, &Path);
    let spoiled: [(&str, Spoil, Code); 5] = [
        ("no kernel", |c, at| c.boot.as_mut().unwrap().kernel = Some(at.join("absent")), Code::BadImage),
        ("not a kernel", |c, at| c.boot.as_mut().unwrap().kernel = Some(at.join("text")), Code::BadImage),
        ("no initrd", |c, at| c.boot.as_mut().unwrap().initrd = Some(at.join("absent")), Code::BadImage),
        ("no disk", |c, at| c.disks[0].path = at.join("absent"), Code::Unusable),
        ("a folder as a disk", |c, at| c.disks[0].path = at.to_owned(), Code::Unusable),
    ];
    let census = vmm.census();
    for (what, spoil, code) in spoiled {
        let mut config = good.clone();
        spoil(&mut config, &vmm.path(""));
        vmm.client.define(&config).unwrap();
        let error = vmm.client.act(Action::Boot).unwrap_err();
        assert_eq!(error.code(), Some(code), "{what}: {error}");
        assert_eq!(vmm.state(), VmState::Defined, "{what}");
    }
    assert_nothing_more(vmm.pid(), &census);
    vmm.boot(&good);
    assert_eq!(vmm.state(), VmState::Running);
}

#[test]
fn clients_in_parallel_get_true_answers_and_those_that_vanish_harm_nobody() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    vmm.boot(&tiny(&vmm, &Tiny::idle()));
    let mut half_open = Vec::new();
    for part in ["", "PO", "POST /v1/vm/pause HTTP/1.1\r\n", "PUT /v1/vm HTTP/1.1\r\ncontent-length: 100\r\n\r\n{"] {
        let mut stream = UnixStream::connect(vmm.client.socket()).unwrap();
        stream.write_all(part.as_bytes()).unwrap();
        half_open.push(stream);
    }
    // These ask and do not stay for the answer.
    for action in [Action::Pause, Action::Resume].into_iter().cycle().take(40) {
        let mut stream = UnixStream::connect(vmm.client.socket()).unwrap();
        let request = format!("POST /v1/vm/{action} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
    }
    drop(vmm.client.events(Some(0), true).unwrap());
    thread::scope(|scope| {
        for action in [Action::Pause, Action::Resume, Action::Reset, Action::PowerButton] {
            let client = &vmm.client;
            scope.spawn(move || {
                for _ in 0..25 {
                    match client.act(action) {
                        Ok(vm) => assert!(matches!(vm.state, VmState::Running | VmState::Paused), "{}", vm.state),
                        Err(error) => assert_eq!(error.code(), Some(Code::WrongState), "{error}"),
                    }
                    assert_eq!(client.disks().unwrap().len(), 1);
                }
            });
        }
    });
    drop(half_open);
    if vmm.state() == VmState::Paused {
        vmm.client.act(Action::Resume).unwrap();
    }
    let vm = vmm.client.describe().unwrap();
    assert_eq!(vm.state, VmState::Running);
    assert!(vm.resets <= 25, "{}", vm.resets);
    vmm.client.act(Action::Shutdown).unwrap();
}
