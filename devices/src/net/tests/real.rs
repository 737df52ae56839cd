//! With real taps, in a network namespace of the test's own thread. Skipped, aloud, where the machine has none.
#![allow(unsafe_code)] // unshare, packet sockets and interface flags have no safe wrappers.

use std::os::fd::{AsFd, AsRawFd, FromRawFd};

use super::*;
use crate::DeviceEvent;

pub(super) const MERGE: u64 = bit(features::MRG_RXBUF);
const ETH_P_ALL: u16 = 3;
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `test` in a thread with a network namespace of its own; its threads inherit it.
pub(in crate::net) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let ran = std::thread::spawn(move || {
        // SAFETY: no pointers; affects this thread only.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || !std::path::Path::new("/dev/net/tun").exists() {
            return false;
        }
        // Else the kernel looks for neighbours, whose frames take buffers that tests give for theirs.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
        true
    });
    if !ran.join().unwrap() {
        eprintln!("SKIPPED: this test needs root (CLONE_NEWNET) and /dev/net/tun");
    }
}

/// Goes over to yet another network namespace.
pub(super) fn leave_namespace() {
    // SAFETY: no pointers; affects this thread only.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
}

fn socket(family: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: no pointers; the result is checked and belongs to nobody else.
    unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

/// Sets an interface up or down.
pub(super) fn set_up(name: &str, up: bool) {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the requests read and write a `struct ifreq`, which has 40 bytes.
    unsafe {
        assert_eq!(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, request.as_mut_ptr()), 0);
        request[16] = if up { request[16] | 1 } else { request[16] & !1 };
        assert_eq!(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, request.as_mut_ptr()), 0);
    }
}

/// A packet socket on the host's side of a tap: what it sends arrives at the guest.
pub(super) struct Wire(OwnedFd);

impl Wire {
    pub(super) fn new(name: &str, header: bool) -> Self {
        wait(|| has_queue(name), "the kernel's queue of the interface");
        let fd = socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(ETH_P_ALL.to_be()));
        let name = std::ffi::CString::new(name).unwrap();
        // SAFETY: plain structs and their sizes; zero is a valid sockaddr_ll.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = ETH_P_ALL.to_be();
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let size = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size), 0);
            let on = i32::from(header);
            let set = |level, option, value: *const libc::c_void, size| {
                assert_eq!(libc::setsockopt(fd.as_raw_fd(), level, option, value, size), 0);
            };
            set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), 4);
            let timeout = libc::timeval { tv_sec: 20, tv_usec: 0 };
            set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const timeout).cast(), size_of::<libc::timeval>() as u32);
        }
        Self(fd)
    }

    pub(super) fn send(&self, data: &[u8]) {
        // SAFETY: pointer and length of a slice.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), data.as_ptr().cast(), data.len(), 0) };
        assert_eq!(sent, data.len() as isize, "{}", std::io::Error::last_os_error());
    }

    /// The next frame of our own type from the guest.
    pub(super) fn receive(&self) -> Vec<u8> {
        loop {
            let mut data = vec![0; 70_000];
            // SAFETY: pointer and length of a mutable slice.
            let length = unsafe { libc::recv(self.0.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), 0) };
            let error = std::io::Error::last_os_error();
            if length < 0 && error.kind() == std::io::ErrorKind::Interrupted {
                continue;
            }
            assert!(length > 0, "{error}");
            data.truncate(length as usize);
            // The host talks, too (IPv6 neighbours), and a packet socket hears itself.
            if data.get(12..14) == Some(&ETHERTYPE) && data[6..12] == MAC {
                return data;
            }
        }
    }
}

/// An Ethernet frame of `length` bytes from the guest (or to it).
pub(super) fn ethernet(from_guest: bool, length: usize, seed: u8) -> Vec<u8> {
    let mut data = frame(length, seed);
    data[..6].copy_from_slice(if from_guest { &[0xff; 6] } else { &MAC });
    data[6..12].copy_from_slice(if from_guest { &MAC } else { &[2, 0, 0, 0, 0, 1] });
    data[12..14].copy_from_slice(&ETHERTYPE);
    data
}

impl Card {
    /// A running card over the tap `name`, which is set up.
    pub(super) fn real(name: &str, pairs: u16, features: u64) -> Self {
        let tap = Tap::open(name, pairs).unwrap();
        set_up(name, true);
        let mut card = Self::with_tap(tap, Vec::new(), pairs, 128, features);
        card.start();
        card
    }

    /// Waits for our own frame among what else the host sends, and gives it; gives other buffers back.
    pub(super) fn await_frame(&mut self, addresses: &HashMap<u16, u64>) -> Vec<u8> {
        loop {
            let used = self.used(RX);
            let mut data = self.driver.read(addresses[&used.head], used.length as usize);
            for _ in 1..num_buffers(&data) {
                let used = self.used(RX);
                data.extend(self.driver.read(addresses[&used.head], used.length as usize));
            }
            if data.get(24..26) == Some(&ETHERTYPE) || data.len() > 2000 {
                return data;
            }
        }
    }

    pub(super) fn give_many(&mut self, count: usize, length: u32) -> HashMap<u16, u64> {
        (0..count).map(|_| self.give(length)).collect()
    }
}

#[test]
fn frames_pass_through_a_real_tap_both_ways() {
    in_namespace(|| {
        let mut card = Card::real("rvtest0", 1, MERGE);
        let wire = Wire::new("rvtest0", false);
        let addresses = card.give_many(64, 600);
        for number in 0..20 {
            let out = ethernet(true, 60 + 72 * usize::from(number), number);
            card.send(&out);
            assert_eq!(wire.receive(), out);
            let back = ethernet(false, 60 + 72 * usize::from(number), number);
            wire.send(&back);
            assert_eq!(card.await_frame(&addresses)[HEADER_SIZE..], back);
        }
    });
}

#[test]
fn a_segmentation_offload_frame_of_the_host_arrives_whole() {
    in_namespace(|| {
        let negotiated = MERGE | bit(features::GUEST_CSUM) | bit(features::GUEST_TSO4);
        let mut card = Card::real("rvtest0", 1, negotiated);
        let wire = Wire::new("rvtest0", true);
        let addresses = card.give_many(100, 1536);
        const PAYLOAD: usize = 40_000;
        let total = (40 + PAYLOAD) as u16;
        let mut data = ethernet(false, 54 + PAYLOAD, 7);
        data[12..14].copy_from_slice(&[8, 0]);
        let mut ip = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        data[14..34].copy_from_slice(&ip);
        // 20 bytes of TCP header, ACK.
        data[34..54].copy_from_slice(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        // NEEDS_CSUM, TCPV4, header 54, segments of 1448, checksum from 34 at 16.
        let mut header = vec![1, 1, 54, 0];
        header.extend([1448u16, 34, 16].iter().flat_map(|field| field.to_le_bytes()));
        wire.send(&[&header[..], &data].concat());
        let seen = card.await_frame(&addresses);
        assert_eq!(seen[1], 1, "it is one frame to be segmented by whoever needs it");
        assert_eq!(num_buffers(&seen), (HEADER_SIZE + data.len()).div_ceil(1536) as u16);
        assert!(seen[HEADER_SIZE + 54..] == data[54..]);
    });
}

#[test]
fn frames_with_headers_that_the_kernel_refuses_are_dropped_and_counted() {
    in_namespace(|| {
        let mut card = Card::real("rvtest0", 1, MERGE);
        let wire = Wire::new("rvtest0", false);
        // An unknown segmentation, and a checksum beyond the end of the frame.
        for header in [[0, 0x7f, 54, 0, 0, 2, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0]] {
            let data = [&header[..], &ethernet(true, 100, 1)].concat();
            let address = card.driver.allocate(data.len() as u64, 1);
            card.driver.write(address, &data);
            card.driver.ring(TX).add(&[Buffer::readable(address, data.len() as u32)]);
            card.driver.ring(TX).kick();
            card.used(TX);
        }
        card.wait_count("net_tx_drops", "refused", 2);
        let good = ethernet(true, 100, 2);
        card.send(&good);
        assert_eq!(wire.receive(), good);
    });
}

#[test]
fn frames_that_were_there_together_leave_in_order_without_those_that_are_not_to() {
    in_namespace(|| {
        let mut card = Card::real("rvtest0", 1, MERGE);
        let wire = Wire::new("rvtest0", false);
        let refused = [0, 0x7f, 54, 0, 0, 2, 0, 0, 0, 0, 0, 0];
        for number in 0..60u8 {
            // Some the kernel refuses, some the card does.
            let header = if number % 7 == 3 { refused } else { [0; HEADER_SIZE] };
            let length = if number % 11 == 5 { 5 } else { 60 + 20 * usize::from(number) };
            let data = [&header[..], &ethernet(true, 1400, number)[..length]].concat();
            let address = card.driver.allocate(data.len() as u64, 1);
            card.driver.write(address, &data);
            let (first, rest) = (u64::from(number) % 12 + 1, data.len() as u32 - u32::from(number) % 12 - 1);
            card.driver
                .ring(TX)
                .stage(&[Buffer::readable(address, first as u32), Buffer::readable(address + first, rest)]);
        }
        card.driver.ring(TX).publish();
        card.driver.ring(TX).kick();
        for _ in 0..60 {
            card.used(TX);
        }
        for number in (0..60u8).filter(|number| number % 7 != 3 && number % 11 != 5) {
            assert_eq!(wire.receive(), ethernet(true, 1400, number)[..60 + 20 * usize::from(number)]);
        }
        card.wait_count("net_tx_drops", "malformed", 5);
        card.wait_count("net_tx_drops", "refused", 8);
    });
}

#[test]
fn a_tap_that_goes_down_is_told_of_once_and_works_again_when_it_is_up() {
    in_namespace(|| {
        let mut card = Card::real("rvtest0", 1, MERGE);
        let addresses = card.give_many(64, 600);
        set_up("rvtest0", false);
        for number in 0..10 {
            card.send(&ethernet(true, 100, number));
            card.used(TX);
        }
        card.wait_count("net_tx_drops", "tap_error", 10);
        let lost = |card: &Card| {
            let events = card.notifier.events();
            events.iter().filter(|(_, event)| matches!(event, DeviceEvent::BackendLost { .. })).count()
        };
        assert_eq!(lost(&card), 1);
        set_up("rvtest0", true);
        let wire = Wire::new("rvtest0", false);
        let good = ethernet(true, 100, 2);
        card.send(&good);
        assert_eq!(wire.receive(), good);
        let back = ethernet(false, 100, 3);
        wire.send(&back);
        assert_eq!(card.await_frame(&addresses)[HEADER_SIZE..], back);
        set_up("rvtest0", false);
        card.send(&good);
        card.used(TX);
        wait(|| lost(&card) == 2, "the next loss is news again");
    });
}

/// Runs `ip`; says whether it did what it was told.
/// Whether what is sent to the interface gets into its queue. The kernel makes that some time after the carrier is there; what is
/// sent until then is dropped, which it tells nobody.
fn has_queue(name: &str) -> bool {
    let said = std::process::Command::new("ip").args(["-o", "link", "show", name]).output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    !(said.contains("LOWER_UP") && said.contains("qdisc noop "))
}

pub(super) fn ip(arguments: &str) -> bool {
    let status = std::process::Command::new("ip").args(arguments.split_whitespace()).status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn a_tap_that_is_deleted_and_made_again_serves_on_with_all_its_queues() {
    in_namespace(|| {
        let negotiated = MERGE | bit(features::MQ) | bit(features::CTRL_VQ);
        let mut card = Card::real("rvtest0", 2, negotiated);
        let addresses = card.give_many(64, 600);
        let command = card.driver.allocate(8, 1);
        card.driver.write(command, &[4, 0, 2, 0, 0xaa]);
        card.driver.ring(4).add(&[Buffer::readable(command, 4), Buffer::writable(command + 4, 1)]);
        card.driver.ring(4).kick();
        card.used(4);
        let events = |card: &Card, wanted: fn(&DeviceEvent) -> bool| {
            card.notifier.events().iter().filter(|(_, event)| wanted(event)).count()
        };
        for round in 1..=2 {
            assert!(ip("link delete rvtest0"));
            wait(
                || events(&card, |event| matches!(event, DeviceEvent::BackendLost { .. })) == round,
                "the loss is noticed without a frame",
            );
            assert_eq!(events(&card, |event| matches!(event, DeviceEvent::BackendRestored { .. })), round - 1);
            assert!(ip("tuntap add dev rvtest0 mode tap vnet_hdr multi_queue"));
            set_up("rvtest0", true);
            wait(
                || events(&card, |event| matches!(event, DeviceEvent::BackendRestored { .. })) == round,
                "the tap is back",
            );
            let wire = Wire::new("rvtest0", false);
            for pair in 0..2 {
                let data = [&[0; HEADER_SIZE][..], &ethernet(true, 80, 1)].concat();
                let address = card.driver.allocate(data.len() as u64, 1);
                card.driver.write(address, &data);
                card.driver.ring(2 * pair + 1).add(&[Buffer::readable(address, data.len() as u32)]);
                card.driver.ring(2 * pair + 1).kick();
                assert_eq!(wire.receive(), data[HEADER_SIZE..], "pair {pair}");
                card.used(2 * pair + 1);
            }
            // The second pair is out of service again, so that the frame comes by the first.
            card.driver.write(command, &[4, 0, 1, 0, 0xaa]);
            card.driver.ring(4).add(&[Buffer::readable(command, 4), Buffer::writable(command + 4, 1)]);
            card.driver.ring(4).kick();
            card.used(4);
            let back = ethernet(false, 100, 3);
            wire.send(&back);
            assert_eq!(card.await_frame(&addresses)[HEADER_SIZE..], back);
            card.driver.write(command, &[4, 0, 2, 0, 0xaa]);
            card.driver.ring(4).add(&[Buffer::readable(command, 4), Buffer::writable(command + 4, 1)]);
            card.driver.ring(4).kick();
            card.used(4);
        }
    });
}

#[test]
fn pairs_of_a_real_tap_are_attached_and_detached_as_the_driver_says() {
    in_namespace(|| {
        let negotiated = MERGE | bit(features::MQ) | bit(features::CTRL_VQ);
        let mut card = Card::real("rvtest0", 4, negotiated);
        let wire = Wire::new("rvtest0", false);
        let data = [&[0; HEADER_SIZE][..], &ethernet(true, 80, 1)].concat();
        let address = card.driver.allocate(data.len() as u64, 1);
        card.driver.write(address, &data);
        let command = card.driver.allocate(8, 1);
        let addresses = card.give_many(100, 600);
        for pairs in [1u8, 4, 2, 3, 1, 4] {
            card.driver.write(command, &[4, 0, pairs, 0, 0xaa]);
            let buffers = [Buffer::readable(command, 4), Buffer::writable(command + 4, 1)];
            card.driver.ring(8).add(&buffers);
            card.driver.ring(8).kick();
            assert_eq!(card.used(8).length, 1);
            assert_eq!(card.driver.read(command + 4, 1), [0]);
            // Also those out of use, by the first queue of the tap.
            for pair in 0..4 {
                card.driver.ring(2 * pair + 1).add(&[Buffer::readable(address, data.len() as u32)]);
                card.driver.ring(2 * pair + 1).kick();
                assert_eq!(wire.receive(), data[HEADER_SIZE..], "pair {pair} of {pairs}");
                card.used(2 * pair + 1);
            }
            // With one pair in use every frame of the host comes by it.
            if pairs == 1 {
                for seed in 0..4 {
                    let back = ethernet(false, 100, seed);
                    wire.send(&back);
                    assert_eq!(card.await_frame(&addresses)[HEADER_SIZE..], back);
                }
            }
        }
    });
}

/// Buffers for each of four pairs: where they are, by pair and head.
pub(super) fn filled(card: &mut Card) -> HashMap<(usize, u16), u64> {
    let mut buffers = HashMap::new();
    for pair in 0..4 {
        for _ in 0..40 {
            let address = card.driver.allocate(BUFFER.into(), 1);
            let head = card.driver.ring(2 * pair).add(&[Buffer::writable(address, BUFFER)]);
            buffers.insert((pair, head), address);
        }
        card.driver.ring(2 * pair).kick();
    }
    buffers
}

/// The pair that receives a frame of ours, and the frame with its header. The buffer is given again.
pub(super) fn received(card: &mut Card, buffers: &HashMap<(usize, u16), u64>) -> (usize, Vec<u8>) {
    let header = card.header();
    let mut seen = None;
    wait(
        || {
            for pair in 0..4 {
                while let Some(used) = card.driver.ring(2 * pair).take_used() {
                    let address = buffers[&(pair, used.head)];
                    let data = card.driver.read(address, used.length as usize);
                    let head = card.driver.ring(2 * pair).add(&[Buffer::writable(address, BUFFER)]);
                    assert_eq!(head, used.head, "the descriptor that is free");
                    card.driver.ring(2 * pair).kick();
                    if data[header + 6..][..6] == [2, 0, 0, 0, 0, 1] {
                        assert!(seen.replace((pair, data)).is_none(), "one frame comes once");
                    }
                }
            }
            seen.is_some()
        },
        "a frame",
    );
    seen.unwrap()
}

#[test]
fn with_rss_each_frame_comes_by_the_queue_that_its_hash_chooses_also_after_the_tap_was_made_again() {
    use super::control::command;
    use super::steering::{datagram, is_possible, key, rss, rss_options};
    use crate::net::steering::hash::Hasher;
    if !is_possible() {
        return;
    }
    in_namespace(|| {
        let tap = Tap::open("rvtest0", 4).unwrap();
        set_up("rvtest0", true);
        let rss_features = bit(features::RSS) | bit(features::HASH_REPORT);
        let negotiated = MERGE | bit(features::MQ) | bit(features::CTRL_VQ) | rss_features;
        let mut card = Card::with_options(rss_options(tap, 4), Vec::new(), 128, negotiated);
        card.start();
        let buffers = filled(&mut card);
        let hasher = Hasher::new(0x3f, &key());
        let mut wire = Wire::new("rvtest0", false);
        for (round, multiplier) in [1, 3, 1].into_iter().enumerate() {
            let table: Vec<u16> = (0..128).map(|index| index * multiplier / 2 % 4).collect();
            assert_eq!(command(&mut card, 8, &rss(0x3f, 2, &table, 4)), 0);
            for port in 1000..1100 {
                let data = datagram(port);
                let (hash, report) = hasher.report(&data);
                wire.send(&data);
                let (pair, seen) = received(&mut card, &buffers);
                assert_eq!(pair, usize::from(table[hash as usize % 128]), "port {port} in round {round}");
                assert_eq!(seen[HASH_HEADER_SIZE..], data);
                assert_eq!(seen[12..16], hash.to_le_bytes());
                assert_eq!(seen[16..18], report.to_le_bytes());
            }
            wire.send(&ethernet(false, 100, 1));
            assert_eq!(received(&mut card, &buffers).0, 2, "a frame without a hash");
            if round > 0 {
                continue;
            }
            // From now on over another tap of that name, with the configuration that there was.
            assert!(ip("link delete rvtest0"));
            let events = |card: &Card, wanted: fn(&DeviceEvent) -> bool| {
                card.notifier.events().iter().any(|(_, event)| wanted(event))
            };
            wait(|| events(&card, |event| matches!(event, DeviceEvent::BackendLost { .. })), "the tap is lost");
            assert!(ip("tuntap add dev rvtest0 mode tap vnet_hdr multi_queue"));
            set_up("rvtest0", true);
            wait(|| events(&card, |event| matches!(event, DeviceEvent::BackendRestored { .. })), "the tap is back");
            wire = Wire::new("rvtest0", false);
            for port in 1000..1020 {
                let data = datagram(port);
                wire.send(&data);
                let (pair, _) = received(&mut card, &buffers);
                assert_eq!(pair, usize::from(table[hasher.report(&data).0 as usize % 128]), "port {port}");
            }
        }
        // Once the driver asks for pairs alone, the kernel chooses: no longer the one queue that the table names.
        assert_eq!(command(&mut card, 8, &rss(0x3f, 2, &[2], 4)), 0);
        assert_eq!(command(&mut card, 8, &[4, 0, 4, 0]), 0);
        let pairs = (1000..1040).map(|port| {
            wire.send(&datagram(port));
            received(&mut card, &buffers).0
        });
        assert_ne!(pairs.filter(|pair| *pair == 2).count(), 40);
    });
}

#[test]
fn a_tap_is_left_as_it_was_found() {
    in_namespace(|| {
        // Held open by somebody else's descriptor of the same open file, as the agent would.
        let tap = Tap::open("rvtest0", 2).unwrap();
        let held: Vec<OwnedFd> = (0..2).map(|i| tap.queue(i).unwrap().try_clone_to_owned().unwrap()).collect();
        drop(tap);
        assert_eq!(sys::header_size(held[0].as_fd()).unwrap(), 10);
        let again: Vec<OwnedFd> = held.iter().map(|fd| fd.try_clone().unwrap()).collect();
        set_up("rvtest0", true);
        let negotiated = bit(features::MQ) | bit(features::CTRL_VQ);
        let mut card = Card::with_tap(Tap::from_fds(again).unwrap(), Vec::new(), 2, 128, negotiated);
        card.start();
        assert_eq!(sys::header_size(held[0].as_fd()).unwrap(), 12);
        assert!(sys::set_queue(held[1].as_fd(), false).is_err(), "the second queue is out of service");
        card.device.handle().set_link(false);
        drop(card);
        assert_eq!(sys::header_size(held[0].as_fd()).unwrap(), 10);
        sys::set_queue(held[1].as_fd(), false).expect("the second queue is in service again");
    });
}

#[test]
fn a_tap_is_steered_by_our_program_no_longer_than_its_card_lives() {
    use super::control::command;
    use super::steering::{datagram, is_possible, rss, rss_options};
    if !is_possible() {
        return;
    }
    in_namespace(|| {
        let tap = Tap::open("rvtest0", 2).unwrap();
        let held: Vec<std::fs::File> =
            (0..2).map(|i| tap.queue(i).unwrap().try_clone_to_owned().unwrap().into()).collect();
        set_up("rvtest0", true);
        let negotiated = bit(features::MQ) | bit(features::CTRL_VQ) | bit(features::RSS);
        let mut card = Card::with_options(rss_options(tap, 2), Vec::new(), 128, negotiated);
        card.start();
        // Without buffers nothing is taken out of the tap.
        assert_eq!(command(&mut card, 4, &rss(0x3f, 1, &[1], 2)), 0);
        let wire = Wire::new("rvtest0", false);
        let waiting = || {
            (1000..1050).for_each(|port| wire.send(&datagram(port)));
            let frames = |mut queue: &std::fs::File| {
                let (mut data, mut frames) = ([0; 2048], 0);
                while let Ok(length) = std::io::Read::read(&mut queue, &mut data) {
                    frames += usize::from(data[..length].ends_with(&[7; 20]));
                }
                frames
            };
            (frames(&held[0]), frames(&held[1]))
        };
        assert_eq!(waiting(), (0, 50));
        drop(card);
        let (first, second) = waiting();
        assert_eq!(first + second, 50);
        assert!(first > 0 && second > 0, "the kernel chooses again: {first} and {second}");
    });
}

#[test]
fn taps_that_cannot_be_used_are_refused_by_name_and_with_a_remedy() {
    in_namespace(|| {
        for name in ["", "tap%d", "a/b", "has space", "sixteen-chars-xx", "."] {
            assert!(matches!(Tap::open(name, 1), Err(TapError::Name(_))), "{name:?}");
        }
        let refused = |name, queues| Tap::open(name, queues).err().map(|error| error.to_string()).unwrap();
        let single = Tap::open("rvtest0", 1).unwrap();
        assert_eq!(single.mtu(), Some(1500));
        assert!(refused("rvtest0", 1).contains("rvtest0 is busy"));
        assert!(refused("rvtest0", 2).contains("multi_queue"));
        assert!(refused("lo", 1).contains("lo"));
        assert!(refused("rvtest0", 0).contains("0 queues"));
        let options = NetOptions { mtu: Some(9000), ..options(single, 1) };
        let error = VirtioNet::new(options, &PlainThreads, Arc::new(crate::NoNotifier)).err().unwrap();
        assert!(error.to_string().contains("ip link set rvtest0 mtu 9000"), "{error}");
        let (a, _b) = UnixDatagram::pair().unwrap();
        assert!(matches!(Tap::from_fds(vec![a.into()]), Err(TapError::NotATap { index: 0, .. })));
        assert!(matches!(Tap::from_fds(Vec::new()), Err(TapError::Count { .. })));
        let fd = open_tap_with(sys::IFF_TAP | sys::IFF_NO_PI);
        assert!(matches!(Tap::from_fds(vec![fd]), Err(TapError::Flags { .. })));
        let two = vec![tap_fd("rvtest1"), tap_fd("rvtest2")];
        assert!(matches!(Tap::from_fds(two), Err(TapError::Flags { multi: true, .. })));
        let held = Tap::open("rvtest3", 2).unwrap();
        const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;
        // SAFETY: the request takes its argument by value.
        assert_eq!(unsafe { libc::ioctl(held.queue(0).unwrap().as_raw_fd(), TUNSETOWNER, 0) }, 0);
        // Without privileges: as another user, this thread only.
        // SAFETY: the raw system call changes this thread alone and takes no pointers.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        // Some machines keep /dev/net/tun for root; that is another remedy.
        let closed = std::fs::File::open("/dev/net/tun").is_err();
        let expected = |other: &str| if closed { "grant access to the device".to_owned() } else { other.to_owned() };
        assert!(refused("rvtest9", 1).contains(&expected("there is no tap rvtest9")));
        assert!(refused("rvtest3", 2).contains(&expected("no permission to use tap rvtest3")));
        drop(held);
    });
}

pub(in crate::net) fn open_tap_with(flags: u16) -> OwnedFd {
    let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    sys::set_interface(file.as_fd(), "rvtest8", flags).unwrap();
    file.into()
}

fn tap_fd(name: &str) -> OwnedFd {
    let tap = Tap::open(name, 1).unwrap();
    tap.queue(0).unwrap().try_clone_to_owned().unwrap()
}
