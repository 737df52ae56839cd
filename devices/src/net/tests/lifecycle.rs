use super::*;
use crate::DeviceEvent;
use crate::virtio::StartError;

const MERGE: u64 = bit(features::MRG_RXBUF);

#[test]
fn a_stop_is_announced_and_gives_the_positions_from_which_a_start_goes_on() {
    let mut card = Card::running(1, 16, MERGE);
    let (first, _) = card.give(BUFFER);
    let (second, address) = card.give(BUFFER);
    card.arrive(&frame(60, 1));
    assert_eq!(card.used(RX).head, first);
    let stopped = card.device.stop().unwrap_or_else(|_| {
        card.notifier.wait(SOON, |event| *event == DeviceEvent::Drained).expect("the card says when it has drained");
        card.device.stop().expect("what has drained has stopped")
    });
    let positions: Vec<(u16, u16, u16)> =
        stopped.iter().map(|queue| (queue.index, queue.state.next_avail, queue.state.next_used)).collect();
    assert_eq!(positions, [(0, 1, 1), (1, 1, 1), (2, 0, 0)], "the held buffer is given back");
    assert!(card.stop().is_empty(), "a stopped card has no queues");
    card.arrive(&frame(61, 2));
    let held_back = card.send(&frame(62, 3));
    assert_eq!(card.driver.ring(RX).take_used(), None);
    card.resume(&stopped);
    assert_eq!(card.used(RX), Used { head: second, length: 73 });
    assert_eq!(card.driver.read(address + 12, 61), frame(61, 2));
    assert_eq!(card.used(TX).head, held_back);
}

#[test]
fn no_frame_is_lost_or_doubled_by_stops_and_starts_under_load() {
    let mut card = Card::running(1, 64, MERGE);
    let host = card.host[0].try_clone().unwrap();
    const FRAMES: u32 = 2000;
    let peer = std::thread::spawn(move || {
        for number in 0..FRAMES {
            host.send(&[&[0; HEADER_SIZE][..], &number.to_le_bytes(), &[0; 56]].concat()).unwrap();
            let mut data = [0; 200];
            take(&host, &mut data).unwrap();
            assert_eq!(data[12..16], number.to_le_bytes(), "the guest's frames leave in order");
        }
    });
    let buffers: Vec<u64> = (0..32).map(|_| card.driver.allocate(128, 1)).collect();
    let mut at = std::collections::HashMap::new();
    for address in &buffers {
        at.insert(card.driver.ring(RX).add(&[Buffer::writable(*address, 128)]), *address);
    }
    card.driver.ring(RX).kick();
    for number in 0..FRAMES {
        let head = card.used(RX).head;
        let address = at.remove(&head).unwrap();
        assert_eq!(card.driver.read(address + 12, 4), number.to_le_bytes());
        // The guest sends each frame back.
        let answer = card.driver.ring(TX).add(&[Buffer::readable(address, 72)]);
        card.driver.ring(TX).kick();
        if number % 7 == 0 {
            let stopped = card.stop();
            card.resume(&stopped);
        }
        assert_eq!(card.used(TX).head, answer);
        at.insert(card.driver.ring(RX).add(&[Buffer::writable(address, 128)]), address);
        card.driver.ring(RX).kick();
    }
    peer.join().unwrap();
    assert_eq!(card.count("net_rx_drops", "") + card.count("net_tx_drops", ""), 0);
}

#[test]
fn a_second_start_is_refused_until_the_card_has_stopped() {
    let mut card = Card::running(2, 16, 0);
    let again = card.driver.activation(0);
    assert!(matches!(card.device.start(again), Err(StartError::Running)));
}

#[test]
fn rings_outside_ram_are_refused_by_name() {
    use virtio_queue::{QueueState, QueueT};
    let mut card = Card::parked(1, 16, 0);
    let mut activation = card.driver.activation(0);
    let queue = &mut activation.queues[1].queue;
    let broken = QueueState { used_ring: 0xffff_ffff_ffff_fff0, ..queue.state() };
    *queue = virtio_queue::Queue::try_from(broken).unwrap();
    assert!(queue.ready());
    assert!(matches!(card.device.start(activation), Err(StartError::Queue { index: 1, .. })));
    card.start();
}

#[test]
fn frames_from_before_the_driver_are_not_delivered() {
    let mut card = Card::parked(1, 16, MERGE);
    for _ in 0..5 {
        card.arrive(&frame(60, 1));
    }
    card.start();
    card.wait_count("net_rx_drops", "stale", 5);
    card.give(BUFFER);
    card.arrive(&frame(70, 2));
    assert_eq!(card.used(RX).length, 82);
}

#[test]
fn while_the_link_is_down_frames_are_dropped_both_ways_and_none_is_delivered_later() {
    let mut card = Card::running(1, 16, MERGE);
    let handle = card.device.handle();
    card.give(BUFFER);
    assert!(handle.state().link_up);
    handle.set_link(false);
    handle.set_link(false);
    assert_eq!(card.driver.signals().config_changes(), 1);
    card.send(&frame(60, 1));
    card.used(TX);
    card.wait_count("net_tx_drops", "link_down", 1);
    card.arrive(&frame(60, 2));
    card.wait_count("net_rx_drops", "link_down", 1);
    let stopped = card.stop();
    card.arrive(&frame(60, 3));
    handle.set_link(true);
    handle.set_link(false);
    handle.set_link(true);
    card.resume(&stopped);
    // Was in the tap when the link went down, while the card was stopped.
    card.wait_count("net_rx_drops", "stale", 1);
    card.arrive(&frame(64, 4));
    assert_eq!(card.used(RX).length, 76);
    handle.set_link(false);
    handle.set_link(true);
    card.send(&frame(65, 5));
    let mut data = [0; 200];
    assert_eq!(take(&card.host[0], &mut data).unwrap(), 77, "what was sent while the link was down is gone");
}

#[test]
fn a_card_that_is_dropped_in_any_state_ends_its_threads() {
    for state in 0..3 {
        let mut card = Card::parked(3, 16, 0);
        if state > 0 {
            card.start();
        }
        if state > 1 {
            let _ = card.device.stop();
        }
        let end = card.host.remove(2);
        drop(card);
        // The worker held the tap: its end is closed with it.
        let error = end.send(&[0; 20]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
    }
}
