//! The chipset, the PCI root and the ACPI tables.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use rackvisor_api::config::VmConfig;
use rackvisor_devices::GuestMemory;
use rackvisor_devices::acpi::{AcpiConfig, AcpiTables, Ecam, Node, Window};
use rackvisor_devices::bus::Bus;
use rackvisor_devices::chipset::{COM1_IRQ, Chipset, ChipsetConfig, PowerManagement, SCI_IRQ};
use rackvisor_devices::generation::GenerationId;
use rackvisor_devices::pci::bridge::{HostBridge, LpcBridge};
use rackvisor_devices::pci::{PciFunction, Root, Windows};
use rackvisor_devices::tpm::{self, Tpm};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::console::LiveConsole;
use super::{AssemblyError, numa};
use crate::cpu::vcpu;
use crate::kvm::interrupts::KvmLine;
use crate::kvm::ioevents::KvmIoEvents;
use crate::memory::layout;

const HOST_BRIDGE_SLOT: u8 = 0;
const LPC_SLOT: u8 = 0x1f;
/// The last bus that the guest is told of. There is only bus 0, and Linux looks for devices on every bus that MCFG names:
/// with 255 that costs a boot 16 000 exits.
const LAST_BUS: u8 = 0;
/// Ports for I/O BARs.
const PCI_PORTS: std::ops::Range<u64> = 0xc000..0x1_0000;

/// What is there before any device is plugged in.
pub struct Platform {
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    root: Arc<Root>,
    chipset: Chipset,
    apic_ids: Vec<u32>,
    tpm: Option<Tpm>,
    generation: Option<Arc<GenerationId>>,
    numa: Vec<Node>,
    ram_size: u64,
}

/// Builds the platform of `vm`.
///
/// # Errors
/// [`AssemblyError::Host`] if two parts claim the same registers, which is a bug of the VMM.
pub fn build(
    config: &VmConfig,
    vm: &Arc<VmFd>,
    apic_ids: &[u32],
    console: &LiveConsole,
    tpm: Option<Tpm>,
    memory: GuestMemory,
) -> Result<Platform, AssemblyError> {
    let ram_size = config.memory.size.bytes();
    let ram_below_4g = ram_size.min(layout::RAM_32BIT_END);
    let line = |gsi| Arc::new(KvmLine::new(Arc::clone(vm), gsi));
    let chipset = Chipset::new(ChipsetConfig {
        ram_below_4g,
        ram_above_4g: ram_size - ram_below_4g,
        rtc_offset_seconds: 0,
        acpi_from_reset: true,
        sci: line(SCI_IRQ),
        serial: Some((line(COM1_IRQ), console.output())),
        debug: None,
    });
    let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let root = Arc::new(Root::new(Arc::clone(&mmio), Arc::clone(&pio), Arc::new(KvmIoEvents(Arc::clone(vm)))));
    let conflict = |e| AssemblyError::host("chipset")(&e);
    chipset.attach(&pio).map_err(conflict)?;
    root.claim_config_ports(Some(Arc::clone(&chipset.reset_control) as _)).map_err(conflict)?;
    let bridge: Arc<dyn PciFunction> = Arc::new(HostBridge::new(Some(layout::ECAM), root.ecam()));
    for (slot, function) in [(HOST_BRIDGE_SLOT, bridge), (LPC_SLOT, Arc::new(LpcBridge::new()) as _)] {
        root.insert(slot, function).map_err(|e| AssemblyError::host("chipset")(&e))?;
    }
    if let Some(serial) = &chipset.serial {
        console.set_input(Arc::clone(serial) as _);
    }
    let generation = config.generation_id.map(|id| {
        let power = Arc::clone(&chipset.power);
        Arc::new(GenerationId::new(layout::GENERATION_ID, id.memory(), memory, power))
    });
    if let Some(tpm) = &tpm {
        mmio.insert(tpm::BASE, tpm::LENGTH, tpm.registers() as _).map_err(conflict)?;
        mmio.insert(tpm::PPI_BASE, tpm::PPI_LENGTH, tpm.ppi() as _).map_err(conflict)?;
    }
    let numa = numa::nodes(config, apic_ids);
    Ok(Platform { pio, mmio, root, chipset, apic_ids: apic_ids.to_vec(), tpm, generation, numa, ram_size })
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

    /// What the accesses of vCPUs reach.
    #[must_use]
    pub fn for_vcpus(&self) -> vcpu::Platform {
        vcpu::Platform { pio: Arc::clone(&self.pio), mmio: Arc::clone(&self.mmio), pci: Arc::clone(&self.root) }
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

    /// Gives every BAR its place, as firmware would.
    ///
    /// # Errors
    /// [`AssemblyError::Host`] when the windows are full.
    pub fn assign_bars(&self) -> Result<(), AssemblyError> {
        let range = |(start, length): (u64, u64)| start..start + length;
        let windows = Windows {
            low: range(layout::PCI_32BIT),
            high: range(layout::pci_64bit_window(self.ram_size)),
            io: PCI_PORTS,
        };
        self.root.assign_bars(&windows).map_err(|e| AssemblyError::host("PCI")(&e))
    }

    /// Writes the ACPI tables, and the generation ID that they point at; gives the address of the root pointer.
    ///
    /// # Errors
    /// [`AssemblyError::Host`] if they do not fit their place.
    pub fn write_acpi(&self, memory: &GuestMemoryMmap) -> Result<u64, AssemblyError> {
        let failed = |e: &dyn std::fmt::Display| AssemblyError::host("ACPI tables")(e);
        let window = |(first, length): (u64, u64)| Window { first, last: first + (length - 1) };
        let tables = AcpiTables::build(&AcpiConfig {
            apic_ids: self.apic_ids.clone(),
            ecam: Ecam { base: layout::ECAM, last_bus: LAST_BUS },
            mmio32: window(layout::PCI_32BIT),
            mmio64: Some(window(layout::pci_64bit_window(self.ram_size))),
            serial: true,
            ioapic: layout::IOAPIC,
            ioapic_id: 0,
            tpm: self.tpm.is_some(),
            numa: self.numa.clone(),
            generation_id: self.generation.as_ref().map(|id| id.address()),
        });
        let placed = tables.and_then(|t| t.place(layout::ACPI_TABLES)).map_err(|e| failed(&e))?;
        if layout::ACPI_TABLES + placed.image.len() as u64 > layout::ACPI_TABLES_END {
            return Err(failed(&"they do not fit below 1 MiB: give the VM fewer vCPUs"));
        }
        memory.write_slice(&placed.image, GuestAddress(placed.base)).map_err(|e| failed(&e))?;
        self.generation.as_ref().map_or(Ok(()), |id| id.place()).map_err(|e| failed(&e))?;
        Ok(placed.rsdp)
    }

    /// Back to power-on. Devices must have drained. May wait for swtpm: not for the control thread.
    ///
    /// # Errors
    /// [`AssemblyError::Host`] if a device is still busy.
    pub fn reset(&self) -> Result<(), AssemblyError> {
        self.chipset.reset();
        self.tpm.iter().for_each(Tpm::reset);
        self.root.reset().map_err(|busy| AssemblyError::host("reset")(&busy))?;
        self.assign_bars()
    }
}
