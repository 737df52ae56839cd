//! What UEFI firmware made for QEMU's Q35 machine (OVMF) needs of the machine besides the chipset: flash memory that it runs
//! from and keeps its variables in, fw_cfg by which it is told what it cannot discover, and the order in which to boot.

mod boot_order;
pub mod flash;
pub mod fw_cfg;
mod store;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

pub use boot_order::{BootDevice, boot_order};
pub use flash::{Flash, FlashMapping};
pub use fw_cfg::{AddressFile, FwCfg, FwCfgFile, LiveFile};
pub use store::{FileStore, FlashStore};

use crate::block::{BlockError, BlockFile, BlockSource, LockedFile, OpenMode};

/// Flash memory ends here, where the processor's first instruction is just below.
pub const FLASH_END: u64 = 1 << 32;
/// The largest flash memory: what lies below 4 GiB and above the local APICs has room for it.
pub const MAX_FLASH: u64 = 8 << 20;
/// Bytes that are erased at once. All sizes are multiples of it.
pub const FLASH_BLOCK: u64 = 0x1000;

/// Why firmware cannot be used. Each message names the file and the remedy.
#[derive(Debug, Error)]
pub enum FirmwareError {
    /// The code cannot be read.
    #[error("cannot read the firmware {}: {error}: check boot.firmware.code", path.display())]
    Code {
        /// The path.
        path: PathBuf,
        /// What the kernel answered.
        error: io::Error,
    },
    /// The code has a size that no firmware without variables has.
    #[error(
        "{} has {bytes} bytes, which is no firmware without its variables: give an OVMF_CODE file, whose size is a multiple of \
         4 KiB, at most 8 MiB and no power of two",
        path.display()
    )]
    CodeSize {
        /// The path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The variables cannot be opened or locked.
    #[error("variables of the firmware: {0}")]
    Open(#[from] BlockError),
    /// The variables cannot be read.
    #[error("cannot read the variables {}: {error}: check boot.firmware.vars", path.display())]
    Vars {
        /// The path.
        path: PathBuf,
        /// What the kernel answered.
        error: io::Error,
    },
    /// The variables do not belong to the code.
    #[error(
        "{} has {bytes} bytes, and the firmware wants {wanted} for its variables: copy the OVMF_VARS file that belongs to the \
         OVMF_CODE file",
        path.display()
    )]
    VarsSize {
        /// The path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The size that goes with the code.
        wanted: u64,
    },
    /// No memory.
    #[error("cannot map {bytes} bytes of flash memory: {reason}; free memory on the host")]
    Map {
        /// How much.
        bytes: usize,
        /// Why not.
        reason: String,
    },
    /// The host refuses the mapping, or the thread that writes the variables.
    #[error("cannot start the flash memory: {0}; raise the limit of processes (pids.max, ulimit -u)")]
    Start(io::Error),
}

/// Contents of flash memory, as the guest reads it. Shared with KVM.
pub type FlashArray = Arc<MmapRegion>;

/// The two parts of flash memory, read from their files.
pub struct FirmwareImages {
    /// The firmware itself. It ends at [`FLASH_END`].
    pub code: FlashArray,
    /// Its variables, right below it.
    pub vars: FlashArray,
    /// Where the variables are kept; locked for this process.
    pub vars_file: Arc<LockedFile>,
}

impl FirmwareImages {
    /// Reads the firmware at `code` and its variables at `vars`, a file of just their size or a block device of at least that.
    ///
    /// # Errors
    /// [`FirmwareError`].
    pub fn open(code: &Path, vars: &Path) -> Result<Self, FirmwareError> {
        let code_error = |error| FirmwareError::Code { path: code.into(), error };
        let code_file = File::open(code).map_err(code_error)?;
        let metadata = code_file.metadata().map_err(code_error)?;
        if !metadata.is_file() {
            return Err(code_error(io::Error::other("it is not a regular file")));
        }
        let code_size = metadata.len();
        let wanted = vars_size(code_size);
        let wanted = wanted.ok_or_else(|| FirmwareError::CodeSize { path: code.into(), bytes: code_size })?;
        let mode = OpenMode { read_only: false, direct: Some(false), block_size: None, wwid: None };
        let opened = BlockFile::open(vars, &mode)?;
        let bytes = opened.geometry().capacity;
        if bytes != wanted && !(opened.is_device() && bytes > wanted) {
            return Err(FirmwareError::VarsSize { path: vars.into(), bytes, wanted });
        }
        let vars_file = Arc::clone(opened.file());
        Ok(Self {
            code: read(&code_file, code_size, |error| FirmwareError::Code { path: code.into(), error })?,
            vars: read(&vars_file, wanted, |error| FirmwareError::Vars { path: vars.into(), error })?,
            vars_file,
        })
    }

    /// First guest-physical addresses of the code and of the variables.
    #[must_use]
    pub fn places(&self) -> (u64, u64) {
        let code = FLASH_END - self.code.size() as u64;
        (code, code - self.vars.size() as u64)
    }
}

/// Bytes of variables that belong to `code` bytes of firmware: together they fill a flash memory, whose size is a power of two.
fn vars_size(code: u64) -> Option<u64> {
    let whole = code.checked_next_power_of_two().filter(|whole| *whole <= MAX_FLASH)?;
    (code > 0 && code.is_multiple_of(FLASH_BLOCK) && whole > code).then(|| whole - code)
}

/// `size` bytes of `file`, in memory of their own: what happens to the file later does not reach the guest.
fn read(file: &File, size: u64, failed: impl Fn(io::Error) -> FirmwareError) -> Result<FlashArray, FirmwareError> {
    // At most `MAX_FLASH`.
    let mut content = vec![0; usize::try_from(size).unwrap_or_default()];
    file.read_exact_at(&mut content, 0).map_err(failed)?;
    let map = |reason: String| FirmwareError::Map { bytes: content.len(), reason };
    let array = MmapRegion::new(content.len()).map_err(|e| map(e.to_string()))?;
    array.as_volatile_slice().write_slice(&content, 0).map_err(|e| map(e.to_string()))?;
    Ok(Arc::new(array))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(code: u64, vars: u64) -> Result<FirmwareImages, FirmwareError> {
        let folder = tempfile::tempdir().unwrap();
        let paths = [("code", code), ("vars", vars)].map(|(name, size)| {
            let path = folder.path().join(name);
            File::create(&path).unwrap().set_len(size).unwrap();
            path
        });
        FirmwareImages::open(&paths[0], &paths[1])
    }

    #[test]
    fn code_and_variables_fill_the_flash_memory_below_4_gib() {
        for (code, vars) in [(0x37_c000, 0x8_4000), (0x1e_0000, 0x2_0000)] {
            let images = open(code, vars).unwrap();
            assert_eq!(images.places(), (FLASH_END - code, FLASH_END - code - vars));
        }
    }

    #[test]
    fn files_that_do_not_belong_together_are_refused() {
        assert!(matches!(open(0x37_c000, 0x2_0000), Err(FirmwareError::VarsSize { wanted: 0x8_4000, .. })));
        for code in [0, 0x40_0000, 0x37_c001, 0x90_0000] {
            assert!(matches!(open(code, 0x8_4000), Err(FirmwareError::CodeSize { .. })), "{code:#x}");
        }
    }

    #[test]
    fn variables_belong_to_one_vm_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let (code, vars) = (folder.path().join("code"), folder.path().join("vars"));
        File::create(&code).unwrap().set_len(0x1e_0000).unwrap();
        File::create(&vars).unwrap().set_len(0x2_0000).unwrap();
        let first = FirmwareImages::open(&code, &vars).unwrap();
        let second = FirmwareImages::open(&code, &vars);
        assert!(matches!(second, Err(FirmwareError::Open(BlockError::Locked { .. }))));
        drop(first);
        FirmwareImages::open(&code, &vars).unwrap();
    }
}
