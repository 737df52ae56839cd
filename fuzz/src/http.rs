//! Bytes on the API's socket, in front of a controller without a VM.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rackvisor_api::server::{Limits, Server, ServerHandle};
use rackvisor_api::state::VmState;
use rackvisor_api::testing::{Machine, full_config, small_config};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::input::Input;

const METHODS: [&str; 6] = ["GET", "PUT", "PATCH", "POST", "DELETE", "HEAD"];
const PATHS: [&str; 24] = [
    "/v1/vm",
    "/v1/vm/disks",
    "/v1/vm/disks/root",
    "/v1/vm/disk-groups",
    "/v1/vm/disk-groups/silver",
    "/v1/vm/nics",
    "/v1/vm/nics/net0",
    "/v1/vm/nics/net0/announce",
    "/v1/vm/boot",
    "/v1/vm/pause",
    "/v1/vm/resume",
    "/v1/vm/reset",
    "/v1/vm/power-button",
    "/v1/vm/sleep-button",
    "/v1/vm/shutdown",
    "/v1/vm/nmi",
    "/v1/events?from=0",
    "/v1/metrics",
    "/v1/inspect",
    "/v1/inspect/devices/root",
    "/v1/inspect/%2e%2e/vcpus/0",
    "/v1/events?from=18446744073709551615",
    "/v1/version",
    "/v1/openapi.json",
];
/// Answers to a stream of events have no end.
const SOON: Duration = Duration::from_millis(20);
/// A server that has not answered a simple question by then hangs.
const HANG: Duration = Duration::from_secs(20);

/// One for all inputs: a client that breaks it for those who come later is what is looked for.
struct Stage {
    machine: Arc<Machine>,
    socket: PathBuf,
    _server: ServerHandle,
    _folder: tempfile::TempDir,
}

static STAGE: Mutex<Option<Stage>> = Mutex::new(None);

impl Stage {
    fn new() -> Self {
        let (folder, machine) = (tempfile::tempdir().unwrap(), Machine::new());
        let socket = folder.path().join("api.sock");
        let server = Server::bind(&socket).unwrap().with_limits(Limits::default());
        let server = server.start(machine.clone(), || Ok(())).unwrap();
        Self { machine, socket, _server: server, _folder: folder }
    }

    /// Says it, with so many descriptors, and hears what comes back.
    fn say(&self, descriptors: usize, parts: &[&[u8]], patience: Duration) -> Vec<u8> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        if descriptors > 0 {
            pass(&stream, descriptors);
        }
        for part in parts {
            // It may have closed already.
            let _ = stream.write_all(part);
        }
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.take(4 << 20).read_to_end(&mut answer);
        answer
    }
}

/// Says nothing yet but an empty line, which a request may begin with, and passes descriptors with it (SCM_RIGHTS).
fn pass(stream: &UnixStream, descriptors: usize) {
    let fds = vec![stream.as_fd(); descriptors];
    let rights = SendAncillaryMessage::ScmRights(&fds);
    let mut room = vec![MaybeUninit::uninit(); rights.size()];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    assert!(ancillary.push(rights), "there is room");
    let _ = sendmsg(stream, &[IoSlice::new(b"\r\n")], &mut ancillary, SendFlags::NOSIGNAL);
}

/// Plays a client.
pub fn play(data: &[u8]) {
    let mut stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let stage = stage.get_or_insert_with(Stage::new);
    let mut input = Input::new(data);
    let shape = input.byte();
    let config = match shape >> 6 {
        0 => None,
        1 => Some(small_config()),
        _ => Some(serde_json::from_value(full_config()).unwrap()),
    };
    let state = config.as_ref().map_or(VmState::Undefined, |_| VmState::ALL[1 + usize::from(shape >> 3) % 5]);
    stage.machine.force(state, config);
    let descriptors = if shape & 2 == 0 { 0 } else { usize::from(input.byte()) % 100 };
    if shape & 1 == 0 {
        stage.say(descriptors, &[input.rest()], SOON);
    } else {
        let (method, path) = (METHODS[usize::from(input.below(6))], PATHS[usize::from(input.below(24))]);
        let body = input.rest();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: vm\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let answer = stage.say(descriptors, &[head.as_bytes(), body], SOON);
        assert!(!answer.starts_with(b"HTTP/1.1 5") || answer.starts_with(b"HTTP/1.1 501"), "{method} {path}: broken");
    }
    let answer = stage.say(0, &[b"GET /v1/version HTTP/1.1\r\nhost: vm\r\nconnection: close\r\n\r\n"], HANG);
    assert!(answer.starts_with(b"HTTP/1.1 200"), "the server does not answer any more");
}
