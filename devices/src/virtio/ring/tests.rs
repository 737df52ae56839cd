//! What the ring makes of good and bad chains, with a driver-side double.

use vm_memory::GuestAddressSpace;

use super::*;
use crate::virtio::double::{Buffer, EVENT_IDX, INDIRECT_DESC, TestDriver, UNMAPPED, Used};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn ring(driver: &mut TestDriver, features: u64) -> Ring {
    let memory = driver.memory();
    let mut activation = driver.activation(features);
    let active = activation.queues.remove(0);
    Ring::new(active.queue, active.positions, features & INDIRECT_DESC != 0, &memory.memory()).unwrap()
}

/// Makes head 0 available and walks it.
fn walk(driver: &mut TestDriver, ring: &mut Ring) -> Result<Vec<Segment>> {
    driver.ring(0).push_available(0);
    driver.ring(0).publish();
    let memory = driver.memory();
    let memory = memory.memory();
    let head = ring.next_head(&memory)?.expect("one head is available");
    let mut chain = Chain::with_capacity(16);
    ring.walk(&memory, head, &mut chain).map(|()| chain.segments)
}

#[test]
fn a_chain_comes_in_readable_and_writable_pieces_whether_direct_or_indirect() {
    let mut driver = TestDriver::new(&[8]);
    let at = driver.allocate(64, 8);
    let mut ring = ring(&mut driver, INDIRECT_DESC);
    let buffers = [Buffer::readable(at, 16), Buffer::readable(at, 0), Buffer::writable(at + 16, 48)];
    let heads = [driver.ring(0).add(&buffers), driver.ring(0).add_indirect(&buffers)];
    let memory = driver.memory();
    let memory = memory.memory();
    let mut chain = Chain::default();
    for head in heads {
        assert_eq!(ring.next_head(&memory), Ok(Some(head)));
        ring.walk(&memory, head, &mut chain).unwrap();
        assert_eq!(chain.readable(), [Segment { address: at, length: 16 }]);
        assert_eq!(chain.writable(), [Segment { address: at + 16, length: 48 }]);
    }
    assert_eq!(ring.next_head(&memory), Ok(None));
}

#[test]
fn a_cycle_ends_in_an_error() {
    let mut driver = TestDriver::new(&[8]);
    let mut ring = ring(&mut driver, INDIRECT_DESC);
    let table = driver.ring(0).addresses().0;
    driver.ring(0).write_descriptor(table, 0, 0x10_0000, 0, NEXT, 1);
    driver.ring(0).write_descriptor(table, 1, 0x10_0000, 0, NEXT, 0);
    assert_eq!(walk(&mut driver, &mut ring), Err(RingError::TooLong { head: 0, limit: 256 }));
}

#[test]
fn every_bad_chain_is_an_error_that_says_what_is_wrong() {
    let mut driver = TestDriver::new(&[8]);
    let spare = driver.allocate(256, 16);
    let mut ring = ring(&mut driver, INDIRECT_DESC);
    let table = driver.ring(0).addresses().0;
    let indirect = |why| Err(RingError::Indirect { head: 0, why });
    let length = "the length of its table is no multiple of 16, or is 0 or too large";
    driver.ring(0).write_descriptor(spare, 0, spare, 16, INDIRECT, 0);
    driver.ring(0).write_descriptor(spare, 1, spare, 16, NEXT, 2);
    driver.ring(0).write_descriptor(table, 1, spare, 16, 0, 0);
    driver.ring(0).write_descriptor(table, 2, spare, u32::MAX, 0, 0);
    let cases = [
        ((spare, 16, NEXT, 8), Err(RingError::DescriptorIndex { index: 8, size: 8 })),
        ((spare, 16, NEXT | WRITE, 1), Err(RingError::Order { head: 0 })),
        ((spare, 16, NEXT, 2), Err(RingError::TooLarge { head: 0 })),
        ((spare, 16, INDIRECT | NEXT, 1), indirect("it has a next descriptor")),
        ((spare, 16, INDIRECT, 0), indirect("it is in an indirect table itself")),
        ((spare, 24, INDIRECT, 0), indirect(length)),
        ((spare, 0, INDIRECT, 0), indirect(length)),
        ((spare, 16 << 16, INDIRECT, 0), indirect(length)),
        ((spare + 16, 32, INDIRECT, 0), Err(RingError::DescriptorIndex { index: 2, size: 2 })),
        ((UNMAPPED, 16, INDIRECT, 0), Err(RingError::Unmapped { head: 0, address: UNMAPPED })),
        ((u64::MAX - 7, 16, INDIRECT, 0), Err(RingError::Unmapped { head: 0, address: u64::MAX - 7 })),
    ];
    for ((address, length, flags, next), error) in cases {
        driver.ring(0).write_descriptor(table, 0, address, length, flags, next);
        assert_eq!(walk(&mut driver, &mut ring), error);
    }
}

#[test]
fn an_indirect_descriptor_without_the_feature_is_refused() {
    let mut driver = TestDriver::new(&[8]);
    let at = driver.allocate(64, 16);
    let mut ring = ring(&mut driver, 0);
    let table = driver.ring(0).addresses().0;
    driver.ring(0).write_descriptor(table, 0, at, 16, INDIRECT, 0);
    assert!(matches!(walk(&mut driver, &mut ring), Err(RingError::Indirect { .. })));
}

#[test]
fn an_available_index_too_far_ahead_and_a_head_out_of_range_are_refused() {
    let mut driver = TestDriver::new(&[8]);
    let mut ring = ring(&mut driver, 0);
    let memory = driver.memory();
    let memory = memory.memory();
    driver.ring(0).set_available_index(9);
    assert_eq!(ring.next_head(&memory), Err(RingError::AvailableIndex { index: 9, next: 0, size: 8 }));
    assert!(ring.enable_kicks(&memory).is_err());
    driver.ring(0).push_available(8);
    driver.ring(0).publish();
    assert_eq!(ring.next_head(&memory), Err(RingError::DescriptorIndex { index: 8, size: 8 }));
}

#[test]
fn a_batch_is_published_at_once_and_interrupts_only_if_the_driver_wants_it() {
    for features in [0, EVENT_IDX] {
        let mut driver = TestDriver::new(&[4]);
        let at = driver.allocate(64, 16);
        let mut ring = ring(&mut driver, features);
        let memory = driver.memory();
        let memory = memory.memory();
        // Far enough for all indexes to wrap.
        for round in 0..40_000_u32 {
            driver.ring(0).want_interrupts(round % 2 == 0);
            let heads = [0, 1].map(|_| driver.ring(0).add(&[Buffer::writable(at, 8)]));
            for head in heads {
                assert_eq!(ring.next_head(&memory), Ok(Some(head)));
                ring.put_used(&memory, head, round).unwrap();
            }
            assert_eq!(driver.ring(0).take_used(), None, "nothing is visible before it is published");
            assert_eq!(ring.publish(&memory), Ok(round % 2 == 0));
            for head in heads {
                assert_eq!(driver.ring(0).take_used(), Some(Used { head, length: round }));
            }
        }
    }
}

#[test]
fn a_ring_that_somebody_else_had_goes_on_where_its_used_index_stands() {
    for features in [0, EVENT_IDX] {
        let mut driver = TestDriver::new(&[4]);
        let at = driver.allocate(64, 16);
        let memory = driver.memory();
        let memory = memory.memory();
        let mut ours = ring(&mut driver, features);
        let mut other = ring(&mut driver, features);
        let heads = [0, 1, 2].map(|_| driver.ring(0).add(&[Buffer::writable(at, 8)]));
        ours.disable_kicks(&memory).unwrap();
        // The other one takes two and uses one.
        assert_eq!(other.next_head(&memory), Ok(Some(heads[0])));
        assert_eq!(other.next_head(&memory), Ok(Some(heads[1])));
        other.put_used(&memory, heads[0], 1).unwrap();
        other.publish(&memory).unwrap();
        ours.resync(&memory).unwrap();
        assert_eq!(ours.state().next_used, 1);
        assert_eq!(ours.next_head(&memory), Ok(Some(heads[1])));
        assert_eq!(ours.next_head(&memory), Ok(Some(heads[2])));
        assert_eq!(ours.publish(&memory), Ok(false), "nothing is owed for what the other one used");
        ours.put_used(&memory, heads[1], 2).unwrap();
        ours.publish(&memory).unwrap();
        for (head, length) in [(heads[0], 1), (heads[1], 2)] {
            assert_eq!(driver.ring(0).take_used(), Some(Used { head, length }));
        }
        assert_eq!(ours.enable_kicks(&memory), Ok(false));
        driver.ring(0).add(&[Buffer::writable(at, 8)]);
        assert!(driver.ring(0).kick(), "the driver hears that kicks are wanted again");
    }
}

#[test]
fn the_driver_kicks_only_while_the_device_asks_for_it_and_no_chain_is_missed() {
    for features in [0, EVENT_IDX] {
        let mut driver = TestDriver::new(&[4]);
        let at = driver.allocate(64, 16);
        let mut ring = ring(&mut driver, features);
        let memory = driver.memory();
        let memory = memory.memory();
        let add = |driver: &mut TestDriver| {
            driver.ring(0).add(&[Buffer::writable(at, 8)]);
            driver.ring(0).kick()
        };
        assert!(!ring.is_available(&memory));
        assert!(add(&mut driver));
        assert!(ring.is_available(&memory));
        ring.disable_kicks(&memory).unwrap();
        assert!(ring.next_head(&memory).unwrap().is_some());
        assert!(!add(&mut driver), "the device is awake");
        assert_eq!(ring.enable_kicks(&memory), Ok(true), "the second chain came without a kick");
        ring.disable_kicks(&memory).unwrap();
        assert!(ring.next_head(&memory).unwrap().is_some());
        assert_eq!(ring.enable_kicks(&memory), Ok(false));
        assert!(add(&mut driver), "the device sleeps");
    }
}

#[test]
fn who_looks_on_sees_what_is_taken_and_used_but_nothing_while_somebody_else_has_the_ring() {
    let mut driver = TestDriver::new(&[4]);
    let at = driver.allocate(64, 16);
    let mut ring = ring(&mut driver, 0);
    let memory = driver.memory();
    let memory = memory.memory();
    let positions = Arc::clone(&ring.positions);
    let seen = || positions.get().map(|at| (at.next_avail, at.next_used, at.in_flight()));
    let heads = [0, 1].map(|_| driver.ring(0).add(&[Buffer::writable(at, 8)]));
    while ring.next_head(&memory).unwrap().is_some() {}
    assert_eq!(seen(), Some((2, 0, 2)), "a worker that found all takes no more before it waits");
    ring.put_used(&memory, heads[0], 8).unwrap();
    assert_eq!(seen(), Some((2, 0, 2)), "the driver does not see it yet");
    ring.publish(&memory).unwrap();
    assert_eq!(seen(), Some((2, 1, 1)));
    ring.give_away();
    assert_eq!(seen(), None);
    ring.resync(&memory).unwrap();
    assert_eq!(seen(), Some((1, 1, 0)));
}
