//! Direct boot: kernel, initrd, command line and tables in guest memory, and where the boot vCPU starts.

pub mod image;
pub mod loading;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use rackvisor_api::config::BootConfig;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use self::image::{ImageError, Initrd, KernelImage, LoadedKernel, Protocol};
use crate::memory::layout::{self, MapEntry};

/// Boot data below 640 KiB: nothing else is there before the kernel runs.
mod place {
    use vm_memory::GuestAddress;

    pub const GDT: GuestAddress = GuestAddress(0x500);
    pub const START_INFO: GuestAddress = GuestAddress(0x6000);
    pub const MODULES: GuestAddress = GuestAddress(0x6040);
    pub const MEMORY_MAP: GuestAddress = GuestAddress(0x6100);
    pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
    /// PML4, then a PDPT, then four page directories: 4 GiB identity-mapped.
    pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
    pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
}

/// `hvm_start_info` magic (Xen public/arch-x86/hvm/start_info.h).
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// "Undefined" boot loader (Linux Documentation/arch/x86/boot.rst, `type_of_loader`).
const LOADER_UNDEFINED: u8 = 0xff;

/// Why a guest could not be loaded.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel or the initrd.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Guest memory refused a write.
    #[error("cannot write {what} to guest memory: {reason}")]
    Write {
        /// What was being written.
        what: &'static str,
        /// Why it failed.
        reason: String,
    },
}

/// Where and how the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// Address of the boot information: EBX (PVH) or RSI (64-bit).
    pub info: u64,
    /// The mode of the CPU.
    pub mode: Mode,
}

/// The mode in which the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 32-bit protected mode without paging, flat segments (PVH).
    Protected,
    /// 64-bit mode with the page tables at this address and the GDT at the other (Linux 64-bit boot protocol).
    Long {
        /// Address of the PML4.
        page_tables: u64,
        /// Address of the GDT.
        gdt: u64,
    },
}

/// All that a direct boot loads. Kept open, so that a reboot needs no path.
#[derive(Debug)]
pub struct BootImages {
    kernel: KernelImage,
    initrd: Option<Initrd>,
    command_line: String,
}

/// A kernel and perhaps an initrd in guest memory.
#[derive(Debug)]
pub struct LoadedImages {
    kernel: LoadedKernel,
    /// Address and bytes.
    initrd: Option<(u64, u64)>,
}

impl BootImages {
    /// Opens what `config` names; nothing if the guest starts from firmware.
    ///
    /// # Errors
    /// [`ImageError`] for the first file that is not right.
    pub fn open(config: &BootConfig) -> Result<Option<Self>, ImageError> {
        let Some(kernel) = &config.kernel else { return Ok(None) };
        Ok(Some(Self {
            kernel: KernelImage::open(kernel)?,
            initrd: config.initrd.as_deref().map(Initrd::open).transpose()?,
            command_line: config.cmdline.clone(),
        }))
    }

    /// Loads kernel and initrd into `memory`, which has `ram` bytes, for a boot or a reboot.
    ///
    /// # Errors
    /// [`BootError`]; the guest must not be started then.
    pub fn load(&mut self, memory: &GuestMemoryMmap, ram: u64) -> Result<LoadedImages, BootError> {
        let ram_end = ram.min(layout::RAM_32BIT_END);
        let kernel = self.kernel.load(memory, ram_end)?;
        self.kernel.check_command_line(&kernel, self.command_line.len())?;
        let initrd = self.initrd.as_mut().map(|i| i.load(memory, &kernel)).transpose()?;
        Ok(LoadedImages { kernel, initrd })
    }

    /// Writes what the kernel is told: command line, memory map, where its initrd is, and the address of the ACPI root
    /// pointer.
    ///
    /// # Errors
    /// [`BootError::Write`]; the guest must not be started then.
    pub fn describe(
        &self,
        loaded: &LoadedImages,
        memory: &GuestMemoryMmap,
        ram: u64,
        rsdp: u64,
    ) -> Result<Entry, BootError> {
        let mut command_line = self.command_line.clone().into_bytes();
        command_line.push(0);
        memory.write_slice(&command_line, place::COMMAND_LINE).map_err(failed("the command line"))?;
        let map = layout::memory_map(ram);
        match &loaded.kernel.protocol {
            Protocol::Pvh => write_pvh(memory, &map, rsdp, loaded.initrd)?,
            Protocol::Linux64(header) => {
                let params = boot_params { hdr: **header, acpi_rsdp_addr: rsdp, ..Default::default() };
                write_linux64(memory, &map, params, loaded.initrd)?;
            }
        }
        Ok(entry(&loaded.kernel))
    }
}

fn entry(kernel: &LoadedKernel) -> Entry {
    let rip = kernel.entry;
    match kernel.protocol {
        Protocol::Pvh => Entry { rip, info: place::START_INFO.0, mode: Mode::Protected },
        Protocol::Linux64(_) => Entry {
            rip,
            info: place::ZERO_PAGE.0,
            mode: Mode::Long { page_tables: place::PAGE_TABLES.0, gdt: place::GDT.0 },
        },
    }
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> BootError {
    move |error| BootError::Write { what, reason: error.to_string() }
}

fn write_pvh(
    memory: &GuestMemoryMmap,
    map: &[MapEntry],
    rsdp: u64,
    initrd: Option<(u64, u64)>,
) -> Result<(), BootError> {
    let entries: Vec<_> = map
        .iter()
        .map(|e| hvm_memmap_table_entry { addr: e.start, size: e.length, type_: e.kind as u32, reserved: 0 })
        .collect();
    let modules: Vec<_> =
        initrd.iter().map(|&(paddr, size)| hvm_modlist_entry { paddr, size, ..Default::default() }).collect();
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { place::MODULES.0 },
        cmdline_paddr: place::COMMAND_LINE.0,
        rsdp_paddr: rsdp,
        memmap_paddr: place::MEMORY_MAP.0,
        memmap_entries: entries.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, place::START_INFO);
    params.set_sections(&entries, place::MEMORY_MAP);
    params.set_modules(&modules, place::MODULES);
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(failed("the PVH start information"))
}

fn write_linux64(
    memory: &GuestMemoryMmap,
    map: &[MapEntry],
    mut params: boot_params,
    initrd: Option<(u64, u64)>,
) -> Result<(), BootError> {
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = place::COMMAND_LINE.0 as u32;
    if let Some((start, length)) = initrd {
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = length as u32;
    }
    // The table is packed: its entries cannot be borrowed.
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.length, r#type: entry.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, place::ZERO_PAGE), memory)
        .map_err(failed("the boot parameters"))?;
    memory.write_slice(gdt().as_flattened(), place::GDT).map_err(failed("the GDT"))?;
    write_page_tables(memory)
}

/// Null, unused, 64-bit code at 0x10, data at 0x18: the selectors that the boot protocol asks for.
fn gdt() -> [[u8; 8]; 4] {
    [0u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes)
}

/// Maps the first 4 GiB to themselves with 2 MiB pages.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 0x1000;
    let failed = failed("the page tables");
    let at = |offset: u64| GuestAddress(place::PAGE_TABLES.0 + offset);
    memory.write_obj(at(PAGE).0 | PRESENT_WRITABLE, at(0)).map_err(&failed)?;
    for gib in 0..4 {
        let directory = at((2 + gib) * PAGE);
        memory.write_obj(directory.0 | PRESENT_WRITABLE, at(PAGE + gib * 8)).map_err(&failed)?;
        let entries: Vec<u8> =
            (0..512).flat_map(|i| ((gib << 30 | i << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes()).collect();
        memory.write_slice(&entries, directory).map_err(&failed)?;
    }
    Ok(())
}
