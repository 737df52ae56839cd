//! Interrupts that are held back.

use super::control::{CONTROL_1, command};
use super::*;
use crate::virtio::double::EVENT_IDX;

pub(super) const FEATURES: u64 = bit(features::CTRL_VQ) | bit(features::NOTF_COAL) | bit(features::VQ_NOTF_COAL);
pub(super) const TX_SET: u8 = 0;
pub(super) const RX_SET: u8 = 1;
const VQ_SET: u8 = 2;
const VQ_GET: u8 = 3;
/// So long that only failing tests see its end.
pub(super) const LONG: u32 = u32::MAX;

pub(super) fn parameters(command: u8, max_packets: u32, max_usecs: u32) -> Vec<u8> {
    [&[6, command][..], &max_packets.to_le_bytes(), &max_usecs.to_le_bytes()].concat()
}

fn of_queue(queue: u16, max_packets: u32, max_usecs: u32) -> Vec<u8> {
    let reserved = [0xff; 2];
    [&[6, VQ_SET][..], &queue.to_le_bytes(), &reserved, &max_packets.to_le_bytes(), &max_usecs.to_le_bytes()].concat()
}

impl Card {
    fn set(&mut self, data: &[u8]) {
        assert_eq!(command(self, CONTROL_1, data), 0);
    }

    /// Sends a frame and sees it used.
    fn pass(&mut self, seed: u8) {
        self.send(&frame(60, seed));
        self.used(TX);
    }

    /// Receives a frame and sees it used.
    fn take(&mut self, seed: u8) {
        self.give(BUFFER);
        self.arrive(&frame(60, seed));
        self.used(RX);
    }
}

#[test]
fn an_interrupt_comes_once_as_many_frames_were_sent_or_received() {
    for event_idx in [0, EVENT_IDX] {
        let mut card = Card::running(1, 16, FEATURES | event_idx);
        card.set(&parameters(TX_SET, 4, LONG));
        card.set(&parameters(RX_SET, 3, LONG));
        let before = card.driver.ring(TX).interrupts();
        // Enough buffers: a driver that has no more is interrupted, whatever it said.
        card.give(BUFFER);
        for round in 1..=3 {
            card.driver.ring(TX).want_interrupts(true);
            card.driver.ring(RX).want_interrupts(true);
            (0..4).for_each(|seed| card.pass(seed));
            assert!(card.driver.ring(TX).wait_interrupt(SOON));
            assert_eq!(card.driver.ring(TX).interrupts(), before + round);
            (0..3).for_each(|seed| card.take(seed));
            assert!(card.driver.ring(RX).wait_interrupt(SOON));
            assert_eq!(card.driver.ring(RX).interrupts(), round);
        }
        assert_eq!(card.count("net_rx_interrupts", ""), 3);
    }
}

#[test]
fn an_interrupt_comes_when_its_time_is_over() {
    let mut card = Card::running(1, 16, FEATURES);
    card.set(&parameters(TX_SET, 1000, 700));
    card.set(&parameters(RX_SET, 1000, 2500));
    card.give(BUFFER);
    for seed in 0..20 {
        card.pass(seed);
        card.take(seed);
        assert!(card.driver.ring(TX).wait_interrupt(SOON));
        assert!(card.driver.ring(RX).wait_interrupt(SOON));
    }
}

#[test]
fn nothing_is_held_back_if_one_of_the_two_is_zero() {
    let mut card = Card::running(1, 16, FEATURES);
    for (packets, usecs) in [(0, LONG), (LONG, 0), (0, 0), (1, LONG)] {
        card.set(&parameters(TX_SET, packets, usecs));
        card.pass(1);
        assert!(card.driver.ring(TX).wait_interrupt(SOON), "{packets} packets, {usecs} microseconds");
    }
}

#[test]
fn what_is_held_back_is_told_when_new_parameters_say_so() {
    let mut card = Card::running(1, 16, FEATURES);
    for parameters in
        [parameters(TX_SET, 3, LONG), parameters(TX_SET, 0, 0), parameters(TX_SET, LONG, 1), of_queue(1, 2, LONG)]
    {
        card.set(&self::parameters(TX_SET, 10, LONG));
        let before = card.driver.ring(TX).interrupts();
        (0..3).for_each(|seed| card.pass(seed));
        assert_eq!(card.driver.ring(TX).interrupts(), before, "it is held back");
        card.set(&parameters);
        assert!(card.driver.ring(TX).wait_interrupt(SOON), "{parameters:?}");
    }
}

#[test]
fn parameters_of_a_queue_that_another_worker_has_count_at_once() {
    let mut card = Card::running(2, 16, FEATURES | bit(features::MQ));
    assert_eq!(command(&mut card, 4, &[4, 0, 2, 0]), 0);
    assert_eq!(command(&mut card, 4, &of_queue(3, 10, LONG)), 0);
    let address = card.driver.allocate(100, 1);
    card.driver.ring(3).add(&[Buffer::readable(address, 100)]);
    card.driver.ring(3).kick();
    card.used(3);
    assert_eq!(card.driver.ring(3).interrupts(), 0, "it is held back");
    assert_eq!(command(&mut card, 4, &of_queue(3, 1, LONG)), 0);
    assert!(card.driver.ring(3).wait_interrupt(SOON));
}

#[test]
fn what_is_held_back_is_told_by_a_stop_and_parameters_survive_it_but_not_a_reset() {
    let mut card = Card::running(1, 16, FEATURES);
    card.set(&parameters(TX_SET, 10, LONG));
    card.set(&parameters(RX_SET, 10, LONG));
    card.give(BUFFER);
    card.pass(1);
    card.take(1);
    let stopped = card.stop();
    assert!(card.driver.ring(TX).wait_interrupt(SOON));
    assert!(card.driver.ring(RX).wait_interrupt(SOON));
    card.resume(&stopped);
    let before = card.driver.ring(TX).interrupts();
    (0..9).for_each(|seed| card.pass(seed));
    assert_eq!(card.driver.ring(TX).interrupts(), before);
    card.pass(9);
    assert!(card.driver.ring(TX).wait_interrupt(SOON));
    card.stop();
    card.device.reset();
    // Fails where the interrupt of its first frame is held back.
    card.start();
}

#[test]
fn a_driver_that_has_nothing_left_to_give_is_interrupted_whatever_it_said() {
    let mut card = Card::running(1, 16, FEATURES);
    card.set(&parameters(TX_SET, LONG, LONG));
    card.set(&parameters(RX_SET, LONG, LONG));
    let before = card.driver.ring(TX).interrupts();
    (0..15).for_each(|seed| card.pass(seed));
    assert_eq!(card.driver.ring(TX).interrupts(), before);
    card.pass(15);
    assert!(card.driver.ring(TX).wait_interrupt(SOON), "the ring has 16 places");
    card.take(1);
    assert!(card.driver.ring(RX).wait_interrupt(SOON), "there are no more buffers");
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    for event_idx in [0, EVENT_IDX] {
        let mut card = Card::running(1, 16, FEATURES | event_idx);
        card.set(&parameters(TX_SET, 3, LONG));
        let before = card.driver.ring(TX).interrupts();
        card.driver.ring(TX).want_interrupts(false);
        (0..3).for_each(|seed| card.pass(seed));
        // The device has counted them by now: these are a batch of their own.
        card.driver.ring(TX).want_interrupts(true);
        (0..3).for_each(|seed| card.pass(seed));
        assert!(card.driver.ring(TX).wait_interrupt(SOON));
        assert_eq!(card.driver.ring(TX).interrupts(), before + 1);
    }
}

#[test]
fn the_driver_is_told_the_parameters_of_a_queue() {
    let mut card = Card::running(1, 16, FEATURES);
    card.set(&parameters(RX_SET, 5, 6));
    card.set(&of_queue(1, 7, 8));
    let address = card.driver.allocate(64, 1);
    let mut get = |queue: u8, data: u32, room: u32| {
        card.driver.write(address, &[6, VQ_GET, queue, 0, 0xff, 0xff, 0]);
        card.driver.write(address + 16, &[0xaa; 16]);
        // The status stands alone, as Linux lays it out.
        let mut buffers = vec![Buffer::readable(address, data), Buffer::writable(address + 16, 1)];
        if room > 0 {
            buffers.push(Buffer::writable(address + 17, room));
        }
        card.driver.ring(CONTROL_1).add(&buffers);
        card.driver.ring(CONTROL_1).kick();
        let length = card.used(CONTROL_1).length;
        (length, card.driver.read(address + 16, length as usize))
    };
    assert_eq!(get(0, 6, 8), (9, vec![0, 5, 0, 0, 0, 6, 0, 0, 0]));
    assert_eq!(get(1, 6, 15), (9, vec![0, 7, 0, 0, 0, 8, 0, 0, 0]));
    assert_eq!(get(0, 6, 7), (1, vec![1]), "there is no room");
    assert_eq!(get(0, 6, 0), (1, vec![1]), "there is no room");
    assert_eq!(get(2, 6, 8), (1, vec![1]), "the control queue");
    assert_eq!(get(9, 6, 8), (1, vec![1]), "no queue");
    assert_eq!(get(0, 5, 8), (1, vec![1]), "cut");
    assert_eq!(get(0, 7, 8), (1, vec![1]), "too long");
}

#[test]
fn commands_that_are_malformed_or_for_queues_that_are_not_enabled_change_nothing() {
    let mut card = Card::parked(2, 16, FEATURES | bit(features::MQ));
    let activation = card.driver.activation_of(card.features, &[0, 1, 2, 4]);
    card.device.start(activation).unwrap();
    assert_eq!(command(&mut card, 4, &of_queue(2, 1, 1)), 0);
    for (data, why) in [
        (of_queue(3, 1, 1), "it is not enabled"),
        (of_queue(4, 1, 1), "the control queue"),
        (of_queue(0x100, 1, 1), "no queue"),
        (of_queue(0, 1, 1)[..13].to_vec(), "cut"),
        ([&of_queue(0, 1, 1)[..], &[0]].concat(), "too long"),
        (parameters(TX_SET, 1, 1)[..9].to_vec(), "cut"),
        ([&parameters(RX_SET, 1, 1)[..], &[0]].concat(), "too long"),
        (parameters(4, 1, 1), "unknown"),
        (vec![6], "no command"),
    ] {
        assert_eq!(command(&mut card, 4, &data), 1, "{why}");
    }
    let mut card = Card::running(1, 16, bit(features::CTRL_VQ));
    for data in [parameters(TX_SET, 1, 1), parameters(RX_SET, 1, 1), of_queue(0, 1, 1)] {
        assert_eq!(command(&mut card, CONTROL_1, &data), 1, "not negotiated");
    }
}
