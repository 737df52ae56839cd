//! Every route, over the real socket.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]

mod support;

use std::sync::Arc;

use hyper::Method;
use rackvisor_api::config::{DiskConfig, DiskPatch, Link, NicPatch, Patch, VmConfig, VmPatch};
use rackvisor_api::control::{Control, Reply, Request};
use rackvisor_api::events::{EventKind, EventLog};
use rackvisor_api::problem::{Code, Problem};
use rackvisor_api::server::Limits;
use rackvisor_api::state::{Action, RequestKind, VmState, decide};
use rackvisor_api::testing::{full_config, small_config};
use support::{problem, serve, stage};

#[test]
fn a_vm_lives_its_life_through_the_client() {
    let stage = stage();
    let client = &stage.client;
    assert_eq!(client.state().unwrap(), VmState::Undefined);
    assert_eq!(client.describe().unwrap_err().code(), Some(Code::VmUndefined));

    let config = VmConfig::from_json(full_config().to_string().as_bytes()).unwrap();
    let vm = client.define(&config).unwrap();
    assert_eq!((vm.state, &vm.config), (VmState::Defined, &config));
    for (action, state) in [
        (Action::Boot, VmState::Running),
        (Action::Pause, VmState::Paused),
        (Action::Resume, VmState::Running),
        (Action::Reset, VmState::Running),
        (Action::PowerButton, VmState::Running),
        (Action::SleepButton, VmState::Running),
        (Action::Nmi, VmState::Running),
        (Action::Shutdown, VmState::Stopped),
    ] {
        assert_eq!(client.act(action).unwrap().state, state, "{action}");
    }
    assert_eq!(client.version().unwrap().version, rackvisor_api::VERSION);
    assert_eq!(client.metrics().unwrap(), "# EOF\n");
    client.forget().unwrap();
    assert_eq!(client.state().unwrap(), VmState::Undefined);
}

#[test]
fn the_generation_id_changes_at_any_time_and_comes_and_goes_while_there_is_no_guest() {
    let stage = stage();
    let client = &stage.client;
    let set = |id: &str| VmPatch { generation_id: Patch::Set(id.parse().unwrap()), ..VmPatch::default() };
    let (first, second) = ("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb88");
    assert_eq!(client.patch(&set(first)).unwrap_err().code(), Some(Code::VmUndefined));
    client.define(&small_config()).unwrap();
    client.act(Action::Boot).unwrap();
    let refused = client.patch(&set(first)).unwrap_err();
    assert_eq!(refused.code(), Some(Code::HotplugUnsupported), "{refused}");
    client.act(Action::Shutdown).unwrap();
    assert_eq!(client.patch(&set(first)).unwrap().config.generation_id, first.parse().ok());
    client.act(Action::Boot).unwrap();
    assert_eq!(client.patch(&VmPatch::default()).unwrap().config.generation_id, first.parse().ok());
    assert_eq!(client.patch(&set(second)).unwrap().config.generation_id, second.parse().ok());
    let clear = VmPatch { generation_id: Patch::Clear, ..VmPatch::default() };
    assert_eq!(client.patch(&clear).unwrap_err().code(), Some(Code::HotplugUnsupported));
    client.act(Action::Shutdown).unwrap();
    assert_eq!(client.patch(&clear).unwrap().config.generation_id, None);
    let answer = client.exchange(Method::PATCH, "/v1/vm", Some(br#"{"generation_id":"7"}"#.to_vec())).unwrap();
    assert_eq!(problem(&answer).pointer.as_deref(), Some("/generation_id"));
}

#[test]
fn devices_are_listed_added_changed_and_removed() {
    let stage = stage();
    let client = &stage.client;
    client.define(&small_config()).unwrap();

    let added = client.put_disk(&DiskConfig::new("data", "/dev/sdb")).unwrap();
    assert_eq!((added.pci.as_str(), added.config.queues), ("0000:00:02.0", 1));
    let patch = DiskPatch { queues: Patch::Set(4), serial: Patch::Set("S9".into()), ..DiskPatch::default() };
    let changed = client.patch_disk("data", &patch).unwrap().config;
    assert_eq!((changed.queues, changed.serial.as_deref()), (4, Some("S9")));
    let answer = client.request(Method::PATCH, "/v1/vm/disks/data", Some(br#"{"queues":null,"serial":null}"#.to_vec()));
    assert_eq!(answer.unwrap().status, 200);
    assert_eq!(client.disk("data").unwrap().config, DiskConfig::new("data", "/dev/sdb"));
    assert_eq!(client.disks().unwrap().len(), 2);

    client.act(Action::Boot).unwrap();
    assert_eq!(
        client.put_disk(&DiskConfig::new("more", "/dev/sdc")).unwrap_err().code(),
        Some(Code::HotplugUnsupported)
    );
    assert_eq!(client.delete_disk("data").unwrap_err().code(), Some(Code::HotplugUnsupported));
    assert_eq!(client.patch_nic("net0", &NicPatch::link(Link::Down)).unwrap().link, Link::Down);
    client.patch_disk("data", &DiskPatch::default()).unwrap();
    client.act(Action::Shutdown).unwrap();

    client.delete_disk("data").unwrap();
    client.delete_nic("net0").unwrap();
    assert_eq!(client.disk("data").unwrap_err().code(), Some(Code::NoSuchDisk));
    assert_eq!(client.nic("net0").unwrap_err().code(), Some(Code::NoSuchNic));
    assert!(client.nics().unwrap().is_empty());
}

#[test]
fn created_things_answer_201_replaced_ones_200_and_removed_ones_204() {
    let stage = stage();
    let vm = serde_json::to_vec(&small_config()).unwrap();
    let disk = br#"{"id":"data","path":"/dev/sdb"}"#.to_vec();
    for (method, path, body, status) in [
        (Method::PUT, "/v1/vm", Some(&vm), 201),
        (Method::PUT, "/v1/vm", Some(&vm), 200),
        (Method::PUT, "/v1/vm/disks/data", Some(&disk), 201),
        (Method::PUT, "/v1/vm/disks/data", Some(&disk), 200),
        (Method::DELETE, "/v1/vm/disks/data", None, 204),
        (Method::DELETE, "/v1/vm", None, 204),
    ] {
        let answer = stage.client.exchange(method.clone(), path, body.cloned()).unwrap();
        assert_eq!(answer.status, status, "{method} {path}");
        assert_eq!(answer.body.is_empty(), status == 204);
    }
}

#[test]
fn every_action_in_every_state_answers_what_the_state_table_says() {
    let stage = stage();
    let config = small_config();
    for state in VmState::ALL {
        for action in Action::ALL {
            let there = (state != VmState::Undefined).then(|| config.clone());
            stage.machine.force(state, there.clone());
            let answer = stage.client.exchange(Method::POST, &format!("/v1/vm/{action}"), None).unwrap();
            match decide(state, RequestKind::Act(action)) {
                Ok(transition) => {
                    assert_eq!(answer.status, 200, "{action} in {state}");
                    assert_eq!(stage.machine.snapshot().0, transition.to, "{action} in {state}");
                }
                Err(illegal) => {
                    assert_eq!(problem(&answer), Problem::from(illegal), "{action} in {state}");
                    assert_eq!(stage.machine.snapshot(), (state, there), "{action} in {state}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_there_is_404_and_what_is_not_possible_is_405_with_allow() {
    let stage = stage();
    for path in ["/", "/v1", "/v1/", "/v2/vm", "/v1/vm/", "/v1/vm/explode", "/v1/vm/disks/a/b", "/v1/jobs/1", "/v1/VM"]
    {
        let answer = stage.client.exchange(Method::GET, path, None).unwrap();
        assert_eq!(problem(&answer).code, Code::NoSuchPath, "{path}");
    }
    for (method, path, allow) in [
        (Method::POST, "/v1/vm", "DELETE,GET,HEAD,PATCH,PUT"),
        (Method::GET, "/v1/vm/boot", "POST"),
        (Method::PUT, "/v1/events", "GET,HEAD"),
        (Method::POST, "/v1/vm/disks/root", "DELETE,GET,HEAD,PATCH,PUT"),
        (Method::OPTIONS, "/v1/metrics", "GET,HEAD"),
    ] {
        let answer = stage.client.exchange(method.clone(), path, None).unwrap();
        let mut methods: Vec<_> = answer.allow.split(',').map(str::trim).collect();
        methods.sort_unstable();
        assert_eq!(methods.join(","), allow, "{method} {path}");
        assert_eq!(problem(&answer).code, Code::MethodNotAllowed, "{method} {path}");
    }
}

#[test]
fn a_body_that_is_wrong_is_refused_with_the_place_of_the_mistake() {
    let stage = stage();
    let good = full_config().to_string();
    for (from, to, code, pointer) in [
        ("\"count\":4", "\"count\":0", Code::InvalidValue, "/cpus/count"),
        ("\"count\":4", "\"count\":1025", Code::InvalidValue, "/cpus/count"),
        ("\"threads\":2", "\"threads\":1", Code::InvalidValue, "/cpus/topology"),
        ("\"2GiB\"", "\"2GB\"", Code::InvalidContent, "/memory/size"),
        ("\"2GiB\"", "\"129MiB\"", Code::InvalidValue, "/memory/size"),
        ("\"off\"", "\"4M\"", Code::InvalidContent, "/memory/hugepages"),
        ("\"queue_size\":128", "\"queue_size\":100", Code::InvalidValue, "/disks/0/queue_size"),
        ("\"id\":\"data\"", "\"id\":\"root\"", Code::Duplicate, "/disks/1/id"),
        ("\"id\":\"data\"", "\"id\":\"rng\"", Code::Duplicate, "/disks/1/id"),
        ("\"id\":\"data\",", "", Code::InvalidContent, "/disks/1"),
        ("mpathb", "mpatha", Code::Duplicate, "/disks/1/path"),
        ("\"slot\":7", "\"slot\":5", Code::Duplicate, "/nics/0/slot"),
        ("\"slot\":7", "\"slot\":31", Code::InvalidValue, "/nics/0/slot"),
        ("52:54", "53:54", Code::InvalidContent, "/nics/0/mac"),
        ("\"tap\":\"tap0\"", "\"tap\":\"a/b\"", Code::InvalidValue, "/nics/0/tap"),
        ("\"mtu\":9000", "\"mut\":9000", Code::InvalidContent, "/nics/0/mut"),
        ("\"mode\":\"socket\"", "\"mode\":\"pty\"", Code::InvalidValue, "/serial/path"),
        ("\"on_reboot\"", "\"on_reboto\"", Code::InvalidContent, "/on_reboto"),
    ] {
        assert!(good.contains(from), "{from}");
        let bad = good.replace(from, to);
        let answer = stage.client.exchange(Method::PUT, "/v1/vm", Some(bad.into_bytes())).unwrap();
        let problem = problem(&answer);
        assert_eq!((problem.code, problem.pointer.as_deref()), (code, Some(pointer)), "{to}: {problem}");
        assert_eq!(problem.status, 422);
    }
    let answer = stage.client.exchange(Method::PUT, "/v1/vm", Some(b"{ nope".to_vec())).unwrap();
    assert_eq!(problem(&answer).code, Code::MalformedBody);
    let no_boot = br#"{"name":"a","memory":{"size":"1GiB"}}"#.to_vec();
    let answer = stage.client.exchange(Method::PUT, "/v1/vm", Some(no_boot)).unwrap();
    assert_eq!(problem(&answer).code, Code::BootSourceMissing);
    assert_eq!(stage.machine.snapshot(), (VmState::Undefined, None));
}

#[test]
fn a_device_that_does_not_fit_the_vm_is_refused_from_its_own_point_of_view() {
    let stage = stage();
    stage.client.define(&small_config()).unwrap();
    let before = stage.machine.snapshot();
    for (path, body, code, pointer) in [
        ("/v1/vm/disks/data", r#"{"id":"data","path":"disk.img"}"#, Code::Duplicate, "/path"),
        ("/v1/vm/disks/net0", r#"{"id":"net0","path":"x"}"#, Code::Duplicate, ""),
        ("/v1/vm/disks/data", r#"{"id":"root","path":"x"}"#, Code::InvalidValue, "/id"),
        ("/v1/vm/disks/data", r#"{"id":"data","path":"x","queues":33}"#, Code::InvalidValue, "/queues"),
        ("/v1/vm/nics/net1", r#"{"id":"net1","tap":"tap1","mac":"52:54:00:00:00:01"}"#, Code::Duplicate, "/mac"),
        ("/v1/vm/nics/net1", r#"{"id":"net1","tap":"tap0","mac":"52:54:00:00:00:02"}"#, Code::Duplicate, "/tap"),
    ] {
        let answer = stage.client.exchange(Method::PUT, path, Some(body.into())).unwrap();
        let problem = problem(&answer);
        assert_eq!((problem.code, problem.pointer.as_deref()), (code, Some(pointer)), "{body}: {problem}");
    }
    let answer = stage.client.exchange(Method::PATCH, "/v1/vm/disks/root", Some(br#"{"path":null}"#.to_vec())).unwrap();
    assert_eq!(problem(&answer).pointer.as_deref(), Some("/path"));
    assert_eq!(stage.machine.snapshot(), before);
}

#[test]
fn a_body_where_none_belongs_and_a_body_without_a_label_are_refused() {
    let stage = stage();
    stage.client.define(&small_config()).unwrap();
    let answer = stage.client.exchange(Method::POST, "/v1/vm/boot", Some(br#"{"force":true}"#.to_vec())).unwrap();
    assert_eq!(problem(&answer).code, Code::UnexpectedBody);
    assert_eq!(stage.machine.snapshot().0, VmState::Defined);
    let request = "PUT /v1/vm HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}";
    assert_eq!(support::raw_problem(&stage.say(request.as_bytes())).code, Code::UnsupportedMediaType);
}

/// A controller that forgets, or never answers.
struct Silent {
    keep: bool,
    kept: std::sync::Mutex<Vec<Reply>>,
}

impl Control for Silent {
    fn submit(&self, _: Request, reply: Reply) {
        if self.keep {
            self.kept.lock().unwrap().push(reply);
        }
    }
    fn inspect(&self, _path: &str) -> Option<serde_json::Value> {
        None
    }

    fn metrics(&self) -> String {
        String::new()
    }
    fn events(&self) -> Arc<EventLog> {
        EventLog::new()
    }
}

#[test]
fn a_controller_that_does_not_answer_is_told_to_the_client() {
    for (keep, code) in [(false, Code::NoAnswer), (true, Code::ControlTimeout)] {
        let limits = Limits { control: std::time::Duration::from_millis(50), ..Limits::default() };
        let control = Arc::new(Silent { keep, kept: std::sync::Mutex::default() });
        let (_folder, socket, server) = serve(control, limits);
        let client = rackvisor_api::client::Client::new(socket);
        assert_eq!(client.describe().unwrap_err().code(), Some(code));
        server.stop();
    }
}

#[test]
fn events_are_replayed_after_an_id_and_followed_until_the_server_ends() {
    let stage = stage();
    stage.client.define(&small_config()).unwrap();
    stage.client.act(Action::Boot).unwrap();
    stage.client.act(Action::Pause).unwrap();

    let all: Vec<_> = stage.client.events(None, false).unwrap().map(|event| event.unwrap()).collect();
    assert_eq!(all.iter().map(|event| event.id).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(all[2].vm, "vm1");
    let cause = Some("pause".to_owned());
    assert_eq!(all[2].what, EventKind::StateChanged { from: VmState::Running, to: VmState::Paused, cause });

    let mut replay = stage.client.events(Some(1), true).unwrap();
    assert_eq!(replay.next().unwrap().unwrap(), all[1]);
    assert_eq!(replay.next().unwrap().unwrap(), all[2]);
    let mut live = stage.client.events(None, true).unwrap();
    let machine = stage.machine.clone();
    machine.force(VmState::Stopped, None);
    assert_eq!(live.next().unwrap().unwrap().id, 4);
    assert_eq!(replay.next().unwrap().unwrap().id, 4);

    stage.server.stop();
    assert!(live.next().is_none());
    assert!(replay.next().is_none());
}

#[test]
fn waiting_for_a_state_ends_when_it_comes() {
    let stage = stage();
    stage.client.define(&small_config()).unwrap();
    assert_eq!(stage.client.wait_for(&[VmState::Defined], None).unwrap(), VmState::Defined);
    let waiter = std::thread::spawn({
        let client = stage.client.clone();
        move || client.wait_for(&[VmState::Stopped, VmState::Crashed], None)
    });
    stage.client.act(Action::Boot).unwrap();
    stage.machine.guest(rackvisor_api::state::GuestEvent::Crash);
    assert_eq!(waiter.join().unwrap().unwrap(), VmState::Crashed);
    let brief = Some(std::time::Duration::from_millis(20));
    let error = stage.client.wait_for(&[VmState::Running], brief).unwrap_err();
    assert!(matches!(error, rackvisor_api::client::ClientError::Timeout(_)), "{error}");
}

#[test]
fn clients_in_parallel_are_all_served() {
    let stage = stage();
    stage.client.define(&small_config()).unwrap();
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let client = stage.client.clone();
            std::thread::spawn(move || {
                for _ in 0..50 {
                    assert_eq!(client.describe().unwrap().config.name, "vm1");
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
}

#[test]
fn the_server_leaves_no_socket_behind_and_refuses_to_start_when_preparation_fails() {
    let stage = stage();
    assert!(stage.socket.exists());
    stage.server.stop();
    assert!(!stage.socket.exists());

    let server = rackvisor_api::server::Server::bind(&stage.socket).unwrap();
    let error = server.start(stage.machine.clone(), || Err(std::io::Error::other("no filter"))).unwrap_err();
    assert_eq!(error.to_string(), "no filter");
    assert!(!stage.socket.exists());
}

#[test]
fn the_tree_of_states_is_served_whole_and_in_parts() {
    let stage = stage();
    assert_eq!(stage.client.inspect("").unwrap()["control"]["state"], "undefined");
    assert_eq!(stage.client.inspect("/control/state/").unwrap(), "undefined");
    for path in ["nothing", "control/state/x", "a b", "%"] {
        assert_eq!(stage.client.inspect(path).unwrap_err().code(), Some(Code::NoSuchPart), "{path}");
    }
}

#[test]
fn a_client_that_comes_back_goes_on_after_the_last_event_that_it_has() {
    let stage = stage();
    stage.client.define(&small_config()).unwrap();
    for action in [Action::Boot, Action::Pause, Action::Resume] {
        stage.client.act(action).unwrap();
    }
    let ids = |headers: &str, query: &str| -> Vec<u64> {
        let request =
            format!("GET /v1/events?follow=false{query} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        let answer = stage.say(request.as_bytes());
        answer.lines().filter_map(|line| line.strip_prefix("id: ")).map(|id| id.parse().unwrap()).collect()
    };
    assert_eq!(ids("", ""), [1, 2, 3, 4]);
    assert_eq!(ids("last-event-id: 2\r\n", ""), [3, 4]);
    assert_eq!(ids("last-event-id: 3\r\n", "&after=1"), [4], "the header wins");
    assert_eq!(ids("last-event-id: 4\r\n", ""), [0; 0]);
    assert!(
        stage
            .say(b"GET /v1/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\nlast-event-id: x\r\n\r\n")
            .starts_with("HTTP/1.1 400 ")
    );
}
