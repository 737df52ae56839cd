//! A guest on a port of a bridge that sends and sends back.

use std::net::{Ipv4Addr, Ipv6Addr};

use rackvisor_api::VmConfig;
use rackvisor_api::size::ByteSize;

use crate::{Guest, Port, Rackvisor, linux_with_net};

/// The port, of TCP and UDP, where each guest sends back what it is sent.
pub(crate) const ECHO: u16 = 7;
/// Bytes of a datagram: with all headers, even of IPv6, no packet is larger than 1500.
const DATAGRAM: u32 = 1400;
/// So many datagrams, a quarter of a megabyte, fit into every queue on their way.
const DATAGRAMS: u32 = 180;

/// A VM on a port.
pub struct Node {
    /// Its console.
    pub guest: Guest,
    /// Its process.
    pub vmm: Rackvisor,
    /// Its port, which goes when the process is gone.
    pub port: Port,
}

/// Boots a guest on each port, all at a time. `change` gets its place in the array.
pub fn nodes<const N: usize>(ports: [Port; N], change: impl Fn(usize, &mut VmConfig)) -> [Node; N] {
    let mut place = 0;
    let mut nodes = ports.map(|port| {
        let mut config = linux_with_net();
        config.memory.size = ByteSize::mib(384);
        config.nics = vec![port.nic.clone()];
        change(place, &mut config);
        place += 1;
        let vmm = Rackvisor::start();
        Node { guest: vmm.boot_with_console(&config), vmm, port }
    });
    nodes.iter_mut().for_each(Node::prepare);
    nodes
}

impl Node {
    /// Bytes of the data that each guest sends over TCP.
    pub const DATA: u64 = 3 << 20;

    fn prepare(&mut self) {
        self.guest.wait_ready();
        self.plug_in();
        // Data that no other guest has, and buffers that take all datagrams at once. Over TCP all is sent back only when all is
        // there: socat on the other end cannot receive while it waits to send.
        self.guest.ok(&format!(
            "echo 8000000 >/proc/sys/net/core/rmem_default; \
             head -c {} /dev/urandom >/tmp/data; sha256sum </tmp/data >/tmp/sum; head -c {} /tmp/data >/tmp/datagrams; \
             socat -t170 TCP6-LISTEN:{ECHO},reuseaddr,fork,backlog=64 \
             SYSTEM:'f=/tmp/echo.$$; cat >$f; cat $f; rm $f' >/dev/null 2>/run/echo &",
            Self::DATA,
            DATAGRAM * DATAGRAMS,
        ));
    }

    /// Gives eth0 its addresses, as at the start; after the driver has had a new card, too.
    pub fn plug_in(&mut self) {
        let Port { address, gateway, .. } = self.port;
        let route = gateway.map(|gateway| format!("&& ip route add default via {gateway}")).unwrap_or_default();
        self.guest.ok(&format!(
            "echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip link set eth0 up && ip address add {address}/24 dev eth0 && \
             ip address add {}/64 dev eth0 {route}",
            self.address6()
        ));
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.port.address
    }

    /// Its address in IPv6.
    pub fn address6(&self) -> Ipv6Addr {
        let [_, _, net, host] = self.port.address.octets();
        Ipv6Addr::new(0xfd00, 0, 0, net.into(), 0, 0, 0, host.into())
    }

    /// Pings `to` once, and waits up to five seconds for the answer.
    pub fn pings(&mut self, to: impl std::fmt::Display) -> bool {
        self.guest.run(&format!("ping -c 1 -W 5 {to}")).0 == 0
    }

    /// Sends its data to `other` over TCP and its datagrams over UDP, by IPv6 or IPv4; `other` sends both back, and what comes
    /// is as it was.
    pub fn exchanges_with(&mut self, other: &mut Self, v6: bool) {
        let (version, to) = if v6 { (6, format!("[{}]", other.address6())) } else { (4, other.address().to_string()) };
        let echo = format!("{version}:{to}:{ECHO}");
        let wanted = self.guest.ok("cat /tmp/sum");
        let tcp = format!("socat -b65536 -t170 - TCP{echo},retry=50,interval=0.1 </tmp/data | sha256sum");
        assert_eq!(self.guest.ok(&tcp), wanted, "by TCP{version}");
        // The switch may let datagrams overtake others while it learns the way, and drop some: on a busy machine, most.
        let enough = (0..3).any(|_| self.datagrams_back(other, version, &echo) >= DATAGRAMS / 2);
        assert!(enough, "most datagrams are lost by UDP{version}: {}", self.guest.ok("grep ^Udp: /proc/net/snmp"));
    }

    /// Sends its datagrams to `other`, who sends them back; gives how many came. Nobody may have changed one.
    fn datagrams_back(&mut self, other: &mut Self, version: u32, echo: &str) -> u32 {
        // For one peer only: one that forks has two sockets for a moment.
        other.guest.ok(&format!(
            "socat -b{DATAGRAM} UDP6-LISTEN:{ECHO},reuseaddr,null-eof,shut-null PIPE >/dev/null 2>&1 & \
             until netstat -lun | grep -q ':{ECHO} '; do usleep 10000; done"
        ));
        self.guest.ok(&format!("socat -b{DATAGRAM} -t20 - UDP{echo},null-eof,shut-null </tmp/datagrams >/tmp/back"));
        let each = |name: &str| format!("xxd -p -c{DATAGRAM} /tmp/{name} | sort -u >/tmp/{name}.each");
        self.guest.ok(&format!("{}; {}", each("datagrams"), each("back")));
        let spoiled = self
            .guest
            .ok("sort /tmp/datagrams.each /tmp/datagrams.each /tmp/back.each | uniq -u | wc -l")
            .trim()
            .to_owned();
        assert_eq!(spoiled, "0", "spoiled datagrams by UDP{version}");
        self.guest.ok("wc -l </tmp/back.each").trim().parse().unwrap()
    }

    /// What of this kind was dropped, either way, for any of these reasons.
    pub fn drops(&self, reasons: &[&str]) -> u64 {
        reasons.iter().map(|reason| self.vmm.counted(&["_drops", &format!("reason=\"{reason}\"")])).sum()
    }

    /// That the guest's kernel has nothing to say about the NIC or itself.
    pub fn assert_no_complaint(&mut self) {
        let complaints =
            self.guest.ok("dmesg | grep -E 'WATCHDOG|timed out|BUG|WARNING: CPU|blocked for more|stall' || true");
        assert_eq!(complaints, "");
    }
}
