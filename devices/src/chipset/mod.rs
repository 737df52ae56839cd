//! The chipset: ICH9-style power management, SMIs, RTC/CMOS, i8042, reset, serial port, debug console, pvpanic, watchdog.
//!
//! [`Chipset`] makes all of it from a [`ChipsetConfig`] and claims its ports; each part also stands alone. So does the [`IoApic`], which a
//! machine has only where the kernel's is not enough.

pub mod clock;
pub mod debug_console;
pub mod i8042;
pub mod io_apic;
pub mod power;
pub mod pvpanic;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod smi;
pub mod watchdog;

use std::sync::Arc;

use crate::DeviceNotifier;
use crate::bus::{Bus, BusError};
use crate::console::ConsoleOutput;
use crate::interrupt::InterruptLine;

pub use clock::{Clock, HostClock};
pub use debug_console::{DebugConsole, DebugSink};
pub use i8042::I8042;
pub use io_apic::{IoApic, PinMessages};
pub use power::{ApmPorts, PowerManagement};
pub use pvpanic::{PVPANIC_ID, Pvpanic};
pub use reset::{Port92, ResetControl};
pub use rtc::{Rtc, RtcConfig, RtcTimer};
pub use serial::Serial;
pub use smi::SmiControl;
pub use watchdog::Watchdog;

/// First port of the power management block (PMBASE of an ICH9 as firmware programs it).
pub const PM_BASE: u16 = 0x600;
/// Ports of the power management block.
pub const PM_LENGTH: u16 = 0x80;
/// The interrupt (ISA IRQ and GSI) of the SCI: level, active high.
pub const SCI_IRQ: u8 = 9;
/// First port of the serial port COM1.
pub const COM1_BASE: u16 = 0x3f8;
/// The interrupt (ISA IRQ and GSI) of COM1: edge, active high.
pub const COM1_IRQ: u8 = 4;
/// Port of the reset control register. It lies within the ports of PCI configuration mechanism 1.
pub const RESET_PORT: u16 = 0xcf9;
/// Written to [`RESET_PORT`] for a full reset: the FADT's RESET_VALUE.
pub const RESET_VALUE: u8 = 0x06;
/// The port of the ACPI enable and disable commands: the FADT's SMI_CMD.
pub const APM_BASE: u16 = 0xb2;
/// Written to [`APM_BASE`] to set SCI_EN: the FADT's ACPI_ENABLE.
pub const ACPI_ENABLE: u8 = 2;
/// Written to [`APM_BASE`] to clear SCI_EN: the FADT's ACPI_DISABLE.
pub const ACPI_DISABLE: u8 = 3;
/// First port of the RTC.
pub const RTC_BASE: u16 = 0x70;
/// The interrupt (ISA IRQ and GSI) of the RTC: edge, active high.
pub const RTC_IRQ: u8 = 8;
/// CMOS byte that holds the century: the FADT's CENTURY.
pub const RTC_CENTURY: u8 = 0x32;
/// Port of pvpanic.
pub const PVPANIC_PORT: u16 = 0x505;
/// Port of the debug console.
pub const DEBUG_PORT: u16 = 0x402;

/// What the chipset is made from.
pub struct ChipsetConfig {
    /// Bytes of RAM below 4 GiB.
    pub ram_below_4g: u64,
    /// Bytes of RAM above 4 GiB.
    pub ram_above_4g: u64,
    /// What the RTC shows beyond UTC, in seconds: the time zone for guests that expect local time.
    pub rtc_offset_seconds: i64,
    /// Whether ACPI mode (SCI_EN) is on from reset: true for direct boot, where no firmware hands over.
    pub acpi_from_reset: bool,
    /// Whether there is system management mode.
    pub smm: bool,
    /// Raises the SCI, [`SCI_IRQ`].
    pub sci: Arc<dyn InterruptLine>,
    /// Raises the interrupt of the RTC, [`RTC_IRQ`].
    pub rtc: Arc<dyn InterruptLine>,
    /// Raises the interrupt of COM1, [`COM1_IRQ`], and where COM1 writes to. None leaves the serial port out.
    pub serial: Option<(Arc<dyn InterruptLine>, ConsoleOutput)>,
    /// Who is told of the guest's panics. None leaves pvpanic out.
    pub panics: Option<Arc<dyn DeviceNotifier>>,
    /// Whether there is a watchdog.
    pub watchdog: bool,
    /// Where lines go that firmware writes to the debug console. None leaves it out.
    pub debug: Option<Arc<dyn DebugSink>>,
}

/// The parts of the chipset that others talk to.
pub struct Chipset {
    /// Power button, SCI, PM timer.
    pub power: Arc<PowerManagement>,
    /// System management interrupts.
    pub smi: Arc<SmiControl>,
    /// Clock and CMOS memory.
    pub rtc: Arc<Rtc>,
    /// Reset by 0xCF9. Not claimed by [`Chipset::attach`]: the owner of the PCI configuration ports passes it on.
    pub reset_control: Arc<ResetControl>,
    /// COM1, if there is one. It is the console's [`InputSink`](crate::console::InputSink).
    pub serial: Option<Arc<Serial>>,
    /// The watchdog, if there is one.
    pub watchdog: Option<Arc<Watchdog>>,
    pvpanic: Option<Arc<Pvpanic>>,
    i8042: Arc<I8042>,
    port92: Arc<Port92>,
    debug: Option<Arc<DebugConsole>>,
}

impl Chipset {
    /// A chipset at power-on.
    #[must_use]
    pub fn new(config: ChipsetConfig) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(HostClock::new());
        let smi = Arc::new(SmiControl::new(config.smm));
        let acpi = config.acpi_from_reset;
        let rtc = RtcConfig {
            ram_below_4g: config.ram_below_4g,
            ram_above_4g: config.ram_above_4g,
            offset_seconds: config.rtc_offset_seconds,
        };
        Self {
            watchdog: config.watchdog.then(|| Arc::new(Watchdog::new(Arc::clone(&clock)))),
            pvpanic: config.panics.map(|notifier| Arc::new(Pvpanic::new(notifier))),
            power: Arc::new(PowerManagement::new(config.sci, Arc::clone(&clock), acpi, Arc::clone(&smi))),
            smi,
            rtc: Arc::new(Rtc::new(&rtc, clock, config.rtc)),
            reset_control: Arc::new(ResetControl::new()),
            serial: config.serial.map(|(line, output)| Arc::new(Serial::new(line, output))),
            i8042: Arc::new(I8042::new()),
            port92: Arc::new(Port92::new()),
            debug: config.debug.map(|sink| Arc::new(DebugConsole::new(sink))),
        }
    }

    /// Claims the ports of all parts but [`Chipset::reset_control`].
    ///
    /// # Errors
    /// [`BusError`] if a port is taken.
    pub fn attach(&self, ports: &Bus) -> Result<(), BusError> {
        let apm = Arc::new(ApmPorts::new(Arc::clone(&self.power)));
        ports.insert(u64::from(PM_BASE), u64::from(PM_LENGTH), Arc::clone(&self.power) as _)?;
        ports.insert(u64::from(APM_BASE), 2, apm)?;
        ports.insert(u64::from(RTC_BASE), 2, Arc::clone(&self.rtc) as _)?;
        ports.insert(0x92, 1, Arc::clone(&self.port92) as _)?;
        ports.insert(0x60, 1, Arc::new(i8042::DataPort(Arc::clone(&self.i8042))))?;
        ports.insert(0x64, 1, Arc::new(i8042::CommandPort(Arc::clone(&self.i8042))))?;
        if let Some(serial) = &self.serial {
            ports.insert(u64::from(COM1_BASE), serial::LENGTH, Arc::clone(serial) as _)?;
        }
        if let Some(pvpanic) = &self.pvpanic {
            ports.insert(u64::from(PVPANIC_PORT), 1, Arc::clone(pvpanic) as _)?;
        }
        if let Some(watchdog) = &self.watchdog {
            let length = u64::from(watchdog::WATCHDOG_LENGTH);
            ports.insert(u64::from(watchdog::WATCHDOG_BASE), length, Arc::clone(watchdog) as _)?;
        }
        if let Some(debug) = &self.debug {
            ports.insert(u64::from(DEBUG_PORT), 1, Arc::clone(debug) as _)?;
        }
        Ok(())
    }

    /// Stops the time of what counts it for the guest, or lets it go on.
    pub fn pause(&self, paused: bool) {
        self.rtc.pause(paused);
        if let Some(watchdog) = &self.watchdog {
            watchdog.pause(paused);
        }
    }

    /// Back to power-on, for a guest reset. The clock goes on, CMOS memory and console backlog stay.
    pub fn reset(&self) {
        self.power.reset();
        self.smi.reset();
        self.rtc.reset();
        self.reset_control.reset();
        self.i8042.reset();
        self.port92.reset();
        if let Some(pvpanic) = &self.pvpanic {
            pvpanic.reset();
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.reset();
        }
        if let Some(serial) = &self.serial {
            serial.reset();
        }
    }
}

#[cfg(test)]
mod tests;
