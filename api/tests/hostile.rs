//! Clients that are wrong, slow, half-open or many.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::time::Duration;

use hyper::Method;
use rackvisor_api::problem::Code;
use rackvisor_api::server::{Limits, MAX_BODY};
use rackvisor_api::state::VmState;
use rackvisor_api::testing::{Mutations, full_config, small_config};
use serde_json::json;
use support::{problem, raw_problem, read_all, stage, stage_with};

const SHORT: Duration = Duration::from_millis(100);

#[test]
fn ten_thousand_bad_bodies_are_refused_and_change_nothing() {
    let stage = stage();
    let full = rackvisor_api::VmConfig::from_json(full_config().to_string().as_bytes()).unwrap();
    stage.client.define(&full).unwrap();
    let before = stage.machine.snapshot();
    let targets = [
        (Method::PUT, "/v1/vm", full_config()),
        (Method::PUT, "/v1/vm/disks/root", full_config()["disks"][0].clone()),
        (Method::PUT, "/v1/vm/nics/net0", full_config()["nics"][0].clone()),
        (
            Method::PATCH,
            "/v1/vm/disks/root",
            json!({"queues": 3, "serial": "S2", "read_only": true, "cache": "writeback"}),
        ),
        (Method::PATCH, "/v1/vm/nics/net0", json!({"link": "up", "mtu": 1500, "mac": "52:54:00:00:00:09"})),
    ];
    for (seed, (method, path, good)) in targets.into_iter().enumerate() {
        for mutation in Mutations::new(good, seed as u64).take(2000) {
            let body = mutation.body.clone();
            let answer = stage.client.exchange(method.clone(), path, Some(body)).unwrap();
            let told = format!("{method} {path}, {}: {}", mutation.what, String::from_utf8_lossy(&mutation.body));
            assert!((400..500).contains(&answer.status), "{}: {told}", answer.status);
            problem(&answer);
            assert_eq!(stage.machine.snapshot(), before, "{told}");
        }
    }
    assert_eq!(stage.client.describe().unwrap().config, full);
}

#[test]
fn a_body_beyond_the_limit_is_refused_whether_or_not_it_says_so() {
    let stage = stage();
    let answer = stage.client.exchange(Method::PUT, "/v1/vm", Some(vec![b' '; MAX_BODY + 1])).unwrap();
    assert_eq!(problem(&answer).code, Code::BodyTooLarge);
    let head = "PUT /v1/vm HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut stream = stage.connect();
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
    for _ in 0..=MAX_BODY / 0x10000 {
        // The server may have closed already: then its answer is waiting.
        if stream.write_all(chunk.as_bytes()).is_err() {
            break;
        }
    }
    assert_eq!(raw_problem(&read_all(&mut stream)).code, Code::BodyTooLarge);
}

#[test]
fn what_is_not_http_gets_a_problem() {
    let stage = stage();
    let long_header = format!("GET /v1/vm HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(32 << 10));
    let many_headers = format!("GET /v1/vm HTTP/1.1\r\nhost: x\r\n{}\r\n", "x: y\r\n".repeat(100));
    let long_target = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "y".repeat(8 << 10));
    for (bytes, code) in [
        ("hello\r\n\r\n", Code::BadRequest),
        ("GET /v1/vm HTTP/9.9\r\n\r\n", Code::BadRequest),
        ("GET /v1/vm HTTP/1.1\r\nno colon\r\n\r\n", Code::BadRequest),
        ("PUT /v1/vm HTTP/1.1\r\ncontent-length: x\r\n\r\n", Code::BadRequest),
        (&long_header, Code::HeadersTooLarge),
        (&many_headers, Code::HeadersTooLarge),
        (&long_target, Code::NoSuchPath),
    ] {
        let mut stream = stage.connect();
        let _ = stream.write_all(bytes.as_bytes());
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let answer = read_all(&mut stream);
        assert_eq!(raw_problem(&answer).code, code, "{:.60}", bytes);
    }
    assert_eq!(stage.client.state().unwrap(), VmState::Undefined);
}

#[test]
fn a_client_that_does_not_finish_its_request_is_told_and_closed() {
    let stage = stage_with(Limits { head: SHORT, body: SHORT, idle: SHORT, ..Limits::default() });
    assert_eq!(raw_problem(&stage.say(b"GET /v1/vm HTT")).code, Code::RequestTimeout);
    let half_body =
        "PUT /v1/vm HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"name\"";
    assert_eq!(raw_problem(&stage.say(half_body.as_bytes())).code, Code::RequestTimeout);
    // Nothing said, nothing answered.
    assert_eq!(stage.say(b""), "");
    // A request, its answer, and then nothing.
    assert!(stage.say(b"GET /v1/version HTTP/1.1\r\nhost: x\r\n\r\n").starts_with("HTTP/1.1 200 "));
}

#[test]
fn half_open_and_idle_connections_give_way_to_clients_that_ask() {
    let stage = stage_with(Limits { connections: 8, ..Limits::default() });
    let mut half_open = Vec::new();
    for i in 0..50 {
        let mut stream = stage.connect();
        if i % 2 == 0 {
            stream.write_all(b"GET /v1/vm HTTP/1.1\r\nhost").unwrap();
        }
        half_open.push(stream);
        assert_eq!(stage.client.state().unwrap(), VmState::Undefined, "after {i}");
    }
    // All but the last few were closed.
    assert_eq!(read_all(&mut half_open[0]), "");
}

#[test]
fn when_all_connections_are_busy_the_next_is_told_so_and_the_followers_leave_room() {
    let stage = stage_with(Limits { connections: 4, followers: 3, ..Limits::default() });
    let mut followers: Vec<_> = (0..3).map(|_| stage.client.events(None, true).unwrap()).collect();
    assert_eq!(stage.client.events(None, true).unwrap_err().code(), Some(Code::TooManyConnections));
    // One place is left for those who ask.
    assert_eq!(stage.client.state().unwrap(), VmState::Undefined);

    let stage = stage_with(Limits { connections: 3, followers: 3, ..Limits::default() });
    let busy: Vec<_> = (0..3).map(|_| stage.client.events(None, true).unwrap()).collect();
    assert_eq!(raw_problem(&stage.say(b"")).code, Code::TooManyConnections);
    drop(busy);
    drop(followers.pop());
}

#[test]
fn a_follower_that_does_not_read_neither_blocks_others_nor_grows_the_server() {
    let stage = stage_with(Limits { stall: SHORT, ..Limits::default() });
    let mut deaf = stage.connect();
    deaf.write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut first = String::new();
    BufReader::new(deaf.try_clone().unwrap()).read_line(&mut first).unwrap();
    assert!(first.starts_with("HTTP/1.1 200 "), "{first}");
    // Far more than fits into the socket: the follower is given up.
    for _ in 0..100 {
        stage.machine.force(VmState::Defined, Some(small_config()));
        for _ in 0..50 {
            stage.machine.force(VmState::Running, Some(small_config()));
            stage.machine.force(VmState::Paused, Some(small_config()));
        }
        assert_eq!(stage.client.state().unwrap(), VmState::Paused);
    }
    // What the socket held is there to read, and then it ends: a stream that went on would have comments in it.
    for line in BufReader::new(deaf).lines().map_while(Result::ok) {
        assert!(!line.starts_with(':'), "the stream goes on");
    }
}

#[test]
fn several_requests_share_a_connection() {
    let stage = stage();
    let ask = "GET /v1/version HTTP/1.1\r\nhost: x\r\n\r\n".repeat(9)
        + "GET /v1/vm HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answers = stage.say(ask.as_bytes());
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 9);
    assert_eq!(answers.matches("HTTP/1.1 404 Not Found").count(), 1);
}
