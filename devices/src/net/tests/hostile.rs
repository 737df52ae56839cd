use super::*;
use crate::DeviceEvent;
use crate::virtio::double::{EVENT_IDX, INDIRECT_DESC, RAM_BASE, RAM_SIZE, UNMAPPED};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Breaks ring `index` with `f` and sees the card ask for a reset once.
fn breaks(index: usize, f: impl FnOnce(&mut Card)) {
    let mut card = Card::running(1, 16, INDIRECT_DESC | bit(features::MRG_RXBUF) | bit(features::CTRL_VQ));
    f(&mut card);
    card.driver.ring(index).kick_always();
    if index == RX {
        card.arrive(&frame(60, 0));
    }
    card.driver.signals().wait_needs_reset(SOON).expect("the card asks for a reset");
    card.notifier.wait(SOON, |event| matches!(event, DeviceEvent::NeedsReset { .. })).expect("the VM hears of it");
    for _ in 0..10 {
        card.driver.ring(index).kick_always();
    }
    if index != TX {
        card.send(&frame(60, 1));
        card.used(TX);
    }
    // The ring is left alone, and the card stops and works after a reset.
    card.stop();
    assert_eq!(card.driver.signals().reset_reasons().len(), 1);
    card.device.reset();
    card.start();
}

#[test]
fn a_cycle_of_descriptors_ends_in_a_reset() {
    for index in [RX, TX, 2] {
        breaks(index, |card| {
            let address = card.driver.allocate(64, 1);
            let ring = card.driver.ring(index);
            let table = ring.addresses().0;
            let flags = if index == RX { NEXT | WRITE } else { NEXT };
            ring.write_descriptor(table, 0, address, 16, flags, 1);
            ring.write_descriptor(table, 1, address, 16, flags, 0);
            ring.push_available(0);
            ring.publish();
        });
    }
}

#[test]
fn buffers_and_tables_outside_ram_end_in_a_reset() {
    for index in [RX, TX, 2] {
        for address in [UNMAPPED, u64::MAX - 8, RAM_BASE + RAM_SIZE as u64 - 8] {
            breaks(index, |card| {
                let ring = card.driver.ring(index);
                if index == RX {
                    ring.add(&[Buffer::writable(address, 100)]);
                } else {
                    ring.add(&[Buffer::readable(address, 60)]);
                }
            });
            breaks(index, |card| {
                let ring = card.driver.ring(index);
                ring.write_descriptor(ring.addresses().0, 0, address, 64, 4, 0);
                ring.push_available(0);
                ring.publish();
            });
        }
    }
}

#[test]
fn heads_and_indexes_out_of_range_end_in_a_reset() {
    for index in [RX, TX, 2] {
        breaks(index, |card| {
            let size = card.driver.ring(index).size();
            card.driver.ring(index).push_available(size);
            card.driver.ring(index).publish();
        });
        breaks(index, |card| card.driver.ring(index).set_available_index(1000));
    }
}

/// xorshift: the same garbage in each run.
struct Garbage(u64);

impl Garbage {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Fills the table with descriptors that are mostly nearly right and makes some heads available.
fn scribble(card: &mut Card, index: usize, garbage: &mut Garbage, buffers: u64) {
    let ring = card.driver.ring(index);
    let table = ring.addresses().0;
    for descriptor in 0..ring.size() {
        let address = match garbage.below(200) {
            0 => garbage.next(),
            1 => table,
            _ => buffers + garbage.below(8192),
        };
        let length = match garbage.below(200) {
            0 => garbage.next() as u32,
            1..20 => 0,
            20..50 => 16 * garbage.below(40) as u32,
            _ => garbage.below(3000) as u32,
        };
        let flags = match garbage.below(50) {
            0 => garbage.below(8) as u16,
            1..30 if index == RX => WRITE,
            _ if index == RX => WRITE | NEXT,
            1..30 => 0,
            _ => NEXT,
        };
        let beyond = u64::from(garbage.below(40) == 0);
        let next = garbage.below(u64::from(ring.size()) + beyond) as u16;
        ring.write_descriptor(table, descriptor, address, length, flags, next);
    }
    for _ in 0..8 {
        let head = garbage.below(u64::from(ring.size()));
        ring.push_available(head as u16);
    }
    ring.publish();
    ring.kick_always();
}

#[test]
fn a_hundred_thousand_chains_of_garbage_neither_stop_nor_break_the_card() {
    let coalescing = bit(features::NOTF_COAL) | bit(features::VQ_NOTF_COAL);
    let features = INDIRECT_DESC | EVENT_IDX | bit(features::CTRL_VQ) | bit(features::MRG_RXBUF) | coalescing;
    let mut card = Card::running(1, 32, features);
    let mut garbage = Garbage(0x9e37_79b9_7f4a_7c15);
    let buffers = card.driver.allocate(1 << 20, 4096);
    card.host[0].set_nonblocking(true).unwrap();
    let mut data = vec![0; 70_000];
    let mut resets = 0;
    for round in 0..100_000 / 24 {
        // Lest the driver has always spoiled already what the worker is about to see.
        std::thread::sleep(Duration::from_micros(100));
        // Some of what the control queue reads holds interrupts back.
        let [packets, usecs] = [garbage.below(20) as u8, garbage.below(200) as u8];
        let command = [6, garbage.below(4) as u8, packets, 0, 0, 0, usecs, 0, 0, 0];
        card.driver.write(buffers + garbage.below(8192), &command);
        for index in [RX, TX, 2] {
            scribble(&mut card, index, &mut garbage, buffers);
        }
        let mut incoming = frame(40 + garbage.below(4000) as usize, round as u8);
        incoming[..2].fill(0);
        let _ = card.host[0].send(&incoming);
        while take(&card.host[0], &mut data).is_ok() {}
        let broken = card.driver.signals().reset_reasons().len();
        if round % 16 == 15 || broken > resets {
            resets = broken;
            card.stop();
            card.device.reset();
            let activation = card.driver.activation(features);
            card.device.start(activation).unwrap();
        }
    }
    card.stop();
    card.device.reset();
    while take(&card.host[0], &mut data).is_ok() {}
    card.host[0].set_nonblocking(false).unwrap();
    card.start();
    let (sent, received) = (card.count("net_tx_packets", ""), card.count("net_rx_packets", ""));
    // How much gets through depends on how soon the worker sees it.
    assert!(sent > 0 && received > 0 && resets > 0, "some of it is right: {sent} {received} {resets}");
}
