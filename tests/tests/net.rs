//! The network, seen from both sides.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::thread;

use rackvisor_api::config::{Link, NicPatch};
use rackvisor_api::size::ByteSize;
use rackvisor_tests::{PATIENCE, Rackvisor, Tap, assert_same_bytes, linux, needs_kvm, noise, sha256};

const AMOUNT: usize = 100_000_000;

/// A listener on the host's end of the tap; gives `nc` and its arguments to reach it.
fn listen(tap: &Tap) -> (TcpListener, String) {
    let listener = TcpListener::bind(SocketAddr::new(tap.host().into(), 0)).unwrap();
    let command = format!("nc {} {}", tap.host(), listener.local_addr().unwrap().port());
    (listener, command)
}

#[test]
fn a_hundred_megabytes_pass_through_the_tap_each_way_unharmed() {
    needs_kvm!();
    let tap = Tap::new();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.boot.as_mut().unwrap().cmdline += &tap.cmdline();
    config.memory.size = ByteSize::mib(512);
    config.cpus.count = 2;
    config.nics = vec![tap.nic()];
    let mut guest = vmm.boot_linux(&config);
    guest.ok(&format!("ping -c 3 {}", tap.host()));

    let data = noise(5, AMOUNT);
    let (listener, command) = listen(&tap);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let _ = stream.read(&mut [0]);
        });
        guest.ok(&format!("{command} >/tmp/data"));
    });
    let sum = guest.ok("sha256sum </tmp/data");
    assert_eq!(sum.split_whitespace().next().unwrap(), sha256(&data), "host to guest");

    let (listener, command) = listen(&tap);
    let back = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).unwrap();
            back
        });
        guest.ok(&format!("{command} </tmp/data"));
        reader.join().unwrap()
    });
    assert_same_bytes(&back, &data, "guest to host");

    let counters = vmm.client.nic("net0").unwrap().counters;
    assert!(counters.rx_bytes > AMOUNT as u64 && counters.tx_bytes > AMOUNT as u64, "{counters:?}");
    assert_eq!(counters.errors, 0);

    // The cable: the guest sees it go and come.
    let carrier = |wanted| {
        format!(
            "for i in $(seq 500); do [ $(cat /sys/class/net/eth0/carrier) = {wanted} ] && exit 0; sleep 0.1; done; exit 1"
        )
    };
    vmm.client.patch_nic("net0", &NicPatch::link(Link::Down)).unwrap();
    guest.ok(&carrier(0));
    assert_ne!(guest.run(&format!("ping -c 1 -W 1 {}", tap.host())).0, 0, "a ping through an unplugged cable");
    vmm.client.patch_nic("net0", &NicPatch::link(Link::Up)).unwrap();
    guest.ok(&carrier(1));
    guest.ok(&format!("ping -c 1 {}", tap.host()));
}
