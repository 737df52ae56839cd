//! Registers: what a driver may and may not do before, while and after it brings the device up.

use super::*;

#[test]
fn the_function_says_who_it_is_as_virtio_win_wants_it() {
    let driver = Driver::new();
    assert_eq!(u64::from_le_bytes(driver.pci_read(0)), 0x0010_0000_1042_1af4);
    assert_eq!(u32::from_le_bytes(driver.pci_read(8)), 0x0100_0001);
    assert_eq!(u32::from_le_bytes(driver.pci_read(0x2c)), 0x1100_1af4);
    for kind in 1..=4 {
        let capability = driver.capability(9, Some(kind));
        assert_eq!(driver.pci_read(capability + 4), [0], "in BAR 0");
    }
    let notify = driver.capability(9, Some(2));
    assert_eq!(u32::from_le_bytes(driver.pci_read(notify + 8)), 0x4000);
    assert_eq!(u32::from_le_bytes(driver.pci_read(notify + 12)), 3 * 4);
    assert_eq!(u32::from_le_bytes(driver.pci_read(notify + 16)), 4);
    let msix = driver.capability(0x11, None);
    assert_eq!(driver.pci_read(msix + 2), [3, 0, 0, 0x80, 0, 0, 0, 0xc0, 0, 0], "four vectors");
}

#[test]
fn the_bar_takes_64_kib_of_64_bit_prefetchable_memory_with_an_ioeventfd_per_queue() {
    let driver = Driver::new();
    driver.pci_write(0x10, &[0xff; 8]);
    assert_eq!(u64::from_le_bytes(driver.pci_read(0x10)), 0xffff_ffff_ffff_000c);
    driver.pci_write(0x10, &0x80_0000_0000_u64.to_le_bytes());
    assert!(driver.pci_write(4, &[6, 0]));
    let bar = driver.pci.bars().remove(0);
    assert_eq!((bar.address, bar.length), (Some(0x80_0000_0000), 0x1_0000));
    assert_eq!(bar.ioevents.iter().map(|(offset, _)| *offset).collect::<Vec<_>>(), [0x4000, 0x4004, 0x4008]);
    assert!(!driver.pci_write(4, &[6, 4]), "nothing moved");
}

#[test]
fn the_ring_features_are_always_offered_and_those_nobody_implements_never() {
    assert_eq!(Driver::new().offered(), VERSION_1 | EVENT_IDX | 1 << 28 | 1 << 5);
}

#[test]
fn status_bits_are_taken_only_after_the_ones_they_build_on() {
    let driver = Driver::new();
    assert_eq!(driver.set_status(2), 0, "DRIVER without ACKNOWLEDGE");
    driver.accept(VERSION_1);
    assert_eq!(driver.set_status(8), 0);
    assert_eq!(driver.set_status(4), 0);
    assert_eq!(driver.set_status(1 | 8), 1);
    assert_eq!(driver.set_status(1 | 4), 1);
    assert_eq!(driver.set_status(1 | 2 | 4), 3, "DRIVER_OK without FEATURES_OK");
    assert!(!driver.device.running());
    assert_eq!(driver.set_status(0x40 | 0x30), 3, "bits of the device, and none");
    assert_eq!(driver.set_status(2), 3, "no bit is ever taken back");
    assert_eq!(driver.set_status(8), 11);
    assert_eq!(driver.set_status(4), 15);
    assert!(driver.device.running());
}

#[test]
fn features_are_refused_without_version_1_and_with_bits_that_were_not_offered() {
    let driver = Driver::new();
    driver.set_status(3);
    for features in [0, EVENT_IDX, VERSION_1 | 1 << 6, VERSION_1 | 1 << 40, VERSION_1 | 1 << 63] {
        driver.accept(features);
        assert_eq!(driver.set_status(11), 3, "{features:#x}");
    }
    driver.accept(VERSION_1 | 1 << 5);
    assert_eq!(driver.set_status(11), 11);
}

#[test]
fn features_cannot_change_after_features_ok() {
    let driver = Driver::new();
    driver.negotiate();
    driver.accept(VERSION_1 | 1 << 5);
    driver.enable(0);
    driver.set_status(DRIVER_READY);
    let features = driver.device.with(|script| script.running.as_ref().unwrap().features);
    assert_eq!(features, VERSION_1 | EVENT_IDX);
}

#[test]
fn a_failed_driver_cannot_start_the_device() {
    let driver = Driver::new();
    driver.negotiate();
    assert_eq!(driver.set_status(0x80 | 11), 0x8b);
    assert_eq!(driver.set_status(0x80 | DRIVER_READY), 0x8b);
    assert!(!driver.device.running());
    assert_eq!(driver.set_status(0), 0);
}

#[test]
fn queue_registers_open_with_features_ok_and_freeze_when_the_queue_is_enabled() {
    let driver = Driver::new();
    driver.set_status(3);
    driver.enable(0);
    assert_eq!((driver.word(QUEUE_SIZE), driver.word(QUEUE_ENABLE)), (256, 0), "too early");
    driver.accept(VERSION_1);
    driver.set_status(11);
    driver.enable(0);
    assert_eq!((driver.word(QUEUE_SIZE), driver.word(QUEUE_ENABLE)), (16, 1));
    driver.set_word(QUEUE_SIZE, 32);
    driver.set_word(QUEUE_ENABLE, 0);
    for register in (32..56).step_by(4) {
        driver.write(register, &[0xff; 4]);
    }
    for register in (32..56).step_by(8) {
        driver.write(register, &[0xff; 8]);
    }
    assert_eq!((driver.word(QUEUE_SIZE), driver.word(QUEUE_ENABLE)), (16, 1));
    assert_eq!(driver.read::<8>(32), 0x1_0000_u64.to_le_bytes());
    assert_eq!(driver.read::<8>(40), 0x1_1000_u64.to_le_bytes());
    assert_eq!(driver.read::<8>(48), 0x1_2000_u64.to_le_bytes());
}

#[test]
fn a_queue_enabled_after_driver_ok_stays_disabled() {
    let driver = Driver::ready();
    driver.enable(2);
    assert_eq!((driver.word(QUEUE_SIZE), driver.word(QUEUE_ENABLE)), (64, 0));
    assert_eq!(driver.device.with(|script| script.running.as_ref().unwrap().queues.len()), 2);
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_maximum() {
    let driver = Driver::new();
    driver.negotiate();
    for (written, kept) in [(128, 128), (0, 128), (3, 128), (512, 128), (0x8000, 128), (256, 256), (1, 1)] {
        driver.set_word(QUEUE_SIZE, written);
        assert_eq!(driver.word(QUEUE_SIZE), kept, "after {written}");
    }
}

#[test]
fn addresses_are_written_whole_or_in_halves_and_in_no_other_way() {
    let driver = Driver::new();
    driver.negotiate();
    driver.write(32, &0x1111_2222_u32.to_le_bytes());
    driver.write(36, &0x3333_4444_u32.to_le_bytes());
    assert_eq!(driver.read::<8>(32), 0x3333_4444_1111_2222_u64.to_le_bytes());
    driver.write(34, &[0; 4]);
    driver.write(36, &[0; 8]);
    driver.write(32, &[0; 2]);
    driver.write(32, &[0; 1]);
    assert_eq!(driver.read::<8>(32), 0x3333_4444_1111_2222_u64.to_le_bytes());
    assert_eq!(driver.read::<4>(34), [0x11, 0x11, 0x44, 0x44], "reads have any width");
}

#[test]
fn a_queue_that_does_not_exist_has_size_zero_and_no_registers() {
    let driver = Driver::new();
    driver.negotiate();
    assert_eq!(driver.word(18), 3, "queues");
    for index in [3, 0xffff] {
        driver.enable(index);
        assert_eq!((driver.word(QUEUE_SIZE), driver.word(QUEUE_ENABLE)), (0, 0));
        assert_eq!(driver.word(QUEUE_VECTOR), 0xffff);
        assert_eq!(driver.read::<24>(32), [0; 24]);
    }
    driver.set_word(QUEUE_SELECT, 2);
    assert_eq!(driver.word(30), 2, "notification offset");
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let driver = Driver::new();
    for register in [16, QUEUE_VECTOR] {
        assert_eq!(driver.word(register), 0xffff);
        driver.set_word(register, 3);
        assert_eq!(driver.word(register), 3);
        driver.set_word(register, 4);
        assert_eq!(driver.word(register), 0xffff);
    }
}

#[test]
fn only_enabled_queues_reach_the_device_with_what_the_driver_wrote() {
    let driver = Driver::new();
    driver.negotiate();
    driver.enable(1);
    driver.set_status(DRIVER_READY);
    driver.device.with(|script| {
        let activation = script.running.as_ref().unwrap();
        assert!(activation.has(29) && !activation.has(5));
        let [active] = &activation.queues[..] else { panic!("one queue") };
        let state = active.queue.state();
        assert_eq!(active.index, 1);
        assert_eq!((state.size, state.max_size, state.ready, state.event_idx_enabled), (16, 64, true, true));
        assert_eq!((state.desc_table, state.avail_ring, state.used_ring), (0x2_0000, 0x2_1000, 0x2_2000));
    });
}

#[test]
fn rings_that_are_misaligned_or_not_in_ram_break_the_device_instead_of_starting_it() {
    let end = RAM as u64;
    for (register, address) in [
        (32, 0x1_0008),
        (40, 0x1_1001),
        (48, 0x1_2002),
        (32, end - 16),
        (40, end - 36),
        (48, end - 128),
        (32, u64::MAX - 15),
        (40, u64::MAX - 1),
        (48, u64::MAX - 3),
    ] {
        let driver = Driver::new();
        driver.use_interrupts();
        driver.negotiate();
        driver.enable(0);
        driver.set_word(QUEUE_SELECT, 1);
        driver.set_word(QUEUE_SIZE, 16);
        for (register, address) in [(32, 0x2_0000_u64), (40, 0x2_1000), (48, 0x2_2000)] {
            driver.write(register, &address.to_le_bytes());
        }
        driver.write(register, &address.to_le_bytes());
        driver.set_word(QUEUE_ENABLE, 1);
        assert_eq!(driver.set_status(DRIVER_READY), 0x40 | DRIVER_READY, "{register} at {address:#x}");
        assert!(!driver.device.running());
        assert!(driver.interrupted(3), "a configuration interrupt");
        let events = driver.notified.0.lock().unwrap().clone();
        assert!(
            matches!(&events[..], [(id, DeviceEvent::NeedsReset { reason })] if id == "disk0" && reason.contains("queue 1"))
        );
        assert_eq!(driver.set_status(0), 0, "a reset heals it");
    }
}

#[test]
fn a_ring_that_ends_with_ram_is_fine() {
    let driver = Driver::new();
    driver.negotiate();
    driver.set_word(QUEUE_SIZE, 16);
    let end = RAM as u64;
    for (register, address) in [(32, end - 256), (40, end - 256 - 38), (48, end - 512)] {
        driver.write(register, &address.to_le_bytes());
    }
    driver.set_word(QUEUE_ENABLE, 1);
    assert_eq!(driver.set_status(DRIVER_READY), DRIVER_READY);
}

#[test]
fn a_trapped_kick_reaches_its_queue_and_is_counted() {
    let driver = Driver::ready();
    driver.write(NOTIFY + 4, &1u16.to_le_bytes());
    assert_eq!((driver.kicked(0), driver.kicked(1)), (false, true));
    driver.write(NOTIFY + 3 * 4, &3u16.to_le_bytes());
    driver.write(MSIX - 2, &[0; 2]);
    let mut trapped = None;
    let mut interrupts = 0;
    driver.pci.metrics().collect(&mut |sample| {
        assert_eq!(sample.labels[0], ("device", "disk0".to_owned()));
        match sample.name {
            "virtio_trapped_kicks" => trapped = Some(sample.value),
            "virtio_interrupts" => interrupts += 1,
            _ => {}
        }
    });
    assert_eq!((trapped, interrupts), (Some(Value::Counter(1)), 4));
}

#[test]
fn queue_interrupts_follow_the_vector_of_their_queue_even_while_it_works() {
    let driver = Driver::ready();
    driver.use_interrupts();
    let trigger = || driver.device.with(|script| script.running.as_ref().unwrap().queues[1].interrupt.trigger());
    trigger();
    assert!(driver.interrupted(1));
    driver.set_word(QUEUE_SELECT, 1);
    driver.set_word(QUEUE_VECTOR, 2);
    trigger();
    assert_eq!((driver.interrupted(1), driver.interrupted(2)), (false, true));
    driver.set_word(QUEUE_VECTOR, 0xffff);
    trigger();
    assert!((0..4).all(|vector| !driver.interrupted(vector)));
}

#[test]
fn a_masked_vector_shows_in_the_pending_bits_of_the_bar() {
    let driver = Driver::ready();
    driver.use_interrupts();
    driver.write(MSIX + 16 + 12, &1u32.to_le_bytes());
    driver.device.with(|script| script.running.as_ref().unwrap().queues[1].interrupt.trigger());
    assert_eq!(driver.read::<8>(PENDING), [2, 0, 0, 0, 0, 0, 0, 0]);
    driver.write(MSIX + 16 + 12, &0u32.to_le_bytes());
    assert!(driver.interrupted(1));
    assert_eq!(driver.read::<8>(PENDING), [0; 8]);
}

#[test]
fn a_configuration_change_bumps_the_generation_sets_the_isr_and_interrupts() {
    let driver = Driver::ready();
    driver.use_interrupts();
    let generation = driver.read::<1>(21)[0];
    driver.pci.signals().config_changed();
    assert_eq!(driver.read::<1>(21)[0], generation.wrapping_add(1));
    assert!(driver.interrupted(3));
    assert_eq!(driver.read::<1>(ISR), [2]);
    assert_eq!(driver.read::<1>(ISR), [0], "reading clears");
}

#[test]
fn a_configuration_change_before_driver_ok_is_reported_with_driver_ok() {
    let driver = Driver::new();
    driver.use_interrupts();
    driver.negotiate();
    driver.pci.signals().config_changed();
    assert!(!driver.interrupted(3));
    driver.set_status(DRIVER_READY);
    assert!(driver.interrupted(3));
}

#[test]
fn device_configuration_is_read_and_written_through_its_region_and_ends_in_zeros() {
    let driver = Driver::new();
    driver.device.with(|script| script.config = [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(driver.read::<4>(DEVICE + 6), [7, 8, 0, 0]);
    driver.write(DEVICE, &[9]);
    assert_eq!(driver.read::<1>(DEVICE), [9]);
    assert_eq!(driver.read::<8>(DEVICE + 0x1ffc), [0; 8]);
}

#[test]
fn everything_works_through_the_window_in_configuration_space() {
    let driver = Driver::new();
    let window = driver.capability(9, Some(5));
    let point = |bar: u8, offset: u64, length: u32| {
        driver.pci_write(window + 4, &[bar]);
        driver.pci_write(window + 8, &(offset as u32).to_le_bytes());
        driver.pci_write(window + 12, &length.to_le_bytes());
    };
    point(0, COMMON + STATUS, 1);
    driver.pci_write(window + 16, &[1]);
    assert_eq!(driver.status(), 1);
    assert_eq!(driver.pci_read(window + 16), [1]);
    point(0, COMMON + 18, 2);
    assert_eq!(driver.pci_read(window + 16), [3, 0], "queues");
    point(0, NOTIFY + 8, 4);
    driver.pci_write(window + 16, &[0; 4]);
    let kick = &driver.pci.bars()[0].ioevents[2].1.clone();
    assert_eq!(kick.read().unwrap(), 1);
    driver.pci.signals().config_changed();
    driver.negotiate();
    driver.set_status(DRIVER_READY);
    point(0, ISR, 1);
    assert_eq!([driver.pci_read(window + 16), driver.pci_read(window + 16)], [[2], [0]]);
    for (bar, offset, length) in
        [(1, 20, 1), (0, 20, 0), (0, 20, 3), (0, 20, 8), (0, 21, 2), (0, 0x1_0000, 4), (0, 0xffff_fffc, 4)]
    {
        point(bar, offset, length);
        driver.pci_write(window + 16, &[0; 4]);
        driver.pci_read::<4>(window + 16);
        assert_eq!(driver.status(), DRIVER_READY, "bar {bar} offset {offset:#x} length {length}");
    }
}
