//! The network, seen from both sides.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::thread;

use rackvisor_api::config::{Link, NicConfig, NicLimitsPatch, NicPatch, Patch, TapFds};
use rackvisor_api::problem::Code;
use rackvisor_api::size::ByteSize;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{
    Guest, PATIENCE, Rackvisor, Rarps, Tap, assert_nothing_more, assert_same_bytes, eventually, impossible_in_a_jail,
    linux, linux_with_net, needs_kvm, needs_vhost, noise, sha256,
};

const AMOUNT: usize = 100_000_000;
/// Why a jailed VM has no RSS.
const RSS: &str = "RSS is an eBPF program on the tap: it takes capabilities, of which nobody in a jail has any";

/// A listener on the host's end of the tap; gives `nc` and its arguments to reach it.
fn listen(tap: &Tap) -> (TcpListener, String) {
    let listener = TcpListener::bind(SocketAddr::new(tap.host().into(), 0)).unwrap();
    let command = format!("nc {} {}", tap.host(), listener.local_addr().unwrap().port());
    (listener, command)
}

/// The value of the first metric whose line has all these parts.
fn metric(vmm: &Rackvisor, parts: &[&str]) -> f64 {
    let metrics = vmm.client.metrics().unwrap();
    let line = metrics.lines().find(|line| parts.iter().all(|part| line.contains(part)));
    line.unwrap_or_else(|| panic!("no {parts:?} in {metrics}")).rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits until vhost-net has the NIC's rings, or has them no more.
fn await_vhost(vmm: &Rackvisor, engaged: bool) {
    let wanted = f64::from(u8::from(engaged));
    eventually("vhost-net has the rings, or not", || {
        (metric(vmm, &["net_vhost_engaged{", "queue=\"0\""]) == wanted).then_some(())
    });
}

#[test]
fn a_hundred_megabytes_pass_through_the_tap_each_way_unharmed() {
    needs_kvm!();
    pass_a_hundred_megabytes(false);
}

#[test]
fn a_hundred_megabytes_pass_through_vhost_each_way_unharmed() {
    needs_vhost!();
    pass_a_hundred_megabytes(true);
}

fn pass_a_hundred_megabytes(vhost: bool) {
    let tap = Tap::new();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.boot.as_mut().unwrap().cmdline += &tap.cmdline();
    config.memory.size = ByteSize::mib(512);
    config.cpus.count = 2;
    config.nics = vec![NicConfig { vhost, ..tap.nic() }];
    let mut guest = vmm.boot_linux(&config);
    guest.ok(&format!("ping -c 3 {}", tap.host()));
    if vhost {
        await_vhost(&vmm, true);
        let at = vmm.client.inspect("devices/net0/queues/0/next_used").unwrap();
        assert!(at.is_null(), "where the kernel is nobody knows, and nobody is told {at}");
    }

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
    if vhost {
        await_vhost(&vmm, true);
        assert_eq!(metric(&vmm, &["net_vhost_errors_total{"]), 0.0);
    }

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
    if vhost {
        await_vhost(&vmm, true);
    }
}

/// A guest with this NIC that the host answers.
fn reachable(vmm: &Rackvisor, tap: &Tap, change: impl FnOnce(&mut NicConfig)) -> Guest {
    let mut config = linux();
    config.boot.as_mut().unwrap().cmdline += &tap.cmdline();
    let mut nic = tap.nic();
    change(&mut nic);
    config.nics = vec![nic];
    let mut guest = vmm.boot_linux(&config);
    guest.ok(&format!("ping -c 1 {}", tap.host()));
    guest
}

#[test]
fn a_guest_that_takes_a_foreign_address_is_heard_by_nobody() {
    needs_kvm!();
    let (tap, vmm) = (Tap::new(), Rackvisor::start());
    let mut guest = reachable(&vmm, &tap, |nic| nic.antispoof = true);
    let ping = format!("ping -c 2 -W 1 {}", tap.host());
    let with_address = |address: &str| format!("ip link set eth0 down; ip link set eth0 address {address} up; {ping}");
    assert_ne!(guest.run(&with_address("52:54:00:12:34:57")).0, 0, "a forged address");
    let metrics = vmm.client.metrics().unwrap();
    let spoofed = metrics.lines().find(|line| line.starts_with("rackvisor_net_tx_drops") && line.contains("spoofed"));
    assert!(!spoofed.unwrap().ends_with(" 0"), "{spoofed:?}");
    guest.ok(&with_address("52:54:00:12:34:56"));
}

#[test]
fn a_guest_that_listens_to_all_hears_what_is_for_others_and_one_that_does_not_does_not() {
    needs_kvm!();
    listen_to_all(false);
}

#[test]
fn a_guest_that_listens_to_all_hears_what_is_for_others_also_from_vhost_and_one_that_does_not_does_not() {
    needs_vhost!();
    listen_to_all(true);
}

fn listen_to_all(vhost: bool) {
    let (tap, vmm) = (Tap::new(), Rackvisor::start());
    let mut guest = reachable(&vmm, &tap, |nic| nic.vhost = vhost);
    // With vhost it is the tap that drops.
    let reason = if vhost { "reason=\"tap\"" } else { "reason=\"filtered\"" };
    let filtered = || metric(&vmm, &["net_rx_drops", reason]);
    // A neighbour that does not exist: frames for its address go to the tap.
    let neighbour = tap.neighbour();
    let shout = || tap.send_to(neighbour);
    let before = filtered();
    eventually("frames for a neighbour are kept from the guest", || {
        shout();
        (filtered() > before).then_some(())
    });
    guest.ok("ip link set eth0 promisc on");
    let (before, received) = (filtered(), vmm.client.nic("net0").unwrap().counters.rx_frames);
    eventually("frames for a neighbour reach the guest", || {
        shout();
        (vmm.client.nic("net0").unwrap().counters.rx_frames > received).then_some(())
    });
    assert_eq!(filtered(), before);
}

/// A guest with two CPUs and a NIC with RSS on `tap`.
fn with_rss(vmm: &Rackvisor, tap: &Tap, vhost: bool) -> Guest {
    let mut config = linux_with_net();
    config.boot.as_mut().unwrap().cmdline += &tap.cmdline();
    config.cpus.count = 2;
    config.nics = vec![NicConfig { queues: 2, rss: true, vhost, ..tap.nic() }];
    let mut guest = vmm.boot_linux(&config);
    guest.ok(&format!("ping -c 1 {}", tap.host()));
    guest
}

/// Sends 200 flows to the guest; gives how many frames each of its two queues received meanwhile, as the guest says.
fn spread(guest: &mut Guest, tap: &Tap) -> [u64; 2] {
    let mut received = || {
        let said = guest.ok("ethtool -S eth0");
        ["rx_queue_0_packets: ", "rx_queue_1_packets: "].map(|name| {
            let count = said.lines().find_map(|line| line.trim().strip_prefix(name));
            count.unwrap_or_else(|| panic!("no {name} in {said}")).trim().parse::<u64>().unwrap()
        })
    };
    let before = received();
    // Each from a port of its own.
    (0..200).for_each(|_| tap.send_to(tap.guest()));
    eventually("the flows arrive", || {
        let [first, second] = received();
        let more = [first - before[0], second - before[1]];
        (more[0] + more[1] >= 200).then_some(more)
    })
}

#[test]
fn linux_takes_rss_and_hash_reports_and_receives_by_all_its_queues() {
    needs_kvm!();
    impossible_in_a_jail!(RSS);
    let (tap, vmm) = (Tap::multi_queue(), Rackvisor::start());
    let mut guest = with_rss(&vmm, &tap, false);
    let features = guest.ok("cat /sys/class/net/eth0/device/features");
    for feature in [22, 53, 57, 60] {
        assert_eq!(features.as_bytes()[feature], b'1', "feature {feature}");
    }
    let [first, second] = spread(&mut guest, &tap);
    assert!(first > 20 && second > 20, "{first} and {second}");
}

#[test]
fn a_guest_chooses_the_queue_that_receives_and_how_long_its_interrupts_are_held_back() {
    needs_kvm!();
    impossible_in_a_jail!(RSS);
    choose_queue_and_interrupts(false);
}

#[test]
fn a_guest_with_vhost_chooses_the_queue_that_receives_and_how_long_its_interrupts_are_held_back() {
    needs_vhost!();
    impossible_in_a_jail!(RSS);
    choose_queue_and_interrupts(true);
}

fn choose_queue_and_interrupts(vhost: bool) {
    let (tap, vmm) = (Tap::multi_queue(), Rackvisor::start());
    let mut guest = with_rss(&vmm, &tap, vhost);
    if vhost {
        await_vhost(&vmm, true);
    }
    guest.ok("ethtool -X eth0 weight 0 1");
    let [_, second] = spread(&mut guest, &tap);
    // What has no hash, such as ARP, is for the first one all the same.
    assert!(second >= 200, "{second}");
    guest.ok("ethtool -X eth0 weight 1 0");
    assert_eq!(spread(&mut guest, &tap)[1], 0);
    guest.ok("ethtool -X eth0 equal 2");
    let [first, second] = spread(&mut guest, &tap);
    assert!(first > 20 && second > 20, "{first} and {second}");
    guest.ok("ethtool -C eth0 rx-usecs 2000 rx-frames 32 tx-usecs 2000 tx-frames 32");
    guest.ok(&format!("ping -c 3 {}", tap.host()));
    if vhost {
        await_vhost(&vmm, true);
        assert_eq!(metric(&vmm, &["net_vhost_errors_total{"]), 0.0);
    }
}

#[test]
fn a_card_of_vhost_goes_on_after_pauses_resets_and_another_driver_and_nothing_is_left_behind() {
    needs_vhost!();
    let (tap, vmm) = (Tap::new(), Rackvisor::start());
    let mut guest = reachable(&vmm, &tap, |nic| nic.vhost = true);
    await_vhost(&vmm, true);
    let census = vmm.census();
    let ping = format!("ping -c 1 {}", tap.host());
    for _ in 0..3 {
        vmm.client.act(Action::Pause).unwrap();
        assert_eq!(metric(&vmm, &["net_vhost_engaged{"]), 0.0, "the rings are not the kernel's in a paused VM");
        vmm.client.act(Action::Resume).unwrap();
        guest.ok(&ping);
        await_vhost(&vmm, true);
    }
    let rebind = "device=$(basename $(readlink -f /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net; \
                  echo $device >unbind && echo $device >bind";
    for _ in 0..3 {
        guest.ok(&format!("{rebind} && ip addr add {}/24 dev eth0 && ip link set eth0 up && {ping}", tap.guest()));
    }
    await_vhost(&vmm, true);
    for _ in 0..2 {
        guest.send("reboot -f");
        guest.wait_ready();
        guest.ok(&ping);
        await_vhost(&vmm, true);
    }
    assert_nothing_more(vmm.pid(), &census);
    assert_eq!(metric(&vmm, &["net_vhost_errors_total{"]), 0.0);

    let limits = NicLimitsPatch { packets_per_second: Patch::Set(1000), ..NicLimitsPatch::default() };
    let patch = NicPatch { rx_limits: Patch::Set(limits), ..NicPatch::default() };
    let problem = vmm.client.patch_nic("net0", &patch).unwrap_err();
    assert_eq!(problem.code(), Some(Code::InvalidValue), "a limit that nobody would keep: {problem}");
    guest.ok(&ping);
}

#[test]
fn an_announcement_is_on_the_wire_five_times() {
    needs_kvm!();
    let (tap, vmm) = (Tap::new(), Rackvisor::start());
    let _guest = reachable(&vmm, &tap, |_| ());
    let rarps = Rarps::listen();
    assert_eq!(vmm.client.announce_nic("net0").unwrap().config.id, "net0");
    for _ in 0..5 {
        let frame = rarps.next();
        assert_eq!(frame[6..12], [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    }
    vmm.client.act(Action::Shutdown).unwrap();
    assert_eq!(vmm.client.announce_nic("net0").unwrap_err().code(), Some(Code::WrongState));
}

#[test]
fn a_tap_that_is_deleted_under_a_guest_is_taken_up_again_when_it_is_back() {
    needs_kvm!();
    let (tap, vmm) = (Tap::new(), Rackvisor::start());
    let mut guest = reachable(&vmm, &tap, |_| ());
    tap.delete();
    assert_ne!(guest.run(&format!("ping -c 1 -W 1 {}", tap.host())).0, 0, "a ping into nothing");
    tap.make();
    guest.ok(&format!("for i in $(seq 60); do ping -c 1 -W 1 {} && exit 0; done; exit 1", tap.host()));
    assert_eq!(vmm.state(), VmState::Running);
}

#[test]
fn a_vmm_without_privileges_has_taps_that_it_was_started_with_and_that_it_was_passed() {
    needs_kvm!();
    let (inherited, passed) = (Tap::new(), Tap::new());
    let vmm = Rackvisor::start_unprivileged(inherited.queue(), &[]);
    // The other way is barred: it could not even open its own tap.
    let mut config = linux();
    config.nics = vec![NicConfig { tap: Some("rvnone".into()), ..inherited.nic() }];
    vmm.client.define(&config).unwrap();
    let refused = vmm.client.act(Action::Boot).unwrap_err();
    assert!(refused.to_string().contains("CAP_NET_ADMIN"), "{refused}");

    let guest = reachable(&vmm, &inherited, |nic| (nic.tap, nic.tap_fds) = (None, Some(TapFds::Inherited(vec![3]))));
    vmm.client.act(Action::Shutdown).unwrap();
    drop(guest);
    let mut config = vmm.client.describe().unwrap().config;
    let console = config.serial.path.clone().unwrap();
    let boots_and_answers = |tap: &Tap| {
        vmm.client.act(Action::Boot).unwrap();
        let mut guest = Guest::connect(&console);
        guest.wait_ready();
        guest.ok(&format!("ping -c 1 {}", tap.host()));
        assert_eq!(vmm.client.nic("net0").unwrap().tap, Some(tap.name.clone()));
        vmm.client.act(Action::Shutdown).unwrap();
    };
    boots_and_answers(&inherited);
    config.nics = vec![passed.nic_with(TapFds::Passed(1))];
    config.boot.as_mut().unwrap().cmdline = linux().boot.unwrap().cmdline + &passed.cmdline();
    vmm.client.define_with_fds(&config, vec![passed.queue()]).unwrap();
    boots_and_answers(&passed);
    boots_and_answers(&passed);
    drop(passed);
    let refused = vmm.client.act(Action::Boot).unwrap_err();
    assert!(refused.to_string().contains("its tap was deleted"), "{refused}");
}
