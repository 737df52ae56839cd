//! Mixed load on the network for a while, with whatever may happen to a NIC in between.
//!
//! RACKVISOR_SOAK_SECONDS says for how long (default: 30), RACKVISOR_SOAK_SEED what happens (default: by the clock; printed).

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rackvisor_api::config::{Link, NicPatch};
use rackvisor_api::state::Action;
use rackvisor_tests::{Bridge, Laps, Mappings, Node, PortOptions, Random, assert_nothing_more, needs_sdn, nodes};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

/// Something that happens to a NIC, chosen by `random`; says what it was.
fn disturb(node: &mut Node, random: &mut Random) -> String {
    let moment = Duration::from_millis(random.draw() % 300);
    match random.below(6) {
        0 => {
            node.vmm.client.patch_nic("net0", &NicPatch::link(Link::Down)).unwrap();
            thread::sleep(moment);
            node.vmm.client.patch_nic("net0", &NicPatch::link(Link::Up)).unwrap();
            format!("link down for {moment:?}")
        }
        1 | 2 => {
            let mut words = String::new();
            for setting in ["tx", "tso", "gso", "gro", "rx-gro-hw"] {
                words += &format!(" {setting} {}", ["off", "on"][random.below(2)]);
            }
            // What cannot be, such as segments without checksums, is left out.
            node.guest.run(&format!("ethtool -K eth0{words}"));
            words
        }
        3 => {
            node.vmm.client.act(Action::Pause).unwrap();
            thread::sleep(moment);
            node.vmm.client.act(Action::Resume).unwrap();
            format!("paused for {moment:?}")
        }
        4 => {
            node.guest.ok(
                "device=$(basename $(readlink -f /sys/class/net/eth0/device)) && cd /sys/bus/virtio/drivers/virtio_net && \
                 echo $device >unbind && echo $device >bind",
            );
            node.plug_in();
            "driver unbound and bound".into()
        }
        _ => {
            let pairs = 1 + random.below(node.port.nic.queues.into());
            node.guest.ok(&format!("ethtool -L eth0 combined {pairs}"));
            format!("{pairs} queue pairs")
        }
    }
}

/// UDP that nobody counts: as fast as it goes, and whatever comes of it.
fn start_udp(node: &mut Node, other: &Node) {
    node.guest.ok(&format!(
        "(while [ ! -e /run/stop ]; do socat -b1400 -t1 - UDP4:{}:7,null-eof,shut-null </tmp/datagrams >/dev/null; \
         sleep 0.5; done) >/dev/null 2>&1 &",
        other.address()
    ));
}

#[test]
fn nothing_stalls_spoils_or_leaks_under_mixed_load_with_flaps_offload_changes_pauses_and_other_drivers() {
    needs_sdn!();
    let time = Duration::from_secs(number("RACKVISOR_SOAK_SECONDS").unwrap_or(30));
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let seed = number("RACKVISOR_SOAK_SEED").unwrap_or_else(clock);
    // Past the test harness, which hides what successful tests print.
    let _ = writeln!(std::io::stderr(), "soak: {time:?} with RACKVISOR_SOAK_SEED={seed}");
    let mut random = Random(seed);

    let bridge = Bridge::new();
    let options = PortOptions { queues: 2, ..PortOptions::default() };
    // One of each data path.
    let mut ports = [bridge.port_with(1, &options), bridge.port_with(2, &options)];
    ports[1].nic.vhost = true;
    let mut nodes = nodes(ports, |_, _| ());
    let addresses = [nodes[0].address(), nodes[1].address()];
    let mut loads = Vec::new();
    for (place, other) in [(0, 1), (1, 0)] {
        loads.push(Laps::echo(&mut nodes[place].guest, addresses[other], 1));
    }
    {
        let [one, two] = &mut nodes;
        start_udp(one, two);
        start_udp(two, one);
    }
    let holdings = |node: &Node| (node.vmm.census(), Mappings::of(node.vmm.pid()));
    let before = [holdings(&nodes[0]), holdings(&nodes[1])];
    let begin = Instant::now();
    let mut happened = 0;
    while begin.elapsed() < time {
        for _ in 0..4 + random.below(8) {
            let place = random.below(2);
            println!("{:?}: guest {place}: {}", begin.elapsed(), disturb(&mut nodes[place], &mut random));
            thread::sleep(Duration::from_millis(random.draw() % 500));
            happened += 1;
        }
        // No stall: both loads come through a lap that began after all this.
        for (node, load) in nodes.iter_mut().zip(&loads) {
            load.wait_for(&mut node.guest, 2);
        }
    }
    let mut laps = Vec::new();
    for (node, load) in nodes.iter_mut().zip(loads) {
        laps.push(load.finish(&mut node.guest));
        node.assert_no_complaint();
    }
    for (node, (census, mappings)) in nodes.iter().zip(&before) {
        assert_nothing_more(node.vmm.pid(), census);
        let now = Mappings::of(node.vmm.pid());
        assert!(now.count < mappings.count + 10, "{mappings} → {now}");
        assert!(now.virtual_kib < mappings.virtual_kib + (100 << 10), "{mappings} → {now}");
    }
    let _ = writeln!(std::io::stderr(), "soak: {happened} disturbances, {laps:?} laps, nothing lost");
}
