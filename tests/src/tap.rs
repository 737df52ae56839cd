//! Taps.

use std::net::{Ipv4Addr, UdpSocket};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use rackvisor_api::config::{NicConfig, TapFds};
use rackvisor_devices::net::open_queues;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType, sockopt};

use crate::PATIENCE;
use crate::programs::tool;

static NUMBER: AtomicU8 = AtomicU8::new(0);

/// Why taps cannot be made here.
pub fn taps_are_missing() -> Option<String> {
    open_queues(&format!("rvp{}", std::process::id()), 1).err().map(|error| error.to_string())
}

/// A tap of the host with an address, removed when dropped. Each has a network of its own: the host is .1, the guest .2.
pub struct Tap {
    /// The name of the interface.
    pub name: String,
    network: [u8; 2],
    flags: &'static str,
}

fn ip(arguments: &str) {
    tool("ip", arguments);
}

impl Tap {
    /// Makes a tap; needs root.
    pub fn new() -> Self {
        Self::with_flags("vnet_hdr")
    }

    /// Makes a tap that may have several queues; needs root.
    pub fn multi_queue() -> Self {
        Self::with_flags("vnet_hdr multi_queue")
    }

    fn with_flags(flags: &'static str) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let tap = Self { name: format!("rvt{pid}.{number}"), network: [(pid % 251) as u8, number], flags };
        tap.make();
        tap
    }

    /// Makes it, also again after [`Tap::delete`].
    pub fn make(&self) {
        ip(&format!("tuntap add dev {} mode tap {}", self.name, self.flags));
        ip(&format!("addr add {}/24 dev {}", self.host(), self.name));
        ip(&format!("link set {} up", self.name));
    }

    /// Takes it from whoever has it.
    pub fn delete(&self) {
        ip(&format!("link delete {}", self.name));
    }

    /// The address of the host.
    pub fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.network[0], self.network[1], 1)
    }

    /// The address of the guest.
    pub fn guest(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.network[0], self.network[1], 2)
    }

    /// An address of its network that nobody has, with an Ethernet address that the host believes in.
    pub fn neighbour(&self) -> Ipv4Addr {
        let address = Ipv4Addr::new(10, self.network[0], self.network[1], 77);
        ip(&format!("neigh replace {address} lladdr 52:54:00:77:77:77 dev {}", self.name));
        address
    }

    /// Sends a datagram into the tap.
    pub fn send_to(&self, address: Ipv4Addr) {
        let socket = UdpSocket::bind((self.host(), 0)).unwrap();
        socket.send_to(b"is anybody there?", (address, 9)).unwrap();
    }

    /// A NIC on it.
    pub fn nic(&self) -> NicConfig {
        NicConfig::new("net0", self.name.clone(), "52:54:00:12:34:56".parse().unwrap())
    }

    /// A NIC on it that has its only queue as a descriptor.
    pub fn nic_with(&self, tap_fds: TapFds) -> NicConfig {
        NicConfig { tap: None, tap_fds: Some(tap_fds), ..self.nic() }
    }

    /// Its only queue, as a host agent opens it.
    pub fn queue(&self) -> OwnedFd {
        open_queues(&self.name, 1).unwrap().remove(0)
    }

    /// What makes the guest use it.
    pub fn cmdline(&self) -> String {
        format!(" rv.ip={}/24 rv.gw={}", self.guest(), self.host())
    }
}

impl Default for Tap {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.name]).status();
    }
}

/// Hears each reverse-ARP frame that comes to an interface of the host.
pub struct Rarps(OwnedFd);

impl Rarps {
    /// Listens from now on; needs root.
    pub fn listen() -> Self {
        // ETH_P_RARP, in network order.
        let protocol = NonZeroU32::new(0x8035_u16.to_be().into()).map(Protocol::from_raw);
        let socket = rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, protocol).unwrap();
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE)).unwrap();
        Self(socket)
    }

    /// The next one, from its Ethernet header on.
    pub fn next(&self) -> Vec<u8> {
        let mut frame = vec![0; 2048];
        let (length, _) = rustix::net::recv(&self.0, frame.as_mut_slice(), RecvFlags::empty()).unwrap();
        frame.truncate(length);
        frame
    }
}
