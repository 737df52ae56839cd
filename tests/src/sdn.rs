//! The laboratory's software-defined network: bridges of Open vSwitch, taps on them for guests, and stations for this host.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::thread;

use rackvisor_api::config::{MacAddr, NicConfig};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::programs::{output, tool};
use crate::unique;

/// Why tests that need Open vSwitch and OVN cannot run here.
pub fn sdn_is_missing() -> Option<&'static str> {
    crate::kvm_is_missing().or_else(|| {
        let there = std::env::var_os("LAB_SDN_BRIDGE").is_some() && Path::new("/run/ovn/ovnnb_db.sock").exists();
        (!there).then_some("there is no OVN of the laboratory here; run it by tests/lab/run --sdn=ovn")
    })
}

/// Ends the test, loudly, where there is no KVM that runs stock kernels, or no OVN.
#[macro_export]
macro_rules! needs_sdn {
    () => {
        if let Some(why) = $crate::sdn_is_missing() {
            return $crate::skip(why);
        }
    };
}

fn ip(words: &str) {
    tool("ip", words);
}

fn vsctl(words: &str) {
    tool("ovs-vsctl", &format!("--timeout=60 {words}"));
}

/// A name for an interface or namespace that nobody else has.
fn fresh_name(kind: &str) -> String {
    format!("{kind}{}.{}", std::process::id(), unique())
}

/// A bridge of Open vSwitch.
pub struct Bridge {
    /// The name of the bridge.
    pub name: String,
    own: bool,
}

impl Bridge {
    /// A learning switch of its own, removed when dropped.
    pub fn new() -> Self {
        let name = fresh_name("rvb");
        vsctl(&format!("add-br {name}"));
        Self { name, own: true }
    }

    /// The one that OVN programs.
    pub fn of_ovn() -> Self {
        Self { name: std::env::var("LAB_SDN_BRIDGE").unwrap(), own: false }
    }

    /// Plugs in a tap for guest `number`.
    pub fn port(&self, number: u8) -> Port {
        self.port_with(number, &PortOptions::default())
    }

    /// Plugs in a tap for guest `number` that is made otherwise.
    pub fn port_with(&self, number: u8, options: &PortOptions) -> Port {
        let tap = fresh_name("rvt");
        let flags = if options.queues > 1 { "vnet_hdr multi_queue" } else { "vnet_hdr" };
        ip(&format!("tuntap add dev {tap} mode tap {flags}"));
        ip(&format!("link set {tap} mtu {} up", options.mtu.unwrap_or(1500)));
        let mut words = format!("add-port {} {tap}", self.name);
        if let Some(vlans) = &options.trunks {
            words += &format!(" trunks={vlans}");
        }
        if let Some(id) = &options.iface_id {
            words += &format!(" -- set interface {tap} external_ids:iface-id={id}");
        }
        vsctl(&words);
        let nic = NicConfig {
            queues: options.queues,
            mtu: options.mtu,
            ..NicConfig::new("net0", tap, MacAddr::new([0x52, 0x54, 0, 0, 0, number]).unwrap())
        };
        Port { nic, address: Ipv4Addr::new(10, 0, 0, number), gateway: None }
    }

    /// Plugs in this host at `address`/24, on VLAN `tag` if there is one.
    pub fn station(&self, address: Ipv4Addr, tag: Option<u16>) -> Station {
        let name = fresh_name("rvs");
        let tag = tag.map(|tag| format!("tag={tag}")).unwrap_or_default();
        vsctl(&format!("add-port {} {name} {tag} -- set interface {name} type=internal", self.name));
        ip(&format!("netns add {name}"));
        ip(&format!("link set {name} netns {name}"));
        let station = Station { name, address };
        // It says nothing that no test asked for.
        station.ok("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6");
        station.ok(&format!("ip address add {address}/24 dev {0} && ip link set {0} up", station.name));
        station
    }
}

impl Default for Bridge {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        if self.own {
            let _ = Command::new("ovs-vsctl").args(["--timeout=60", "--if-exists", "del-br", &self.name]).status();
        }
    }
}

/// How a port is made.
#[derive(Clone, Debug)]
pub struct PortOptions {
    /// Queue pairs of the tap and the NIC.
    pub queues: u16,
    /// The MTU of both; 1500 and untold by default.
    pub mtu: Option<u16>,
    /// The VLANs that pass, with their tags.
    pub trunks: Option<String>,
    /// The logical port of OVN that it realises.
    pub iface_id: Option<String>,
}

impl Default for PortOptions {
    fn default() -> Self {
        Self { queues: 1, mtu: None, trunks: None, iface_id: None }
    }
}

/// A tap on a bridge, removed when dropped, and what the guest behind it has.
pub struct Port {
    /// The NIC.
    pub nic: NicConfig,
    /// The guest's address, in a network of 24 bits.
    pub address: Ipv4Addr,
    /// Its default route.
    pub gateway: Option<Ipv4Addr>,
}

impl Port {
    /// The guest behind it has this address and default route.
    pub fn at(mut self, address: Ipv4Addr, gateway: Ipv4Addr) -> Self {
        (self.address, self.gateway) = (address, Some(gateway));
        self
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let tap = self.nic.tap.as_deref().unwrap_or_default();
        let _ = Command::new("ovs-vsctl").args(["--timeout=60", "--if-exists", "del-port", tap]).status();
        let _ = Command::new("ip").args(["link", "delete", tap]).status();
    }
}

/// This host on a bridge, in a network namespace of its own; removed when dropped.
pub struct Station {
    /// The name of the interface, and of the namespace.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
}

impl Station {
    /// Runs a shell command there; says whether it succeeded.
    pub fn run(&self, command: &str) -> bool {
        Command::new("ip").args(["netns", "exec", &self.name, "sh", "-c", command]).output().unwrap().status.success()
    }

    /// Runs a shell command there that must succeed.
    pub fn ok(&self, command: &str) {
        assert!(self.run(command), "{command}, on the host's {}", self.name);
    }

    /// What `body` gives on a thread there. Sockets that it opens stay there.
    pub fn within<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                body()
            });
            there.join().unwrap()
        })
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        // The interface first: it would come back to us with the namespace's end.
        let _ = Command::new("ovs-vsctl").args(["--timeout=60", "--if-exists", "del-port", &self.name]).status();
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// What was made in OVN's northbound database, taken away when dropped.
pub struct Ovn {
    undo: Vec<String>,
}

impl Ovn {
    /// Runs `ovn-nbctl` with each of these lines, quoted as a shell wants it; then waits until the bridge does as they say.
    pub fn with(lines: &str) -> Self {
        let mut ovn = Self { undo: Vec::new() };
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (status, _, said) = output(Command::new("sh").args(["-c", &format!("ovn-nbctl {line}")]));
            assert_eq!(status, 0, "ovn-nbctl {line}: {said}");
            let mut words = line.split_whitespace();
            if let (Some(what @ ("ls-add" | "lr-add" | "lb-add")), Some(name)) = (words.next(), words.next()) {
                ovn.undo.push(format!("--if-exists {} {name}", what.replace("add", "del")));
            }
        }
        tool("ovn-nbctl", "--timeout=120 --wait=hv sync");
        ovn
    }
}

impl Drop for Ovn {
    fn drop(&mut self) {
        for undo in &self.undo {
            let _ = Command::new("ovn-nbctl").args(undo.split_whitespace()).status();
        }
    }
}
