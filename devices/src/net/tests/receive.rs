use super::*;

const MERGE: u64 = bit(features::MRG_RXBUF);

#[test]
fn a_frame_arrives_in_one_buffer_with_its_length_and_one_buffer_counted() {
    for merge in [0, MERGE] {
        let mut card = Card::running(1, 16, merge);
        let (head, address) = card.give(BUFFER);
        // The tap leaves the field undefined.
        card.arrive_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xee, 0xee], &frame(1000, 1));
        assert_eq!(card.used(RX), Used { head, length: 1012 });
        let data = card.driver.read(address, 1012);
        assert_eq!(num_buffers(&data), 1);
        assert_eq!(data[HEADER_SIZE..], frame(1000, 1));
        assert!(card.driver.ring(RX).wait_interrupt(SOON));
        card.wait_count("net_rx_packets", "", 1);
        card.wait_count("net_rx_bytes", "", 1000);
    }
}

#[test]
fn a_frame_spans_mergeable_buffers_which_become_visible_together() {
    for mut card in cards(16, MERGE) {
        let given: Vec<(u16, u64)> = (0..5).map(|_| card.give(400)).collect();
        let before = card.driver.ring(RX).used_index();
        card.arrive(&frame(1000, 2));
        let first = card.used(RX);
        assert_eq!(card.driver.ring(RX).used_index(), before + 3, "the driver takes num_buffers elements at once");
        let used = [first, card.used(RX), card.used(RX)];
        let lengths: Vec<u32> = used.iter().map(|used| used.length).collect();
        assert_eq!(lengths, [400, 400, 212]);
        let mut data = Vec::new();
        for ((head, address), used) in given.iter().zip(used) {
            assert_eq!(used.head, *head);
            data.extend(card.driver.read(*address, used.length as usize));
        }
        assert_eq!(num_buffers(&data), 3);
        assert_eq!(data[HEADER_SIZE..], frame(1000, 2));
        // What was laid out for the first frame serves the next.
        card.arrive(&frame(500, 3));
        assert_eq!(card.used(RX), Used { head: given[3].0, length: 400 });
        assert_eq!(card.used(RX), Used { head: given[4].0, length: 112 });
        assert_eq!(card.driver.read(given[3].1 + 12, 388), frame(500, 3)[..388]);
    }
}

#[test]
fn a_header_that_is_split_over_descriptors_is_completed() {
    for mut card in cards(16, MERGE) {
        let address = card.driver.allocate(4096, 1);
        let parts =
            [Buffer::writable(address, 5), Buffer::writable(address + 100, 6), Buffer::writable(address + 200, 500)];
        let head = card.driver.ring(RX).add(&parts);
        card.driver.ring(RX).kick();
        card.arrive_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xee, 0xee], &frame(64, 4));
        assert_eq!(card.used(RX), Used { head, length: 76 });
        let data =
            [card.driver.read(address, 5), card.driver.read(address + 100, 6), card.driver.read(address + 200, 65)];
        let data = data.concat();
        assert_eq!(num_buffers(&data), 1);
        assert_eq!(data[HEADER_SIZE..], frame(64, 4));
    }
}

#[test]
fn without_mergeable_buffers_a_frame_that_is_too_large_is_dropped_and_its_buffer_serves_the_next() {
    for mut card in cards(16, 0) {
        let (head, address) = card.give(500);
        card.give(2000);
        card.arrive(&frame(489, 5));
        card.wait_count("net_rx_drops", "oversize", 1);
        card.arrive(&frame(488, 6));
        assert_eq!(card.used(RX), Used { head, length: 500 });
        assert_eq!(card.driver.read(address + 12, 488), frame(488, 6));
    }
}

#[test]
fn a_frame_that_is_larger_than_what_the_driver_gave_so_far_waits_for_the_rest() {
    for mut card in cards(16, MERGE) {
        let starved = card.count("net_rx_starved", "");
        let first = card.give(300);
        card.arrive(&frame(1000, 7));
        card.arrive(&frame(100, 8));
        wait(|| card.count("net_rx_starved", "") > starved, "the frame waits");
        assert_eq!(card.driver.ring(RX).take_used(), None);
        let rest = [card.give(300), card.give(300), card.give(300)];
        let mut data = Vec::new();
        for (head, address) in std::iter::once(first).chain(rest) {
            let used = card.used(RX);
            assert_eq!(used.head, head);
            data.extend(card.driver.read(address, used.length as usize));
        }
        assert_eq!(num_buffers(&data), 4);
        assert_eq!(data[HEADER_SIZE..], frame(1000, 7));
        let (head, address) = card.give(300);
        assert_eq!(card.used(RX), Used { head, length: 112 });
        assert_eq!(card.driver.read(address + 12, 100), frame(100, 8));
        assert_eq!(card.count("net_rx_drops", ""), 0);
    }
}

#[test]
fn a_frame_that_is_larger_than_the_whole_ring_is_dropped_and_reception_goes_on() {
    for mut card in cards(4, MERGE) {
        let given: Vec<(u16, u64)> = (0..4).map(|_| card.give(100)).collect();
        card.arrive(&frame(389, 9));
        card.wait_count("net_rx_drops", "oversize", 1);
        card.arrive(&frame(388, 10));
        let lengths: Vec<u32> = given.iter().map(|_| card.used(RX).length).collect();
        assert_eq!(lengths, [100, 100, 100, 100]);
        assert_eq!(card.driver.read(given[0].1 + 12, 88), frame(388, 10)[..88]);
    }
}

#[test]
fn the_largest_frame_fits_into_the_smallest_common_buffers() {
    for mut card in cards(64, MERGE | bit(features::GUEST_CSUM) | bit(features::GUEST_TSO4)) {
        let given: Vec<(u16, u64)> = (0..64).map(|_| card.give(1536)).collect();
        let mut header = [0; HEADER_SIZE];
        header[..2].copy_from_slice(&[1, 1]);
        card.arrive_with(&header, &frame(65_550, 11));
        let mut data = Vec::new();
        for (_, address) in given.iter().take(43) {
            let length = card.used(RX).length;
            data.extend(card.driver.read(*address, length as usize));
        }
        assert_eq!(num_buffers(&data), 43);
        assert!(data[HEADER_SIZE..] == frame(65_550, 11));
    }
}

#[test]
fn frames_wait_for_buffers_and_none_is_lost_or_doubled_when_tap_and_ring_are_full() {
    for mut card in cards(4, MERGE) {
        let host = card.host[0].try_clone().unwrap();
        const FRAMES: usize = 500;
        let sender = std::thread::spawn(move || {
            for number in 0..FRAMES {
                // Blocks while the tap is full.
                host.send(&[&[0; HEADER_SIZE][..], &frame(60, number as u8)].concat()).unwrap();
            }
        });
        wait(|| card.count("net_rx_starved", "") > 0, "frames wait");
        let addresses: Vec<u64> = (0..4).map(|_| card.driver.allocate(128, 1)).collect();
        for number in 0..FRAMES {
            let address = addresses[number % 4];
            card.driver.ring(RX).add(&[Buffer::writable(address, 128)]);
            card.driver.ring(RX).kick();
            assert_eq!(card.used(RX).length, 72);
            assert_eq!(card.driver.read(address + 12, 60), frame(60, number as u8), "frame {number}");
        }
        sender.join().unwrap();
        assert_eq!(card.driver.ring(RX).take_used(), None);
    }
}

#[test]
fn a_frame_that_needs_an_offload_which_the_driver_did_not_take_is_dropped() {
    for mut card in cards(16, MERGE | bit(features::GUEST_CSUM)) {
        let (head, _) = card.give(BUFFER);
        let mut header = [0; HEADER_SIZE];
        header[..2].copy_from_slice(&[1, 1]);
        card.arrive_with(&header, &frame(100, 12));
        card.wait_count("net_rx_drops", "offload", 1);
        header[1] = 0;
        card.arrive_with(&header, &frame(101, 13));
        assert_eq!(card.used(RX), Used { head, length: 113 });
    }
}

#[test]
fn buffers_without_room_for_a_header_go_back_unused_and_are_counted() {
    for mut card in cards(16, MERGE) {
        let (small, _) = card.give(11);
        let address = card.driver.allocate(64, 1);
        let readable = card.driver.ring(RX).add(&[Buffer::readable(address, 16), Buffer::writable(address + 16, 48)]);
        let (good, _) = card.give(BUFFER);
        card.arrive(&frame(60, 14));
        assert_eq!(card.used(RX), Used { head: small, length: 0 });
        assert_eq!(card.used(RX), Used { head: readable, length: 0 });
        assert_eq!(card.used(RX), Used { head: good, length: 72 });
        card.wait_count("net_rx_drops", "bad_buffer", 2);
    }
}

#[test]
fn new_ram_is_used_and_held_buffers_move_with_the_map() {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use crate::virtio::double::{RAM_BASE, RAM_SIZE};
    for mut card in cards(16, MERGE) {
        let (head, address) = card.give(BUFFER);
        let (second, moved) = card.give(BUFFER);
        card.arrive(&frame(60, 15));
        assert_eq!(card.used(RX).head, head);
        assert_eq!(card.driver.read(address + 12, 60), frame(60, 15));
        // The second buffer is laid out by now. The map grows, and all of RAM moves to other host memory.
        let (memory, base) = (card.driver.memory(), 1 << 32);
        let ranges = [(GuestAddress(RAM_BASE), RAM_SIZE), (GuestAddress(base), 0x10000)];
        let grown = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        grown.write_slice(&card.driver.read(RAM_BASE, RAM_SIZE), GuestAddress(RAM_BASE)).unwrap();
        memory.lock().unwrap().replace(grown);
        card.driver.ring(RX).add(&[Buffer::writable(base, BUFFER)]);
        card.driver.ring(RX).kick();
        card.arrive(&frame(61, 16));
        assert_eq!(card.used(RX), Used { head: second, length: 73 });
        assert_eq!(card.driver.read(moved + 12, 61), frame(61, 16));
        card.arrive(&frame(62, 17));
        assert_eq!(card.used(RX).length, 74);
        assert_eq!(card.driver.read(base + 12, 62), frame(62, 17));
    }
}

#[test]
fn small_frames_arrive_in_order_among_large_ones() {
    let mut card = Card::running(1, 256, MERGE);
    let host = card.host[0].try_clone().unwrap();
    const FRAMES: usize = 3000;
    let size = |number: usize| if number.is_multiple_of(97) { 6000 } else { 60 + number % 500 };
    let sender = std::thread::spawn(move || {
        for number in 0..FRAMES {
            // Blocks while the tap is full.
            host.send(&[&[0; HEADER_SIZE][..], &frame(size(number), number as u8)].concat()).unwrap();
        }
    });
    let mut addresses: HashMap<u16, u64> = (0..64).map(|_| card.give(1000)).collect();
    for number in 0..FRAMES {
        let (mut data, mut chains) = (Vec::new(), 1);
        while chains > 0 {
            let used = card.used(RX);
            let address = addresses.remove(&used.head).unwrap();
            data.extend(card.driver.read(address, used.length as usize));
            if data.len() == used.length as usize {
                chains = num_buffers(&data);
            }
            chains -= 1;
            addresses.insert(card.driver.ring(RX).add(&[Buffer::writable(address, 1000)]), address);
            card.driver.ring(RX).kick();
        }
        assert!(data[HEADER_SIZE..] == frame(size(number), number as u8), "frame {number}");
    }
    sender.join().unwrap();
    assert_eq!(card.count("net_rx_drops", ""), 0);
}

#[test]
fn a_frame_that_waits_for_buffers_is_not_delivered_after_the_link_was_down_or_a_stop() {
    for stop in [false, true] {
        let mut card = Card::running(1, 16, MERGE);
        let starved = card.count("net_rx_starved", "");
        card.give(100);
        card.arrive(&frame(600, 1));
        wait(|| card.count("net_rx_starved", "") > starved, "the frame does not fit, and waits");
        if stop {
            let stopped = card.stop();
            card.resume(&stopped);
        } else {
            card.device.handle().set_link(false);
            card.device.handle().set_link(true);
        }
        card.wait_count("net_rx_drops", "stale", 1);
        card.arrive(&frame(61, 2));
        assert_eq!(card.used(RX).length, 73);
    }
}
