//! What operators and host agents rely on, with the real programs and without a guest: outside of the laboratory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs;
use std::net::{Shutdown, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;

use rackvisor_tests::{Rackvisor, Tiny, assert_nothing_more, eventually, output, rackctl_binary, skip, tell};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

#[test]
fn the_log_is_json_in_a_file_that_is_opened_anew_on_sighup() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.log");
    let to = format!("file:{}", path.display());
    let vmm = Rackvisor::start_with(&["--log-format", "json", "--log-to", &to]);
    let lines = |path: &std::path::Path| -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let config = Tiny::idle().config(&vmm.path(""));
    vmm.client.define(&config).unwrap();
    let first = eventually("a line of the log", || lines(&path).into_iter().next());
    assert_eq!(
        (&first["level"], &first["message"], &first["to"]),
        (&"INFO".into(), &"state changed".into(), &"defined".into())
    );
    assert_eq!(first["vm"], config.name.as_str());
    assert!(first["timestamp"].is_string(), "{first}");

    let old = folder.path().join("vm.log.1");
    fs::rename(&path, &old).unwrap();
    kill_process(Pid::from_raw(vmm.pid().try_into().unwrap()).unwrap(), Signal::HUP).unwrap();
    let before = lines(&old).len();
    eventually("the log is opened anew", || {
        // Until the signal has come, lines go to the old file.
        vmm.client.forget().unwrap();
        vmm.client.define(&config).unwrap();
        lines(&path).into_iter().next()
    });
    assert!(lines(&old).len() >= before);
    assert_eq!(vmm.log(), "", "nothing goes to standard error");
}

/// `rackctl` as another user.
fn rackctl_as(uid: u32, vmm: &Rackvisor, line: &str) -> (i32, String, String) {
    let identity = [format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()];
    let mut command = Command::new("setpriv");
    command.args(identity).arg(rackctl_binary()).arg("--socket").arg(vmm.client.socket()).args(line.split(' '));
    output(command.current_dir("/"))
}

#[test]
fn only_users_that_are_named_are_served_whoever_may_open_the_socket() {
    if !rustix::process::geteuid().is_root() {
        return skip("only root can start clients as other users");
    }
    let arguments = [
        "--api-socket-mode",
        "666",
        "--api-socket-owner",
        "4711:4712",
        "--api-allow-uid",
        "0",
        "--api-allow-uid",
        "4711",
    ];
    let vmm = Rackvisor::start_with(&arguments);
    let socket = fs::metadata(vmm.client.socket()).unwrap();
    assert_eq!((socket.mode() & 0o777, socket.uid(), socket.gid()), (0o666, 4711, 4712));
    // The folder of the test, and the programs, are root's.
    fs::set_permissions(vmm.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let (status, out, err) = rackctl_as(4711, &vmm, "version");
    if err.contains("Permission denied") && status != 1 {
        return skip("other users cannot execute rackctl where it was built");
    }
    assert_eq!((status, err.as_str()), (0, ""), "{out}");
    let (status, _, err) = rackctl_as(4712, &vmm, "version");
    assert!(status == 1 && err.contains("not-allowed (403)") && err.contains("uid 4712"), "{status} {err}");
    assert_eq!(vmm.client.version().unwrap().api, "v1");
}

/// Passes connections on from a port of this host to a Unix socket.
fn bridge(socket: std::path::PathBuf) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, UnixStream::connect(&socket)) else { continue };
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            thread::spawn(move || {
                let (mut from, mut to) = (server, client);
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

#[test]
fn the_server_does_what_its_openapi_document_says() {
    let Some(schemathesis) = schemathesis() else {
        return skip("schemathesis is missing: tests/setup --python, or name the program in SCHEMATHESIS");
    };
    let vmm = Rackvisor::start();
    vmm.client.define(&Tiny::idle().config(&vmm.path(""))).unwrap();
    let census = vmm.census();
    let document = vmm.path("openapi.json");
    fs::write(&document, vmm.client.openapi().unwrap().to_string()).unwrap();
    let url = format!("http://127.0.0.1:{}", bridge(vmm.client.socket().to_owned()));
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
    let mut command = Command::new(schemathesis);
    command.arg("run").arg(&document).args(["--url", &url, "--checks", checks, "--seed", "1"]);
    // The events are a stream that does not end; the rest of it is tested elsewhere.
    command.args(["--exclude-path", "/v1/events", "--phases", "examples,coverage,fuzzing", "--max-examples", "12"]);
    command.args(["--max-failures", "5", "--request-timeout", "10", "--no-color", "--max-time", "20"]);
    let (status, out, err) = output(command.current_dir(vmm.path("")));
    assert_eq!(status, 0, "{out}\n{err}");
    let sum: Vec<&str> = out.lines().rev().filter(|line| line.contains("generated")).take(1).collect();
    tell(sum.first().unwrap_or(&"schemathesis is content"));
    assert_nothing_more(vmm.pid(), &census);
}

/// The program that tests against an OpenAPI document.
fn schemathesis() -> Option<std::path::PathBuf> {
    let own = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/python/bin/schemathesis");
    std::env::var_os("SCHEMATHESIS").map(Into::into).or_else(|| own.exists().then_some(own))
}
