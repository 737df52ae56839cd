//! What is kept when the host fails, what is flushed when the cache goes, and what has to wait for a limit.

use super::memory::MemoryDisk;
use super::*;
use crate::DeviceEvent;
use crate::block::{ErrorPolicy, Operation};
use crate::limiter::{Limits, Rate};

const SIZE: usize = 1 << 20;
const WRITE: Operation = Operation::Write { stable: false };

fn bench(disk: &MemoryDisk, on_error: ErrorPolicy) -> Bench {
    disk.bench(BlockOptions { on_error, ..BlockOptions::new("root", "") })
}

/// Makes a write of 512 bytes available, with memory of its own; gives its head and where its status goes.
fn send_write(bench: &mut Bench, sector: u64, byte: u8) -> (u16, u64) {
    let (header, data, status) =
        (bench.driver.allocate(16, 16), bench.driver.allocate(512, 512), bench.driver.allocate(1, 1));
    let mut raw = [0; 16];
    raw[..4].copy_from_slice(&OUT.to_le_bytes());
    raw[8..].copy_from_slice(&sector.to_le_bytes());
    bench.driver.write(header, &raw);
    bench.driver.write(data, &[byte; 512]);
    bench.driver.write(status, &[0xaa]);
    let chain = [Buffer::readable(header, 16), Buffer::readable(data, 512), Buffer::writable(status, 1)];
    let head = bench.driver.ring(0).add_indirect(&chain);
    bench.driver.ring(0).kick();
    (head, status)
}

fn used(bench: &mut Bench) -> Option<u16> {
    bench.driver.ring(0).wait_used(Duration::from_millis(50)).map(|used| used.head)
}

fn held_events(bench: &Bench) -> usize {
    let held = |event: &DeviceEvent| matches!(event, DeviceEvent::IoError { held: true, .. });
    bench.notifier.events().iter().filter(|(_, event)| held(event)).count()
}

#[test]
fn a_failed_request_is_kept_and_tried_again_before_all_that_came_after_it() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk, ErrorPolicy::Stop).started(FLUSH);
    disk.results(&[Err(libc::EIO)]);
    let (first, first_status) = send_write(&mut bench, 8, 1);
    let event = bench.notifier.wait(SOON, |event| matches!(event, DeviceEvent::IoError { .. })).unwrap();
    let expected = DeviceEvent::IoError { operation: "write", offset: 4096, bytes: 512, errno: libc::EIO, held: true };
    assert_eq!(event, expected);
    let (second, _) = send_write(&mut bench, 16, 2);
    worker_turns(&mut bench);
    assert_eq!(disk.seen().len(), 1, "nothing is taken while a request is kept");
    assert_eq!(used(&mut bench), None, "the guest hears nothing");
    assert_eq!(bench.driver.read(first_status, 1), [0xaa]);
    assert_eq!((bench.device.handle().held(), bench.device.handle().in_flight().0), (1, 0));

    // Still broken: it is kept again, and asks for help again.
    let stopped = bench.stop();
    disk.results(&[Err(libc::EIO)]);
    bench.resume(FLUSH, &stopped);
    eventually(|| held_events(&bench) == 2);

    let stopped = bench.stop();
    bench.resume(FLUSH, &stopped);
    assert_eq!([used(&mut bench), used(&mut bench)], [Some(first), Some(second)]);
    assert_eq!(bench.driver.read(first_status, 1), [STATUS_OK]);
    assert_eq!(disk.seen(), [(WRITE, 4096, 512), (WRITE, 4096, 512), (WRITE, 4096, 512), (WRITE, 8192, 512)]);
    assert_eq!(bench.device.handle().held(), 0);
    assert_eq!(bench.read(8, 512).1, [1; 512]);
    assert_eq!(bench.metric("disk_errors", Some("write")), 2);
}

#[test]
fn of_requests_in_flight_only_those_that_failed_are_tried_again_in_their_order() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk, ErrorPolicy::Stop).started(FLUSH);
    disk.hold(true);
    let heads: Vec<u16> = (0..4).map(|n| send_write(&mut bench, n * 8, n as u8 + 1).0).collect();
    eventually(|| disk.pending() == 4);
    disk.results(&[Err(libc::EIO), Ok(512), Err(libc::ENOSPC), Ok(512)]);
    disk.hold(false);
    assert_eq!([used(&mut bench), used(&mut bench)], [Some(heads[1]), Some(heads[3])]);
    eventually(|| bench.device.handle().held() == 2);
    assert_eq!(held_events(&bench), 1, "one call for help");
    let stopped = bench.stop();
    bench.resume(FLUSH, &stopped);
    assert_eq!([used(&mut bench), used(&mut bench)], [Some(heads[0]), Some(heads[2])]);
    let again = [(WRITE, 0, 512), (WRITE, 8192, 512)];
    assert_eq!(disk.seen()[4..], again);
}

#[test]
fn a_request_that_fails_while_the_device_is_being_stopped_is_kept_too() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk, ErrorPolicy::Stop).started(FLUSH);
    disk.hold(true);
    let (head, _) = send_write(&mut bench, 0, 1);
    eventually(|| disk.pending() == 1);
    assert!(bench.device.stop().is_err());
    disk.results(&[Err(libc::EIO)]);
    disk.hold(false);
    let stopped = bench.stop();
    assert_eq!(used(&mut bench), None);
    bench.resume(FLUSH, &stopped);
    assert_eq!(used(&mut bench), Some(head));
}

#[test]
fn a_reservation_conflict_goes_to_the_guest_and_so_does_all_that_the_policy_does_not_name() {
    for (policy, errno, held) in [
        (ErrorPolicy::Stop, libc::EBADE, false),
        (ErrorPolicy::Enospc, libc::EBADE, false),
        (ErrorPolicy::Enospc, libc::EIO, false),
        (ErrorPolicy::Enospc, libc::ENOSPC, true),
        (ErrorPolicy::Enospc, libc::EDQUOT, true),
        (ErrorPolicy::Report, libc::ENOSPC, false),
    ] {
        let disk = MemoryDisk::new(SIZE);
        let mut bench = bench(&disk, policy).started(FLUSH);
        disk.results(&[Err(errno)]);
        let (head, status) = send_write(&mut bench, 0, 1);
        assert!(bench.notifier.wait(SOON, |event| matches!(event, DeviceEvent::IoError { .. })).is_some());
        assert_eq!(held_events(&bench), usize::from(held), "{policy:?} {errno}");
        let answer = (!held).then_some(head);
        assert_eq!(used(&mut bench), answer, "{policy:?} {errno}");
        assert_eq!(bench.driver.read(status, 1), [if held { 0xaa } else { STATUS_IOERR }]);
    }
}

#[test]
fn the_policy_may_change_while_the_disk_is_in_use() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk, ErrorPolicy::Report).started(FLUSH);
    bench.device.handle().set_error_policy(ErrorPolicy::Stop);
    disk.results(&[Err(libc::EIO)]);
    send_write(&mut bench, 0, 1);
    eventually(|| bench.device.handle().held() == 1);
}

#[test]
fn a_reset_forgets_what_was_kept() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk, ErrorPolicy::Stop).started(FLUSH);
    disk.results(&[Err(libc::EIO)]);
    send_write(&mut bench, 0, 1);
    eventually(|| bench.device.handle().held() == 1);
    bench.stop();
    bench.device.reset();
    assert_eq!(bench.device.handle().held(), 0);
    bench.start(FLUSH);
    assert_eq!(bench.request(T_FLUSH, 0, &[]), ok(1));
    assert_eq!(disk.seen().len(), 2, "the write was not tried again");
}

#[test]
fn turning_the_write_cache_off_flushes_what_was_written_before() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk, ErrorPolicy::Report).started(FLUSH);
    disk.hold(true);
    let (head, _) = send_write(&mut bench, 0, 1);
    eventually(|| disk.pending() == 1);
    bench.device.write_config(32, &[0]);
    worker_turns(&mut bench);
    assert_eq!(disk.seen(), [(WRITE, 0, 512)], "the flush follows the write that is in flight");
    disk.hold(false);
    assert_eq!(used(&mut bench), Some(head));
    eventually(|| disk.seen().len() == 2);
    assert_eq!(disk.seen()[1], (Operation::Flush, 0, 0));
    assert_eq!(bench.write(0, &[2; 512]), ok(1));
    assert_eq!(disk.seen()[2], (Operation::Write { stable: true }, 0, 512));
    // Off once more is nothing new.
    bench.device.write_config(32, &[0]);
    worker_turns(&mut bench);
    assert_eq!(disk.seen().len(), 3);
    assert!(bench.notifier.events().is_empty());
}

#[test]
fn a_flush_of_our_own_that_fails_is_told_and_a_stop_waits_for_it() {
    let disk = MemoryDisk::new(SIZE);
    let mut bench = bench(&disk, ErrorPolicy::Stop).started(FLUSH);
    disk.hold(true);
    bench.device.write_config(32, &[0]);
    eventually(|| disk.pending() == 1);
    assert!(bench.device.stop().is_err());
    disk.results(&[Err(libc::EIO)]);
    disk.hold(false);
    bench.stop();
    let told = |event: &DeviceEvent| {
        matches!(event, DeviceEvent::IoError { operation: "flush", errno: libc::EIO, held: false, .. })
    };
    assert!(bench.notifier.events().iter().any(|(_, event)| told(event)));
}

#[test]
fn requests_wait_for_the_limit_and_go_on_when_it_is_lifted() {
    let disk = MemoryDisk::new(SIZE);
    let slow = Limits { ops: Some(Rate { per_second: 1, burst: Some(1) }), bytes: None };
    let mut bench = disk.bench(BlockOptions { limits: slow, ..BlockOptions::new("root", "") }).started(FLUSH);
    let heads: Vec<u16> = (0..3).map(|n| send_write(&mut bench, n * 8, 1).0).collect();
    eventually(|| bench.metric("disk_throttled", None) > 0);
    assert!(disk.seen().len() < 3);
    bench.device.handle().set_limits(Limits::default());
    for head in heads {
        assert_eq!(bench.driver.ring(0).wait_used(SOON).unwrap().head, head);
    }
}

#[test]
fn a_throttled_queue_stops_at_once_and_goes_on_where_it_stood() {
    let disk = MemoryDisk::new(SIZE);
    let slow = Limits { ops: None, bytes: Some(Rate { per_second: 1, burst: Some(1) }) };
    let mut bench = disk.bench(BlockOptions { limits: slow, ..BlockOptions::new("root", "") }).started(FLUSH);
    let first = send_write(&mut bench, 0, 1).0;
    assert_eq!(bench.driver.ring(0).wait_used(SOON).unwrap().head, first);
    let second = send_write(&mut bench, 8, 1).0;
    eventually(|| bench.metric("disk_throttled", None) > 0);
    let stopped = bench.stop();
    assert_eq!(stopped[0].state.next_avail, 1);
    bench.device.handle().set_limits(Limits::default());
    bench.resume(FLUSH, &stopped);
    assert_eq!(bench.driver.ring(0).wait_used(SOON).unwrap().head, second);
}
