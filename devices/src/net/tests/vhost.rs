//! With real taps and the kernel's vhost-net. Skipped, aloud, where the machine has none; the filter's part runs with any tap.

use super::super::vhost::DEVICE;
use super::coalescing::{FEATURES as COALESCING, LONG, RX_SET, TX_SET, parameters};
use super::control::{command, offloads};
use super::real::{MERGE, Wire, ethernet, filled, in_namespace, ip, received, set_up};
use super::steering::{datagram, is_possible, key, rss, rss_options};
use super::*;
use crate::DeviceEvent;
use crate::virtio::double::{EVENT_IDX, INDIRECT_DESC, UNMAPPED};

const CONTROL: u64 = bit(features::CTRL_VQ) | bit(features::CTRL_RX) | bit(features::CTRL_VLAN);
const OTHER: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x99];

/// Runs `test` for drivers without and with EVENT_IDX, each with a tap of its own.
fn with_vhost(test: impl Fn(u64) + Send + Clone + 'static) {
    for features in [MERGE, MERGE | EVENT_IDX | INDIRECT_DESC] {
        let test = test.clone();
        in_namespace(move || {
            if std::path::Path::new(DEVICE).exists() {
                test(features);
            } else {
                eprintln!("SKIPPED: this test needs {}", DEVICE);
            }
        });
    }
}

impl Card {
    /// A running card whose frames the kernel moves.
    fn kernel(pairs: u16, features: u64) -> Self {
        let mut tap = None;
        // Programs that other tests start have a former card's descriptors for a moment.
        wait(
            || {
                tap = Tap::open("rvtest0", pairs).ok();
                tap.is_some()
            },
            "the tap is free",
        );
        let options = NetOptions { vhost: true, ..options(tap.unwrap(), pairs) };
        set_up("rvtest0", true);
        let mut card = Self::with_options(options, Vec::new(), 128, features);
        card.start();
        card.wait_engaged(1);
        card
    }

    /// The sum of a gauge over all pairs.
    fn gauge(&self, name: &str) -> u32 {
        let mut sum = 0;
        self.device.metrics().collect(&mut |sample| {
            if let Value::Gauge(value) = sample.value
                && sample.name == name
            {
                sum += value as u32;
            }
        });
        sum
    }

    fn engaged(&self) -> u32 {
        self.gauge("net_vhost_engaged")
    }

    /// Waits until the kernel has the rings of so many pairs.
    fn wait_engaged(&self, pairs: u32) {
        wait(|| self.engaged() == pairs, "vhost-net has the rings, or has them no more");
    }

    /// One frame each way, with interrupts.
    fn passes(&mut self, wire: &Wire, seed: u8) {
        let out = ethernet(true, 100 + usize::from(seed), seed);
        self.driver.ring(TX).want_interrupts(true);
        self.send(&out);
        assert_eq!(wire.receive(), out);
        self.used(TX);
        assert!(self.driver.ring(TX).wait_interrupt(SOON), "the driver is interrupted for what was sent");
        let addresses = self.give_many(3, 600);
        self.want_interrupts(RX);
        let back = ethernet(false, 100 + usize::from(seed), seed);
        wire.send(&back);
        assert_eq!(self.await_ours(&addresses)[HEADER_SIZE..], back);
        assert!(self.driver.ring(RX).wait_interrupt(SOON), "the driver is interrupted");
    }

    /// As drivers do it: what was used before the wish was seen gives no interrupt.
    fn want_interrupts(&mut self, queue: usize) {
        let ring = self.driver.ring(queue);
        ring.want_interrupts(true);
        while ring.take_used().is_some() {
            ring.want_interrupts(true);
        }
    }

    /// As `await_frame`, with buffers of former calls, too.
    fn await_ours(&mut self, addresses: &HashMap<u16, u64>) -> Vec<u8> {
        self.given.extend(addresses);
        let given = self.given.clone();
        self.await_frame(&given)
    }
}

/// A frame from the host for `to`, on a VLAN if there is one.
fn from_host(to: [u8; 6], vlan: Option<u16>, seed: u8) -> Vec<u8> {
    let mut data = ethernet(false, 100, seed);
    data[..6].copy_from_slice(&to);
    if let Some(vlan) = vlan {
        data.splice(12..12, [[0x81, 0], vlan.to_be_bytes()].concat());
    }
    data
}

/// Which of these frames a tap queue gives out.
fn read_from_tap(tap: &Tap, wire: &Wire, frames: &[Vec<u8>]) -> Vec<bool> {
    frames.iter().for_each(|frame| wire.send(frame));
    let mut seen = Vec::new();
    let mut data = [0; 2048];
    let mut segments = sys::Segments::with_capacity(1);
    while let Ok(length) = segments.read_from(tap.queue(0).unwrap(), 0, &mut data) {
        seen.push(data[HEADER_SIZE..length].to_vec());
    }
    frames.iter().map(|frame| seen.contains(frame)).collect()
}

/// A filter of a driver that wants its own address and VLAN 7.
fn own_and_vlan_7() -> filter::Filter {
    let mut filter = filter::Filter::new(MAC, true);
    filter.apply(&filter::Change::Mode(filter::Mode::Promiscuous, false));
    filter.apply(&filter::Change::Vlan { id: 7, wanted: true });
    filter
}

#[test]
fn a_tap_keeps_away_what_the_filter_refuses_and_is_left_without_it() {
    in_namespace(|| {
        let tap = Tap::open("rvtest0", 1).unwrap();
        set_up("rvtest0", true);
        let wire = Wire::new("rvtest0", false);
        let frames = [(MAC, None), (OTHER, None), ([0xff; 6], None), (MAC, Some(7)), (MAC, Some(8)), (OTHER, Some(7))];
        let frames: Vec<_> = (0..).zip(frames).map(|(seed, (to, vlan))| from_host(to, vlan, seed)).collect();
        assert_eq!(read_from_tap(&tap, &wire, &frames), [true; 6]);
        tap.set_filter(own_and_vlan_7().program().as_deref()).unwrap();
        assert_eq!(read_from_tap(&tap, &wire, &frames), [true, false, true, true, false, false]);
        // Tags that the host's network keeps beside the frame.
        for (vlan, expected) in [(7, true), (8, false)] {
            if !ip(&format!("link add link rvtest0 name rv.{vlan} up type vlan id {vlan}")) {
                eprintln!("SKIPPED: tags beside frames need the module 8021q");
                break;
            }
            let plain = from_host(MAC, None, 9);
            Wire::new(&format!("rv.{vlan}"), false).send(&plain);
            assert_eq!(read_from_tap(&tap, &wire, &[from_host(MAC, Some(vlan), 9)]), [expected], "VLAN {vlan}");
        }
        // What the kernel does not take leaves no filter behind.
        assert!(tap.set_filter(Some(&[])).is_err());
        assert_eq!(read_from_tap(&tap, &wire, &frames), [true; 6]);
        tap.set_filter(own_and_vlan_7().program().as_deref()).unwrap();
        let held = tap.queue(0).unwrap().try_clone_to_owned().unwrap();
        drop(tap);
        let tap = Tap::from_fds(vec![held]).unwrap();
        assert_eq!(read_from_tap(&tap, &wire, &frames), [true; 6]);
    });
}

#[test]
fn queues_come_into_service_also_while_the_tap_has_a_filter() {
    in_namespace(|| {
        let tap = Tap::open("rvtest0", 3).unwrap();
        set_up("rvtest0", true);
        let filter = own_and_vlan_7();
        for count in [3, 1, 2, 3, 2, 1, 3] {
            tap.use_queues(count).unwrap();
            tap.set_filter(filter.program().as_deref()).unwrap();
            for index in 0..3 {
                // The kernel refuses what is so already.
                let done = sys::set_queue(tap.queue(index).unwrap(), index < count);
                assert!(done.is_err(), "queue {index} of {count}");
            }
        }
    });
}

#[test]
fn vhost_moves_frames_both_ways_and_they_go_on_after_each_stop() {
    with_vhost(|features| {
        let mut card = Card::kernel(1, features);
        let wire = Wire::new("rvtest0", false);
        for round in 0..10 {
            card.passes(&wire, round);
            let stopped = card.stop();
            assert_eq!(card.engaged(), 0);
            for queue in stopped.iter().filter(|queue| queue.index < 2) {
                assert_eq!(queue.state.next_avail, queue.state.next_used, "nothing is in flight");
                assert_eq!(queue.state.next_used, card.driver.ring(queue.index.into()).used_index());
            }
            // What waits for the start is neither lost nor doubled.
            let out = ethernet(true, 70, round);
            let back = ethernet(false, 70, round);
            let addresses = card.give_many(1, 600);
            card.send(&out);
            wire.send(&back);
            card.resume(&stopped);
            assert_eq!(wire.receive(), out);
            card.used(TX);
            assert_eq!(card.await_ours(&addresses)[HEADER_SIZE..], back);
            card.wait_engaged(1);
        }
        assert_eq!(card.count("net_vhost_errors", ""), 0);
    });
}

#[test]
fn vhost_hands_a_card_whose_link_is_down_to_the_path_that_drops_and_takes_it_again() {
    with_vhost(|features| {
        let mut card = Card::kernel(1, features);
        let wire = Wire::new("rvtest0", false);
        for round in 0..3 {
            card.passes(&wire, round);
            card.device.handle().set_link(false);
            card.wait_engaged(0);
            card.send(&ethernet(true, 100, 77));
            card.used(TX);
            card.wait_count("net_tx_drops", "link_down", u64::from(round) + 1);
            card.device.handle().set_link(true);
            card.wait_engaged(1);
        }
        card.passes(&wire, 9);
    });
}

#[test]
fn vhost_delivers_only_what_the_driver_wants() {
    with_vhost(|features| {
        let mut card = Card::kernel(1, features | CONTROL);
        let wire = Wire::new("rvtest0", false);
        let addresses = card.give_many(100, 600);
        let check = |card: &mut Card, expected: [bool; 4]| {
            let frames = [(MAC, None), (OTHER, None), (MAC, Some(7)), (MAC, Some(8))];
            let frames: Vec<_> = (0..).zip(frames).map(|(seed, (to, vlan))| from_host(to, vlan, seed)).collect();
            frames.iter().for_each(|frame| wire.send(frame));
            // The last frame is wanted always.
            let last = from_host(MAC, None, 99);
            wire.send(&last);
            let mut seen = Vec::new();
            while seen.last() != Some(&last) {
                let used = card.used(RX);
                seen.push(
                    card.driver.read(addresses[&used.head] + HEADER_SIZE as u64, used.length as usize - HEADER_SIZE),
                );
                card.driver.ring(RX).add(&[Buffer::writable(addresses[&used.head], 600)]);
                card.driver.ring(RX).kick();
            }
            let passed: Vec<bool> = frames.iter().map(|frame| seen.contains(frame)).collect();
            assert_eq!(passed, expected);
            card.wait_engaged(1);
        };
        check(&mut card, [true; 4]);
        assert_eq!(command(&mut card, 2, &[0, 0, 0]), 0, "not promiscuous");
        check(&mut card, [true, false, false, false]);
        assert_eq!(command(&mut card, 2, &[2, 0, 7, 0]), 0, "VLAN 7");
        check(&mut card, [true, false, true, false]);
        let table = [&[1, 0, 1, 0, 0, 0][..], &OTHER, &[0; 4]].concat();
        assert_eq!(command(&mut card, 2, &table), 0);
        check(&mut card, [true, true, true, false]);
        let stopped = card.stop();
        card.resume(&stopped);
        check(&mut card, [true, true, true, false]);
        assert_eq!(command(&mut card, 2, &[0, 0, 1]), 0, "promiscuous");
        check(&mut card, [true; 4]);
        assert_eq!(command(&mut card, 2, &[0, 0, 0]), 0);
        card.stop();
        card.device.reset();
        card.start();
        card.wait_engaged(1);
        let addresses = card.give_many(1, 600);
        card.given.clear();
        let back = from_host(OTHER, None, 3);
        wire.send(&back);
        assert_eq!(
            card.await_ours(&addresses)[HEADER_SIZE..],
            back,
            "a new driver has all until it says what it wants"
        );
    });
}

#[test]
fn vhost_follows_the_pairs_that_the_driver_uses_with_a_filter_in_the_tap() {
    with_vhost(|features| {
        let mut card = Card::kernel(4, features | CONTROL | bit(features::MQ));
        let wire = Wire::new("rvtest0", false);
        let data = [&[0; HEADER_SIZE][..], &ethernet(true, 80, 1)].concat();
        let address = card.driver.allocate(data.len() as u64, 1);
        card.driver.write(address, &data);
        assert_eq!(command(&mut card, 8, &[0, 0, 0]), 0, "not promiscuous");
        for pairs in [1u8, 4, 2, 3, 1, 4] {
            assert_eq!(command(&mut card, 8, &[4, 0, pairs, 0]), 0);
            card.wait_engaged(pairs.into());
            for pair in 0..usize::from(pairs) {
                card.driver.ring(2 * pair + 1).add(&[Buffer::readable(address, data.len() as u32)]);
                card.driver.ring(2 * pair + 1).kick();
                assert_eq!(wire.receive(), data[HEADER_SIZE..], "pair {pair} of {pairs}");
                card.used(2 * pair + 1);
            }
            if pairs == 1 {
                card.passes(&wire, 5);
            }
        }
        let stopped = card.stop();
        card.resume(&stopped);
        card.wait_engaged(4);
    });
}

#[test]
fn vhost_follows_the_offloads_of_the_driver() {
    with_vhost(|features| {
        let negotiated = bit(features::GUEST_CSUM) | bit(features::GUEST_TSO4);
        let control = bit(features::CTRL_VQ) | bit(features::CTRL_GUEST_OFFLOADS);
        let mut card = Card::kernel(1, features | negotiated | control);
        let wire = Wire::new("rvtest0", false);
        for value in [0, negotiated, bit(features::GUEST_CSUM), 0] {
            assert_eq!(command(&mut card, 2, &offloads(value)), 0);
            // What the tap holds is looked at first, which takes buffers.
            card.passes(&wire, 1);
            card.wait_engaged(1);
            card.passes(&wire, 2);
        }
    });
}

#[test]
fn vhost_gives_up_a_tap_that_goes_down_or_is_deleted_and_takes_it_when_it_is_back() {
    with_vhost(|features| {
        let mut card = Card::kernel(1, features | CONTROL);
        assert_eq!(command(&mut card, 2, &[0, 0, 0]), 0, "not promiscuous");
        let heard = |card: &Card, wanted: fn(&DeviceEvent) -> bool| {
            card.notifier.events().iter().filter(|(_, event)| wanted(event)).count()
        };
        let lost = |event: &DeviceEvent| matches!(event, DeviceEvent::BackendLost { .. });
        let restored = |event: &DeviceEvent| matches!(event, DeviceEvent::BackendRestored { .. });
        for round in 1..=2 {
            if round == 1 {
                set_up("rvtest0", false);
            } else {
                assert!(ip("link delete rvtest0"));
                for number in 0..3 {
                    card.send(&ethernet(true, 100, number));
                    card.used(TX);
                }
            }
            wait(|| heard(&card, lost) == round, "the loss is noticed without a frame");
            card.wait_engaged(0);
            if round == 2 {
                assert!(ip("tuntap add dev rvtest0 mode tap vnet_hdr"));
            }
            set_up("rvtest0", true);
            // A tap that was only down is known to work with its first frame.
            let end = Instant::now() + SOON;
            while heard(&card, restored) < round {
                assert!(Instant::now() < end, "the tap is back");
                card.send(&ethernet(true, 100, 2));
                card.used(TX);
            }
            let wire = Wire::new("rvtest0", false);
            card.wait_engaged(1);
            let out = ethernet(true, 100, 3);
            card.send(&out);
            assert_eq!(wire.receive(), out);
            card.used(TX);
            // The filter is there again.
            let addresses = card.give_many(8, 600);
            wire.send(&from_host(OTHER, None, 4));
            wire.send(&from_host(MAC, None, 5));
            loop {
                let seen = card.await_ours(&addresses);
                assert_ne!(seen[HEADER_SIZE..], from_host(OTHER, None, 4));
                if seen[HEADER_SIZE..] == from_host(MAC, None, 5) {
                    break;
                }
            }
        }
    });
}

#[test]
fn a_ring_that_vhost_finds_broken_ends_in_a_reset() {
    with_vhost(|features| {
        for index in [RX, TX] {
            let mut card = Card::kernel(1, features);
            let wire = Wire::new("rvtest0", false);
            let bad = if index == RX { Buffer::writable(UNMAPPED, 600) } else { Buffer::readable(UNMAPPED, 60) };
            card.driver.ring(index).add(&[bad]);
            card.driver.ring(index).kick_always();
            wire.send(&from_host(MAC, None, 1));
            card.driver.signals().wait_needs_reset(SOON).expect("the card asks for a reset");
            assert!(card.count("net_vhost_errors", "") > 0);
            assert_eq!(card.engaged(), 0);
            for _ in 0..10 {
                card.driver.ring(index).kick_always();
            }
            card.stop();
            assert_eq!(card.driver.signals().reset_reasons().len(), 1);
            card.device.reset();
            card.start();
            card.wait_engaged(1);
            card.given.clear();
            card.passes(&wire, 2);
        }
    });
}

#[test]
fn a_chain_that_vhost_cannot_send_is_dropped_and_counted() {
    with_vhost(|features| {
        let mut card = Card::kernel(1, features);
        let wire = Wire::new("rvtest0", false);
        let address = card.driver.allocate(128, 1);
        card.driver.ring(TX).add(&[Buffer::readable(address, 64), Buffer::writable(address + 64, 64)]);
        card.driver.ring(TX).kick();
        card.used(TX);
        card.wait_count("net_tx_drops", "malformed", 1);
        card.passes(&wire, 1);
    });
}

#[test]
fn the_threads_of_the_kernel_wait_until_others_have_finished() {
    with_vhost(|features| {
        let _card = Card::kernel(2, features);
        let threads = super::super::vhost::thread::threads().unwrap();
        assert_eq!(threads.len(), 2, "one for each pair");
        for thread in threads {
            assert_eq!(crate::scheduling::policy(thread), libc::SCHED_BATCH);
        }
    });
}

#[test]
fn interrupts_of_vhost_are_held_back_for_as_long_as_the_driver_says_and_a_stop_tells_of_all() {
    const MICROSECONDS: u32 = 20_000;
    with_vhost(|features| {
        let mut card = Card::kernel(1, features | COALESCING);
        let wire = Wire::new("rvtest0", false);
        let held = |card: &mut Card, queue: usize, seed: u8| {
            while card.driver.ring(queue).wait_interrupt(Duration::ZERO) {}
            card.want_interrupts(queue);
            if queue == TX {
                card.send(&ethernet(true, 100, seed));
                assert_eq!(wire.receive(), ethernet(true, 100, seed));
                card.used(TX);
            } else {
                let addresses = card.give_many(3, 600);
                wire.send(&ethernet(false, 100, seed));
                assert_eq!(card.await_ours(&addresses)[HEADER_SIZE..], ethernet(false, 100, seed));
            }
            assert!(!card.driver.ring(queue).wait_interrupt(Duration::from_millis(50)), "it is held back");
        };
        card.passes(&wire, 1);
        for (queue, set) in [(TX, TX_SET), (RX, RX_SET)] {
            assert_eq!(command(&mut card, 2, &parameters(set, LONG, LONG)), 0);
            held(&mut card, queue, 2);
            assert_eq!(command(&mut card, 2, &parameters(set, LONG, 1)), 0);
            assert!(card.driver.ring(queue).wait_interrupt(SOON), "new parameters say that it is due");
        }
        assert_eq!(command(&mut card, 2, &parameters(TX_SET, LONG, MICROSECONDS)), 0);
        let begin = Instant::now();
        card.passes(&wire, 3);
        assert!(begin.elapsed() >= Duration::from_micros(MICROSECONDS.into()));
        assert_eq!(command(&mut card, 2, &parameters(TX_SET, LONG, LONG)), 0);
        held(&mut card, TX, 4);
        let stopped = card.stop();
        assert!(card.driver.ring(TX).wait_interrupt(SOON));
        card.resume(&stopped);
        card.wait_engaged(1);
        held(&mut card, TX, 5);
        assert_eq!(command(&mut card, 2, &parameters(TX_SET, 0, 0)), 0);
        assert!(card.driver.ring(TX).wait_interrupt(SOON));
        card.passes(&wire, 6);
        assert_eq!(card.engaged(), 1);
    });
}

#[test]
fn interrupts_for_small_frames_are_held_back_and_those_for_large_ones_or_none_are_not() {
    const BURST: usize = 64;
    const LARGE: usize = 8000;
    with_vhost(|features| {
        let mut card = Card::kernel(1, features);
        let address = card.driver.allocate((HEADER_SIZE + LARGE) as u64, 1);
        card.driver.write(address + HEADER_SIZE as u64, &ethernet(true, LARGE, 1));
        let hold = |card: &Card| card.gauge("net_vhost_hold_microseconds");
        for (length, held) in [(100, true), (LARGE, false), (100, true)] {
            let end = Instant::now() + SOON;
            while (hold(&card) > 0) != held {
                assert!(Instant::now() < end, "frames of {length} bytes; held for {} µs", hold(&card));
                card.want_interrupts(TX);
                for _ in 0..BURST {
                    card.driver.ring(TX).add(&[Buffer::readable(address, (HEADER_SIZE + length) as u32)]);
                }
                card.driver.ring(TX).kick();
                (0..BURST).for_each(|_| _ = card.used(TX));
                assert!(card.driver.ring(TX).wait_interrupt(SOON), "the driver is interrupted");
            }
            assert!(hold(&card) <= 1000);
        }
        wait(|| hold(&card) == 0, "a driver that sends nothing is forgotten");
        card.passes(&Wire::new("rvtest0", false), 2);
    });
}

#[test]
fn with_rss_vhost_delivers_each_frame_by_the_queue_that_its_hash_chooses() {
    if !is_possible() {
        return;
    }
    with_vhost(|features| {
        let options = NetOptions { vhost: true, ..rss_options(Tap::open("rvtest0", 4).unwrap(), 4) };
        set_up("rvtest0", true);
        let negotiated = features | bit(features::MQ) | bit(features::CTRL_VQ) | bit(features::RSS);
        let mut card = Card::with_options(options, Vec::new(), 128, negotiated);
        assert_eq!(card.device.features() & bit(features::HASH_REPORT), 0, "the kernel tells no hashes");
        card.start();
        let buffers = filled(&mut card);
        let hasher = crate::net::steering::hash::Hasher::new(0x3f, &key());
        let wire = Wire::new("rvtest0", false);
        for multiplier in [1, 3] {
            let table: Vec<u16> = (0..128).map(|index| index * multiplier / 2 % 4).collect();
            assert_eq!(command(&mut card, 8, &rss(0x3f, 2, &table, 4)), 0);
            card.wait_engaged(4);
            for port in 1000..1050 {
                let data = datagram(port);
                wire.send(&data);
                let (pair, seen) = received(&mut card, &buffers);
                assert_eq!(pair, usize::from(table[hasher.report(&data).0 as usize % 128]), "port {port}");
                assert_eq!(seen[HEADER_SIZE..], data);
            }
        }
        assert_eq!(card.engaged(), 4);
    });
}

#[test]
fn a_machine_without_vhost_is_told_what_to_do() {
    in_namespace(|| {
        if std::path::Path::new(DEVICE).exists() {
            eprintln!("SKIPPED: this machine has {}", DEVICE);
            return;
        }
        let options = NetOptions { vhost: true, ..options(Tap::open("rvtest0", 1).unwrap(), 1) };
        let error = VirtioNet::new(options, &PlainThreads, Arc::new(crate::NoNotifier)).err().unwrap().to_string();
        for part in ["NIC net0", DEVICE, "modprobe vhost_net", "set `vhost` to false"] {
            assert!(error.contains(part), "{error}");
        }
    });
}
