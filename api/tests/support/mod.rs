//! A real server on a real socket, in front of a controller without a VM.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rackvisor_api::client::{Answer, Client};
use rackvisor_api::control::Control;
use rackvisor_api::problem::{MEDIA_TYPE, Problem};
use rackvisor_api::server::{Limits, Server, ServerHandle};
use rackvisor_api::testing::Machine;

pub struct Stage {
    pub client: Client,
    pub socket: PathBuf,
    pub machine: Arc<Machine>,
    pub server: ServerHandle,
    pub folder: tempfile::TempDir,
}

pub fn stage() -> Stage {
    stage_with(Limits::default())
}

pub fn stage_with(limits: Limits) -> Stage {
    let machine = Machine::new();
    let (folder, socket, server) = serve(machine.clone(), limits);
    Stage { client: Client::new(&socket), socket, machine, server, folder }
}

pub fn serve(control: Arc<dyn Control>, limits: Limits) -> (tempfile::TempDir, PathBuf, ServerHandle) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let server = Server::bind(&socket).unwrap().with_limits(limits).start(control, || Ok(())).unwrap();
    (folder, socket, server)
}

impl Stage {
    /// A connection that speaks bytes.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        // Far beyond every limit: a test that comes here has failed.
        stream.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
        stream
    }

    /// Sends bytes, then reads until the server closes.
    pub fn say(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        read_all(&mut stream)
    }
}

pub fn read_all(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    // A server that closes with unread bytes of ours resets the connection, after its answer.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

/// The problem in a raw answer, checked to be consistent with its head.
pub fn raw_problem(answer: &str) -> Problem {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    assert!(head.to_ascii_lowercase().contains(&format!("content-type: {MEDIA_TYPE}")), "{head}");
    let problem: Problem = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body:?}"));
    assert!(head.starts_with(&format!("HTTP/1.1 {} ", problem.status)), "{head}");
    problem
}

/// The problem in an answer, checked to be consistent with its status.
pub fn problem(answer: &Answer) -> Problem {
    assert_eq!(answer.content_type, MEDIA_TYPE, "{}", String::from_utf8_lossy(&answer.body));
    let problem: Problem = answer.json().unwrap();
    assert_eq!(problem.status, answer.status);
    assert!(!problem.detail.is_empty() && !problem.remedy.is_empty(), "{problem:?}");
    problem
}
