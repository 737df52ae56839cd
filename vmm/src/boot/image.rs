//! Kernel images: what a file is, and every way in which it can be bad, said clearly before a byte of it runs.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::memory::layout;

/// Offset of the setup header in a bzImage (Linux Documentation/arch/x86/boot.rst).
const SETUP_HEADER: usize = 0x1f1;
/// `HdrS` at this offset makes it a Linux image.
const SETUP_MAGIC: usize = 0x202;
/// Protocol 2.12 brought `xloadflags`, which says whether there is a 64-bit entry.
const OLDEST_PROTOCOL: u16 = 0x020c;
/// The 64-bit entry of the protected-mode part.
const ENTRY_64: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;
/// What Linux takes at most through PVH, with its final NUL (COMMAND_LINE_SIZE).
const PVH_CMDLINE_SIZE: u32 = 2048;
const EM_X86_64: u16 = 62;

/// Why an image could not be opened or loaded.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("{role} {path}: {source}; check `boot.{role}` and the permissions of the file", path = path.display())]
    Open {
        /// `kernel` or `initrd`.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel of the host answered.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("kernel {path}: {problem}; {remedy}", path = path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: &'static str,
    },
    /// It does not fit.
    #[error("{role} {path} needs {needed} MiB but there are {available} MiB for it: give the VM more `memory.size`", path = path.display())]
    TooBig {
        /// `kernel` or `initrd`.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// MiB that it takes.
        needed: u64,
        /// MiB that there are.
        available: u64,
    },
    /// The command line does not fit.
    #[error("`boot.cmdline` has {length} bytes but kernel {path} takes {limit} at most: shorten it", path = path.display())]
    CommandLine {
        /// The kernel.
        path: PathBuf,
        /// Bytes given.
        length: usize,
        /// Bytes that the kernel takes.
        limit: usize,
    },
}

/// How a kernel wants to be entered.
#[derive(Debug, Clone)]
pub enum Protocol {
    /// 32-bit protected mode with `hvm_start_info` in EBX (Xen PVH).
    Pvh,
    /// Linux' 64-bit boot protocol with `boot_params` in RSI.
    Linux64(Box<setup_header>),
}

/// A kernel in guest memory.
#[derive(Debug, Clone)]
pub struct LoadedKernel {
    /// Where it starts to run.
    pub entry: u64,
    /// First address behind all that it needs to start.
    pub end: u64,
    /// The highest address that its initrd may occupy.
    pub initrd_max: u64,
    /// How to enter it.
    pub protocol: Protocol,
}

/// A kernel file that is open and was seen to be a kernel. Kept open, so that a reboot needs no path.
#[derive(Debug)]
pub struct KernelImage {
    path: PathBuf,
    file: File,
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Elf,
    BzImage,
}

impl KernelImage {
    /// Opens the kernel at `path` and looks at its headers.
    ///
    /// # Errors
    /// [`ImageError`] that says what the file is instead.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let (mut file, length) = open_file("kernel", path)?;
        let mut head = vec![0; 4096.min(usize::try_from(length).unwrap_or(usize::MAX))];
        file.read_exact(&mut head).map_err(|source| open_error("kernel", path, source))?;
        let format = recognise(&head, length).map_err(|(problem, remedy)| ImageError::Bad {
            path: path.to_owned(),
            problem,
            remedy,
        })?;
        Ok(Self { path: path.to_owned(), file, format })
    }

    /// Loads the kernel into `memory`. `ram_end` is where RAM below 4 GiB ends.
    ///
    /// # Errors
    /// [`ImageError`] if it is damaged or does not fit.
    pub fn load(&mut self, memory: &GuestMemoryMmap, ram_end: u64) -> Result<LoadedKernel, ImageError> {
        let kernel = match self.format {
            Format::Elf => self.load_elf(memory, ram_end)?,
            Format::BzImage => self.load_bzimage(memory, ram_end)?,
        };
        if kernel.end > ram_end {
            return Err(ImageError::TooBig {
                role: "kernel",
                path: self.path.clone(),
                needed: kernel.end.div_ceil(1 << 20),
                available: ram_end >> 20,
            });
        }
        Ok(kernel)
    }

    /// Checks that a command line of `length` bytes fits the kernel.
    ///
    /// # Errors
    /// [`ImageError::CommandLine`].
    pub fn check_command_line(&self, kernel: &LoadedKernel, length: usize) -> Result<(), ImageError> {
        let limit = match &kernel.protocol {
            Protocol::Pvh => PVH_CMDLINE_SIZE - 1,
            Protocol::Linux64(header) => header.cmdline_size,
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        if length > limit {
            return Err(ImageError::CommandLine { path: self.path.clone(), length, limit });
        }
        Ok(())
    }

    fn load_elf(&mut self, memory: &GuestMemoryMmap, ram_end: u64) -> Result<LoadedKernel, ImageError> {
        let loaded = Elf::load(memory, None, &mut self.file, Some(GuestAddress(layout::HIGH_RAM_START)));
        let loaded = loaded.map_err(|e| self.bad(e.to_string(), "the file is damaged or needs more `memory.size`"))?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(self.bad(
                "this ELF image has no PVH entry".into(),
                "build the kernel with CONFIG_PVH=y, or give its bzImage (vmlinuz)",
            ));
        };
        Ok(LoadedKernel { entry: entry.0, end: loaded.kernel_end, initrd_max: ram_end - 1, protocol: Protocol::Pvh })
    }

    fn load_bzimage(&mut self, memory: &GuestMemoryMmap, ram_end: u64) -> Result<LoadedKernel, ImageError> {
        let start = GuestAddress(layout::HIGH_RAM_START);
        let loaded = BzImage::load(memory, Some(start), &mut self.file, None);
        let loaded = loaded.map_err(|e| self.bad(e.to_string(), "the file is damaged or needs more `memory.size`"))?;
        let Some(header) = loaded.setup_header else {
            return Err(self.bad("it has no setup header".into(), "give the kernel's bzImage (vmlinuz)"));
        };
        // The decompressor runs where it is loaded, and writes the kernel to its preferred address.
        let unpacked = header.pref_address.saturating_add(u64::from(header.init_size));
        Ok(LoadedKernel {
            entry: start.0 + ENTRY_64,
            end: loaded.kernel_end.max(unpacked),
            initrd_max: u64::from(header.initrd_addr_max).min(ram_end - 1),
            protocol: Protocol::Linux64(Box::new(header)),
        })
    }

    fn bad(&self, problem: String, remedy: &'static str) -> ImageError {
        ImageError::Bad { path: self.path.clone(), problem, remedy }
    }
}

/// An initrd that is open.
#[derive(Debug)]
pub struct Initrd {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Initrd {
    /// Opens the initrd at `path`.
    ///
    /// # Errors
    /// [`ImageError::Open`].
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let (file, length) = open_file("initrd", path)?;
        Ok(Self { path: path.to_owned(), file, length })
    }

    /// Loads the initrd as high as `kernel` allows; gives its address and length in bytes.
    ///
    /// # Errors
    /// [`ImageError::TooBig`] if it does not fit between the kernel and the end of RAM.
    pub fn load(&mut self, memory: &GuestMemoryMmap, kernel: &LoadedKernel) -> Result<(u64, u64), ImageError> {
        use vm_memory::Bytes;
        let start = (kernel.initrd_max + 1).checked_sub(self.length).map(|s| s & !0xfff).filter(|s| *s >= kernel.end);
        let start = start.ok_or_else(|| ImageError::TooBig {
            role: "initrd",
            path: self.path.clone(),
            needed: self.length.div_ceil(1 << 20),
            available: (kernel.initrd_max + 1).saturating_sub(kernel.end) >> 20,
        })?;
        let failed = |source| open_error("initrd", &self.path, source);
        self.file.rewind().map_err(failed)?;
        let length = usize::try_from(self.length).unwrap_or(usize::MAX);
        memory
            .read_exact_volatile_from(GuestAddress(start), &mut self.file, length)
            .map_err(|e| open_error("initrd", &self.path, io::Error::other(e)))?;
        Ok((start, self.length))
    }
}

fn open_error(role: &'static str, path: &Path, source: io::Error) -> ImageError {
    ImageError::Open { role, path: path.to_owned(), source }
}

fn open_file(role: &'static str, path: &Path) -> Result<(File, u64), ImageError> {
    let failed = |source| open_error(role, path, source);
    let mut file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("is not a regular file")));
    }
    let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
    if length == 0 {
        return Err(failed(io::Error::other("is empty")));
    }
    file.rewind().map_err(failed)?;
    Ok((file, length))
}

type Refusal = (String, &'static str);

fn recognise(head: &[u8], length: u64) -> Result<Format, Refusal> {
    if head.starts_with(b"\x7fELF") {
        return check_elf(head).map(|()| Format::Elf);
    }
    if head.get(SETUP_MAGIC..SETUP_MAGIC + 4) == Some(b"HdrS") {
        return check_bzimage(head, length).map(|()| Format::BzImage);
    }
    let decompress = "decompress it: a kernel is an ELF vmlinux or a bzImage (vmlinuz)";
    for (magic, name) in [
        (&b"\x1f\x8b"[..], "gzip"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"BZh", "bzip2"),
    ] {
        if head.starts_with(magic) {
            return Err((format!("this is a {name}-compressed file"), decompress));
        }
    }
    if head.starts_with(b"MZ") {
        return Err(("this is an EFI program, not a Linux image".into(), "give an ELF vmlinux or a bzImage (vmlinuz)"));
    }
    let shown: Vec<_> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
    Err((format!("unknown format, it starts with {}", shown.join(" ")), "give an ELF vmlinux or a bzImage (vmlinuz)"))
}

fn u16_at(head: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(head.get(offset..offset + 2)?.try_into().ok()?))
}

fn check_elf(head: &[u8]) -> Result<(), Refusal> {
    let remedy = "give a 64-bit x86 vmlinux";
    match (head.get(4), head.get(5), u16_at(head, 18)) {
        (Some(2), Some(1), Some(EM_X86_64)) => Ok(()),
        (Some(1), ..) => Err(("this ELF image is 32-bit".into(), remedy)),
        (Some(2), Some(1), Some(machine)) => Err((format!("this ELF image is for machine type {machine}"), remedy)),
        (Some(2), Some(2), _) => Err(("this ELF image is big-endian".into(), remedy)),
        _ => Err(("this ELF image is cut short or damaged".into(), "copy it again")),
    }
}

fn check_bzimage(head: &[u8], length: u64) -> Result<(), Refusal> {
    let cut = || ("this bzImage is cut short".to_owned(), "copy it again");
    let protocol = u16_at(head, 0x206).ok_or_else(cut)?;
    if protocol < OLDEST_PROTOCOL {
        let (major, minor) = (protocol >> 8, protocol & 0xff);
        let problem = format!("this bzImage speaks boot protocol {major}.{minor:02}, 2.12 is the oldest one known");
        return Err((problem, "give a kernel of Linux 3.8 or newer"));
    }
    if u16_at(head, 0x236).ok_or_else(cut)? & XLF_KERNEL_64 == 0 {
        return Err(("this bzImage has no 64-bit entry".into(), "give a 64-bit kernel"));
    }
    let sectors = u64::from(*head.get(SETUP_HEADER).ok_or_else(cut)?);
    let setup = (if sectors == 0 { 4 } else { sectors } + 1) * 512;
    let paragraphs = head.get(0x1f4..0x1f8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes).ok_or_else(cut)?;
    if length < setup + u64::from(paragraphs) * 16 {
        return Err(cut());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn refusal(content: &[u8]) -> String {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        KernelImage::open(file.path()).expect_err("must be refused").to_string()
    }

    fn bzimage() -> Vec<u8> {
        let mut image = vec![0; 1024 + 512];
        image[0x1f1] = 1;
        image[0x1f4] = 32;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x211] = 1;
        image[0x236] = 1;
        image
    }

    #[test]
    fn each_way_an_image_can_be_bad_has_its_own_words_and_a_remedy() {
        let elf = |class, data, machine| {
            let mut image = vec![0; 64];
            image[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, data]);
            image[18] = machine;
            image
        };
        let with = |offset: usize, value: u8| {
            let mut image = bzimage();
            image[offset] = value;
            image
        };
        let cut = bzimage()[..1024].to_vec();
        for (content, words) in [
            (b"".to_vec(), "is empty"),
            (b"\x1f\x8b\x08....".to_vec(), "gzip-compressed"),
            (b"\xfd7zXZ\0".to_vec(), "xz-compressed"),
            (b"\x28\xb5\x2f\xfd....".to_vec(), "zstd-compressed"),
            (b"MZ....".to_vec(), "EFI program"),
            (b"hello world".to_vec(), "starts with 68 65 6c 6c"),
            (elf(1, 1, 3), "32-bit"),
            (elf(2, 1, 183), "machine type 183"),
            (elf(2, 2, 0), "big-endian"),
            (b"\x7fELF".to_vec(), "cut short"),
            (with(0x207, 1), "boot protocol 1.15"),
            (with(0x236, 0), "no 64-bit entry"),
            (cut, "cut short"),
        ] {
            let message = refusal(&content);
            assert!(message.contains(words), "{message}");
            assert!(message.contains("; "), "a remedy follows: {message}");
        }
        assert!(KernelImage::open(Path::new("/nowhere")).unwrap_err().to_string().contains("No such file"));
        assert!(KernelImage::open(Path::new("/tmp")).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn a_kernel_or_initrd_that_does_not_fit_is_refused_with_both_sizes() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut image = bzimage();
        image[0x258..0x260].copy_from_slice(&(16u64 << 20).to_le_bytes());
        file.write_all(&image).unwrap();
        let error = KernelImage::open(file.path()).unwrap().load(&memory, 16 << 20);
        assert!(matches!(error, Ok(LoadedKernel { end: 0x100_0000, .. })), "it ends where RAM ends: {error:?}");
        let error = KernelImage::open(file.path()).unwrap().load(&memory, 15 << 20).unwrap_err();
        assert!(error.to_string().contains("needs 16 MiB but there are 15 MiB"), "{error}");

        let kernel = LoadedKernel { entry: 0, end: 12 << 20, initrd_max: (16 << 20) - 1, protocol: Protocol::Pvh };
        file.as_file().set_len(5 << 20).unwrap();
        let error = Initrd::open(file.path()).unwrap().load(&memory, &kernel).unwrap_err();
        assert!(error.to_string().contains("needs 5 MiB but there are 4 MiB"), "{error}");
        file.as_file().set_len(3 << 20).unwrap();
        assert_eq!(Initrd::open(file.path()).unwrap().load(&memory, &kernel).unwrap(), (13 << 20, 3 << 20));
    }
}
