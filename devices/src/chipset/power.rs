//! The power management block of an ICH9 (ICH9 datasheet §13.8.3; ACPI 6.5 §4.8): PM1 events and control, PM timer,
//! GPE0, SMI enable; and the APM ports, which switch ACPI mode by themselves and raise SMIs.
//!
//! | offset | register | |
//! |---|---|---|
//! | 0x00 | PM1_STS, PM1_EN | 16 bits each; status bits are cleared by writing one |
//! | 0x04 | PM1_CNT | SCI_EN, SLP_TYP, SLP_EN; sleep type 0 is S5 |
//! | 0x08 | PM_TMR | 32 bits, 3.579545 MHz |
//! | 0x20 | GPE0_STS, GPE0_EN | 64 bits each |
//! | 0x30 | SMI_EN | 32 bits, see [`SmiControl`] |
//!
//! Any access width at any offset works byte by byte; what is not listed reads zero and ignores writes.

use std::sync::{Arc, Mutex, PoisonError};

use super::clock::Clock;
use super::smi::SmiControl;
use super::{ACPI_DISABLE, ACPI_ENABLE};
use crate::bus::{BusDevice, VmRequest};
use crate::interrupt::InterruptLine;

/// Rate of the PM timer in Hz (ACPI 6.5 §4.8.2.1).
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// Sleep type of S5, as `\_S5` gives it and as stock OVMF writes it.
pub const SLEEP_TYPE_S5: u16 = 0;

const TMR_STS: u16 = 1 << 0;
const GBL_STS: u16 = 1 << 5;
const PWRBTN_STS: u16 = 1 << 8;
const SLPBTN_STS: u16 = 1 << 9;
const RTC_STS: u16 = 1 << 10;
/// Enable bits that a guest can set: those above and PCIEXP_WAKE_DIS.
const PM1_EN_KEPT: u16 = TMR_STS | GBL_STS | PWRBTN_STS | SLPBTN_STS | RTC_STS | 1 << 14;
const PM1_SCI: u16 = TMR_STS | GBL_STS | PWRBTN_STS | SLPBTN_STS | RTC_STS;

const SCI_EN: u16 = 1 << 0;
const BM_RLD: u16 = 1 << 1;
const SLP_TYP: u16 = 7 << 10;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_EN: u16 = 1 << 13;

struct State {
    pm1_status: u16,
    pm1_enable: u16,
    pm1_control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    apm_control: u8,
    apm_status: u8,
    /// The timer's top bit when TMR_STS was last brought up to date.
    timer_top: bool,
    sci: bool,
}

/// The PM block. The buttons may be pressed from any thread.
///
/// The timer's TMR_STS is brought up to date when the guest looks; its turn-over every 10 minutes raises no SCI by itself.
/// No known guest enables it: all poll the timer, as TMR_VAL_EXT tells them to.
pub struct PowerManagement {
    state: Mutex<State>,
    line: Arc<dyn InterruptLine>,
    clock: Arc<dyn Clock>,
    acpi_from_reset: bool,
    smi: Arc<SmiControl>,
}

impl PowerManagement {
    /// A block at power-on, with SCI_EN set if `acpi_from_reset`. `sci` is a level, active high.
    #[must_use]
    pub fn new(
        sci: Arc<dyn InterruptLine>,
        clock: Arc<dyn Clock>,
        acpi_from_reset: bool,
        smi: Arc<SmiControl>,
    ) -> Self {
        let timer_top = ticks(clock.monotonic()) >> 31 != 0;
        let state = Mutex::new(State { timer_top, ..State::power_on(acpi_from_reset) });
        Self { state, line: sci, clock, acpi_from_reset, smi }
    }

    /// Presses the power button: the guest sees PWRBTN_STS, and an SCI if it has enabled it. Whether it then shuts down is
    /// up to the guest.
    pub fn press_power_button(&self) {
        self.with(|state| state.pm1_status |= PWRBTN_STS);
    }

    /// Presses the sleep button: SLPBTN_STS, and an SCI as with the power button.
    pub fn press_sleep_button(&self) {
        self.with(|state| state.pm1_status |= SLPBTN_STS);
    }

    /// Raises general purpose event `number`, 0 to 63: its status bit, and an SCI if the guest has enabled it.
    pub fn raise_gpe(&self, number: u8) {
        self.with(|state| state.gpe_status |= 1u64.checked_shl(u32::from(number)).unwrap_or(0));
    }

    /// Back to power-on; the SCI falls. The timer goes on.
    pub fn reset(&self) {
        let acpi = self.acpi_from_reset;
        self.with(|state| {
            *state = State { sci: state.sci, timer_top: state.timer_top, ..State::power_on(acpi) };
        });
    }

    /// The PM timer: a 32-bit count at [`PM_TIMER_HZ`].
    #[must_use]
    pub fn timer(&self) -> u32 {
        ticks(self.clock.monotonic())
    }

    /// Runs `action`, then brings TMR_STS and the SCI line up to date. The line is set under the lock, so that two vCPUs
    /// cannot leave it at the older level.
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let top = self.timer() >> 31 != 0;
        if std::mem::replace(&mut state.timer_top, top) != top {
            state.pm1_status |= TMR_STS;
        }
        let result = action(&mut state);
        let sci = state.sci_level();
        if std::mem::replace(&mut state.sci, sci) != sci {
            self.line.set(sci);
        }
        result
    }

    fn command(&self, state: &mut State, command: u8) -> Option<VmRequest> {
        state.apm_control = command;
        match command {
            ACPI_ENABLE => state.pm1_control |= SCI_EN,
            ACPI_DISABLE => state.pm1_control &= !SCI_EN,
            _ => return self.smi.command(),
        }
        None
    }
}

impl State {
    fn power_on(acpi: bool) -> Self {
        Self {
            pm1_status: 0,
            pm1_enable: 0,
            pm1_control: if acpi { SCI_EN } else { 0 },
            gpe_status: 0,
            gpe_enable: 0,
            apm_control: 0,
            apm_status: 0,
            timer_top: false,
            sci: false,
        }
    }

    fn sci_level(&self) -> bool {
        let pending = self.pm1_status & self.pm1_enable & PM1_SCI != 0 || self.gpe_status & self.gpe_enable != 0;
        self.pm1_control & SCI_EN != 0 && pending
    }

    fn read(&self, offset: u64, timer: u32, smi: &SmiControl) -> u8 {
        let byte = |bytes: &[u8], start: u64| {
            usize::try_from(offset - start).ok().and_then(|index| bytes.get(index)).copied().unwrap_or(0)
        };
        match offset {
            0x00..0x02 => byte(&self.pm1_status.to_le_bytes(), 0x00),
            0x02..0x04 => byte(&self.pm1_enable.to_le_bytes(), 0x02),
            0x04..0x06 => byte(&self.pm1_control.to_le_bytes(), 0x04),
            0x08..0x0c => byte(&timer.to_le_bytes(), 0x08),
            0x20..0x28 => byte(&self.gpe_status.to_le_bytes(), 0x20),
            0x28..0x30 => byte(&self.gpe_enable.to_le_bytes(), 0x28),
            0x30..0x34 => byte(&smi.enable().to_le_bytes(), 0x30),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u8, smi: &SmiControl) -> Option<VmRequest> {
        match offset {
            0x00..0x02 => self.pm1_status &= !at_16(value, offset),
            0x02..0x04 => self.pm1_enable = replace_16(self.pm1_enable, value, offset - 0x02) & PM1_EN_KEPT,
            0x04..0x06 => {
                let written = replace_16(self.pm1_control, value, offset - 0x04);
                self.pm1_control = written & (SCI_EN | BM_RLD | SLP_TYP);
                let sleep_type = (written & SLP_TYP) >> SLP_TYP_SHIFT;
                if written & SLP_EN != 0 && sleep_type == SLEEP_TYPE_S5 {
                    return Some(VmRequest::PowerOff);
                }
            }
            0x20..0x28 => self.gpe_status &= !(u64::from(value) << ((offset - 0x20) * 8)),
            0x28..0x30 => {
                let shift = (offset - 0x28) * 8;
                self.gpe_enable = self.gpe_enable & !(0xff << shift) | u64::from(value) << shift;
            }
            0x30..0x34 => {
                let shift = (offset - 0x30) * 8;
                smi.set_enable(smi.enable() & !(0xff << shift) | u32::from(value) << shift);
            }
            _ => {}
        }
        None
    }
}

/// The low 32 bits of the timer's count after `nanoseconds`.
fn ticks(nanoseconds: u64) -> u32 {
    let ticks = u128::from(nanoseconds) * u128::from(PM_TIMER_HZ) / 1_000_000_000;
    u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or(0)
}

fn at_16(value: u8, byte: u64) -> u16 {
    u16::from(value) << ((byte & 1) * 8)
}

fn replace_16(old: u16, value: u8, byte: u64) -> u16 {
    old & !at_16(0xff, byte) | at_16(value, byte)
}

impl BusDevice for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The timer is by far the most read: it needs no lock.
        if offset == 8 && data.len() == 4 {
            data.copy_from_slice(&self.timer().to_le_bytes());
            return;
        }
        let timer = self.timer();
        self.with(|state| {
            for (offset, byte) in (offset..).zip(data) {
                *byte = state.read(offset, timer, &self.smi);
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        let smi = &self.smi;
        self.with(|state| (offset..).zip(data).filter_map(|(offset, &byte)| state.write(offset, byte, smi)).last())
    }
}

/// The APM control and status ports at 0xB2 (ICH9 datasheet §13.7.1): [`ACPI_ENABLE`] and [`ACPI_DISABLE`] written to the
/// control port switch ACPI mode at once, any other command is an SMI where [`SmiControl`] lets it be one. Both keep what is
/// written.
pub struct ApmPorts(Arc<PowerManagement>);

impl ApmPorts {
    /// The APM ports of `power`.
    #[must_use]
    pub fn new(power: Arc<PowerManagement>) -> Self {
        Self(power)
    }
}

impl BusDevice for ApmPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.with(|state| {
            for (offset, byte) in (offset..).zip(data) {
                *byte = if offset == 0 { state.apm_control } else { state.apm_status };
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        self.0.with(|state| {
            let mut request = None;
            for (offset, &byte) in (offset..).zip(data) {
                if offset == 0 {
                    request = self.0.command(state, byte);
                } else {
                    state.apm_status = byte;
                }
            }
            request
        })
    }
}

#[cfg(test)]
mod tests;
