//! Taps.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use rackvisor_api::config::NicConfig;

static NUMBER: AtomicU8 = AtomicU8::new(0);

/// A tap of the host with an address, removed when dropped. Each has a network of its own: the host is .1, the guest .2.
pub struct Tap {
    /// The name of the interface.
    pub name: String,
    network: [u8; 2],
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Tap {
    /// Makes a tap; needs root.
    pub fn new() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let tap = Self { name: format!("rvt{pid}.{number}"), network: [(pid % 251) as u8, number] };
        ip(&format!("tuntap add dev {} mode tap vnet_hdr", tap.name));
        ip(&format!("addr add {}/24 dev {}", tap.host(), tap.name));
        ip(&format!("link set {} up", tap.name));
        tap
    }

    /// The address of the host.
    pub fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.network[0], self.network[1], 1)
    }

    /// The address of the guest.
    pub fn guest(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.network[0], self.network[1], 2)
    }

    /// A NIC on it.
    pub fn nic(&self) -> NicConfig {
        NicConfig::new("net0", self.name.clone(), "52:54:00:12:34:56".parse().unwrap())
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
