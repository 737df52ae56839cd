//! Guests on logical switches of OVN.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::collections::BTreeSet;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;

use rackvisor_tests::{Bridge, Guest, Ovn, PATIENCE, Port, PortOptions, needs_sdn, nodes};

/// The tap of guest `number` on the logical port `vm<number>`.
fn port(net: u8, number: u8) -> Port {
    let options = PortOptions { iface_id: Some(format!("vm{number}")), ..PortOptions::default() };
    let at = |host| Ipv4Addr::new(10, 0, net, host);
    Bridge::of_ovn().port_with(number, &options).at(at(number), at(1))
}

/// What makes a logical switch `net<net>` with the ports of these guests, each of which may only use its own addresses.
fn switch(net: u8, guests: &[u8]) -> String {
    let port = |number| {
        let (id, addresses) = (format!("vm{number}"), format!("'52:54:00:00:00:{number:02x} 10.0.{net}.{number}'"));
        format!(
            "lsp-add net{net} {id} -- lsp-set-addresses {id} {addresses} -- lsp-set-port-security {id} {addresses}\n"
        )
    };
    format!("ls-add net{net}\n") + &guests.iter().map(port).collect::<String>()
}

/// The way to the outside: a bridge that OVN knows as the physical network `outside`.
struct Outside(Bridge);

impl Outside {
    /// The router's own address there.
    const ROUTER: Ipv4Addr = Ipv4Addr::new(172, 31, 9, 1);
    /// That of this host.
    const HOST: Ipv4Addr = Ipv4Addr::new(172, 31, 9, 2);
    /// What the router shares out among the guests.
    const VIRTUAL: Ipv4Addr = Ipv4Addr::new(172, 31, 9, 10);
    /// An address that is reached through this host only.
    const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

    fn new() -> Self {
        let bridge = Bridge::new();
        Self::map(&["set", "open_vswitch", ".", &format!("external_ids:ovn-bridge-mappings=outside:{}", bridge.name)]);
        Self(bridge)
    }

    fn map(words: &[&str]) {
        assert!(Command::new("ovs-vsctl").args(words).status().unwrap().success());
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        Self::map(&["remove", "open_vswitch", ".", "external_ids", "ovn-bridge-mappings"]);
    }
}

/// A router between `net1`, `net2` and the outside: it hides the guests behind its own address, and shares connections to a
/// virtual one out among them.
fn router() -> String {
    let inner = |net: u8| {
        format!(
            "lrp-add router to-net{net} 02:00:00:00:00:0{net} 10.0.{net}.1/24
             lsp-add net{net} from-net{net} -- lsp-set-type from-net{net} router -- lsp-set-addresses from-net{net} router -- \
             lsp-set-options from-net{net} router-port=to-net{net}\n"
        )
    };
    format!(
        "lr-add router -- set logical_router router options:chassis=lab
         {}{}
         ls-add outside
         lrp-add router to-outside 02:00:00:00:00:09 {router}/24
         lsp-add outside from-outside -- lsp-set-type from-outside router -- lsp-set-addresses from-outside router -- \
         lsp-set-options from-outside router-port=to-outside
         lsp-add outside wire -- lsp-set-type wire localnet -- lsp-set-addresses wire unknown -- \
         lsp-set-options wire network_name=outside
         lr-route-add router 0.0.0.0/0 {host}
         lr-nat-add router snat {router} 10.0.0.0/16
         lb-add shared {shared}:80 10.0.1.2:80,10.0.2.3:80 tcp
         lr-lb-add router shared",
        inner(1),
        inner(2),
        router = Outside::ROUTER,
        host = Outside::HOST,
        shared = Outside::VIRTUAL,
    )
}

#[test]
fn guests_on_two_switches_reach_each_other_and_the_outside_by_nat_and_share_the_connections_to_one_address() {
    needs_sdn!();
    let outside = Outside::new();
    let _ovn = Ovn::with(&(switch(1, &[2]) + &switch(2, &[3]) + &router()));
    let station = outside.0.station(Outside::HOST, None);
    station.ok(&format!("ip address add {}/32 dev lo && ip link set lo up", Outside::FAR));
    let [mut one, mut two] = nodes([port(1, 2), port(2, 3)], |_, _| ());

    // From one switch to the other, both ways.
    one.exchanges_with(&mut two, false);
    two.exchanges_with(&mut one, false);

    // Who is outside sees the router's address, and answers get to where they belong.
    let listener = station.within(|| TcpListener::bind((Outside::FAR, 0)).unwrap());
    let socket = station.within(|| UdpSocket::bind((Outside::FAR, 0)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let ask = |guest: &mut Guest, kind: &str, address: SocketAddr| {
        guest.send(&format!("echo question | socat -t60 - {kind}:{address},shut-none,readbytes=6"));
    };
    let heard = |peer: SocketAddr| assert_eq!(peer.ip(), IpAddr::from(Outside::ROUTER));
    for node in [&mut one, &mut two] {
        ask(&mut node.guest, "TCP4", listener.local_addr().unwrap());
        let (mut stream, peer) = listener.accept().unwrap();
        heard(peer);
        let mut question = [0; 9];
        stream.read_exact(&mut question).unwrap();
        std::io::Write::write_all(&mut stream, b"answer").unwrap();
        assert_eq!(node.guest.result(), (0, "answer".into()));

        ask(&mut node.guest, "UDP4", socket.local_addr().unwrap());
        let (length, peer) = socket.recv_from(&mut question).unwrap();
        heard(peer);
        assert_eq!(&question[..length], b"question\n");
        socket.send_to(b"answer", peer).unwrap();
        assert_eq!(node.guest.result(), (0, "answer".into()));
    }

    // Of many connections to the shared address each guest gets some, and nobody else any.
    for (node, name) in [(&mut one, "one"), (&mut two, "two")] {
        let serve = "socat -U TCP4-LISTEN:80,fork,reuseaddr OPEN:/run/name,rdonly >/dev/null 2>&1 &";
        node.guest.ok(&format!("printf {name} >/run/name; {serve}"));
        node.guest.ok("until netstat -ltn | grep -q ':80 '; do sleep 0.1; done");
    }
    let names: BTreeSet<String> = station.within(|| {
        let ask = |_| {
            let mut stream = TcpStream::connect((Outside::VIRTUAL, 80)).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut name = String::new();
            stream.read_to_string(&mut name).unwrap();
            name
        };
        (0..40).map(ask).collect()
    });
    assert_eq!(names, ["one", "two"].map(String::from).into());
}

#[test]
fn frames_under_a_forged_address_stop_at_ovns_port_security_and_no_other_guest_sees_them() {
    needs_sdn!();
    let _ovn = Ovn::with(&switch(1, &[2, 3]));
    let [mut forger, mut other] = nodes([port(1, 2), port(1, 3)], |_, _| ());
    // All that comes to the other one's card, as it is.
    other
        .guest
        .ok("ip link set eth0 promisc on; socat -u -b65536 INTERFACE:eth0 CREATE:/run/frames >/dev/null 2>&1 & \
         until grep -q 0003 /proc/net/packet; do sleep 0.1; done");
    let seen = |guest: &mut Guest, mac: &str| {
        guest.ok(&format!("xxd -p /run/frames | tr -d '\\n' | grep -o {mac} | wc -l")).parse::<u32>().unwrap()
    };
    assert!(forger.pings(other.address()));
    assert!(seen(&mut other.guest, "525400000002") > 0, "the capture sees nothing");

    let sent = |forger: &rackvisor_tests::Node| forger.vmm.client.nic("net0").unwrap().counters.tx_frames;
    let before = sent(&forger);
    forger.guest.ok("ip link set eth0 down; ip link set eth0 address 52:54:00:0f:0f:0f; ip link set eth0 up");
    forger.guest.ok(&format!("ip route replace default via {}; ip neigh flush dev eth0", other.address()));
    assert!(!forger.pings(other.address()), "a forged address was answered");
    assert!(sent(&forger) > before, "the forged frames were not even sent");
    assert_eq!(seen(&mut other.guest, "5254000f0f0f"), 0);

    // It is the address, nothing else.
    forger.guest.ok("ip link set eth0 down; ip link set eth0 address 52:54:00:00:00:02; ip link set eth0 up");
    assert!(forger.pings(other.address()));
    assert_eq!(seen(&mut other.guest, "5254000f0f0f"), 0);
}
