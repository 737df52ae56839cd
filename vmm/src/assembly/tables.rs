//! The tables by which an operating system finds the platform: ACPI and SMBIOS, for a direct boot and for firmware.

use std::ops::Range;
use std::sync::{Arc, Weak};

use rackvisor_api::config::VmConfig;
use rackvisor_devices::acpi::{AcpiConfig, AcpiError, AcpiTables, Ecam, GenerationPage, Node, Window};
use rackvisor_devices::firmware::FwCfgFile;
use rackvisor_devices::generation::GenerationId;
use rackvisor_devices::pci::bridge::HostBridge;
use rackvisor_devices::pci::{BarKind, Root, SLOT_COUNT};
use rackvisor_devices::smbios::{Processors, Smbios, SmbiosInfo};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::AssemblyError;
use crate::memory::layout;

/// The last bus that the guest is told of. There is only bus 0, and Linux looks for devices on every bus that MCFG names:
/// with 255 that costs a boot 16 000 exits.
const LAST_BUS: u8 = 0;
/// The 64-bit window that firmware's own choice is rounded to, and the least that it has.
const WINDOW_UNIT: u64 = 1 << 30;
const WINDOW_LEAST: u64 = 32 << 30;

/// What the tables say of devices that have no place of their own.
#[derive(Clone)]
pub struct Facts {
    /// Whether there is a device for panics.
    pub pvpanic: bool,
    /// Whether there is a watchdog.
    pub watchdog: bool,
    /// Whether there is a TPM.
    pub tpm: bool,
    /// Whether there are the 8259 interrupt controllers and the 8254 timer of a PC.
    pub pc_chips: bool,
    /// vCPUs and memory by node; empty: nothing is said of nodes.
    pub numa: Vec<Node>,
    /// The generation ID.
    pub generation: Option<Arc<GenerationId>>,
}

/// What ACPI tables follow from.
pub struct Platform {
    /// Local APIC ID of each vCPU.
    pub apic_ids: Vec<u32>,
    /// Bytes of RAM.
    pub ram: u64,
    /// What else there is.
    pub facts: Facts,
    /// Knows where configuration space is.
    pub bridge: Arc<HostBridge>,
    /// Knows where BARs are, if firmware places them. A device on the bus has this: it must not keep the bus.
    pub root: Option<Weak<Root>>,
}

impl Platform {
    /// How things are now.
    fn config(&self) -> AcpiConfig {
        let window = |(first, length): (u64, u64)| Window { first, last: first + (length - 1) };
        // Firmware that has not placed it yet looks only at the sizes of the tables.
        let ecam = self.bridge.ecam_window().unwrap_or((layout::ECAM, layout::ECAM_SIZE));
        let high = window(layout::pci_64bit_window(self.ram));
        let (mmio32, mmio64) = match &self.root {
            None => (vec![window(layout::PCI_32BIT)], high),
            Some(root) => {
                let low = layout::firmware_windows(self.ram).low;
                (without(low, ecam), root.upgrade().and_then(|root| placed_above_4g(&root)).unwrap_or(high))
            }
        };
        AcpiConfig {
            apic_ids: self.apic_ids.clone(),
            ecam: Ecam { base: ecam.0, last_bus: LAST_BUS },
            mmio32,
            mmio64: Some(mmio64),
            serial: true,
            pvpanic: self.facts.pvpanic,
            watchdog: self.facts.watchdog,
            tpm: self.facts.tpm,
            pc_chips: self.facts.pc_chips,
            numa: self.facts.numa.clone(),
            generation_id: self.facts.generation.as_ref().map(|id| match &self.root {
                None => GenerationPage::At(layout::GENERATION_PAGE),
                Some(_) => GenerationPage::Content(id.page()),
            }),
            ioapic: layout::IOAPIC,
            ioapic_id: 0,
        }
    }

    /// Writes the tables for a direct boot; gives the address of the root pointer.
    ///
    /// # Errors
    /// [`AssemblyError::Host`] if they do not fit their place.
    pub fn write(&self, memory: &GuestMemoryMmap) -> Result<u64, AssemblyError> {
        let failed = |e: &dyn std::fmt::Display| AssemblyError::host("ACPI tables")(e);
        let tables = AcpiTables::build(&self.config());
        let placed = tables.and_then(|t| t.place(layout::ACPI_TABLES)).map_err(|e| failed(&e))?;
        if layout::ACPI_TABLES + placed.image.len() as u64 > layout::SMBIOS {
            return Err(failed(&"they do not fit below the SMBIOS tables: give the VM fewer vCPUs"));
        }
        memory.write_slice(&placed.image, GuestAddress(placed.base)).map_err(|e| failed(&e))?;
        Ok(placed.rsdp)
    }

    /// The files of fw_cfg with the tables for how things are now.
    ///
    /// # Errors
    /// [`AcpiError`] if the guest placed something where no table can say so.
    pub fn files(&self) -> Result<Vec<FwCfgFile>, AcpiError> {
        Ok(AcpiTables::build(&self.config())?.files().to_vec())
    }
}

/// `range` without `hole` (start and length), in pieces that are not empty.
fn without(range: Range<u64>, hole: (u64, u64)) -> Vec<Window> {
    let end = hole.0.saturating_add(hole.1);
    let pieces = [range.start..range.end.min(hole.0), range.start.max(end)..range.end];
    pieces.into_iter().filter(|p| p.start < p.end).map(|p| Window { first: p.start, last: p.end - 1 }).collect()
}

/// The window in which the firmware has placed BARs above 4 GiB, if it did.
fn placed_above_4g(root: &Root) -> Option<Window> {
    let functions = (0..SLOT_COUNT).filter_map(|slot| root.function(slot));
    let bars = functions.flat_map(|function| function.bars());
    let memory = bars.filter(|bar| matches!(bar.kind, BarKind::Memory64 { .. }));
    let high = memory.filter_map(|bar| Some((bar.address?, bar.length))).filter(|(at, _)| *at >= 1 << 32);
    let ends = high.map(|(at, length)| (at, at.saturating_add(length)));
    let (first, end) = ends.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))?;
    let first = first / WINDOW_UNIT * WINDOW_UNIT;
    let end = end.checked_next_multiple_of(WINDOW_UNIT)?.max(first.saturating_add(WINDOW_LEAST));
    Some(Window { first, last: end - 1 })
}

/// The SMBIOS structures of `config`.
#[must_use]
pub fn smbios(config: &VmConfig) -> Smbios {
    let wanted = &config.smbios;
    let topology = config.cpus.topology();
    let (cores, threads) = (topology.cores, topology.threads);
    let text = |text: &Option<String>, default: &str| text.clone().unwrap_or_else(|| default.to_owned());
    Smbios::new(&SmbiosInfo {
        manufacturer: text(&wanted.manufacturer, "Rackvisor"),
        product: text(&wanted.product, "Virtual Machine"),
        version: wanted.version.clone(),
        serial: wanted.serial.clone(),
        sku: wanted.sku.clone(),
        family: wanted.family.clone(),
        asset_tag: wanted.asset_tag.clone(),
        uuid: wanted.uuid.map(|uuid| uuid.bytes()),
        processors: Processors { sockets: topology.sockets, cores, threads: cores * threads },
        memory: config.memory.size.bytes(),
    })
}

/// Writes the SMBIOS structures where an operating system looks for them that no firmware starts.
///
/// # Errors
/// [`AssemblyError::Host`] if they do not fit their place.
pub fn write_smbios(smbios: &Smbios, memory: &GuestMemoryMmap) -> Result<(), AssemblyError> {
    let failed = |e: &dyn std::fmt::Display| AssemblyError::host("SMBIOS tables")(e);
    let entry = smbios.entry_point(layout::SMBIOS_TABLES);
    if layout::SMBIOS_TABLES + smbios.tables.len() as u64 > layout::TABLES_END {
        return Err(failed(&"they do not fit below 1 MiB: give the VM fewer sockets"));
    }
    memory.write_slice(&entry, GuestAddress(layout::SMBIOS)).map_err(|e| failed(&e))?;
    memory.write_slice(&smbios.tables, GuestAddress(layout::SMBIOS_TABLES)).map_err(|e| failed(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_space_is_cut_out_of_the_window_wherever_the_firmware_puts_it() {
        let window = |first, last| Window { first, last };
        let range = 0x8000_0000..0xfc00_0000;
        let size = 256 << 20;
        assert_eq!(
            without(range.clone(), (0xb000_0000, size)),
            [window(0x8000_0000, 0xafff_ffff), window(0xc000_0000, 0xfbff_ffff)]
        );
        assert_eq!(
            without(range.clone(), (0xe000_0000, size)),
            [window(0x8000_0000, 0xdfff_ffff), window(0xf000_0000, 0xfbff_ffff)]
        );
        assert_eq!(without(range.clone(), (0x8000_0000, size)), [window(0x9000_0000, 0xfbff_ffff)]);
        for elsewhere in [0x1000_0000, 1 << 33] {
            assert_eq!(without(range.clone(), (elsewhere, size)), [window(0x8000_0000, 0xfbff_ffff)]);
        }
    }
}
