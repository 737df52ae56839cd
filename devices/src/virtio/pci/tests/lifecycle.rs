//! Reset, pause, resume, and what happens when they meet.

use super::*;

fn positions(driver: &Driver) -> Vec<(u16, u16, u16)> {
    driver.device.with(|script| {
        let queues = &script.running.as_ref().unwrap().queues;
        queues.iter().map(|q| (q.index, q.queue.next_avail(), q.queue.next_used())).collect()
    })
}

#[test]
fn a_reset_forgets_all_that_the_driver_set() {
    let driver = Driver::ready();
    driver.use_interrupts();
    driver.set_word(QUEUE_SELECT, 1);
    let before = Driver::new().read::<60>(0);
    assert_ne!(driver.read::<60>(0), before);
    assert_eq!(driver.set_status(0), 0);
    assert_eq!(driver.read::<60>(0), before);
    assert_eq!(driver.device.with(|script| script.resets), 1);
    driver.negotiate();
    driver.enable(0);
    driver.set_status(DRIVER_READY);
    assert_eq!(positions(&driver), [(0, 0, 0)]);
}

#[test]
fn status_stays_non_zero_until_the_device_has_drained_and_only_reading_it_asks_again() {
    let driver = Driver::ready();
    driver.device.with(|script| script.busy = 4);
    driver.write(STATUS, &[0]);
    let stops = || driver.device.with(|script| script.stops);
    assert_eq!(stops(), 1, "the write returns at once");
    driver.word(QUEUE_SIZE);
    driver.read::<4>(DEVICE);
    driver.pci_read::<4>(0);
    driver.write(STATUS, &[0]);
    assert_eq!(stops(), 1);
    for _ in 0..3 {
        assert_eq!(driver.status(), DRIVER_READY);
    }
    assert!(driver.device.running());
    assert_eq!(driver.status(), 0);
    assert!(!driver.device.running());
    assert_eq!(driver.device.with(|script| (script.stops, script.resets)), (5, 1));
    assert_eq!(driver.status(), 0);
    assert_eq!(stops(), 5);
}

#[test]
fn writes_while_a_reset_drains_are_ignored() {
    let driver = Driver::ready();
    driver.device.with(|script| script.busy = 2);
    driver.write(STATUS, &[0]);
    driver.set_word(QUEUE_SELECT, 2);
    driver.set_word(16, 1);
    driver.write(STATUS, &[1]);
    driver.write(DEVICE, &[7]);
    driver.enable(2);
    assert_ne!(driver.status(), 0);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read::<60>(0), Driver::new().read::<60>(0));
    assert_eq!(driver.read::<1>(DEVICE), [0]);
}

#[test]
fn a_reset_clears_needs_reset_and_pending_interrupts_but_not_the_vectors_of_the_system() {
    let driver = Driver::ready();
    driver.use_interrupts();
    driver.write(MSIX + 12, &1u32.to_le_bytes());
    driver.device.with(|script| {
        let activation = script.running.as_ref().unwrap();
        activation.queues[0].interrupt.trigger();
        activation.signals.needs_reset("a test");
        activation.signals.needs_reset("again");
    });
    assert_eq!(driver.read::<1>(PENDING), [0], "only 4 and 8 byte accesses");
    assert_eq!(driver.read::<4>(PENDING), [1, 0, 0, 0]);
    assert_eq!(driver.status(), 0x40 | DRIVER_READY);
    assert!(driver.interrupted(3));
    assert_eq!(driver.notified.0.lock().unwrap().len(), 1, "told once");
    assert_eq!(driver.set_status(0), 0);
    assert_eq!(driver.read::<4>(PENDING), [0; 4]);
    driver.negotiate();
    driver.set_word(16, 3);
    driver.set_status(DRIVER_READY);
    driver.pci.signals().config_changed();
    assert!(driver.interrupted(3), "the vector is still routed and unmasked");
}

#[test]
fn a_driver_that_breaks_its_device_over_and_over_does_not_fill_the_events() {
    let driver = Driver::new();
    for _ in 0..100 {
        driver.negotiate();
        driver.set_status(DRIVER_READY);
        driver.pci.signals().needs_reset("a test");
        assert_eq!(driver.status(), 0x40 | DRIVER_READY);
        driver.set_status(0);
    }
    assert_eq!(driver.notified.0.lock().unwrap().len(), 5, "as many as lines of the log");
    let mut counted = 0;
    driver.pci.metrics().collect(&mut |sample| {
        if let ("virtio_needs_resets", Value::Counter(count)) = (sample.name, sample.value) {
            counted = count;
        }
    });
    assert_eq!(counted, 100);
}

#[test]
fn what_is_shown_follows_the_command_register_the_bar_and_the_vectors() {
    let driver = Driver::ready();
    let view = driver.pci.view();
    let config = |offset: u16, data: &[u8]| {
        let _ = driver.pci.config_write(offset, data);
    };
    config(0x10, &0x1_0000_u32.to_le_bytes());
    config(0x14, &2u32.to_le_bytes());
    config(0x04, &4u16.to_le_bytes());
    assert_eq!((view.command(), view.bar()), (4, None));
    config(0x04, &6u16.to_le_bytes());
    assert_eq!((view.command(), view.bar()), (6, Some(0x2_0001_0000)));
    let masked = |view: &TransportView| view.interrupts().vectors.iter().map(|v| v.masked).collect::<Vec<_>>();
    assert!(masked(&view).iter().all(|masked| *masked));
    driver.use_interrupts();
    let interrupts = view.interrupts();
    assert!(interrupts.enabled && !interrupts.function_masked);
    assert!(masked(&view).iter().any(|masked| !masked));
    driver.pci.reset().unwrap();
    assert_eq!((view.command(), view.bar(), view.interrupts().enabled), (0, None, false));
}

#[test]
fn the_driver_state_follows_what_the_driver_does() {
    let driver = Driver::new();
    assert_eq!(driver.pci.driver_state(), DriverState::Idle);
    driver.negotiate();
    assert_eq!(driver.pci.driver_state(), DriverState::Idle);
    driver.set_status(DRIVER_READY);
    assert_eq!(driver.pci.driver_state(), DriverState::Active);
    driver.pci.signals().needs_reset("a test");
    assert_eq!(driver.pci.driver_state(), DriverState::NeedsReset);
    driver.set_status(0);
    assert_eq!(driver.pci.driver_state(), DriverState::Idle);
}

#[test]
fn a_device_that_cannot_start_is_broken_until_its_reset() {
    let driver = Driver::new();
    driver.device.with(|script| script.refuse = true);
    driver.negotiate();
    driver.enable(0);
    assert_eq!(driver.set_status(DRIVER_READY), 0x40 | DRIVER_READY);
    driver.set_status(DRIVER_READY);
    assert_eq!(driver.device.with(|script| script.starts), 1, "not tried again");
    driver.device.with(|script| script.refuse = false);
    assert_eq!(driver.set_status(0), 0);
    driver.negotiate();
    assert_eq!(driver.set_status(DRIVER_READY), DRIVER_READY);
}

#[test]
fn a_device_may_break_from_inside_its_start() {
    let driver = Driver::new();
    driver.device.with(|script| script.break_at_start = true);
    driver.negotiate();
    assert_eq!(driver.set_status(DRIVER_READY), 0x40 | DRIVER_READY);
    assert!(driver.device.running());
    assert_eq!(driver.set_status(0), 0);
}

#[test]
fn pause_and_resume_keep_the_positions_and_kick_every_queue() {
    let driver = Driver::ready();
    driver.device.advance(7);
    driver.pci.pause().unwrap();
    driver.pci.pause().unwrap();
    assert!(!driver.device.running());
    driver.pci.resume().unwrap();
    assert_eq!(positions(&driver), [(0, 7, 7), (1, 7, 7)]);
    assert!(driver.kicked(0) && driver.kicked(1));
    driver.pci.resume().unwrap();
    assert_eq!(driver.device.with(|script| script.starts), 2, "resuming what runs does nothing");
    driver.device.advance(u16::MAX);
    driver.pci.pause().unwrap();
    driver.pci.resume().unwrap();
    assert_eq!(positions(&driver), [(0, 6, 6), (1, 6, 6)]);
}

#[test]
fn a_pause_that_does_not_drain_can_be_asked_again_or_taken_back() {
    let driver = Driver::ready();
    driver.device.advance(3);
    driver.device.with(|script| script.busy = 3);
    assert_eq!(driver.pci.pause().unwrap_err().requests, 3);
    assert!(driver.pci.pause().is_err());
    assert!(matches!(driver.pci.resume(), Err(StartError::Running)));
    driver.pci.resume().unwrap();
    assert_eq!(positions(&driver), [(0, 3, 3), (1, 3, 3)]);
}

#[test]
fn pausing_a_device_without_driver_changes_nothing() {
    let driver = Driver::new();
    driver.pci.pause().unwrap();
    driver.pci.resume().unwrap();
    assert_eq!(driver.device.with(|script| script.starts), 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_driver_that_gets_ready_during_a_pause_starts_with_the_resume() {
    let driver = Driver::new();
    driver.pci.pause().unwrap();
    driver.negotiate();
    driver.enable(0);
    assert_eq!(driver.set_status(DRIVER_READY), DRIVER_READY);
    assert!(!driver.device.running());
    driver.pci.resume().unwrap();
    assert!(driver.device.running());
}

#[test]
fn a_reset_during_a_pause_leaves_nothing_to_resume() {
    for busy in [0, 2] {
        let driver = Driver::ready();
        driver.device.advance(5);
        driver.device.with(|script| script.busy = busy);
        assert_eq!(driver.pci.pause().is_err(), busy > 0);
        driver.write(STATUS, &[0]);
        while driver.status() != 0 {}
        driver.pci.resume().unwrap();
        assert!(!driver.device.running());
        driver.negotiate();
        driver.enable(0);
        driver.set_status(DRIVER_READY);
        assert_eq!(positions(&driver), [(0, 0, 0)]);
    }
}

#[test]
fn a_pause_during_a_reset_waits_for_its_drain() {
    let driver = Driver::ready();
    driver.device.with(|script| script.busy = 2);
    driver.write(STATUS, &[0]);
    assert!(driver.pci.pause().is_err());
    driver.pci.pause().unwrap();
    driver.pci.resume().unwrap();
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.device.with(|script| script.resets), 1);
}

#[test]
fn a_resume_that_the_device_refuses_breaks_it() {
    let driver = Driver::ready();
    driver.pci.pause().unwrap();
    driver.device.with(|script| script.refuse = true);
    assert!(matches!(driver.pci.resume(), Err(StartError::WorkerGone)));
    assert_eq!(driver.status(), 0x40 | DRIVER_READY);
}

#[test]
fn a_machine_reset_takes_configuration_space_and_vectors_back_to_power_on_once_drained() {
    let driver = Driver::ready();
    driver.use_interrupts();
    driver.pci_write(0x10, &0x80_0000_0000_u64.to_le_bytes());
    driver.pci_write(4, &[6, 0]);
    driver.device.with(|script| script.busy = 1);
    assert!(driver.pci.reset().is_err());
    assert!(driver.pci.bars()[0].address.is_some(), "nothing is reset while it drains");
    driver.pci.reset().unwrap();
    driver.pci.reset().unwrap();
    assert_eq!(driver.pci.bars()[0].address, None);
    assert_eq!(driver.pci_read(driver.capability(0x11, None) + 2), [3, 0]);
    assert_eq!(driver.read::<16>(MSIX), [0; 16], "16 bytes are no access");
    assert_eq!(driver.read::<8>(MSIX + 8), [0, 0, 0, 0, 1, 0, 0, 0], "masked");
    assert_eq!(driver.read::<60>(0), Driver::new().read::<60>(0));
}

#[test]
fn a_device_dropped_while_it_runs_takes_everything_with_it() {
    let driver = Driver::ready();
    let shared = Arc::downgrade(&driver.pci.shared);
    let Driver { pci, bar, .. } = driver;
    drop((pci, bar));
    assert!(shared.upgrade().is_none());
}
