//! Descriptors that come with requests: those that are taken, and all the others, which are closed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]

mod support;

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::Method;
use rackvisor_api::VmConfig;
use rackvisor_api::client::Client;
use rackvisor_api::config::{NicConfig, TapFds};
use rackvisor_api::control::{Control, Reply, Request, Response};
use rackvisor_api::descriptors::{Descriptors, MAX_DESCRIPTORS};
use rackvisor_api::events::EventLog;
use rackvisor_api::problem::Code;
use rackvisor_api::server::Limits;
use rackvisor_api::state::VmState;
use rackvisor_api::testing::small_config;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use support::{Stage, problem, raw_problem, read_all, serve, stage, stage_with};

const SHORT: Duration = Duration::from_millis(100);
const VERSION: &[u8] = b"GET /v1/version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

/// One test at a time, because they count the descriptors of the process; `None`, said aloud, where there is no /dev/net/tun.
fn alone() -> Option<MutexGuard<'static, ()>> {
    static ALONE: Mutex<()> = Mutex::new(());
    if let Err(error) = File::open("/dev/net/tun") {
        eprintln!("SKIPPED: this test needs /dev/net/tun: {error}");
        return None;
    }
    Some(ALONE.lock().unwrap_or_else(PoisonError::into_inner))
}

fn tun() -> OwnedFd {
    OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap().into()
}

fn tuns(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| tun()).collect()
}

/// How many descriptors of this process, which has the server in it, lead to /dev/net/tun.
fn held() -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| std::fs::read_link(entry.unwrap().path()));
    links.filter(|link| link.as_ref().is_ok_and(|link| link.ends_with("net/tun"))).count()
}

/// Waits until so many are held.
fn wait_until_held(wanted: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while held() != wanted {
        assert!(Instant::now() < deadline, "{} descriptors are held, not {wanted}", held());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends bytes with descriptors.
fn pass(stream: &UnixStream, bytes: &[u8], fds: &[impl AsFd]) -> rustix::io::Result<usize> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let rights = SendAncillaryMessage::ScmRights(&fds);
    let mut room = vec![MaybeUninit::uninit(); rights.size()];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    assert!(ancillary.push(rights));
    rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

fn nic(id: &str, last: u8, tap_fds: TapFds) -> NicConfig {
    let queues = u16::try_from(tap_fds.passed() + tap_fds.inherited().len()).unwrap();
    let mac = format!("52:54:00:00:01:{last:02x}").parse().unwrap();
    NicConfig { tap: None, tap_fds: Some(tap_fds), queues, ..NicConfig::new(id, "", mac) }
}

/// A VM with NICs that want 1 and 2 descriptors.
fn wanting_three() -> VmConfig {
    let mut config = small_config();
    config.nics.push(nic("net1", 1, TapFds::Passed(1)));
    config.nics.push(nic("net2", 2, TapFds::Passed(2)));
    config
}

/// A controller that keeps what came.
#[derive(Default)]
struct Keeper(Mutex<Vec<(VmConfig, Descriptors)>>);

impl Control for Keeper {
    fn submit(&self, request: Request, reply: Reply) {
        if let Request::Define(config, passed) = request {
            self.0.lock().unwrap().push((*config, passed));
            reply.send(Ok(Response::Deleted));
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
fn passed_descriptors_come_to_the_controller_in_their_order_and_belong_to_it_then() {
    let Some(_alone) = alone() else { return };
    let keeper = Arc::new(Keeper::default());
    let (_folder, socket, server) = serve(keeper.clone(), Limits::default());
    let open = |read, write| OwnedFd::from(OpenOptions::new().read(read).write(write).open("/dev/net/tun").unwrap());
    let fds = vec![open(true, true), open(true, false), open(false, true)];
    let config = serde_json::to_vec(&wanting_three()).unwrap();
    let answer = Client::new(socket).exchange_with_fds(Method::PUT, "/v1/vm", Some(config), fds).unwrap();
    assert_eq!(answer.status, 204);
    // The connection and the server are gone, and the client's own are closed.
    server.stop();
    assert_eq!(held(), 3);
    let (config, passed) = keeper.0.lock().unwrap().pop().unwrap();
    let modes: Vec<Vec<_>> = passed
        .share_out(&config.nics)
        .unwrap()
        .iter()
        .map(|share| share.iter().map(|fd| fcntl_getfl(fd).unwrap() & OFlags::ACCMODE).collect())
        .collect();
    assert_eq!(modes, [vec![], vec![OFlags::RDWR], vec![OFlags::RDONLY, OFlags::WRONLY]]);
    assert_eq!(held(), 0);
}

#[test]
fn descriptors_that_a_request_does_not_want_refuse_it_and_are_closed() {
    let Some(_alone) = alone() else { return };
    let stage = stage();
    stage.client.define(&small_config()).unwrap();
    let before = stage.machine.snapshot();
    let text = |value: &NicConfig| serde_json::to_string(value).unwrap();
    let (three, named) = (serde_json::to_string(&wanting_three()).unwrap(), text(&small_config().nics[0]));
    let disk = r#"{"id":"data","path":"/dev/sdb"}"#;
    let (put, patch) = (Method::PUT, Method::PATCH);
    for (method, path, body, count, code) in [
        (&put, "/v1/vm", three.as_str(), 0, Code::BadDescriptors),
        (&put, "/v1/vm", &three, 2, Code::BadDescriptors),
        (&put, "/v1/vm", &three, 4, Code::BadDescriptors),
        (&put, "/v1/vm", &three, MAX_DESCRIPTORS + 1, Code::BadDescriptors),
        (&put, "/v1/vm", "{ nope", 3, Code::MalformedBody),
        (&put, "/v1/vm/nics/net0", &named, 1, Code::BadDescriptors),
        (&put, "/v1/vm/disks/data", disk, 1, Code::BadDescriptors),
        (&put, "/v1/nowhere", disk, 1, Code::NoSuchPath),
        (&put, "/v1/vm/boot", disk, 1, Code::MethodNotAllowed),
        (&patch, "/v1/vm/nics/net0", r#"{"mtu":1400}"#, 1, Code::BadDescriptors),
        (&patch, "/v1/vm/nics/net0", r#"{"tap":null,"tap_fds":{"passed":1}}"#, 1, Code::BadDescriptors),
        (&Method::POST, "/v1/vm/boot", "", 1, Code::BadDescriptors),
        (&Method::DELETE, "/v1/vm", "", 1, Code::BadDescriptors),
        (&Method::GET, "/v1/vm", "", 1, Code::BadDescriptors),
        (&Method::GET, "/v1/metrics", "", MAX_DESCRIPTORS, Code::BadDescriptors),
    ] {
        let body = (!body.is_empty()).then(|| body.as_bytes().to_vec());
        let answer = stage.client.exchange_with_fds(method.clone(), path, body, tuns(count)).unwrap();
        let problem = problem(&answer);
        assert_eq!(problem.code, code, "{method} {path} with {count}: {problem}");
        wait_until_held(0);
        assert_eq!(stage.machine.snapshot(), before, "{method} {path} with {count}");
    }
    let with_null = vec![tun(), tun(), OwnedFd::from(File::open("/dev/null").unwrap())];
    let body = Some(three.into_bytes());
    let answer = stage.client.exchange_with_fds(put, "/v1/vm", body, with_null).unwrap();
    assert!(problem(&answer).detail.starts_with("number 2 "), "{:?}", problem(&answer));
    assert_eq!(stage.machine.snapshot(), before);
    stage.client.define_with_fds(&wanting_three(), tuns(3)).unwrap();
    stage.client.put_nic_with_fds(&nic("net3", 3, TapFds::Passed(2)), tuns(2)).unwrap();
    wait_until_held(0);
}

#[test]
fn descriptors_may_come_with_any_part_of_the_request_and_go_with_it() {
    let Some(_alone) = alone() else { return };
    let stage = stage();
    let body = serde_json::to_string(&wanting_three()).unwrap();
    let head = |path: &str| {
        let length = body.len();
        format!("PUT {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n")
    };
    let mut stream = stage.connect();
    // Of the first request nothing is left for the second, which has its own in two parts.
    pass(&stream, (head("/v1/nowhere") + &body).as_bytes(), &tuns(3)).unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).unwrap();
    assert_eq!(first, *b"HTTP/1.1 404");
    assert_eq!(held(), 0);
    pass(&stream, &head("/v1/vm").as_bytes()[..10], &tuns(1)).unwrap();
    stream.write_all(&head("/v1/vm").as_bytes()[10..]).unwrap();
    stream.write_all(&body.as_bytes()[..10]).unwrap();
    pass(&stream, &body.as_bytes()[10..], &tuns(2)).unwrap();
    stream.write_all(VERSION).unwrap();
    let answers = read_all(&mut stream);
    assert_eq!(answers.matches("HTTP/1.1 201 ").count(), 1, "{answers}");
    assert_eq!(answers.matches("HTTP/1.1 200 ").count(), 1, "{answers}");
    wait_until_held(0);
}

#[test]
fn a_flood_of_descriptors_does_not_fill_the_table_of_the_process() {
    let Some(_alone) = alone() else { return };
    let stage = stage();
    // 253 is the most that the kernel takes at once (SCM_MAX_FD).
    for kind in ["/dev/null", "/dev/net/tun"] {
        let mine: Vec<_> = (0..253).map(|_| File::open(kind).unwrap()).collect();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let mut stream = stage.connect();
        stream.write_all(b"GET /v1/vm HTTP/1.1\r\nhost: x\r\nx: ").unwrap();
        let before = open();
        for round in 0..1000 {
            pass(&stream, b"x", if round % 2 == 0 { &mine } else { &mine[..MAX_DESCRIPTORS] }).unwrap();
            if round % 100 == 0 {
                assert_eq!(stage.client.state().unwrap(), VmState::Undefined);
            }
            let more = open().saturating_sub(before);
            // Those of one read, and those of the clients' connections.
            assert!(more < 2 * MAX_DESCRIPTORS + 50, "{more} more are open in round {round}");
        }
        stream.write_all(b"\r\nconnection: close\r\n\r\n").unwrap();
        assert_eq!(raw_problem(&read_all(&mut stream)).code, Code::BadDescriptors);
        drop(mine);
    }
    wait_until_held(0);
}

#[test]
fn requests_that_do_not_end_give_their_descriptors_back_in_time() {
    let Some(_alone) = alone() else { return };
    let stage = stage_with(Limits { head: SHORT, body: SHORT, ..Limits::default() });
    let half_body = b"PUT /v1/vm HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
    for begun in [b"PUT /v1/vm HTT".as_slice(), half_body] {
        let mut stream = stage.connect();
        pass(&stream, begun, &tuns(10)).unwrap();
        assert_eq!(raw_problem(&read_all(&mut stream)).code, Code::RequestTimeout);
        wait_until_held(0);
    }
    let stream = stage.connect();
    pass(&stream, b"PUT /v1/vm HTT", &tuns(10)).unwrap();
    drop(stream);
    wait_until_held(0);
}

#[test]
fn all_requests_together_hold_a_bounded_number_of_descriptors() {
    let Some(_alone) = alone() else { return };
    let stage = stage();
    let begin = |stage: &Stage| {
        let stream = stage.connect();
        pass(&stream, b"PUT /v1/vm HTTP/1.1\r\n", &tuns(MAX_DESCRIPTORS)).unwrap();
        stream
    };
    let mut begun: Vec<_> = (0..4).map(|_| begin(&stage)).collect();
    wait_until_held(4 * MAX_DESCRIPTORS);
    let refused = stage.client.define_with_fds(&wanting_three(), tuns(3)).unwrap_err();
    assert_eq!(refused.code(), Some(Code::OutOfResources), "{refused}");
    // Whoever passes none is served.
    assert_eq!(stage.client.state().unwrap(), VmState::Undefined);
    begun.pop();
    wait_until_held(3 * MAX_DESCRIPTORS);
    stage.client.define_with_fds(&wanting_three(), tuns(3)).unwrap();
    drop(begun);
    wait_until_held(0);
}
