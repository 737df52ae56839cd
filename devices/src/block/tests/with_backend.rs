//! With a backend that can be told what to do.

use super::memory::MemoryDisk;
use super::*;
use crate::DeviceEvent;
use crate::block::Operation;
use crate::virtio::StartError;
use crate::virtio::double::UNMAPPED;

const SIZE: usize = 1 << 20;

fn bench(disk: &MemoryDisk) -> Bench {
    disk.bench(BlockOptions::new("root", ""))
}

#[test]
fn every_error_of_the_host_reaches_the_guest_the_metrics_and_the_events() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    let errnos =
        [libc::EIO, libc::ENOSPC, libc::EBADE, libc::EOPNOTSUPP, libc::ETIMEDOUT, libc::EREMOTEIO, libc::ENOLINK];
    for errno in errnos {
        disk.results(&[Err(errno); 3]);
        assert_eq!(bench.write(8, &[1; 512]), REFUSED);
        assert_eq!(bench.read(8, 512).0, REFUSED);
        assert_eq!(bench.request(T_FLUSH, 0, &[]), REFUSED);
        let events = bench.notifier.events();
        let told = events.iter().rev().take(3).filter(|(disk, event)| {
            disk == "root" && matches!(event, DeviceEvent::IoError { errno: told, .. } if *told == errno)
        });
        assert_eq!(told.count(), 3);
    }
    let events = bench.notifier.events();
    let write = |(_, event): &(String, DeviceEvent)| {
        matches!(event, DeviceEvent::IoError { operation: "write", offset: 4096, bytes: 512, held: false, .. })
    };
    assert!(events.iter().any(write), "{events:?}");
    for operation in ["read", "write", "flush"] {
        assert_eq!(bench.metric("disk_errors", Some(operation)), errnos.len() as u64);
        assert_eq!(bench.metric("disk_requests", Some(operation)), errnos.len() as u64);
    }
    assert_eq!(bench.metric("disk_written_bytes", None) + bench.metric("disk_read_bytes", None), 0);
    assert_eq!(bench.write(8, &[1; 512]), ok(1), "the next one works");
}

#[test]
fn a_short_completion_is_never_success() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    for bytes in [0, 1, 511, 513, 1024] {
        disk.results(&[Ok(bytes); 2]);
        assert_eq!(bench.write(8, &[1; 512]), REFUSED);
        assert_eq!(bench.read(8, 512).0, REFUSED);
    }
}

#[test]
fn a_discard_that_the_host_cannot_do_is_unsupported_and_one_that_fails_is_an_error() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    for kind in [DISCARD, WRITE_ZEROES] {
        disk.results(&[Err(libc::EOPNOTSUPP)]);
        assert_eq!(bench.ranges(kind, &[(0, 8, 0)]), UNSUPPORTED);
        disk.results(&[Err(libc::EIO)]);
        assert_eq!(bench.ranges(kind, &[(0, 8, 0)]), REFUSED);
    }
}

#[test]
fn the_ranges_of_a_request_are_done_one_after_the_other_until_one_fails() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    assert_eq!(bench.ranges(DISCARD, &[(0, 8, 0), (16, 0, 0), (32, 4096 / 512, 0)]), ok(1));
    assert_eq!(disk.seen(), [(Operation::Discard, 0, 4096), (Operation::Discard, 16384, 4096)]);
    disk.results(&[Ok(4096), Err(libc::EIO)]);
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, 8, 1), (8, 8, 0), (16, 8, 0)]), REFUSED);
    let zeroes = |unmap| Operation::WriteZeroes { unmap, stable: false };
    assert_eq!(disk.seen()[2..], [(zeroes(true), 0, 4096), (zeroes(false), 4096, 4096)]);
}

#[test]
fn ranges_are_checked_and_their_flags_known() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    let sectors = SIZE as u64 / 512;
    assert_eq!(bench.ranges(DISCARD, &[(0, 8, 1)]), UNSUPPORTED, "unmap is no flag of discard");
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, 8, 2)]), UNSUPPORTED);
    for range in [(sectors, 1, 0), (u64::MAX, 8, 0), (0, u32::MAX, 0), (1 << 55, 1, 0)] {
        assert_eq!(bench.ranges(DISCARD, &[(0, 8, 0), range]), REFUSED, "{range:?}");
    }
    assert_eq!(bench.ranges(DISCARD, &[(0, 1, 0); 17]), REFUSED, "more than the configuration says");
    let data = bench.data;
    for length in [0, 1, 15, 17] {
        assert_eq!(bench.request(DISCARD, 0, &[Buffer::readable(data, length)]), REFUSED, "{length} bytes");
    }
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, 0, 0)]), ok(1), "nothing to do is done");
    assert!(disk.seen().is_empty());
}

#[test]
fn requests_outside_the_disk_or_of_odd_size_or_of_unknown_type_never_reach_it() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    let sectors = SIZE as u64 / 512;
    for sector in [sectors, sectors + 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(bench.write(sector, &[1; 512]), REFUSED);
        assert_eq!(bench.read(sector, 512).0, REFUSED);
    }
    assert_eq!(bench.read(sectors - 1, 1024).0, REFUSED);
    for length in [1, 511, 513] {
        assert_eq!(bench.read(0, length).0, REFUSED);
    }
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 99, u32::MAX] {
        assert_eq!(bench.request(kind, 0, &[]), UNSUPPORTED, "type {kind}");
    }
    assert_eq!(bench.request(IN, 0, &[]), ok(1), "nothing to read is read");
    assert_eq!(bench.metric("disk_refused_requests", None), 2 * 5 + 1 + 3 + 11);
    assert!(disk.seen().is_empty());
    assert!(bench.driver.signals().reset_reasons().is_empty());
}

#[test]
fn a_header_that_is_too_short_is_refused() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    bench.header(IN, 0);
    let chain = [Buffer::readable(bench.header, 15), Buffer::writable(bench.data, 512)];
    let chain = [chain[0], chain[1], Buffer::writable(bench.status, 1)];
    let head = bench.driver.ring(0).add(&chain);
    bench.driver.ring(0).kick();
    assert_eq!(bench.answer(0, head), REFUSED);
}

#[test]
fn writes_are_stable_when_flush_was_not_negotiated_or_the_cache_is_off() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk);
    let stable = |stable| Operation::Write { stable };
    for (features, writeback, expected) in [(0, 1, true), (FLUSH, 0, true), (FLUSH, 1, false)] {
        bench.device.write_config(32, &[writeback]);
        bench.start(features);
        assert_eq!(bench.write(0, &[1; 512]), ok(1));
        assert_eq!(disk.seen().last(), Some(&(stable(expected), 0, 512)));
        assert_eq!(bench.stop().len(), 1);
    }
}

#[test]
fn a_stop_during_a_request_is_busy_until_it_has_ended_and_nothing_is_written_after() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    assert_eq!(bench.write(0, &[7; 4096]), ok(1));
    disk.hold(true);
    let data = bench.data;
    bench.driver.write(data, &[1; 4096]);
    let head = bench.send(0, IN, 0, &[Buffer::writable(data, 4096)]);
    eventually(|| disk.pending() == 1);
    eventually(|| bench.device.handle().in_flight().0 == 1);
    let busy = bench.device.stop().expect_err("a read is in flight");
    assert_eq!(busy.requests, 1);
    assert!(bench.device.handle().in_flight().1 > Duration::ZERO);
    let activation = bench.driver.resume(FLUSH, &[]);
    assert!(matches!(bench.device.start(activation), Err(StartError::Running)));
    worker_turns(&mut bench);
    assert!(bench.device.stop().is_err(), "asking again changes nothing");
    assert_eq!(bench.driver.read(data, 4096), [1; 4096]);
    disk.hold(false);
    assert!(bench.notifier.wait(SOON, |event| *event == DeviceEvent::Drained).is_some());
    let stopped = bench.device.stop().expect("it said that it has drained");
    assert_eq!(stopped.len(), 1);
    assert_eq!((stopped[0].state.next_avail, stopped[0].state.next_used), (2, 2));
    assert_eq!(bench.answer(0, head), ok(4097), "the read ended before the stop did");
    assert_eq!(bench.driver.read(data, 4096), [7; 4096]);
    // The driver may use its memory for other things now.
    bench.driver.write(data, &[2; 4096]);
    bench.driver.ring(0).kick_always();
    assert_eq!(bench.device.handle().in_flight().0, 0);
    assert_eq!(bench.driver.read(data, 4096), [2; 4096]);
}

#[test]
fn a_stopped_queue_takes_no_request_before_it_is_started_again() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    disk.hold(true);
    let first = bench.send(0, T_FLUSH, 0, &[]);
    eventually(|| disk.pending() == 1);
    assert!(bench.device.stop().is_err());
    let second = bench.send(0, T_FLUSH, 0, &[]);
    worker_turns(&mut bench);
    disk.hold(false);
    let stopped = bench.stop();
    assert_eq!(bench.answer(0, first), ok(1));
    assert_eq!(disk.seen().len(), 1);
    assert_eq!((stopped[0].state.next_avail, stopped[0].state.next_used), (1, 1));
    bench.resume(FLUSH, &stopped);
    assert_eq!(bench.answer(0, second), ok(1));
}

#[test]
fn a_device_dropped_while_its_disk_hangs_leaves_its_thread_to_end_by_itself() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk).started(FLUSH);
    disk.hold(true);
    bench.send(0, IN, 0, &[Buffer::writable(bench.data, 4096)]);
    eventually(|| disk.pending() == 1);
    let memory = bench.driver.memory();
    drop(bench);
    assert_eq!(disk.pending(), 1, "the request is still in flight");
    disk.hold(false);
    eventually(|| disk.pending() == 0);
    drop(memory);
}

#[test]
fn requests_complete_in_any_order_and_a_full_ring_is_no_trouble() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = disk.bench(BlockOptions { queue_size: 16, ..BlockOptions::new("root", "") }).started(FLUSH);
    for _ in 0..100 {
        disk.hold(true);
        bench.header(T_FLUSH, 0);
        let chain = bench.chain(&[]);
        let heads: Vec<u16> = (0..16).map(|_| bench.driver.ring(0).add_indirect(&chain)).collect();
        bench.driver.ring(0).kick();
        // Counted when all of them were taken.
        eventually(|| bench.metric("disk_queue_depth", None) == 16);
        assert_eq!(disk.pending(), 16);
        disk.hold(false);
        let used = heads.iter().map(|_| bench.driver.ring(0).wait_used(SOON).expect("the disk answers").head);
        assert_eq!(used.collect::<Vec<_>>(), heads);
    }
}

#[test]
fn queues_that_cannot_work_are_refused_before_any_starts() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = disk.bench(BlockOptions { queues: 2, ..BlockOptions::new("root", "") });
    let mut broken = bench.driver.activation(FLUSH);
    broken.queues[1].queue.try_set_used_ring_address(vm_memory::GuestAddress(UNMAPPED)).unwrap();
    assert!(matches!(bench.device.start(broken), Err(StartError::Queue { index: 1, .. })));
    let mut twice = bench.driver.activation(FLUSH);
    twice.queues[1].index = 0;
    assert!(matches!(bench.device.start(twice), Err(StartError::Queue { index: 0, .. })));
    let mut unknown = bench.driver.activation(FLUSH);
    unknown.queues[1].index = 2;
    assert!(matches!(bench.device.start(unknown), Err(StartError::Queue { index: 2, .. })));
    assert!(bench.stop().is_empty(), "nothing was started");
    let mut small = TestDriver::new(&[512, 512]);
    assert!(matches!(bench.device.start(small.activation(FLUSH)), Err(StartError::Queue { index: 0, .. })));
    bench.start(FLUSH);
    assert_eq!(bench.request(T_FLUSH, 0, &[]), ok(1));
}
