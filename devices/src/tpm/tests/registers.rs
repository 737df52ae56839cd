use super::super::{Ppi, firmware_config};
use super::*;

#[test]
fn firmware_is_told_the_place_and_layout_of_the_physical_presence_memory() {
    assert_eq!(firmware_config(), [0x00, 0x50, 0xd4, 0xfe, 2, 1]);
}

#[test]
fn drivers_recognise_a_crb_of_version_1_with_one_locality_and_a_buffer_of_3968_bytes() {
    let swtpm = Swtpm::start();
    let (tpm, _) = tpm(&swtpm);
    let driver = Driver(tpm.registers());
    let id = driver.get(0x30);
    // Interface type, version, CapLocality, CapCRB, interface selector: what edk2 and Windows look at.
    assert_eq!((id & 0xf, id >> 4 & 0xf, id >> 8 & 1, id >> 14 & 1, id >> 17 & 3), (1, 1, 0, 1, 1));
    assert_eq!(driver.get(0x00), 0x81, "valid, not assigned, not established");
    assert_eq!((driver.get(0x44), driver.get(0x4c)), (2, 0), "idle");
    assert_eq!((driver.get(0x58), driver.get(0x5c), driver.get(0x60)), (0xf80, 0xfed4_0080, 0));
    assert_eq!((driver.get(0x64), driver.get(0x68), driver.get(0x6c)), (0xf80, 0xfed4_0080, 0));
    swtpm.script().established = true;
    tpm.reset();
    assert_eq!(driver.get(0x00), 0x80, "established");
}

#[test]
fn swtpm_is_switched_on_before_the_first_command_and_off_at_the_end() {
    let swtpm = Swtpm::start();
    let (tpm, _) = tpm(&swtpm);
    // Capabilities, data channel, stop, buffer size, init, locality, established.
    let on = [0x0e, 0x11, 0x02, 0x05, 0x04];
    assert_eq!(swtpm.script().controls, [&[0x01, 0x10], &on[..]].concat());
    tpm.reset();
    assert_eq!(swtpm.script().controls[7..], on);
    drop(tpm);
    assert_eq!(swtpm.script().controls[12..], [0x0e]);
}

#[test]
fn a_command_reaches_swtpm_whole_and_its_response_the_driver() {
    let swtpm = Swtpm::start();
    let (tpm, _) = tpm(&swtpm);
    let driver = Driver::new(&tpm);
    let response = driver.execute(&GET_RANDOM);
    assert_eq!(response, [0x80, 0x01, 0, 0, 0, 12, 0, 0, 0, 0, 0, 8]);
    // The largest one, which the driver writes in words.
    let mut large = vec![0x5a; 0xf80];
    large[..10].copy_from_slice(&[0x80, 0x01, 0, 0, 0x0f, 0x80, 0, 0, 1, 0x7b]);
    driver.set(0x40, 1);
    for (chunk, offset) in large.chunks(8).zip((0x80..).step_by(8)) {
        driver.0.write(offset, chunk);
    }
    driver.set(0x4c, 1);
    assert_eq!(driver.finish()[10..], large[10..]);
    assert_eq!(swtpm.script().commands, [GET_RANDOM.to_vec(), large]);
}

#[test]
fn a_shorter_response_leaves_nothing_of_the_command_behind() {
    let swtpm = Swtpm::start();
    let (tpm, _) = tpm(&swtpm);
    let driver = Driver::new(&tpm);
    swtpm.script().mode = Mode::Say(vec![0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0]);
    assert_eq!(driver.execute(&GET_RANDOM).len(), 10);
    assert_eq!(driver.get(0x80 + 8), 0);
}

#[test]
fn a_command_of_an_impossible_size_is_answered_so_and_goes_nowhere() {
    let swtpm = Swtpm::start();
    let (tpm, _) = tpm(&swtpm);
    let driver = Driver::new(&tpm);
    for size in [0u32, 9, 0xf81, 0x8000_0000, u32::MAX] {
        let command = [&[0x80, 0x01], &size.to_be_bytes()[..], &[0; 4]].concat();
        assert_eq!(driver.execute(&command), [0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x42], "{size}");
    }
    assert!(swtpm.script().commands.is_empty());
}

#[test]
fn nothing_is_started_without_locality_0_or_while_a_command_is_executed() {
    let swtpm = Swtpm::start();
    let (tpm, notifier) = tpm(&swtpm);
    let driver = Driver::new(&tpm);
    driver.set(0x08, 2);
    assert_eq!((driver.get(0x00) & 2, driver.get(0x0c)), (0, 0), "relinquished");
    driver.start(&GET_RANDOM);
    assert_eq!(driver.get(0x4c), 0);
    driver.set(0x08, 1);
    swtpm.script().mode = Mode::Hang;
    driver.start(&GET_RANDOM);
    assert_eq!(driver.get(0x4c), 1);
    // All of this is ignored now.
    driver.set(0x80, 0x1234);
    driver.set(0x4c, 1);
    driver.set(0x40, 2);
    assert_eq!((driver.get(0x80), driver.get(0x44)), (0, 0));
    let busy = tpm.stop().unwrap_err();
    assert_eq!(busy.requests, 1);
    swtpm.script().mode = Mode::Echo;
    assert_eq!(driver.finish().len(), 12);
    assert_eq!(swtpm.script().commands, [GET_RANDOM]);
    // The end of the command was told to who waited for it.
    notifier.wait(SOON, |event| *event == DeviceEvent::Drained).unwrap();
    tpm.stop().unwrap();
}

#[test]
fn a_reset_gives_the_registers_of_power_on() {
    let swtpm = Swtpm::start();
    let (tpm, _) = tpm(&swtpm);
    let driver = Driver::new(&tpm);
    driver.execute(&GET_RANDOM);
    driver.set(0x40, 1);
    tpm.reset();
    assert_eq!((driver.get(0x00), driver.get(0x0c), driver.get(0x44), driver.get(0x80)), (0x81, 0, 2, 0));
}

#[test]
fn a_hundred_thousand_accesses_of_any_width_anywhere_do_no_harm() {
    let swtpm = Swtpm::start();
    let (tpm, notifier) = tpm(&swtpm);
    let registers = tpm.registers();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };
    for _ in 0..100_000 {
        // Mostly registers, and what they react to.
        let offset = if random(4) == 0 { random(0x1000) } else { random(0x90) };
        let mut data = random(8).to_le_bytes();
        let width = 1 << random(4);
        let width = width.min(usize::try_from(0x1000 - offset).unwrap());
        if random(3) == 0 {
            registers.read(offset, &mut data[..width]);
        } else {
            registers.write(offset, &data[..width]);
        }
    }
    let driver = Driver::new(&tpm);
    driver.finish();
    assert_eq!(driver.execute(&GET_RANDOM).len(), 12);
    assert!(!notifier.events().iter().any(|(_, event)| matches!(event, DeviceEvent::BackendLost { .. })));
}

#[test]
fn physical_presence_memory_keeps_bytes_and_asks_for_the_clearing_of_ram() {
    let ppi = Ppi::new();
    let read = |offset, length| {
        let mut data = vec![0; length];
        ppi.read(offset, &mut data);
        data
    };
    ppi.write(0x109, &5u32.to_le_bytes());
    assert_eq!(read(0x108, 8), [0, 5, 0, 0, 0, 0, 0, 0]);
    assert!(!ppi.wants_memory_overwrite());
    ppi.write(0x15a, &[1]);
    assert!(ppi.wants_memory_overwrite());
    ppi.write(0x3fc, &[7; 8]);
    assert_eq!(read(0x3fc, 8), [7, 7, 7, 7, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(read(u64::MAX, 4), [0xff; 4]);
}
