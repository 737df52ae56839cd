use super::*;
use crate::virtio::double::{EVENT_IDX, INDIRECT_DESC};

fn receive(card: &Card, queue: usize) -> Vec<u8> {
    let mut data = vec![0; 70_000];
    let length = take(&card.host[queue], &mut data).unwrap();
    data.truncate(length);
    data
}

#[test]
fn a_frame_leaves_byte_for_byte_however_it_is_cut_into_descriptors() {
    let mut card = Card::running(1, 16, INDIRECT_DESC);
    let data = [&[0; HEADER_SIZE][..], &frame(1400, 1)].concat();
    let address = card.driver.allocate(data.len() as u64, 1);
    card.driver.write(address, &data);
    for cuts in [vec![], vec![12], vec![5, 13, 100], vec![1, 2, 3, 4, 5, 6, 1000]] {
        let mut edges = cuts.clone();
        edges.push(data.len() as u64);
        let mut start = 0;
        let mut buffers = Vec::new();
        for edge in edges {
            buffers.push(Buffer::readable(address + start, (edge - start) as u32));
            start = edge;
        }
        for indirect in [false, true] {
            let ring = card.driver.ring(TX);
            let head = if indirect { ring.add_indirect(&buffers) } else { ring.add(&buffers) };
            ring.kick();
            assert_eq!(receive(&card, 0), data);
            assert_eq!(card.used(TX), Used { head, length: 0 });
        }
    }
    card.wait_count("net_tx_packets", "", 9);
}

#[test]
fn the_largest_frame_leaves_whole() {
    let mut card = Card::running(1, 16, 0);
    card.send(&frame(65_550, 1));
    assert!(receive(&card, 0)[HEADER_SIZE..] == frame(65_550, 1));
}

#[test]
fn a_full_tap_holds_frames_back_and_every_one_leaves_once_and_in_order() {
    let mut card = Card::running(1, 1024, 0);
    const FRAMES: u32 = 700;
    for number in 0..FRAMES {
        let data = [&[0; HEADER_SIZE][..], &number.to_le_bytes(), &frame(60, 0)].concat();
        let address = card.driver.allocate(data.len() as u64, 1);
        card.driver.write(address, &data);
        card.driver.ring(TX).stage(&[Buffer::readable(address, data.len() as u32)]);
    }
    card.driver.ring(TX).publish();
    card.driver.ring(TX).kick();
    card.wait_count("net_tx_tap_full", "", 1);
    for number in 0..FRAMES {
        assert_eq!(receive(&card, 0)[12..16], number.to_le_bytes());
        card.used(TX);
    }
    assert_eq!(card.count("net_tx_drops", ""), 0);
}

#[test]
fn frames_that_are_too_short_too_large_or_partly_writable_are_dropped_and_counted_and_the_next_one_leaves() {
    let mut card = Card::running(1, 16, 0);
    let address = card.driver.allocate(200_000, 1);
    let malformed = [
        vec![Buffer::readable(address, 25)],
        vec![Buffer::writable(address, 100)],
        vec![Buffer::readable(address, 100), Buffer::writable(address, 100)],
        vec![Buffer::readable(address, 0)],
    ];
    for buffers in &malformed {
        let head = card.driver.ring(TX).add(buffers);
        card.driver.ring(TX).kick();
        assert_eq!(card.used(TX), Used { head, length: 0 });
    }
    for length in [66_000, 200_000] {
        card.driver.ring(TX).add(&[Buffer::readable(address, length)]);
        card.driver.ring(TX).kick();
        assert_eq!(card.used(TX).length, 0);
    }
    card.send(&frame(60, 3));
    assert_eq!(receive(&card, 0)[HEADER_SIZE..], frame(60, 3));
    card.wait_count("net_tx_drops", "malformed", 4);
    card.wait_count("net_tx_drops", "oversize", 2);
}

#[test]
fn a_batch_gives_one_interrupt_and_no_kick_is_asked_for_while_the_worker_is_awake() {
    let mut card = Card::running(1, 64, EVENT_IDX);
    // Frames that are dropped do not depend on how fast the tap takes them.
    card.device.handle().set_link(false);
    let before = card.driver.ring(TX).interrupts();
    card.driver.ring(TX).want_interrupts(true);
    let address = card.driver.allocate(100, 1);
    for _ in 0..48 {
        card.driver.ring(TX).stage(&[Buffer::readable(address, 100)]);
    }
    card.driver.ring(TX).publish();
    assert!(card.driver.ring(TX).kick());
    for _ in 0..48 {
        card.used(TX);
    }
    card.wait_count("net_tx_drops", "link_down", 48);
    assert!(card.driver.ring(TX).wait_interrupt(SOON));
    assert_eq!(card.driver.ring(TX).interrupts() - before, 1);
}
