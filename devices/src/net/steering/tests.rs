//! Hashes against published vectors, and the kernel's program against ours.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};

use super::config::{HashConfig, RssConfig};
use super::flow::*;
use super::hash::{Hasher, KEY_LENGTH, Key};
use super::*;

/// The key of Microsoft's "Verifying the RSS hash calculation".
const KEY: Key = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b,
    0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac,
    0x01, 0xfa,
];
const ETHERNET: [u8; 12] = [0x52, 0x54, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1];

fn ipv4(protocol: u8, fragment: u16, source: [u8; 4], destination: [u8; 4], options: usize, rest: &[u8]) -> Vec<u8> {
    let mut header = [0x45 + options as u8, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
    header[6..8].copy_from_slice(&fragment.to_be_bytes());
    let options = vec![1; 4 * options];
    [&ETHERNET[..], &ETHERTYPE_IPV4, &header, &source, &destination, &options, rest].concat()
}

fn ipv6(next: u8, source: [u8; 16], destination: [u8; 16], rest: &[u8]) -> Vec<u8> {
    let header = [0x60, 0, 0, 0, 0, 0, next, 64];
    [&ETHERNET[..], &ETHERTYPE_IPV6, &header, &source, &destination, rest].concat()
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    [&source.to_be_bytes()[..], &destination.to_be_bytes(), &[0; 16]].concat()
}

/// `struct virtio_net_rss_config`.
fn rss(types: u32, unclassified: u16, table: &[u16], transmit: u16, key: &[u8]) -> Vec<u8> {
    let mask = (table.len() as u16).wrapping_sub(1).to_le_bytes();
    let table: Vec<u8> = table.iter().flat_map(|queue| queue.to_le_bytes()).collect();
    let (unclassified, transmit) = (unclassified.to_le_bytes(), transmit.to_le_bytes());
    [&types.to_le_bytes()[..], &mask, &unclassified, &table, &transmit, &[key.len() as u8], key].concat()
}

fn config(types: u32, unclassified: u16, table: &[u16]) -> RssConfig {
    RssConfig::parse(&rss(types, unclassified, table, 1, &KEY), 256).unwrap()
}

/// The program, where this machine lets us have it.
fn steering() -> Option<Steering> {
    match Steering::new() {
        Ok(steering) => Some(steering),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            eprintln!("SKIPPED: this test needs root (CAP_BPF and CAP_PERFMON)");
            None
        }
        Err(error) => {
            let map = sys::create_map(WORDS).unwrap();
            let mut log = vec![0; 1 << 20];
            let _ = sys::load_program(&program::build(map.as_fd()), &mut log);
            let log = String::from_utf8_lossy(&log);
            let log = log.trim_end_matches('\0');
            panic!("{error}: {}", &log[log.len().saturating_sub(2000)..]);
        }
    }
}

#[test]
fn the_published_vectors_for_ipv4_have_their_hashes() {
    let hasher = Hasher::new(SUPPORTED, &KEY);
    let vectors: [(&str, u16, &str, u16, u32, u32); 5] = [
        ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323e_8fc2, 0x51cc_c178),
        ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xd718_262a, 0xc626_b0ea),
        ("24.19.198.95", 12898, "12.22.207.184", 38024, 0xd2d0_a5de, 0x5c2b_394a),
        ("38.27.205.30", 48228, "209.142.163.6", 2217, 0x8298_9176, 0xafc7_327f),
        ("153.39.163.191", 44251, "202.188.127.2", 1303, 0x5d18_09c5, 0x10e8_28a2),
    ];
    for (source, source_port, destination, destination_port, plain, with_ports) in vectors {
        let octets = |address: &str| address.parse::<Ipv4Addr>().unwrap().octets();
        let of = |protocol| {
            let ports = ports(source_port, destination_port);
            hasher.report(&ipv4(protocol, 0, octets(source), octets(destination), 0, &ports))
        };
        assert_eq!(of(1), (plain, 1), "{source}");
        assert_eq!(of(TCP), (with_ports, 2), "{source}");
        assert_eq!(of(UDP), (with_ports, 3), "{source}");
    }
}

#[test]
fn the_published_vectors_for_ipv6_have_their_hashes() {
    let hasher = Hasher::new(SUPPORTED, &KEY);
    let vectors: [(&str, u16, &str, u16, u32, u32); 3] = [
        ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2cc1_8cd5, 0x4020_7d3d),
        ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0x0f0c_461c, 0xdde5_1bbf),
        ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, "fe80::200:f8ff:fe21:67cf", 38024, 0x4b61_e985, 0x02d1_feef),
    ];
    for (source, source_port, destination, destination_port, plain, with_ports) in vectors {
        let octets = |address: &str| address.parse::<Ipv6Addr>().unwrap().octets();
        let of = |next, before: &[u8]| {
            let rest = [before, &ports(source_port, destination_port)].concat();
            hasher.report(&ipv6(next, octets(source), octets(destination), &rest))
        };
        assert_eq!(of(58, &[]), (plain, 4), "{source}");
        assert_eq!(of(TCP, &[]), (with_ports, 5), "{source}");
        assert_eq!(of(UDP, &[]), (with_ports, 6), "{source}");
        // Extension headers are skipped: hop-by-hop options of 16 bytes, then a fragment that is all there is.
        let extensions = [&[FRAGMENT, 1, 0, 0][..], &[0; 12], &[TCP, 0, 0, 0, 1, 2, 3, 4]].concat();
        assert_eq!(of(0, &extensions), (with_ports, 5), "{source}");
        assert_eq!(of(FRAGMENT, &[TCP, 0, 0, 1, 1, 2, 3, 4]), (plain, 4), "more fragments follow");
    }
}

#[test]
fn a_frame_is_hashed_by_the_first_enabled_type_that_it_has() {
    let of = |types, frame: &[u8]| Hasher::new(types, &KEY).report(frame).1;
    let tcp = ipv4(TCP, 0, [10, 0, 0, 1], [10, 0, 0, 2], 0, &ports(1, 2));
    assert_eq!([of(TCPV4 | IPV4, &tcp), of(IPV4, &tcp), of(UDPV4 | IPV4, &tcp), of(UDPV4, &tcp)], [2, 1, 1, 0]);
    assert_eq!(of(SUPPORTED & !(TCPV4 | IPV4), &tcp), 0);
    let fragment = ipv4(UDP, 0x2000, [10, 0, 0, 1], [10, 0, 0, 2], 0, &ports(1, 2));
    assert_eq!([of(SUPPORTED, &fragment), of(UDPV4, &fragment)], [1, 0], "other fragments have no ports");
    let whole = ipv4(UDP, 0x4000, [10, 0, 0, 1], [10, 0, 0, 2], 10, &ports(1, 2));
    assert_eq!(of(SUPPORTED, &whole), 3, "it must not be fragmented, and has options");
    assert_eq!(of(SUPPORTED, &tcp[..37]), 1, "the ports are cut off");
    assert_eq!(of(SUPPORTED, &tcp[..33]), 0, "the addresses are cut off");
    let tagged = |tags: &[u8]| [&tcp[..12], tags, &tcp[12..]].concat();
    assert_eq!(of(SUPPORTED, &tagged(&[0x81, 0, 0, 5])), 2);
    assert_eq!(of(SUPPORTED, &tagged(&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5])), 2);
    assert_eq!(of(SUPPORTED, &tagged(&[0x81, 0, 0, 5].repeat(3))), 0);
    let arp = [&ETHERNET[..], &[8, 6], &[0; 28]].concat();
    assert_eq!(of(SUPPORTED, &arp), 0);
}

/// xorshift: the same frames in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.below(256) as u8)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A frame that looks right, mostly.
    fn frame(&mut self) -> Vec<u8> {
        let ports = self.bytes::<24>();
        let mut frame = match self.below(5) {
            0 | 1 => {
                let (protocol, fragment) = (self.of(&[TCP, UDP, 1, 47]), self.of(&[0, 0, 0x4000, 0x2000, 5]));
                let (source, destination) = (self.bytes(), self.bytes());
                ipv4(protocol, fragment, source, destination, self.of(&[0, 0, 1, 10]), &ports)
            }
            2 | 3 => {
                let (first, mut rest) = self.extensions();
                rest.extend(ports);
                ipv6(first, self.bytes(), self.bytes(), &rest)
            }
            _ => [&ETHERNET[..], &self.bytes::<60>()].concat(),
        };
        for _ in 0..self.of(&[0, 0, 0, 1, 2, 3]) {
            let tag = [&self.of(&VLAN_TAGS)[..], &self.bytes::<2>()].concat();
            frame.splice(ETHERTYPE..ETHERTYPE, tag);
        }
        if self.below(8) == 0 {
            let at = ETHERTYPE + self.below(8) as usize;
            frame[at] = self.below(256) as u8;
        }
        if self.below(6) == 0 {
            // The kernel wants an Ethernet header, whose length the shortest frame has.
            frame.truncate(14 + self.below(frame.len() as u64 - 13) as usize);
        }
        frame
    }

    /// Extension headers with their first type: up to six, some of them long.
    fn extensions(&mut self) -> (u8, Vec<u8>) {
        let mut types: Vec<u8> = (0..self.below(7)).map(|_| self.of(&[0, 43, 60, FRAGMENT])).collect();
        types.push(self.of(&[TCP, UDP, 58, 50]));
        let mut rest = Vec::new();
        for pair in types.windows(2) {
            let length = if pair[0] == FRAGMENT { 0 } else { self.of(&[0u8, 0, 1, 3, 20, 28]) };
            let offset = if self.below(5) == 0 { self.bytes() } else { [0, self.of(&[0, 2, 6])] };
            rest.extend([&[pair[1], length][..], &offset, &[9; 4], &vec![9; 8 * usize::from(length)]].concat());
        }
        (types[0], rest)
    }
}

#[test]
fn the_kernel_steers_every_frame_as_its_hash_says() {
    let Some(steering) = steering() else { return };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut seen = [0; 10];
    for round in 0..60 {
        let types = if round % 3 == 0 { SUPPORTED } else { random.below(64) as u32 };
        let table: Vec<u16> = (0..1 << random.below(8)).map(|_| random.below(200) as u16).collect();
        let key = random.bytes::<KEY_LENGTH>();
        let config = RssConfig::parse(&rss(types, 222, &table, 1, &key), 256).unwrap();
        let hasher = config.hash.hasher();
        steering.set(&config, &hasher);
        for _ in 0..300 {
            let frame = random.frame();
            let (hash, report) = hasher.report(&frame);
            seen[usize::from(report)] += 1;
            let expected = if report == 0 { 222 } else { table[hash as usize % table.len()] };
            let queue = sys::run_program(steering.program(), &frame).unwrap();
            assert_eq!(queue, u32::from(expected), "types {types:#x}, report {report}: {frame:x?}");
        }
    }
    assert!(seen[..7].iter().all(|count| *count > 100), "all kinds of frames came: {seen:?}");
}

#[test]
fn no_frame_is_steered_by_a_table_that_is_half_written() {
    let Some(steering) = steering() else { return };
    // Queue 3 is named where the configuration never looks.
    let (one, other) = (config(0, 1, &[3; 128]), config(SUPPORTED, 3, &[2; 128]));
    let frame = ipv4(TCP, 0, [10, 0, 0, 1], [10, 0, 0, 2], 0, &ports(1, 2));
    let hashers = [one.hash.hasher(), other.hash.hasher()];
    steering.set(&one, &hashers[0]);
    let done = AtomicBool::new(false);
    let mut seen = [0; 4];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // An odd number, so that each place holds the one and the other.
                steering.set(&other, &hashers[1]);
                steering.set(&other, &hashers[1]);
                steering.set(&one, &hashers[0]);
            }
        });
        for _ in 0..100_000 {
            seen[sys::run_program(steering.program(), &frame).unwrap() as usize] += 1;
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(seen[3], 0, "{seen:?}");
}

#[test]
fn a_configuration_that_breaks_a_rule_is_refused_whole() {
    let good = rss(SUPPORTED, 1, &[0, 1, 2, 3], 4, &KEY);
    let parsed = RssConfig::parse(&good, 4).unwrap();
    assert_eq!(parsed.pairs(), 4);
    assert_eq!(parsed.receivers().collect::<Vec<u16>>(), [0, 1, 2, 3, 1]);
    for length in 0..good.len() {
        assert_eq!(RssConfig::parse(&good[..length], 4), None, "cut after {length} bytes");
    }
    assert_eq!(RssConfig::parse(&good, 3), None, "queue 3 and 4 transmit queues of 3");
    let refused = |data: Vec<u8>, why: &str| assert_eq!(RssConfig::parse(&data, 4), None, "{why}");
    refused(rss(1 << 6, 0, &[0], 1, &KEY), "a type that is not offered");
    refused(rss(1 << 31, 0, &[0], 1, &KEY), "a type that nobody knows");
    refused(rss(SUPPORTED, 4, &[0], 1, &KEY), "unclassified queue out of range");
    refused(rss(SUPPORTED, 0, &[0, 4], 1, &KEY), "queue out of range");
    refused(rss(SUPPORTED, 0, &[0, 0xffff], 1, &KEY), "a reserved bit");
    refused(rss(SUPPORTED, 0, &[0, 1, 2], 1, &KEY), "no power of two");
    refused(rss(SUPPORTED, 0, &[0; 256], 1, &KEY), "too many entries");
    refused(rss(SUPPORTED, 0, &[], 1, &KEY), "65536 entries, by the mask");
    refused(rss(SUPPORTED, 0, &[0], 0, &KEY), "no transmit queue");
    refused(rss(SUPPORTED, 0, &[0], 5, &KEY), "more transmit queues than there are");
    refused(rss(SUPPORTED, 0, &[0], 1, &[0; 41]), "a key that is too long");
    refused(rss(SUPPORTED, 0, &[0], 1, &[]), "no key");
    assert!(RssConfig::parse(&rss(0, 0, &[0], 1, &[]), 4).is_some(), "without hashes there needs no key");
    let more_receivers = RssConfig::parse(&rss(SUPPORTED, 0, &[0; 128], 3, &KEY[..16]), 4).unwrap();
    assert_eq!(more_receivers.pairs(), 3, "transmit queues are used, too");
}

#[test]
fn hashes_are_configured_with_types_that_are_offered_and_a_key_that_fits() {
    let hash = |types: u32, reserved: u8, key: &[u8]| {
        let reserved = [0, 0, 0, 0, 0, 0, 0, reserved];
        HashConfig::parse(&[&types.to_le_bytes()[..], &reserved, &[key.len() as u8], key].concat())
    };
    assert_eq!(hash(TCPV4, 0, &KEY).unwrap().hasher(), Hasher::new(TCPV4, &KEY));
    let mut short = KEY;
    short[16..].fill(0);
    assert_eq!(hash(IPV4, 0, &KEY[..16]).unwrap().hasher(), Hasher::new(IPV4, &short));
    for (refused, why) in [
        (hash(1 << 8, 0, &KEY), "a type that is not offered"),
        (hash(IPV4, 1, &KEY), "what is reserved"),
        (hash(IPV4, 0, &[1; 41]), "a key that is too long"),
        (hash(IPV4, 0, &[]), "no key"),
        (HashConfig::parse(&[0; 12]), "cut"),
    ] {
        assert_eq!(refused, None, "{why}");
    }
}
