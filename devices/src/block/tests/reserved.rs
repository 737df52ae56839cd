//! A disk that is reserved, and is taken by another host.

use super::super::reservation::Guard;
use super::super::reservation::tests::Lun;
use std::time::Instant;

use super::memory::MemoryDisk;
use super::*;
use crate::DeviceEvent;

const SIZE: usize = 1 << 20;
const A: u64 = 0xa;
const B: u64 = 0xb;

const RARELY: Duration = Duration::from_secs(3600);

fn bench(disk: &MemoryDisk, lun: &Lun) -> Bench {
    disk.guarded(Guard::new(lun.reserved_by(1, A, false).unwrap())).started(FLUSH)
}

/// One that looks at its reservation only if there is a reason.
fn lazy(disk: &MemoryDisk, lun: &Lun) -> Bench {
    disk.guarded(Guard::new(lun.reserved_by(1, A, false).unwrap()).every(RARELY)).started(FLUSH)
}

fn lost(bench: &Bench) -> Option<DeviceEvent> {
    bench.notifier.wait(SOON, |event| matches!(event, DeviceEvent::ReservationLost { .. }))
}

#[test]
fn a_conflict_after_the_lun_was_taken_is_the_last_request_that_reaches_it() {
    let (disk, lun) = (MemoryDisk::new(SIZE), Lun::default());
    let mut bench = lazy(&disk, &lun);
    assert_eq!(bench.write(0, &[1; 512]), ok(1));
    let _other = lun.reserved_by(2, B, true).unwrap();
    disk.results(&[Err(libc::EBADE)]);
    assert_eq!(bench.write(0, &[2; 512]), REFUSED, "the guest is told of the conflict");
    assert_eq!(lost(&bench), Some(DeviceEvent::ReservationLost { holder: Some(B) }));
    let seen = disk.seen().len();
    for _ in 0..3 {
        bench.send(0, OUT, 0, &[Buffer::readable(bench.data, 512)]);
    }
    worker_turns(&mut bench);
    assert_eq!(disk.seen().len(), seen);
    assert_eq!(bench.stop()[0].state.next_avail, 2, "the others stay in the ring");
    let count = |bench: &Bench| {
        let events = bench.notifier.events();
        events.iter().filter(|(_, event)| matches!(event, DeviceEvent::ReservationLost { .. })).count()
    };
    bench.device.handle().release_reservation().unwrap();
    assert_eq!(count(&bench), 1, "it is told once");
}

#[test]
fn a_lun_that_is_taken_from_an_idle_guest_is_noticed_as_well() {
    let (disk, lun) = (MemoryDisk::new(SIZE), Lun::default());
    let bench = bench(&disk, &lun);
    let _other = lun.reserved_by(2, B, true).unwrap();
    assert_eq!(lost(&bench), Some(DeviceEvent::ReservationLost { holder: Some(B) }));
}

#[test]
fn a_conflict_on_one_path_of_a_lun_that_is_still_ours_stops_nothing() {
    let (disk, lun) = (MemoryDisk::new(SIZE), Lun::default());
    let mut bench = lazy(&disk, &lun);
    let begun = Instant::now();
    for _ in 0..100 {
        disk.results(&[Err(libc::EBADE)]);
        assert_eq!(bench.write(0, &[2; 512]), REFUSED);
    }
    assert_eq!(bench.write(0, &[3; 512]), ok(1));
    eventually(|| begun.elapsed() > Duration::from_millis(300));
    let looks = lun.looks();
    // Two were at the start.
    let bearable = 4 + begun.elapsed().as_millis() as usize / 100;
    assert!((3..=bearable).contains(&looks), "{looks} looks at the LUN for 100 conflicts, {bearable} would do");
    // And then there is no more reason to look.
    std::thread::sleep(Duration::from_millis(500));
    assert!(lun.looks() <= looks + 1);
    assert!(!bench.notifier.events().iter().any(|(_, event)| matches!(event, DeviceEvent::ReservationLost { .. })));
}

#[test]
fn a_device_that_goes_gives_its_lun_up_unless_requests_hang() {
    let (disk, lun) = (MemoryDisk::new(SIZE), Lun::default());
    let first = bench(&disk, &lun);
    let handle = first.device.handle();
    drop(first);
    assert_eq!(lun.keys(), [0; 0], "released without being asked to, also with a handle left");
    handle.release_reservation().unwrap();

    let mut second = bench(&disk, &lun);
    second.device.handle().release_reservation().unwrap();
    assert_eq!(lun.keys(), [0; 0]);
    assert_eq!(second.write(0, &[1; 512]), ok(1));
    drop(second);

    let mut third = bench(&disk, &lun);
    disk.hold(true);
    third.send(0, OUT, 0, &[Buffer::readable(third.data, 512)]);
    eventually(|| disk.pending() == 1);
    let error = third.device.handle().release_reservation().unwrap_err().to_string();
    assert!(error.contains("1 of its requests"), "{error}");
    let memory = third.driver.memory();
    drop(third);
    assert_eq!(lun.keys(), [A, A], "its write may still come");
    disk.hold(false);
    eventually(|| disk.pending() == 0);
    drop(memory);
}
