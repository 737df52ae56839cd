//! Guests on bridges of Open vSwitch.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use rackvisor_api::config::{Link, NicPatch};
use rackvisor_tests::{
    Bridge, Guest, Laps, Node, PATIENCE, PortOptions, Rarps, Station, eventually, needs_sdn, nodes, pairwise,
};

/// What a guest does itself and what it leaves to others when it sends and receives.
#[derive(Clone, Copy, Debug)]
struct Offloads {
    checksum: bool,
    tso: bool,
    gso: bool,
    gro: bool,
    gro_hw: bool,
}

impl Offloads {
    /// The levels of the factors of [`Offloads::new`].
    const LEVELS: [usize; 4] = [3, 2, 2, 2];

    fn new(levels: &[usize]) -> Self {
        // No segments without checksums.
        let (checksum, tso) = (levels[0] > 0, levels[0] > 1);
        Self { checksum, tso, gso: levels[1] > 0, gro: levels[2] > 0, gro_hw: levels[3] > 0 }
    }

    fn apply(self, guest: &mut Guest) {
        let settings = [
            ("tx", "tx-checksumming", self.checksum),
            ("tso", "tcp-segmentation-offload", self.tso),
            ("gso", "generic-segmentation-offload", self.gso),
            ("gro", "generic-receive-offload", self.gro),
            ("rx-gro-hw", "rx-gro-hw", self.gro_hw),
        ];
        let on = |on| if on { "on" } else { "off" };
        let words: String = settings.iter().map(|(word, _, is)| format!(" {word} {}", on(*is))).collect();
        let found = guest.ok(&format!("ethtool -K eth0{words} >/dev/null; ethtool -k eth0 | grep -v fixed"));
        for (_, name, is) in settings {
            let line = found.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap();
            assert_eq!(line.trim(), on(is), "{name}, of {self:?}");
        }
    }
}

#[test]
fn two_guests_on_a_bridge_exchange_tcp_and_udp_unharmed_with_every_pair_of_offload_settings() {
    needs_sdn!();
    exchange_with_offloads(false);
}

#[test]
fn a_guest_on_vhost_exchanges_tcp_and_udp_unharmed_with_every_pair_of_its_offload_settings() {
    needs_sdn!();
    exchange_with_offloads(true);
}

/// `vhost`: the first guest's frames are moved by vhost-net, and the second, whose are not, is left as it is.
fn exchange_with_offloads(vhost: bool) {
    let bridge = Bridge::new();
    let ports = [bridge.port(1), bridge.port(2)];
    let [mut one, mut two] = nodes(ports, |place, config| config.nics[0].vhost = vhost && place == 0);
    if vhost {
        eventually("vhost-net has the rings", || (one.vmm.counted(&["net_vhost_engaged{"]) == 1).then_some(()));
    }
    let varied = if vhost { 1 } else { 2 };
    let levels = [Offloads::LEVELS.repeat(varied), vec![2]].concat();
    for row in pairwise(&levels) {
        let v6 = row[4 * varied] > 0;
        println!("IPv{}", if v6 { 6 } else { 4 });
        for (node, levels) in [&mut one, &mut two].into_iter().zip(row.chunks_exact(4)) {
            let offloads = Offloads::new(levels);
            println!("{offloads:?}");
            offloads.apply(&mut node.guest);
        }
        one.exchanges_with(&mut two, v6);
    }
    for node in [&mut one, &mut two] {
        assert_eq!(node.drops(&["malformed", "oversize", "refused", "offload", "bad_buffer", "tap_error"]), 0);
        node.assert_no_complaint();
    }
}

/// Fragments that the guest made, and those that it put together.
fn fragments(guest: &mut Guest) -> String {
    guest.ok("grep ^Ip: /proc/net/snmp | tail -n 1 | cut -d ' ' -f 15,19")
}

#[test]
fn frames_of_9000_bytes_pass_whole_and_no_packet_is_cut_on_its_way() {
    needs_sdn!();
    let bridge = Bridge::new();
    let jumbo = PortOptions { mtu: Some(9000), ..PortOptions::default() };
    let [mut one, mut two] = nodes([bridge.port_with(1, &jumbo), bridge.port_with(2, &jumbo)], |_, _| ());
    let whole = |one: &mut Node, two: &Node, size: u32| {
        let before = fragments(&mut one.guest);
        one.guest.ok(&format!("ping -c 5 -s {size} {}", two.address()));
        fragments(&mut one.guest) == before
    };
    for node in [&mut one, &mut two] {
        assert_eq!(node.guest.ok("cat /sys/class/net/eth0/mtu"), "9000", "the guest takes the MTU that it is told");
    }
    assert!(whole(&mut one, &two, 8972));
    assert!(!whole(&mut one, &two, 8973), "nobody would see fragments");
    // Frames as large as the MTU, no larger and hardly any smaller ones.
    for node in [&mut one, &mut two] {
        node.guest.ok("ethtool -K eth0 tso off gso off gro off rx-gro-hw off");
    }
    let sent = |node: &Node| node.vmm.client.nic("net0").unwrap().counters;
    let before = sent(&one);
    two.exchanges_with(&mut one, false);
    let after = sent(&one);
    let (frames, bytes) = (after.tx_frames - before.tx_frames, after.tx_bytes - before.tx_bytes);
    assert!(bytes > Node::DATA && bytes / frames > 2000, "{bytes} bytes in {frames} frames");
}

#[test]
fn queue_pairs_come_and_go_under_load_and_nothing_stalls_or_is_spoiled() {
    needs_sdn!();
    let bridge = Bridge::new();
    let four = PortOptions { queues: 4, ..PortOptions::default() };
    let ports = [bridge.port_with(1, &four), bridge.port(2)];
    let [mut one, mut two] = nodes(ports, |place, config| config.cpus.count = if place == 0 { 2 } else { 1 });
    let frames = |queue: &str| {
        let queue = format!("queue=\"{queue}\"");
        one.vmm.counted(&["net_rx_packets", &queue]) + one.vmm.counted(&["net_tx_packets", &queue])
    };
    let load = Laps::echo(&mut two.guest, one.port.address, 4);
    for pairs in [4, 1, 2, 4, 2, 1, 4] {
        one.guest.ok(&format!("ethtool -L eth0 combined {pairs}"));
        let last = (pairs - 1).to_string();
        let before = frames(&last);
        eventually("the last of the pairs is used", || (frames(&last) > before).then_some(()));
        let others: Vec<_> = (pairs..4).map(|queue| queue.to_string()).collect();
        eventually("the others are used no more", || {
            let before: u64 = others.iter().map(|queue| frames(queue)).sum();
            load.wait_for(&mut two.guest, 1);
            (others.iter().map(|queue| frames(queue)).sum::<u64>() == before).then_some(())
        });
    }
    assert!(load.finish(&mut two.guest) >= 7);
    assert_eq!(one.drops(&["tap_error"]), 0, "a queue of the tap was used out of service");
    one.assert_no_complaint();
}

#[test]
fn a_transfer_goes_on_when_the_cable_comes_back_and_what_was_sent_arrives() {
    needs_sdn!();
    let bridge = Bridge::new();
    let [mut one, mut two] = nodes([bridge.port(1), bridge.port(2)], |_, _| ());
    let load = Laps::echo(&mut two.guest, one.address(), 2);
    for flap in 0..4 {
        let flapping = if flap % 2 == 0 { &one.vmm } else { &two.vmm };
        let received = || flapping.client.nic("net0").unwrap().counters.rx_bytes;
        let before = received();
        eventually("data flows", || (received() > before + (1 << 20)).then_some(()));
        flapping.client.patch_nic("net0", &NicPatch::link(Link::Down)).unwrap();
        // Long enough for some to be lost, too short for TCP to become slow.
        thread::sleep(Duration::from_millis(200));
        let before = received();
        flapping.client.patch_nic("net0", &NicPatch::link(Link::Up)).unwrap();
        eventually("data flows again", || (received() > before).then_some(()));
    }
    assert!(load.finish(&mut two.guest) > 0);
    assert!(one.drops(&["link_down"]) + two.drops(&["link_down"]) > 0, "nothing was under way when the link went down");
    for node in [&mut one, &mut two] {
        node.assert_no_complaint();
    }
}

/// Makes this host ask, on its VLAN, where an address is that nobody has. Such a broadcast goes to all.
fn shout(station: &Station) {
    let [a, b, c, _] = station.address.octets();
    station.within(|| {
        let socket = UdpSocket::bind((station.address, 0)).unwrap();
        socket.send_to(b"is anybody there?", (Ipv4Addr::new(a, b, c, 77), 9)).unwrap();
    });
}

#[test]
fn a_guest_on_a_trunk_gets_the_vlans_that_it_asked_for_and_no_others() {
    needs_sdn!();
    let bridge = Bridge::new();
    let station = |vlan: u8| bridge.station(Ipv4Addr::new(10, 0, vlan, 1), Some(vlan.into()));
    let stations = [10, 20, 30].map(station);
    let trunk = PortOptions { trunks: Some("10,20".into()), ..PortOptions::default() };
    let [mut node] = nodes([bridge.port_with(2, &trunk)], |_, _| ());
    let add = |vlan| {
        format!(
            "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad; ip link add link eth0 name eth0.{vlan} type vlan id {vlan} && \
             ip address add 10.0.{vlan}.2/24 dev eth0.{vlan} && ip link set eth0.{vlan} up"
        )
    };
    node.guest.ok(&add(10));
    assert!(node.pings(stations[0].address));
    let filtered = |node: &Node| node.drops(&["filtered"]);
    let received = |node: &Node| node.vmm.client.nic("net0").unwrap().counters.rx_frames;
    let is_filtered = |node: &Node| {
        let (before, got) = (filtered(node), received(node));
        eventually("frames of VLAN 20 are kept from the guest", || {
            shout(&stations[1]);
            (filtered(node) > before + 2).then_some(())
        });
        assert_eq!(received(node), got);
    };
    is_filtered(&node);
    // Segments and checksums are left to the card under a tag, too.
    let (address, v10) = (stations[0].address, &stations[0]);
    let listener = v10.within(|| TcpListener::bind((address, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let sum = node.guest.ok("cut -d ' ' -f 1 /tmp/sum");
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            all
        });
        node.guest.ok(&format!("nc {address} {port} </tmp/data"));
        assert_eq!(rackvisor_tests::sha256(&reader.join().unwrap()), sum);
    });

    node.guest.ok(&add(20));
    assert!(node.pings(stations[1].address), "VLAN 20 is asked for");
    node.guest.ok(&add(30));
    shout(&stations[2]);
    assert!(!node.pings(stations[2].address), "VLAN 30 is not on the trunk");
    let heard = "cat /sys/class/net/eth0.30/statistics/rx_packets";
    assert_eq!(node.guest.ok(heard), "0", "it does not even come to the card, which would let it through");
    node.guest.ok("ip link del eth0.20");
    is_filtered(&node);
    assert!(node.pings(stations[0].address));
    node.assert_no_complaint();
}

#[test]
fn an_announcement_is_seen_on_another_port_of_the_bridge() {
    needs_sdn!();
    let bridge = Bridge::new();
    let station = bridge.station(Ipv4Addr::new(10, 0, 0, 1), None);
    let [mut node] = nodes([bridge.port(2)], |_, _| ());
    assert!(node.pings(station.address));
    let rarps = station.within(Rarps::listen);
    node.vmm.client.announce_nic("net0").unwrap();
    for _ in 0..5 {
        let frame = rarps.next();
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], node.port.nic.mac.bytes());
    }
}
