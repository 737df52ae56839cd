//! Firmware in flash memory, and what it is told.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use rackvisor_api::config::{FirmwareConfig, VmConfig, boot_order, slot_assignment};
use rackvisor_devices::GuestMemory;
use rackvisor_devices::acpi::PAGE_ADDRESS;
use rackvisor_devices::bus::Bus;
use rackvisor_devices::chipset::{DebugSink, SmiControl};
use rackvisor_devices::firmware::fw_cfg::{FW_CFG_BASE, FW_CFG_LENGTH};
use rackvisor_devices::firmware::{
    self, AddressFile, BootDevice, FileStore, FirmwareError, FirmwareImages, Flash, FlashMapping, FwCfg, FwCfgFile,
    LiveFile,
};
use rackvisor_devices::generation::GenerationId;
use rackvisor_devices::throttle::Throttle;
use rackvisor_devices::tpm;

use super::{AssemblyError, Host, tables};
use crate::kvm::AddressSpace;
use crate::kvm::rom::{Bank, KvmRom};
use crate::memory::layout::{self, MemoryKind};

/// No S3 and no S4, whose type is 2; S5 is type 0 (QEMU's `etc/system-states`: a byte for each state, bit 7 is "possible").
const SYSTEM_STATES: [u8; 6] = [0x80, 0, 0, 1, 2, 0x80];

/// The firmware of a machine. It has no part in what the guest does later.
pub struct Firmware {
    flash: Arc<Flash>,
    fw_cfg: Arc<FwCfg>,
    /// What is only read: the code, and outside of system management mode the variables.
    _roms: Vec<KvmRom>,
}

/// What the firmware is plugged into.
pub struct Board<'a> {
    /// KVM's VM.
    pub vm: &'a Arc<VmFd>,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Ports.
    pub pio: &'a Bus,
    /// Memory-mapped registers.
    pub mmio: &'a Bus,
    /// The same in system management mode.
    pub smm_mmio: &'a Bus,
    /// System management interrupts.
    pub smi: &'a Arc<SmiControl>,
    /// What ACPI tables follow from.
    pub tables: tables::Platform,
    /// The generation ID, which the firmware places.
    pub generation: Option<Arc<GenerationId>>,
}

impl Firmware {
    /// Opens what `wanted` names and plugs it into `board`.
    ///
    /// # Errors
    /// [`AssemblyError`].
    pub fn attach(
        wanted: &FirmwareConfig,
        config: &VmConfig,
        host: &Host,
        board: Board<'_>,
    ) -> Result<Self, AssemblyError> {
        let images = FirmwareImages::open(&wanted.code, &wanted.vars)?;
        let (code_base, vars_base) = images.places();
        let failed = |e: &dyn std::fmt::Display| AssemblyError::host("flash memory")(e);
        let rom =
            |space, bank, base, array: &Arc<_>| KvmRom::new(Arc::clone(board.vm), space, bank, base, Arc::clone(array));
        let mut roms = vec![rom(AddressSpace::Normal, Bank::Code, code_base, &images.code)];
        // Who may write the variables finds them as flash memory, all others as ROM.
        let (writer, registers) = if wanted.smm {
            roms.push(rom(AddressSpace::Smm, Bank::Code, code_base, &images.code));
            roms.push(rom(AddressSpace::Normal, Bank::Vars, vars_base, &images.vars));
            (AddressSpace::Smm, board.smm_mmio)
        } else {
            (AddressSpace::Normal, board.mmio)
        };
        for rom in &roms {
            rom.set_readable(true).map_err(|e| failed(&e))?;
        }
        let vars = rom(writer, Bank::Vars, vars_base, &images.vars);
        let store = Box::new(FileStore(images.vars_file));
        let flash = Flash::new(images.vars, Box::new(vars), store, &*host.spawner, Arc::clone(&host.notifier));
        let flash = Arc::new(flash.map_err(FirmwareError::Start)?);
        let source = Box::new(move || board.tables.files());
        let fw_cfg = FwCfg::new(board.memory, config.cpus.count, files(config)?, source);
        let fw_cfg = Arc::new(fw_cfg.with_live_files(live_files(wanted, board.generation, board.smi)));
        registers.insert(vars_base, flash.size(), Arc::clone(&flash) as _).map_err(|e| failed(&e))?;
        let conflict = |e| AssemblyError::host("fw_cfg")(&e);
        board.pio.insert(FW_CFG_BASE, FW_CFG_LENGTH, Arc::clone(&fw_cfg) as _).map_err(conflict)?;
        Ok(Self { flash, fw_cfg, _roms: roms })
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.flash.reset();
        self.fw_cfg.reset();
    }
}

/// What does not depend on what the firmware does.
fn files(config: &VmConfig) -> Result<Vec<FwCfgFile>, AssemblyError> {
    let smbios = tables::smbios(config);
    let mut files = vec![
        FwCfgFile::new("etc/e820", e820(config.memory.size.bytes())),
        FwCfgFile::new("etc/system-states", SYSTEM_STATES.to_vec()),
        FwCfgFile::new("etc/smbios/smbios-anchor", smbios.entry_point(0).to_vec()),
        FwCfgFile::new("etc/smbios/smbios-tables", smbios.tables),
    ];
    if config.tpm.is_some() {
        files.push(FwCfgFile::new("etc/tpm/config", tpm::firmware_config()));
    }
    let slots = slot_assignment(config).map_err(AssemblyError::Config)?;
    let slot = |id: &str| slots.iter().find(|(other, _)| other == id).map(|(_, slot)| *slot);
    let device = |id: &str| {
        let kind = if config.disk(id).is_some() { BootDevice::Disk } else { BootDevice::Nic };
        slot(id).map(kind)
    };
    let order: Vec<BootDevice> = boot_order(config).into_iter().filter_map(device).collect();
    if !order.is_empty() {
        files.push(FwCfgFile::new("bootorder", firmware::boot_order(&order)));
    }
    Ok(files)
}

/// What the firmware writes, or asks for more than once.
fn live_files(
    wanted: &FirmwareConfig,
    generation: Option<Arc<GenerationId>>,
    smi: &Arc<SmiControl>,
) -> Vec<(&'static str, Arc<dyn LiveFile>)> {
    let address = generation.map(|generation| {
        let take = Box::new(move |page| generation.placed(page));
        (PAGE_ADDRESS, Arc::new(AddressFile(take)) as _)
    });
    address.into_iter().chain(wanted.smm.then(|| smi.files()).into_iter().flatten()).collect()
}

/// RAM, and what KVM needs for itself, in e820's form.
fn e820(ram: u64) -> Vec<u8> {
    let ranges = layout::ram_ranges(ram).into_iter().map(|range| (range.start.0, range.length, MemoryKind::Ram));
    let (start, length) = layout::KVM_PAGES;
    let entries = ranges.chain([(start, length, MemoryKind::Reserved)]);
    entries
        .flat_map(|(start, length, kind)| {
            let mut entry = [start, length].map(u64::to_le_bytes).concat();
            entry.extend((kind as u32).to_le_bytes());
            entry
        })
        .collect()
}

/// What the firmware writes to its debug console goes to the log, at level debug.
pub struct FirmwareLog;

/// OVMF's debug build writes some 6000 lines when it starts.
static FIRMWARE_LOG: Throttle = Throttle::of(10_000);

impl DebugSink for FirmwareLog {
    fn line(&self, line: &str) {
        if tracing::enabled!(target: "firmware", tracing::Level::DEBUG)
            && let Some(held_back) = FIRMWARE_LOG.pass()
        {
            tracing::debug!(target: "firmware", held_back = (held_back > 0).then_some(held_back), "{line}");
        }
    }
}
