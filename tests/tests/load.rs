//! The API under load. How much of it the guest notices is for `make bench-api` to measure.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rackvisor_tests::{Rackvisor, linux_with_fio, needs_kvm, tell};

const CONNECTIONS: usize = 100;
/// Of requests of the guest, the longest bucket below 100 ms: what is above is only told.
const LIMIT: &str = "le=\"0.065536\"";

/// What clients ask, and the statuses that answer it.
const ASKED: [(&str, &str); 6] = [
    ("GET /v1/vm HTTP/1.1\r\nhost: x\r\n\r\n", "200"),
    ("GET /v1/metrics HTTP/1.1\r\nhost: x\r\n\r\n", "200"),
    ("GET /v1/inspect HTTP/1.1\r\nhost: x\r\n\r\n", "200"),
    ("GET /v1/vm/disks/data HTTP/1.1\r\nhost: x\r\n\r\n", "200"),
    ("POST /v1/vm/boot HTTP/1.1\r\nhost: x\r\n\r\n", "409"),
    ("PUT /v1/vm HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 3\r\n\r\n{ }", "422"),
];

/// One connection that asks one thing after the other until it is told to stop; gives how often it was answered.
fn hammer(socket: &Path, first: usize, stop: &AtomicBool) -> u64 {
    // What the clients take of the processor is not the VMM's.
    rustix::process::setpriority_process(None, 19).unwrap();
    let mut stream = BufReader::new(UnixStream::connect(socket).unwrap());
    stream.get_ref().set_read_timeout(Some(rackvisor_tests::PATIENCE)).unwrap();
    let mut answered = 0;
    for (request, status) in ASKED.iter().cycle().skip(first) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        let (mut line, mut length) = (String::new(), 0);
        stream.read_line(&mut line).unwrap();
        assert_eq!(line.split(' ').nth(1), Some(*status), "{request}");
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).unwrap();
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
        }
        stream.read_exact(&mut vec![0; length]).unwrap();
        answered += 1;
    }
    answered
}

/// Requests of the disk so far, and how many of them took longer than the limit.
fn requests(vmm: &Rackvisor) -> (u64, u64) {
    let all = vmm.counted(&["disk_request_seconds_count"]);
    (all, all - vmm.counted(&["disk_request_seconds_bucket", LIMIT]))
}

fn resident(vmm: &Rackvisor) -> u64 {
    vmm.counted(&["process_resident_memory_bytes"]) >> 20
}

#[test]
fn a_hundred_connections_that_hammer_the_api_while_the_guest_does_io_are_all_answered_and_memory_stays_bounded() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux_with_fio();
    config.disks = vec![vmm.image("data", &vec![0; 8 << 20])];
    let mut guest = vmm.boot_linux(&config);
    // Its requests, and how many of them were late. What memory costs once is there when the first of two is over.
    let mut io = || {
        let before = requests(&vmm);
        guest.ok(
            "fio --name=a --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=4 --size=8m \
            --time_based --runtime=5 --output=/tmp/said || cat /tmp/said",
        );
        let after = requests(&vmm);
        (after.0 - before.0, after.1 - before.1)
    };
    let quiet = io();
    let (resident_before, stop) = (resident(&vmm), AtomicBool::new(false));
    let (loaded, answered) = thread::scope(|scope| {
        let hammer = |connection| {
            let (socket, stop) = (vmm.client.socket(), &stop);
            scope.spawn(move || hammer(socket, connection, stop))
        };
        let connections: Vec<_> = (0..CONNECTIONS).map(hammer).collect();
        // Also if it fails, the clients have an end.
        let loaded = scope.spawn(io).join();
        stop.store(true, Ordering::Relaxed);
        (loaded.unwrap(), connections.into_iter().map(|connection| connection.join().unwrap()).collect::<Vec<_>>())
    });
    let grown = resident(&vmm).saturating_sub(resident_before);
    let (all, least) = (answered.iter().sum::<u64>(), *answered.iter().min().unwrap());
    tell(&format!(
        "{all} requests of clients answered, {least} on one connection at least; of the guest {} ({} late) without them, {} \
        ({} late) with them; {grown} MiB more",
        quiet.0, quiet.1, loaded.0, loaded.1
    ));
    // Each stopped only when it had the answer to what it asked last.
    assert!(least >= 1, "{answered:?}");
    assert!(quiet.0 > 100 && loaded.0 > 100, "{quiet:?} {loaded:?}");
    assert!(grown <= 32, "{grown} MiB more");
}
