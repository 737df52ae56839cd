//! Rings that break the rules, and garbage.

use super::memory::MemoryDisk;
use super::*;
use crate::DeviceEvent;
use crate::virtio::double::{EVENT_IDX, RAM_BASE, RAM_SIZE, UNMAPPED};

const SIZE: usize = 1 << 20;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Descriptor 0 as a test wants it, made available; the device must ask for a reset.
fn breaks(prepare: impl FnOnce(&mut Bench)) -> String {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = disk.bench(BlockOptions::new("root", "")).started(FLUSH);
    bench.header(IN, 0);
    prepare(&mut bench);
    bench.driver.ring(0).kick_always();
    let reason = bench.driver.signals().wait_needs_reset(SOON).expect("the device asks for a reset");
    let told = |event: &DeviceEvent| matches!(event, DeviceEvent::NeedsReset { .. });
    assert!(bench.notifier.wait(SOON, told).is_some());
    assert_eq!(bench.metric("disk_broken_rings", None), 1);
    assert_eq!(bench.driver.ring(0).used_index(), 0);
    // It is quiet, and works again after the reset.
    bench.driver.ring(0).kick_always();
    bench.stop();
    bench.device.reset();
    bench.start(FLUSH);
    assert_eq!(bench.write(0, &[1; 512]), ok(1));
    assert_eq!(bench.driver.signals().reset_reasons().len(), 1);
    reason
}

fn descriptor(bench: &mut Bench, index: u16, address: u64, length: u32, flags: u16, next: u16) {
    let table = bench.driver.ring(0).addresses().0;
    bench.driver.ring(0).write_descriptor(table, index, address, length, flags, next);
}

fn head(bench: &mut Bench, head: u16) {
    bench.driver.ring(0).push_available(head);
    bench.driver.ring(0).publish();
}

#[test]
fn a_cycle_asks_for_a_reset() {
    let reason = breaks(|bench| {
        let (header, data) = (bench.header, bench.data);
        descriptor(bench, 0, header, 16, NEXT, 1);
        descriptor(bench, 1, data, 512, NEXT | WRITE, 2);
        descriptor(bench, 2, data, 512, NEXT | WRITE, 1);
        head(bench, 0);
    });
    assert!(reason.contains("cycle"), "{reason}");
}

#[test]
fn a_chain_without_a_writable_byte_asks_for_a_reset() {
    for status_length in [0, 1] {
        let reason = breaks(|bench| {
            let (header, status) = (bench.header, bench.status);
            let flags = if status_length == 0 { WRITE } else { 0 };
            descriptor(bench, 0, header, 16, NEXT, 1);
            descriptor(bench, 1, status, status_length, flags, 0);
            head(bench, 0);
        });
        assert!(reason.contains("no writable byte"), "{reason}");
    }
}

#[test]
fn an_address_without_ram_asks_for_a_reset_wherever_it_is() {
    for position in 0..3 {
        let reason = breaks(|bench| {
            let mut at = [bench.header, bench.data, bench.status];
            at[position] = UNMAPPED;
            descriptor(bench, 0, at[0], 16, NEXT, 1);
            descriptor(bench, 1, at[1], 512, NEXT | WRITE, 2);
            descriptor(bench, 2, at[2], 1, WRITE, 0);
            head(bench, 0);
        });
        assert!(reason.contains("not guest RAM"), "{reason}");
    }
}

#[test]
fn buffers_that_leave_ram_or_the_address_space_ask_for_a_reset() {
    let end = RAM_BASE + RAM_SIZE as u64;
    for address in [end - 511, u64::MAX - 511, u64::MAX] {
        breaks(|bench| {
            let (header, status) = (bench.header, bench.status);
            descriptor(bench, 0, header, 16, NEXT, 1);
            descriptor(bench, 1, address, 512, NEXT | WRITE, 2);
            descriptor(bench, 2, status, 1, WRITE, 0);
            head(bench, 0);
        });
    }
}

#[test]
fn heads_and_indexes_out_of_range_ask_for_a_reset() {
    breaks(|bench| head(bench, 256));
    breaks(|bench| head(bench, u16::MAX));
    breaks(|bench| bench.driver.ring(0).set_available_index(257));
    breaks(|bench| bench.driver.ring(0).set_available_index(u16::MAX));
    breaks(|bench| {
        let header = bench.header;
        descriptor(bench, 0, header, 16, NEXT, 256);
        head(bench, 0);
    });
}

#[test]
fn a_table_in_a_table_asks_for_a_reset() {
    breaks(|bench| {
        let data = bench.data;
        bench.driver.ring(0).write_descriptor(data, 0, data, 16, INDIRECT, 0);
        descriptor(bench, 0, data, 16, INDIRECT, 0);
        head(bench, 0);
    });
}

#[test]
fn more_chains_than_descriptors_ask_for_a_reset() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = disk.bench(BlockOptions { queue_size: 16, ..BlockOptions::new("root", "") }).started(FLUSH);
    disk.hold(true);
    bench.header(T_FLUSH, 0);
    let (header, status) = (bench.header, bench.status);
    descriptor(&mut bench, 0, header, 16, NEXT, 1);
    descriptor(&mut bench, 1, status, 1, WRITE, 0);
    for batch in 1..=2 {
        for _ in 0..9 {
            bench.driver.ring(0).push_available(0);
        }
        bench.driver.ring(0).publish();
        bench.driver.ring(0).kick_always();
        eventually(|| disk.pending() == (9 * batch).min(16));
    }
    let reason = bench.driver.signals().wait_needs_reset(SOON).unwrap();
    assert!(reason.contains("more than 16 chains"), "{reason}");
    disk.hold(false);
    bench.stop();
}

#[test]
fn one_broken_ring_leaves_the_other_queues_alone() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = disk.bench(BlockOptions { queues: 2, ..BlockOptions::new("root", "") }).started(FLUSH);
    head(&mut bench, 300);
    bench.driver.ring(0).kick_always();
    assert!(bench.driver.signals().wait_needs_reset(SOON).is_some());
    let other = bench.send(1, T_FLUSH, 0, &[]);
    assert_eq!(bench.answer(1, other), ok(1));
    assert_eq!(bench.stop().len(), 2);
}

/// An address: sometimes RAM.
fn wild_address(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => random.next(),
        1 => u64::MAX - random.below(5000),
        2 => RAM_BASE + RAM_SIZE as u64 - random.below(5000),
        _ => tame_address(random),
    }
}

fn tame_address(random: &mut Random) -> u64 {
    RAM_BASE + RAM_SIZE as u64 / 2 + random.below(RAM_SIZE as u64 / 4)
}

fn length(random: &mut Random) -> u32 {
    match random.below(4) {
        0 => random.below(40) as u32,
        1 => 16,
        _ => 512 * random.below(9) as u32,
    }
}

/// A chain of a random request in random pieces, direct or indirect; with `wild`, something of it is wrong.
fn garbage(bench: &mut Bench, random: &mut Random, wild: bool) {
    let kinds = [IN, OUT, T_FLUSH, GET_ID, DISCARD, WRITE_ZEROES, random.below(20) as u32];
    let header = tame_address(random);
    let mut raw = [0; 16];
    raw[..4].copy_from_slice(&kinds[random.below(7) as usize].to_le_bytes());
    raw[8..].copy_from_slice(&random.below(SIZE as u64 / 512 + 8).to_le_bytes());
    bench.driver.write(header, &raw);
    let indirect = random.below(2) == 0;
    let own = bench.driver.ring(0).addresses().0;
    let table = if indirect { tame_address(random) } else { own };
    let pieces = 2 + random.below(12) as u16;
    let writable_from = random.below(u64::from(pieces)) as u16;
    let mistake = if wild { random.below(u64::from(pieces)) as u16 } else { u16::MAX };
    for index in 0..pieces {
        let (mut at, mut length) = if index == 0 { (header, 16) } else { (tame_address(random), length(random)) };
        let mut flags = if index >= writable_from.max(1) { WRITE } else { 0 };
        let mut next = index + 1;
        flags |= if next < pieces { NEXT } else { 0 };
        if index == mistake {
            match random.below(5) {
                0 => at = wild_address(random),
                1 => length = random.next() as u32,
                2 => flags = random.next() as u16,
                3 => (flags, next) = (flags | NEXT, random.below(20) as u16),
                _ => flags ^= WRITE,
            }
        }
        bench.driver.ring(0).write_descriptor(table, index, at, length, flags, next);
    }
    let mut head = 0;
    if indirect {
        let length = 16 * u32::from(pieces) + u32::from(wild && random.below(4) == 0);
        bench.driver.ring(0).write_descriptor(own, 15, table, length, INDIRECT, 0);
        head = 15;
    }
    if wild && random.below(10) == 0 {
        head = random.next() as u16;
    }
    bench.driver.ring(0).push_available(head);
    bench.driver.ring(0).publish();
}

#[test]
fn a_hundred_thousand_chains_of_garbage_neither_panic_nor_hang_the_disk() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = disk.bench(BlockOptions { queue_size: 16, ..BlockOptions::new("root", "") });
    let mut random = Random(0x5eed);
    let (mut taken, mut used) = (0, 0);
    while taken < 100_000 {
        bench.start(FLUSH | if random.below(2) == 0 { EVENT_IDX } else { 0 });
        let resets = bench.driver.signals().resets();
        for _ in 0..64 {
            if bench.driver.signals().resets() > resets {
                break;
            }
            // Seldom more than fit: that breaks the ring too.
            for _ in 0..=random.below(16) {
                let wild = random.below(60) == 0;
                garbage(&mut bench, &mut random, wild);
            }
            bench.driver.ring(0).kick_always();
            // Until it is all taken, or the ring is broken.
            for _ in 0..20 {
                std::thread::yield_now();
            }
        }
        // However broken it is, it stops, and starts anew.
        let stopped = bench.stop();
        taken += u64::from(stopped[0].state.next_avail);
        used += u64::from(stopped[0].state.next_used);
        bench.device.reset();
    }
    bench.start(FLUSH);
    assert_eq!(bench.request(T_FLUSH, 0, &[]), ok(1));
    let resets = bench.driver.signals().reset_reasons();
    let kinds: std::collections::BTreeSet<&str> = resets.iter().map(|r| &r[r.len() - 12..]).collect();
    assert!(resets.len() > 50 && kinds.len() > 5, "{} resets: {kinds:?}", resets.len());
    assert!(used > 50_000, "{used} of {taken} chains were answered");
}
