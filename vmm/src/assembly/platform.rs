//! The chipset, the PCI root and the firmware.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use rackvisor_api::config::{CpusConfig, VmConfig};
use rackvisor_api::problem::{Pointer, Problem};
use rackvisor_devices::GuestMemory;
use rackvisor_devices::bus::{Bus, BusError};
use rackvisor_devices::chipset::{
    COM1_IRQ, Chipset, ChipsetConfig, DebugSink, IoApic, PowerManagement, RTC_IRQ, RtcTimer, SCI_IRQ, io_apic,
};
use rackvisor_devices::generation::GenerationId;
use rackvisor_devices::interrupt::InterruptLine;
use rackvisor_devices::pci::bridge::{HostBridge, LpcBridge};
use rackvisor_devices::pci::smram::Smram;
use rackvisor_devices::pci::{PciFunction, Root};
use rackvisor_devices::tpm::{self, Tpm};
use vm_memory::GuestMemoryMmap;

use super::clock::LiveClock;
use super::console::LiveConsole;
use super::firmware::{Board, Firmware, FirmwareLog};
use super::tables::Facts;
use super::{AssemblyError, Host, clock, numa, tables};
use crate::cpu::model::default_phys_bits;
use crate::cpu::vcpu;
use crate::kvm::chipset::Irqchip;
use crate::kvm::interrupts::{KvmLine, KvmMsis};
use crate::kvm::ioevents::KvmIoEvents;
use crate::kvm::smm::{KvmSmis, KvmSmram};
use crate::memory::{Ram, layout};

const HOST_BRIDGE_SLOT: u8 = 0;
const LPC_SLOT: u8 = 0x1f;

/// What is there before any device is plugged in.
pub struct Platform {
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    smm_mmio: Arc<Bus>,
    smis: KvmSmis,
    root: Arc<Root>,
    chipset: Chipset,
    io_apic: Option<Arc<IoApic>>,
    bridge: Arc<HostBridge>,
    firmware: Option<Firmware>,
    tpm: Option<Tpm>,
    generation: Option<Arc<GenerationId>>,
    /// What the tables say of devices that have no place of their own.
    facts: Facts,
    /// Seconds beyond UTC by the configuration.
    clock_offset: i64,
    /// Raises the interrupts of the clock.
    _clock: RtcTimer,
    ram_size: u64,
}

/// The vCPUs, and how interrupts reach them.
pub struct Processors<'a> {
    /// KVM's VM.
    pub vm: &'a Arc<VmFd>,
    /// APIC IDs in order of index.
    pub apic_ids: &'a [u32],
    /// What reaches these.
    pub irqchip: Irqchip,
    /// Sends messages to them.
    pub msis: &'a KvmMsis,
}

impl Processors<'_> {
    /// The I/O APIC, if it is ours.
    fn io_apic(&self) -> Option<Arc<IoApic>> {
        (self.irqchip == Irqchip::Split).then(|| Arc::new(IoApic::new(Box::new(self.msis.clone()))))
    }

    /// The line of the chipset with this number, which `io_apic` has if it is ours.
    fn line(&self, gsi: u8, io_apic: Option<&Arc<IoApic>>) -> Arc<dyn InterruptLine> {
        match io_apic {
            Some(io_apic) => io_apic.line(gsi),
            None => Arc::new(KvmLine::new(Arc::clone(self.vm), u32::from(gsi))),
        }
    }
}

/// Builds the platform around `processors`.
///
/// # Errors
/// [`AssemblyError::Host`] if two parts claim the same registers, which is a bug of the VMM.
pub fn build(
    config: &VmConfig,
    processors: &Processors<'_>,
    console: &LiveConsole,
    host: &Host,
    tpm: Option<Tpm>,
    ram: &mut Ram,
) -> Result<Platform, AssemblyError> {
    let firmware = config.boot.as_ref().and_then(|boot| boot.firmware.as_ref());
    let (by_firmware, smm) = (firmware.is_some(), firmware.is_some_and(|firmware| firmware.smm));
    let ram_size = config.memory.size.bytes();
    check_addresses(config)?;
    let ram_below_4g = ram_size.min(layout::RAM_32BIT_END);
    let clock_offset = clock::offset(config.clock);
    let Processors { vm, apic_ids, .. } = processors;
    let io_apic = processors.io_apic();
    let line = |gsi| processors.line(gsi, io_apic.as_ref());
    let chipset = Chipset::new(ChipsetConfig {
        ram_below_4g,
        ram_above_4g: ram_size - ram_below_4g,
        rtc_offset_seconds: clock_offset.saturating_add(host.clock_shift),
        rtc: line(RTC_IRQ),
        panics: config.pvpanic.then(|| Arc::clone(&host.notifier)),
        watchdog: config.watchdog.is_some(),
        acpi_from_reset: !by_firmware,
        smm,
        sci: line(SCI_IRQ),
        serial: Some((line(COM1_IRQ), console.output())),
        debug: by_firmware.then(|| -> Arc<dyn DebugSink> { Arc::new(FirmwareLog) }),
    });
    let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let root = Arc::new(Root::new(Arc::clone(&mmio), Arc::clone(&pio), Arc::new(KvmIoEvents(Arc::clone(vm)))));
    let conflict = |e| AssemblyError::host("chipset")(&e);
    chipset.attach(&pio).map_err(conflict)?;
    if let Some(io_apic) = &io_apic {
        mmio.insert(u64::from(layout::IOAPIC), io_apic::LENGTH, Arc::clone(io_apic) as _).map_err(conflict)?;
    }
    root.claim_config_ports(Some(Arc::clone(&chipset.reset_control) as _)).map_err(conflict)?;
    let smram = smm.then(|| KvmSmram::new(Arc::clone(vm), ram)).transpose()?;
    let bridge = Arc::new(host_bridge(by_firmware, smram, ram_size, &root));
    let function = Arc::clone(&bridge) as Arc<dyn PciFunction>;
    let lpc = Arc::new(LpcBridge::new(Arc::clone(&chipset.smi)));
    let plugged = |(slot, function)| root.insert(slot, function).map_err(|e| AssemblyError::host("chipset")(&e));
    [(HOST_BRIDGE_SLOT, function), (LPC_SLOT, lpc as _)].into_iter().try_for_each(plugged)?;
    if let Some(serial) = &chipset.serial {
        console.set_input(Arc::clone(serial) as _);
    }
    let page = (!by_firmware).then_some(u64::from(layout::GENERATION_PAGE));
    let generation = generation(config, page, &chipset, ram);
    if let Some(tpm) = &tpm {
        plug_tpm(tpm, &mmio).map_err(conflict)?;
    }
    let facts = Facts {
        pvpanic: config.pvpanic,
        watchdog: chipset.watchdog.is_some(),
        tpm: tpm.is_some(),
        pc_chips: io_apic.is_none(),
        numa: numa::nodes(config, apic_ids),
        generation: generation.clone(),
    };
    let timer =
        RtcTimer::start(&chipset.rtc, &*host.spawner).map_err(|e| AssemblyError::host("thread of the clock")(&e))?;
    Ok(Platform {
        pio,
        smm_mmio: Arc::new(Bus::over(Arc::clone(&mmio))),
        smis: KvmSmis::new(Arc::clone(vm), apic_ids),
        mmio,
        root,
        chipset,
        io_apic,
        bridge,
        firmware: None,
        tpm,
        generation,
        facts,
        clock_offset,
        _clock: timer,
        ram_size,
    })
}

/// The identity that changes with each restore, at `page` or wherever the firmware puts it.
fn generation(config: &VmConfig, page: Option<u64>, chipset: &Chipset, ram: &Ram) -> Option<Arc<GenerationId>> {
    let id = config.generation_id?;
    Some(Arc::new(GenerationId::new(page, id.memory(), ram.shared(), Arc::clone(&chipset.power))))
}

/// The MCH; with the memory of system management mode if there is any.
fn host_bridge(by_firmware: bool, smram: Option<KvmSmram>, ram_size: u64, root: &Root) -> HostBridge {
    let bridge = HostBridge::new((!by_firmware).then_some(layout::ECAM), root.ecam());
    let Some(smram) = smram else { return bridge };
    let mib = u16::try_from(layout::tseg(ram_size).1 >> 20).unwrap_or(u16::MAX);
    bridge.with_smram(Smram::new(Box::new(smram), mib))
}

/// Its registers, and the memory by which the guest's system asks the firmware for what only somebody present may ask.
fn plug_tpm(tpm: &Tpm, mmio: &Bus) -> Result<(), BusError> {
    mmio.insert(tpm::BASE, tpm::LENGTH, tpm.registers() as _)?;
    mmio.insert(tpm::PPI_BASE, tpm::PPI_LENGTH, tpm.ppi() as _)
}

/// The guest must be able to reach all of its addresses with the bits that it is shown.
fn check_addresses(config: &VmConfig) -> Result<(), AssemblyError> {
    let CpusConfig { phys_bits, model, .. } = config.cpus;
    let Some(bits) = phys_bits.or(default_phys_bits(model)) else { return Ok(()) };
    let (start, length) = layout::pci_64bit_window(config.memory.size.bytes());
    if start + length <= 1 << bits {
        return Ok(());
    }
    let detail = format!("{bits} bits of physical addresses do not reach the end of the guest's memory and devices");
    let problem = Problem::invalid(
        &Pointer::root().key("cpus").key("phys_bits"),
        detail,
        "choose more, or give the VM less memory",
    );
    Err(AssemblyError::Config(problem))
}

impl Platform {
    /// Where devices are plugged in.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The power button.
    #[must_use]
    pub fn power(&self) -> &PowerManagement {
        &self.chipset.power
    }

    /// The clock and the watchdog as they are described from outside.
    #[must_use]
    pub fn live_clock(&self) -> LiveClock {
        LiveClock::new(Arc::clone(&self.chipset.rtc), self.chipset.watchdog.clone(), self.clock_offset)
    }

    /// Stops the time of what counts it for the guest, or lets it go on.
    pub fn pause(&self, paused: bool) {
        self.chipset.pause(paused);
    }

    /// What the accesses of vCPUs reach.
    #[must_use]
    pub fn for_vcpus(&self) -> vcpu::Platform {
        vcpu::Platform {
            pio: Arc::clone(&self.pio),
            mmio: Arc::clone(&self.mmio),
            smm_mmio: Arc::clone(&self.smm_mmio),
            pci: Arc::clone(&self.root),
            smis: self.smis.clone(),
            io_apic: self.io_apic.clone(),
        }
    }

    /// The TPM, if there is one.
    #[must_use]
    pub fn tpm(&self) -> Option<&Tpm> {
        self.tpm.as_ref()
    }

    /// Whether the guest wants its RAM to be cleared before it starts again.
    #[must_use]
    pub fn wants_memory_overwrite(&self) -> bool {
        self.tpm.as_ref().is_some_and(|tpm| tpm.ppi().wants_memory_overwrite())
    }

    /// The generation ID, if there is one.
    #[must_use]
    pub fn generation(&self) -> Option<&Arc<GenerationId>> {
        self.generation.as_ref()
    }

    /// Plugs the firmware in, if the guest starts by one.
    ///
    /// # Errors
    /// [`AssemblyError`].
    pub fn add_firmware(
        &mut self,
        config: &VmConfig,
        host: &Host,
        vm: &Arc<VmFd>,
        memory: GuestMemory,
        apic_ids: &[u32],
    ) -> Result<(), AssemblyError> {
        let Some(wanted) = config.boot.as_ref().and_then(|boot| boot.firmware.as_ref()) else { return Ok(()) };
        let tables = self.tables(apic_ids, true);
        let (pio, mmio, smm_mmio, smi) = (&self.pio, &self.mmio, &self.smm_mmio, &self.chipset.smi);
        let generation = self.generation.clone();
        let board = Board { vm, memory, pio, mmio, smm_mmio, smi, tables, generation };
        self.firmware = Some(Firmware::attach(wanted, config, host, board)?);
        Ok(())
    }

    /// Writes the generation ID where the tables of a direct boot point.
    ///
    /// # Errors
    /// [`AssemblyError::Host`] if there is no RAM.
    pub fn place_generation_id(&self) -> Result<(), AssemblyError> {
        let placed = self.generation.as_ref().map_or(Ok(()), |id| id.place());
        placed.map_err(|e| AssemblyError::host("generation ID")(&e))
    }

    /// Gives every BAR its place, as firmware would; or leaves it to the firmware.
    ///
    /// # Errors
    /// [`AssemblyError::Host`] when the windows are full.
    pub fn assign_bars(&self) -> Result<(), AssemblyError> {
        if self.firmware.is_some() {
            self.root.set_windows(layout::firmware_windows(self.ram_size));
            return Ok(());
        }
        self.root.assign_bars(&layout::direct_windows(self.ram_size)).map_err(|e| AssemblyError::host("PCI")(&e))
    }

    /// Writes the tables for a direct boot; gives the address of the ACPI root pointer.
    ///
    /// # Errors
    /// [`AssemblyError::Host`] if they do not fit their place.
    pub fn write_tables(
        &self,
        config: &VmConfig,
        apic_ids: &[u32],
        memory: &GuestMemoryMmap,
    ) -> Result<u64, AssemblyError> {
        tables::write_smbios(&tables::smbios(config), memory)?;
        self.tables(apic_ids, false).write(memory)
    }

    fn tables(&self, apic_ids: &[u32], by_firmware: bool) -> tables::Platform {
        let bridge = Arc::clone(&self.bridge);
        let root = by_firmware.then(|| Arc::downgrade(&self.root));
        tables::Platform { apic_ids: apic_ids.to_vec(), ram: self.ram_size, facts: self.facts.clone(), bridge, root }
    }

    /// Back to power-on. Devices must have drained. May wait for swtpm: not for the control thread.
    ///
    /// # Errors
    /// [`AssemblyError::Host`] if a device is still busy.
    pub fn reset(&self) -> Result<(), AssemblyError> {
        self.chipset.reset();
        if let Some(io_apic) = &self.io_apic {
            io_apic.reset();
        }
        if let Some(firmware) = &self.firmware {
            firmware.reset();
        }
        self.tpm.iter().for_each(Tpm::reset);
        self.root.reset().map_err(|busy| AssemblyError::host("reset")(&busy))?;
        self.assign_bars()
    }
}
