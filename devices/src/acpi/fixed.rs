//! The tables of fixed layout.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;

use super::{AcpiConfig, LAST_XAPIC_ID, OEM_ID, OEM_REVISION, OEM_TABLE_ID, chipset};

/// Bytes of the header that all tables but RSDP and FACS begin with.
pub(super) const HEADER: usize = 36;
/// Offsets of the addresses in the FADT (ACPI 6.5 table 5.9) and the RSDP (table 5.3).
pub(super) const FADT_FIRMWARE_CTRL: usize = 36;
pub(super) const FADT_DSDT: usize = 40;
pub(super) const FADT_X_DSDT: usize = 140;
pub(super) const RSDP_XSDT: usize = 24;

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

pub(super) fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

pub(super) fn rsdp() -> Vec<u8> {
    bytes(&Rsdp::new(OEM_ID, 0))
}

pub(super) fn facs() -> Vec<u8> {
    bytes(&FACS::new())
}

pub(super) fn xsdt(entries: usize) -> Vec<u8> {
    table(*b"XSDT", 1, &vec![0; entries * 8])
}

/// A register of the PM block as a generic address.
fn port(offset: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(chipset::PM_BASE + offset))
}

/// ACPI 6.5 §5.2.9: the full hardware model. Windows' loaders refuse a hardware-reduced one.
pub(super) fn fadt(config: &AcpiConfig) -> Vec<u8> {
    let at = |offset: u16| u32::from(chipset::PM_BASE + offset).into();
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    if config.apic_ids.len() > 8 {
        // Flat logical mode ends at 8 processors.
        fadt = fadt.flag(Flags::ForceApicClusterModel);
    }
    fadt.sci_int = u16::from(chipset::SCI_IRQ).into();
    fadt.smi_cmd = u32::from(chipset::APM_BASE).into();
    fadt.acpi_enable = chipset::ACPI_ENABLE;
    fadt.acpi_disable = chipset::ACPI_DISABLE;
    fadt.pm1a_evt_blk = at(0x00);
    fadt.pm1a_cnt_blk = at(0x04);
    fadt.pm_tmr_blk = at(0x08);
    fadt.gpe0_blk = at(0x20);
    fadt.pm1_evt_len = 4;
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_len = 4;
    fadt.gpe0_blk_len = 16;
    // Latencies above 100 and 1000 µs: there is no C2 and no C3.
    fadt.p_lvl2_lat = 0x0fff.into();
    fadt.p_lvl3_lat = 0x0fff.into();
    fadt.century = chipset::RTC_CENTURY;
    fadt.iapc_boot_arch = boot_architecture(config).into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(chipset::RESET_PORT));
    fadt.reset_value = chipset::RESET_VALUE;
    fadt.x_pm1a_evt_blk = port(0x00, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(0x04, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(0x08, 32, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = port(0x20, 128, AccessSize::ByteAccess);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    bytes(&fadt.finalize())
}

/// ACPI 6.5 table 5.11. No 8042, no VGA; the CMOS RTC is there; legacy devices only with a serial port.
fn boot_architecture(config: &AcpiConfig) -> u16 {
    const LEGACY_DEVICES: u16 = 1 << 0;
    const NO_VGA: u16 = 1 << 2;
    NO_VGA | if config.serial { LEGACY_DEVICES } else { 0 }
}

/// ACPI 6.5 §5.2.12.
pub(super) fn madt(config: &AcpiConfig) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    let mut body = Vec::new();
    body.extend(AcpiConfig::LOCAL_APIC.to_le_bytes());
    body.extend(if config.pc_chips { PCAT_COMPAT } else { 0 }.to_le_bytes());
    for (uid, &apic_id) in (0u32..).zip(&config.apic_ids) {
        local_apic(&mut body, uid, apic_id);
    }
    // I/O APIC.
    body.extend([1, 12, config.ioapic_id, 0]);
    body.extend(config.ioapic.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    if config.pc_chips {
        // The PIT is wired to pin 2, edge, active high, as on ISA.
        source_override(&mut body, 0, 2, 0);
    }
    // The SCI is a level, active high.
    source_override(&mut body, chipset::SCI_IRQ, u32::from(chipset::SCI_IRQ), 0b1101);
    // NMI is LINT1 of all.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    if config.apic_ids.iter().any(|&id| id > LAST_XAPIC_ID) {
        body.extend([10, 12, 0, 0]);
        body.extend(u32::MAX.to_le_bytes());
        body.extend([1, 0, 0, 0]);
    }
    table(*b"APIC", 5, &body)
}

fn local_apic(body: &mut Vec<u8>, uid: u32, apic_id: u32) {
    const ENABLED: u32 = 1;
    match (u8::try_from(uid), u8::try_from(apic_id)) {
        (Ok(uid), Ok(id)) if apic_id <= LAST_XAPIC_ID => {
            body.extend([0, 8, uid, id]);
            body.extend(ENABLED.to_le_bytes());
        }
        _ => {
            body.extend([9, 16, 0, 0]);
            body.extend(apic_id.to_le_bytes());
            body.extend(ENABLED.to_le_bytes());
            body.extend(uid.to_le_bytes());
        }
    }
}

fn source_override(body: &mut Vec<u8>, irq: u8, gsi: u32, flags: u16) {
    body.extend([2, 10, 0, irq]);
    body.extend(gsi.to_le_bytes());
    body.extend(flags.to_le_bytes());
}

/// PCI Firmware Specification 3.3 §4.1.2.
pub(super) fn mcfg(config: &AcpiConfig) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(config.ecam.base, 0, 0, config.ecam.last_bus);
    bytes(&mcfg)
}

/// Windows ACPI Emulated Devices Table: one read of the PM timer is enough, and register C of the RTC need not be read.
pub(super) fn waet() -> Vec<u8> {
    const RTC_GOOD: u32 = 1 << 0;
    const PM_TIMER_GOOD: u32 = 1 << 1;
    table(*b"WAET", 1, &(RTC_GOOD | PM_TIMER_GOOD).to_le_bytes())
}

/// The table of the TPM.
pub(super) fn tpm2() -> Vec<u8> {
    table(*b"TPM2", 4, &super::tpm::table())
}

/// Which processors and memory are near each other.
pub(super) fn srat(config: &AcpiConfig) -> Vec<u8> {
    table(*b"SRAT", 3, &super::numa::srat(&config.numa))
}

/// How far nodes are apart.
pub(super) fn slit(config: &AcpiConfig) -> Vec<u8> {
    table(*b"SLIT", 1, &super::numa::slit(&config.numa))
}
