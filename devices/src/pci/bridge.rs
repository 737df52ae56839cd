//! The two functions of the Q35 chipset that every guest finds: the host bridge (MCH) and the ICH9 LPC bridge.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{COMMAND, COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY, ConfigSpace, Identity};
use super::smram::Smram;
use super::{BarKind, BarMapping, ConfigEffect, PciFunction};
use crate::bus::BusDevice;
use crate::chipset::SmiControl;
use crate::virtio::StillBusy;

/// Slot of the host bridge.
pub const HOST_BRIDGE_SLOT: u8 = 0;
/// Slot of the LPC bridge. It is function 0 on Q35 machines, and the only one here.
pub const LPC_SLOT: u8 = 0x1f;

const INTEL: u16 = 0x8086;
const SUBSYSTEM_VENDOR: u16 = 0x1af4;
const SUBSYSTEM: u16 = 0x1100;

/// Intel 82G33/G31/P35/P31 DRAM controller: what firmware takes for a Q35 machine.
pub const HOST_BRIDGE: Identity = Identity {
    vendor: INTEL,
    device: 0x29c0,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: SUBSYSTEM_VENDOR,
    subsystem: SUBSYSTEM,
};

/// Intel 82801IB (ICH9) LPC interface controller.
pub const LPC: Identity = Identity {
    vendor: INTEL,
    device: 0x2918,
    revision: 2,
    class: 0x06_01_00,
    subsystem_vendor: SUBSYSTEM_VENDOR,
    subsystem: SUBSYSTEM,
};

/// First port of the ACPI power-management block: where PMBASE points at power-on.
pub const PM_BASE: u16 = 0x600;

/// Registers of the host bridge (Intel 3 Series datasheet §5.1).
pub(super) mod mch {
    /// Megabytes of TSEG, told where all ones are written (QEMU's own).
    pub const EXT_TSEG_MBYTES: u16 = 0x50;
    pub(super) const PCIEXBAR: u16 = 0x60;
    pub(super) const PAM0: u16 = 0x90;
    pub const SMRAM: u16 = 0x9d;
    pub const ESMRAMC: u16 = 0x9e;
    pub const TSEGMB: u16 = 0xac;
    pub const TOLUD: u16 = 0xb0;

    pub(super) const PCIEXBAR_ENABLE: u64 = 1;
    pub(super) const PCIEXBAR_LENGTH_SHIFT: u32 = 1;
    /// Enable, length, and address bits 35:26.
    pub(super) const PCIEXBAR_WRITABLE: u64 = 0xf_fc00_0007;
    pub(super) const PCIEXBAR_ADDRESS: u64 = 0xf_fc00_0000;
    pub(super) const SMRAM_DEFAULT: u8 = 0x02;
    pub(super) const ESMRAMC_DEFAULT: u8 = 0x38;
}

/// Registers of the LPC bridge (Intel ICH9 datasheet §13.1).
mod ich9 {
    pub(super) const PMBASE: u16 = 0x40;
    pub(super) const ACPI_CNTL: u16 = 0x44;
    pub(super) const PIRQ_A: u16 = 0x60;
    pub(super) const SERIRQ_CNTL: u16 = 0x64;
    pub(super) const PIRQ_E: u16 = 0x68;
    pub(super) const GEN_PMCON_1: u16 = 0xa0;
    pub(super) const RCBA: u16 = 0xf0;

    pub(super) const PMBASE_IO: u32 = 1;
    pub(super) const PMBASE_WRITABLE: u32 = 0xff80;
    pub(super) const ACPI_ENABLE: u8 = 0x80;
    /// ACPI enable and SCI routing.
    pub(super) const ACPI_CNTL_WRITABLE: u8 = 0x87;
    pub(super) const PIRQ_DISABLED: u8 = 0x80;
    /// Disable bit and IRQ number.
    pub(super) const PIRQ_WRITABLE: u8 = 0x8f;
    pub(super) const SERIRQ_DEFAULT: u8 = 0x10;
    /// Enable and mode; the frame settings are fixed.
    pub(super) const SERIRQ_WRITABLE: u8 = 0xc3;
    pub(super) const SMI_LOCK: u16 = 1 << 4;
    /// Enable and address bits 31:14.
    pub(super) const RCBA_WRITABLE: u32 = 0xffff_c001;
}

/// The host bridge: identity, memory-map registers, the place of ECAM, and who sees the memory of system management mode.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
    ecam: Arc<dyn BusDevice>,
    smram: Option<Smram>,
}

impl HostBridge {
    /// A host bridge that places `ecam` (from [`super::Root::ecam`]) where PCIEXBAR says. `base` is its address at power-on
    /// (a multiple of 256 MiB below 64 GiB), for guests that boot without firmware; `None` leaves it to the firmware.
    #[must_use]
    pub fn new(base: Option<u64>, ecam: Arc<dyn BusDevice>) -> Self {
        let mut config = ConfigSpace::new(&HOST_BRIDGE);
        config.make_writable(mch::EXT_TSEG_MBYTES, &[0xff; 2]);
        config.make_writable(mch::PCIEXBAR, &mch::PCIEXBAR_WRITABLE.to_le_bytes());
        if let Some(base) = base {
            let value = (base & mch::PCIEXBAR_ADDRESS) | mch::PCIEXBAR_ENABLE;
            config.define(mch::PCIEXBAR, &value.to_le_bytes());
        }
        config.make_writable(mch::PAM0, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        config.define(mch::SMRAM, &[mch::SMRAM_DEFAULT]);
        config.make_writable(mch::SMRAM, &[0x78]);
        config.define(mch::ESMRAMC, &[mch::ESMRAMC_DEFAULT]);
        config.make_writable(mch::ESMRAMC, &[0xc7]);
        config.make_writable(mch::TSEGMB, &0xfff0_0000_u32.to_le_bytes());
        config.make_writable(mch::TOLUD, &0xfff0_u16.to_le_bytes());
        Self { config: Mutex::new(config), ecam, smram: None }
    }

    /// The same with memory for system management mode.
    #[must_use]
    pub fn with_smram(self, smram: Smram) -> Self {
        Self { smram: Some(smram), ..self }
    }

    /// First guest-physical address and bytes of the configuration window; `None` while it is off. What MCFG must say.
    #[must_use]
    pub fn ecam_window(&self) -> Option<(u64, u64)> {
        window(&self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn window(config: &ConfigSpace) -> Option<(u64, u64)> {
    let value = u64::from(config.dword(mch::PCIEXBAR)) | u64::from(config.dword(mch::PCIEXBAR + 4)) << 32;
    let length = match (value >> mch::PCIEXBAR_LENGTH_SHIFT) & 3 {
        0 => 256 << 20,
        1 => 128 << 20,
        2 => 64 << 20,
        _ => return None,
    };
    let base = value & mch::PCIEXBAR_ADDRESS & !(length - 1);
    (value & mch::PCIEXBAR_ENABLE != 0 && base != 0).then_some((base, length))
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        let mut config = self.lock();
        let before = window(&config);
        config.write(offset, data);
        if let Some(smram) = &self.smram {
            smram.follow(&mut config);
        }
        (before != window(&config)).into()
    }

    fn bars(&self) -> Vec<BarMapping> {
        let window = self.ecam_window();
        vec![BarMapping {
            index: 0,
            address: window.map(|(base, _)| base),
            length: window.map_or(0, |(_, length)| length),
            kind: BarKind::Fixed,
            device: Arc::clone(&self.ecam),
            ioevents: Vec::new(),
        }]
    }

    fn reset(&self) -> Result<(), StillBusy> {
        let mut config = self.lock();
        config.reset();
        if let Some(smram) = &self.smram {
            smram.follow(&mut config);
        }
        Ok(())
    }
}

/// The LPC bridge: registers that firmware and ACPI code expect. What they would move (the PM block) is fixed.
pub struct LpcBridge {
    config: Mutex<ConfigSpace>,
    smi: Arc<SmiControl>,
}

impl LpcBridge {
    /// An LPC bridge at power-on: PM block at [`PM_BASE`] and enabled, PCI interrupt lines off. Its SMI_LOCK locks `smi`.
    #[must_use]
    pub fn new(smi: Arc<SmiControl>) -> Self {
        let mut config = ConfigSpace::new(&LPC);
        // Always on (ICH9 datasheet §13.1.3). Firmware that finds ports off looks for no serial port behind them.
        config.define(COMMAND, &(COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
        config.define(ich9::PMBASE, &(u32::from(PM_BASE) | ich9::PMBASE_IO).to_le_bytes());
        config.make_writable(ich9::PMBASE, &ich9::PMBASE_WRITABLE.to_le_bytes());
        config.define(ich9::ACPI_CNTL, &[ich9::ACPI_ENABLE]);
        config.make_writable(ich9::ACPI_CNTL, &[ich9::ACPI_CNTL_WRITABLE]);
        for first in [ich9::PIRQ_A, ich9::PIRQ_E] {
            config.define(first, &[ich9::PIRQ_DISABLED; 4]);
            config.make_writable(first, &[ich9::PIRQ_WRITABLE; 4]);
        }
        config.define(ich9::SERIRQ_CNTL, &[ich9::SERIRQ_DEFAULT]);
        config.make_writable(ich9::SERIRQ_CNTL, &[ich9::SERIRQ_WRITABLE]);
        config.make_writable(ich9::GEN_PMCON_1, &ich9::SMI_LOCK.to_le_bytes());
        config.make_writable(ich9::RCBA, &ich9::RCBA_WRITABLE.to_le_bytes());
        Self { config: Mutex::new(config), smi }
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for LpcBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        let mut config = self.lock();
        let bars_changed = config.write(offset, data);
        if config.word(ich9::GEN_PMCON_1) & ich9::SMI_LOCK != 0 {
            config.lock(ich9::GEN_PMCON_1, &ich9::SMI_LOCK.to_le_bytes());
            self.smi.lock_enable();
        }
        bars_changed.into()
    }

    fn bars(&self) -> Vec<BarMapping> {
        Vec::new()
    }

    fn reset(&self) -> Result<(), StillBusy> {
        self.lock().reset();
        Ok(())
    }
}
