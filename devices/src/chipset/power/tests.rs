use std::sync::Arc;

use super::super::tests::{HandClock, Line, read8, read16, read32, write8, write16};
use super::*;

fn block(acpi: bool) -> (PowerManagement, Arc<Line>, Arc<HandClock>) {
    let (line, clock) = (Arc::new(Line::default()), HandClock::at(0));
    (PowerManagement::new(Arc::clone(&line) as _, Arc::clone(&clock) as _, acpi, Arc::default()), line, clock)
}

#[test]
fn the_power_button_raises_the_sci_until_its_status_bit_is_cleared() {
    let (power, sci, _) = block(true);
    write16(&power, 2, PWRBTN_STS);
    assert!(!sci.is_high());
    power.press_power_button();
    assert!(sci.is_high());
    assert_eq!(read16(&power, 0), PWRBTN_STS);
    // Writing zeroes clears nothing; pressing again changes nothing.
    write16(&power, 0, 0);
    power.press_power_button();
    assert!(sci.is_high());
    write16(&power, 0, PWRBTN_STS);
    assert!(!sci.is_high());
    assert_eq!(read16(&power, 0), 0);
    assert_eq!(sci.rises(), 1);
}

#[test]
fn the_sleep_button_has_a_status_bit_of_its_own() {
    let (power, sci, _) = block(true);
    write16(&power, 2, SLPBTN_STS);
    power.press_sleep_button();
    assert_eq!((read16(&power, 0), sci.is_high()), (SLPBTN_STS, true));
}

#[test]
fn a_press_before_the_guest_enables_the_button_is_seen_when_it_does() {
    let (power, sci, _) = block(false);
    power.press_power_button();
    assert!(!sci.is_high());
    write16(&power, 2, PWRBTN_STS);
    assert!(!sci.is_high(), "not in ACPI mode yet");
    write16(&power, 4, SCI_EN);
    assert!(sci.is_high());
    write16(&power, 2, 0);
    assert!(!sci.is_high());
}

#[test]
fn the_apm_port_switches_acpi_mode_and_keeps_its_bytes() {
    let (power, _, _) = block(false);
    let power = Arc::new(power);
    let apm = ApmPorts::new(Arc::clone(&power));
    assert_eq!(read16(&*power, 4) & SCI_EN, 0);
    write8(&apm, 0, ACPI_ENABLE);
    assert_eq!(read16(&*power, 4) & SCI_EN, SCI_EN);
    write8(&apm, 0, 0x55);
    assert_eq!(read16(&*power, 4) & SCI_EN, SCI_EN, "another command");
    write8(&apm, 0, ACPI_DISABLE);
    assert_eq!(read16(&*power, 4) & SCI_EN, 0);
    write8(&apm, 1, 0x77);
    assert_eq!((read8(&apm, 0), read8(&apm, 1)), (ACPI_DISABLE, 0x77));
}

#[test]
fn commands_that_are_not_about_acpi_raise_an_smi_where_there_is_system_management_mode() {
    let smi = Arc::new(SmiControl::new(true));
    let power = PowerManagement::new(Arc::<Line>::default(), HandClock::at(0), false, smi);
    let power = Arc::new(power);
    let apm = ApmPorts::new(Arc::clone(&power));
    assert_eq!(apm.write(0, &[0x55]), None);
    write8(&*power, 0x30, 0x21);
    assert_eq!(read32(&*power, 0x30), 0x21);
    assert_eq!(apm.write(0, &[0x55, 1]), Some(VmRequest::Smi { broadcast: false }));
    assert_eq!((read8(&apm, 0), read8(&apm, 1)), (0x55, 1), "which the handler reads");
    assert_eq!(apm.write(1, &[0x55]), None);
    assert_eq!(apm.write(0, &[ACPI_ENABLE]), None);
    assert_eq!(read16(&*power, 4) & SCI_EN, SCI_EN);
}

#[test]
fn sleep_type_0_with_sleep_enable_powers_off_and_other_types_do_nothing() {
    let (power, _, _) = block(true);
    // ACPICA writes the type first, then type and enable.
    assert_eq!(write16(&power, 4, SCI_EN), None);
    assert_eq!(write16(&power, 4, SCI_EN | SLP_EN), Some(VmRequest::PowerOff));
    assert_eq!(read16(&power, 4), SCI_EN, "SLP_EN reads as zero");
    assert_eq!(write16(&power, 4, SCI_EN | 1 << 10 | SLP_EN), None);
    assert_eq!(read16(&power, 4), SCI_EN | 1 << 10);
    // OVMF's way: in bytes.
    assert_eq!(write8(&power, 5, 0), None);
    assert_eq!(write8(&power, 5, 0x20), Some(VmRequest::PowerOff));
    assert_eq!(power.write(4, &u32::from(SCI_EN | SLP_EN).to_le_bytes()), Some(VmRequest::PowerOff));
}

#[test]
fn the_pm_timer_counts_3_579_545_in_a_second_and_wraps_at_32_bits() {
    let (power, _, clock) = block(true);
    assert_eq!(read32(&power, 8), 0);
    clock.advance(1_000_000_000);
    assert_eq!(read32(&power, 8), 3_579_545);
    clock.advance(1_000_000_000);
    assert_eq!(read32(&power, 8), 7_159_090);
    assert_eq!(read16(&power, 8), 7_159_090u32 as u16);
    power.write(8, &[0; 4]);
    assert_eq!(read32(&power, 8), 7_159_090, "read-only");
    let wrap = (1u128 << 32) * 1_000_000_000 / u128::from(PM_TIMER_HZ) + 1 - 2_000_000_000;
    clock.advance(wrap as u64);
    assert_eq!(read32(&power, 8), 0);
    clock.advance(u64::MAX / 2);
    read32(&power, 8);
}

#[test]
fn the_timer_status_is_set_when_its_top_bit_changes() {
    let (power, _, clock) = block(true);
    assert_eq!(read16(&power, 0), 0);
    clock.advance(600_000_000_000);
    assert_eq!(read16(&power, 0), TMR_STS);
    write16(&power, 0, TMR_STS);
    assert_eq!(read16(&power, 0), 0);
    clock.advance(600_000_000_000);
    assert_eq!(read16(&power, 0), TMR_STS);
    power.reset();
    assert_eq!(read16(&power, 0), 0);
}

#[test]
fn a_general_purpose_event_raises_the_sci_when_enabled() {
    let (power, sci, _) = block(true);
    power.raise_gpe(1);
    power.raise_gpe(63);
    power.raise_gpe(64);
    assert_eq!((read32(&power, 0x20), read32(&power, 0x24)), (2, 1 << 31));
    assert!(!sci.is_high());
    write8(&power, 0x2f, 0x80);
    assert!(sci.is_high());
    write8(&power, 0x20, 0xff);
    assert!(sci.is_high());
    write8(&power, 0x27, 0x80);
    assert!(!sci.is_high());
    assert_eq!(read32(&power, 0x20) | read32(&power, 0x24), 0);
    assert_eq!(read32(&power, 0x2c), 1 << 31);
}

#[test]
fn the_smi_registers_tell_firmware_that_apm_smis_are_set_up() {
    let (power, _, _) = block(false);
    assert_eq!(read32(&power, 0x30), 0x20);
    power.write(0x30, &0x8000_0001u32.to_le_bytes());
    assert_eq!(read32(&power, 0x30), 0x8000_0021);
    power.write(0x34, &[0xff; 4]);
    assert_eq!(read32(&power, 0x34), 0);
}

#[test]
fn reserved_bits_and_registers_read_zero() {
    let (power, _, _) = block(false);
    for offset in (0..0x80).step_by(8) {
        power.write(offset, &[0xff; 8]);
    }
    assert_eq!(read16(&power, 2), PM1_EN_KEPT);
    assert_eq!(read16(&power, 4), SCI_EN | BM_RLD | SLP_TYP);
    for offset in [0x06, 0x0c, 0x10, 0x38, 0x7c] {
        assert_eq!(read16(&power, offset), 0, "offset {offset:#x}");
    }
}
