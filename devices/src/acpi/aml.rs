//! The DSDT: what cannot be discovered. Small, because guests interpret it at boot.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If, Interrupt,
    Local, Memory32Fixed, Name, NotEqual, ONE, Or, Package, Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{AcpiConfig, GenerationPage, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Window, chipset, generation, tpm};
use crate::chipset::watchdog::{WATCHDOG_BASE, WATCHDOG_LENGTH};

/// Processors that three hexadecimal digits of a name can tell apart.
pub(super) const PROCESSOR_LIMIT: usize = 0x1000;

/// ACPI 6.5 §5.2.11.1.
pub(super) fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut code = Vec::new();
    pci_root(config).to_aml_bytes(&mut code);
    board(config).to_aml_bytes(&mut code);
    processors(config).to_aml_bytes(&mut code);
    if config.tpm {
        tpm::device().to_aml_bytes(&mut code);
    }
    match &config.generation_id {
        Some(GenerationPage::At(page)) => generation::device(*page).to_aml_bytes(&mut code),
        Some(GenerationPage::Content(_)) => generation::device(0).to_aml_bytes(&mut code),
        None => {}
    }
    // Sleep type of PM1a and PM1b, two reserved.
    Name::new("_S5_".into(), &Package::new(vec![&S5, &S5, &ZERO, &ZERO])).to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt.as_slice().to_vec()
}

const S5: u8 = chipset::power::SLEEP_TYPE_S5 as u8;

/// AML that is made already.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The bytes of `aml`, so that what it borrows may go.
pub(super) fn raw(aml: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

fn hid(id: &str) -> Raw {
    raw(&Name::new("_HID".into(), &EISAName::new(id)))
}

pub(super) fn uid(number: u32) -> Raw {
    raw(&Name::new("_UID".into(), &number))
}

pub(super) fn crs(resources: Vec<&dyn Aml>) -> Raw {
    raw(&Name::new("_CRS".into(), &ResourceTemplate::new(resources)))
}

/// `\_SB.PCI0` (PCI Firmware Specification 3.3 §4), with the LPC bridge in it.
fn pci_root(config: &AcpiConfig) -> Raw {
    let compatible = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    raw(&Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PCI0".into(),
            vec![
                &hid("PNP0A08"),
                &compatible,
                &uid(0),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &windows(config),
                &native_control(),
                &lpc(config),
            ],
        )],
    ))
}

/// What the bridge passes on: all ports but those of configuration mechanism 1, and the windows for BARs.
fn windows(config: &AcpiConfig) -> Raw {
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let buses = AddressSpace::new_bus_number(0u16, u16::from(config.ecam.last_bus));
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports_below = AddressSpace::new_io(0u16, 0x0cf7, None);
    let ports_above = AddressSpace::new_io(0x0d00u16, 0xffff, None);
    let kind = AddressSpaceCacheable::NotCacheable;
    let window =
        |window: &Window| raw(&AddressSpace::new_memory(kind, true, low(window.first), low(window.last), None));
    let mmio32: Vec<Raw> = config.mmio32.iter().map(window).collect();
    let mmio64 = config.mmio64.map(|window| {
        AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, window.first, window.last, None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config_ports, &ports_below, &ports_above];
    resources.extend(mmio32.iter().map(|window| window as &dyn Aml));
    if let Some(mmio64) = &mmio64 {
        resources.push(mmio64);
    }
    crs(resources)
}

/// `_OSC` (PCI Firmware Specification 3.3 §4.5.1): the guest may control PME, AER and the capability structures. It may not
/// control hot-plug: that goes by ACPI, without the five seconds of the attention button.
fn native_control() -> Raw {
    const GRANTED: u8 = 1 << 2 | 1 << 3 | 1 << 4;
    const UNKNOWN_UUID: u8 = 1 << 2;
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const MASKED: u8 = 1 << 4;
    let (status, control) = (Path::new("STS0"), Path::new("CTL0"));
    let uuid = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    let (arguments, revision, granted) = (Arg(3), Arg(1), Local(0));
    let flag = |bit: &u8| raw(&Or::new(&status, &status, bit));
    raw(&acpi_tables::aml::Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &arguments, &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &uuid),
                vec![
                    // The second word says what the guest supports: nothing here depends on it.
                    &CreateDWordField::new(&control, &arguments, &8u8),
                    &And::new(&granted, &control, &GRANTED),
                    &If::new(&NotEqual::new(&revision, &ONE), vec![&flag(&UNKNOWN_REVISION)]),
                    &If::new(&NotEqual::new(&granted, &control), vec![&flag(&MASKED)]),
                    &Store::new(&control, &granted),
                ],
            ),
            &Else::new(vec![&flag(&UNKNOWN_UUID)]),
            &Return::new(&arguments),
        ],
    ))
}

/// The LPC bridge and what hangs on it.
fn lpc(config: &AcpiConfig) -> Raw {
    let address = Name::new("_ADR".into(), &0x001f_0000u32);
    let clock = clock();
    let mut children: Vec<&dyn Aml> = vec![&address, &clock];
    let serial = config.serial.then(serial_port);
    let pvpanic = config.pvpanic.then(pvpanic);
    children.extend(serial.iter().chain(&pvpanic).map(|device| device as &dyn Aml));
    raw(&Device::new("LPC_".into(), children))
}

fn clock() -> Raw {
    let ports = IO::new(chipset::RTC_BASE, chipset::RTC_BASE, 1, 2);
    let interrupt = Interrupt::new(true, true, false, false, u32::from(chipset::RTC_IRQ));
    raw(&Device::new("RTC_".into(), vec![&hid("PNP0B00"), &crs(vec![&ports, &interrupt])]))
}

/// The device that drivers for QEMU's look for.
fn pvpanic() -> Raw {
    let id = Name::new("_HID".into(), &"QEMU0001");
    let status = Name::new("_STA".into(), &0xfu8);
    let ports = crs(vec![&IO::new(chipset::PVPANIC_PORT, chipset::PVPANIC_PORT, 1, 1)]);
    raw(&Device::new("PEVT".into(), vec![&id, &status, &ports]))
}

fn serial_port() -> Raw {
    let ports = IO::new(chipset::COM1_BASE, chipset::COM1_BASE, 8, 8);
    let interrupt = Interrupt::new(true, true, false, false, u32::from(chipset::COM1_IRQ));
    raw(&Device::new("COM1".into(), vec![&hid("PNP0501"), &uid(1), &crs(vec![&ports, &interrupt])]))
}

/// `\_SB.MBRD`: what the board itself uses, so that no device is placed there. Linux uses configuration space in memory only
/// if it is reserved here.
fn board(config: &AcpiConfig) -> Raw {
    let power = IO::new(chipset::PM_BASE, chipset::PM_BASE, 1, chipset::PM_LENGTH as u8);
    let apm = IO::new(chipset::APM_BASE, chipset::APM_BASE, 1, 2);
    let port92 = IO::new(0x92, 0x92, 1, 1);
    let size = (u64::from(config.ecam.last_bus) + 1) << 20;
    let ecam = match (u32::try_from(config.ecam.base), u32::try_from(size)) {
        (Ok(base), Ok(size)) if base.checked_add(size - 1).is_some() => raw(&Memory32Fixed::new(true, base, size)),
        _ => {
            let last = config.ecam.base.saturating_add(size - 1);
            raw(&AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, config.ecam.base, last, None))
        }
    };
    let watchdog = IO::new(WATCHDOG_BASE, WATCHDOG_BASE, 1, WATCHDOG_LENGTH);
    let mut used: Vec<&dyn Aml> = vec![&power, &apm, &port92, &ecam];
    if config.watchdog {
        used.push(&watchdog);
    }
    let resources = crs(used);
    raw(&Scope::new("_SB_".into(), vec![&Device::new("MBRD".into(), vec![&hid("PNP0C02"), &uid(1), &resources])]))
}

/// `\_SB.Cxxx`: one device for each processor, matched with the MADT by its UID (ACPI 6.5 §8.4).
fn processors(config: &AcpiConfig) -> Raw {
    let devices: Vec<Raw> = (0u32..)
        .zip(&config.apic_ids)
        .map(|(number, _)| {
            let id = Name::new("_HID".into(), &"ACPI0007");
            raw(&Device::new(Path::new(&format!("C{number:03X}")), vec![&id, &uid(number)]))
        })
        .collect();
    raw(&Scope::new("_SB_".into(), devices.iter().map(|device| device as &dyn Aml).collect()))
}
