//! ACPI tables (ACPI 6.5 §5.2), built from the configuration by `acpi_tables`.
//!
//! [`AcpiTables::build`] makes each table apart, with a list of the addresses and checksums that depend on where tables
//! come to lie: firmware is handed those ([`AcpiTables::files`]). For direct boot [`AcpiTables::place`] does the firmware's
//! part and gives one image for a base address.

mod aml;
mod fixed;
mod generation;
mod layout;
mod loader;
mod numa;
mod tpm;
mod wdat;

use thiserror::Error;

pub use layout::{Checksum, Placed, Pointer, Table};
pub use loader::PAGE_ADDRESS;
pub use numa::Node;

use crate::chipset;

/// OEM identifiers of every table.
const OEM_ID: [u8; 6] = *b"RACKVM";
const OEM_TABLE_ID: [u8; 8] = *b"RACKVISR";
const OEM_REVISION: u32 = 1;

/// The name among the tables of the page with the generation ID, which is none.
const GENERATION_PAGE: &str = "VGEN";

/// The highest local APIC ID that an 8-bit MADT entry holds; 255 means all.
const LAST_XAPIC_ID: u32 = 254;

/// A window of addresses, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
}

/// PCI configuration space in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ecam {
    /// Address of bus 0: a multiple of 1 MiB.
    pub base: u64,
    /// The last bus: the space is 1 MiB for each.
    pub last_bus: u8,
}

impl Ecam {
    fn last(&self) -> Option<u64> {
        self.base.checked_add((u64::from(self.last_bus) + 1) << 20).map(|end| end - 1)
    }
}

/// The page with the generation ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GenerationPage {
    /// It lies at this address.
    At(u32),
    /// This is it, and it comes to lie with the tables.
    Content(Vec<u8>),
}

/// What the tables are built from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Local APIC ID of each vCPU; its place is the processor's UID.
    pub apic_ids: Vec<u32>,
    /// PCI configuration space.
    pub ecam: Ecam,
    /// Where BARs below 4 GiB may lie.
    pub mmio32: Vec<Window>,
    /// Where BARs above 4 GiB may lie.
    pub mmio64: Option<Window>,
    /// Whether there is a COM1.
    pub serial: bool,
    /// Whether there is a pvpanic port.
    pub pvpanic: bool,
    /// Whether there is a watchdog.
    pub watchdog: bool,
    /// Address of the I/O APIC.
    pub ioapic: u32,
    /// Its ID.
    pub ioapic_id: u8,
    /// Whether there are the 8259 interrupt controllers and the 8254 timer of a PC.
    pub pc_chips: bool,
    /// Whether there is a TPM ([`crate::tpm`]).
    pub tpm: bool,
    /// The page with the generation ID ([`crate::generation`]), if there is one.
    pub generation_id: Option<GenerationPage>,
    /// The NUMA nodes. None: nothing is said about them.
    pub numa: Vec<Node>,
}

impl AcpiConfig {
    /// The default address of the I/O APIC.
    pub const IOAPIC: u32 = 0xfec0_0000;
    /// The address of the local APICs.
    pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

    fn check(&self) -> Result<(), AcpiError> {
        if self.apic_ids.is_empty() || self.apic_ids.len() > aml::PROCESSOR_LIMIT {
            return Err(AcpiError::Processors(self.apic_ids.len()));
        }
        let ecam_last = self.ecam.last().filter(|_| self.ecam.base.is_multiple_of(1 << 20) && self.ecam.base > 0);
        let Some(ecam_last) = ecam_last else { return Err(AcpiError::Ecam(self.ecam.base)) };
        let ecam = Window { first: self.ecam.base, last: ecam_last };
        let bad = |window: &Window, name| AcpiError::Window { name, first: window.first, last: window.last };
        let overlaps = |window: &Window| window.first <= ecam.last && ecam.first <= window.last;
        let is_bad = |low: &&Window| low.first > low.last || low.last > u64::from(u32::MAX) || overlaps(low);
        if let Some(low) = self.mmio32.iter().find(is_bad) {
            return Err(bad(low, "32-bit"));
        }
        if let Some(high) = &self.mmio64
            && (high.first > high.last || high.first <= u64::from(u32::MAX) || overlaps(high))
        {
            return Err(bad(high, "64-bit"));
        }
        if let Some(node) = self.numa.iter().position(|node| !node.is_complete(self.numa.len())) {
            return Err(AcpiError::Node(node));
        }
        Ok(())
    }
}

/// Why there are no tables.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AcpiError {
    /// No processors, or more than the tables can name.
    #[error("ACPI tables hold 1 to 4096 processors, not {0}: change the number of vCPUs")]
    Processors(usize),
    /// The configuration space is misplaced.
    #[error("PCI configuration space at {0:#x} must start at a multiple of 1 MiB above 0 and end below 2^64")]
    Ecam(u64),
    /// A window for BARs is misplaced.
    #[error(
        "the {name} PCI window {first:#x}-{last:#x} is empty, on the wrong side of 4 GiB or within configuration space"
    )]
    Window {
        /// "32-bit" or "64-bit".
        name: &'static str,
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
    },
    /// A NUMA node is not described.
    #[error("NUMA node {0} has an empty range of memory, or not a distance to each node")]
    Node(usize),
    /// The tables do not fit below the end of the address space that their pointers reach.
    #[error(
        "ACPI tables of {size} bytes do not fit at {base:#x}: choose a 64-byte aligned address further below 4 GiB"
    )]
    Place {
        /// Where they should go.
        base: u64,
        /// Their size in bytes.
        size: u64,
    },
}

/// All tables, not yet placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    tables: Vec<Table>,
    pointers: Vec<Pointer>,
    checksums: Vec<Checksum>,
}

impl AcpiTables {
    /// The tables for `config`: RSDP first, then FACS, DSDT, the page with the generation ID if it is among them, FADT, MADT, MCFG, WAET, then WDAT, TPM2, SRAT and SLIT where there
    /// is something for them to say, XSDT.
    ///
    /// # Errors
    /// [`AcpiError`] for a configuration that tables cannot express.
    pub fn build(config: &AcpiConfig) -> Result<Self, AcpiError> {
        config.check()?;
        let mut set = layout::Builder::default();
        let rsdp = set.add("RSDP", 16, fixed::rsdp());
        let facs = set.add("FACS", 64, fixed::facs());
        let code = aml::dsdt(config);
        let dsdt_pointer = generation::page_pointer(&code);
        let dsdt = set.add_checked("DSDT", code);
        if let Some(GenerationPage::Content(page)) = &config.generation_id
            && let Some(pointer) = dsdt_pointer
        {
            let page = set.add(GENERATION_PAGE, crate::generation::PAGE as u64, page.clone());
            set.point(dsdt, pointer, 4, page);
        }
        let fadt = set.add_checked("FACP", fixed::fadt(config));
        set.point(fadt, fixed::FADT_FIRMWARE_CTRL, 4, facs);
        set.point(fadt, fixed::FADT_DSDT, 4, dsdt);
        set.point(fadt, fixed::FADT_X_DSDT, 8, dsdt);
        let mut listed = vec![
            fadt,
            set.add_checked("APIC", fixed::madt(config)),
            set.add_checked("MCFG", fixed::mcfg(config)),
            set.add_checked("WAET", fixed::waet()),
        ];
        if config.watchdog {
            listed.push(set.add_checked("WDAT", wdat::wdat()));
        }
        if config.tpm {
            listed.push(set.add_checked("TPM2", fixed::tpm2()));
        }
        if !config.numa.is_empty() {
            listed.push(set.add_checked("SRAT", fixed::srat(config)));
            listed.push(set.add_checked("SLIT", fixed::slit(config)));
        }
        let xsdt = set.add_checked("XSDT", fixed::xsdt(listed.len()));
        for (index, table) in listed.into_iter().enumerate() {
            set.point(xsdt, fixed::HEADER + index * 8, 8, table);
        }
        set.point(rsdp, fixed::RSDP_XSDT, 8, xsdt);
        // The first checksum covers the ACPI 1.0 part only, the second all of it, with the first.
        set.checksum(rsdp, 8, 20);
        set.checksum(rsdp, 32, 36);
        Ok(set.finish())
    }

    /// Each table, pointers and checksums not filled in.
    #[must_use]
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Where tables hold addresses of tables.
    #[must_use]
    pub fn pointers(&self) -> &[Pointer] {
        &self.pointers
    }

    /// Where tables hold checksums, in the order in which they are to be made, after the pointers.
    #[must_use]
    pub fn checksums(&self) -> &[Checksum] {
        &self.checksums
    }
}

#[cfg(test)]
mod tests;
