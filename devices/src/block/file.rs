//! A regular file or a block device as a disk: opening, locking, shape, size.

// Ioctls, statx, locks and flags of descriptors have no safe wrapper among our dependencies.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{MaybeUninit, size_of_val};
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::backend::{BlockSource, Geometry, RangeLimits};
use super::error::BlockError;
use super::identity;
use super::sysfs::QueueAttributes;
use crate::syscall::check;

const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKALIGNOFF: libc::Ioctl = 0x127a;
const SECTOR: u32 = 512;
/// What a file says of its blocks is the same on each host: 512 bytes, 4096 of which are written best together.
const FILE_PHYSICAL_BLOCK: u32 = 4096;
/// The largest range of a file that is punched at once.
const FILE_RANGE: RangeLimits = RangeLimits { max_bytes: 1 << 30, granularity: 4096 };
/// The largest range that is zeroed at once where the device says nothing: writing it must end in bearable time.
const SLOW_ZEROES: u64 = 64 << 20;

/// A file with a lock on all of it, which is given up with the last owner, even if the kernel keeps the file for longer.
#[derive(Debug)]
pub struct LockedFile(File);

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        // It was locked, so it can be unlocked; and closing the file does it anyway, if later.
        let _ = set_lock(&self.0, libc::F_UNLCK);
    }
}

/// An open disk, locked for this process.
#[derive(Debug)]
pub struct BlockFile {
    file: Arc<LockedFile>,
    path: PathBuf,
    geometry: Geometry,
    is_device: bool,
    direct: bool,
}

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct OpenMode {
    /// Refuse writes, and share the disk with other readers.
    pub read_only: bool,
    /// Go past the host's page cache. `None`: on block devices only.
    pub direct: Option<bool>,
    /// Show blocks of this many bytes to the guest. `None`: those of the host.
    pub block_size: Option<u32>,
    /// Refuse any device but the LUN with this world-wide identifier, before anything is read, written or locked.
    pub wwid: Option<String>,
}

impl BlockFile {
    /// Opens and locks the disk at `path`.
    ///
    /// # Errors
    /// [`BlockError`] that says what is wrong with the path and what to do.
    pub fn open(path: &Path, mode: &OpenMode) -> Result<Self, BlockError> {
        let file = open(path, mode.read_only)?;
        let metadata =
            file.metadata().map_err(|error| BlockError::Geometry { path: path.into(), what: "the type", error })?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(BlockError::Kind { path: path.into(), kind: kind_of(&metadata) });
        }
        if let Some(wanted) = &mode.wwid {
            check_identity(path, wanted, is_device.then(|| metadata.rdev()))?;
        }
        let direct = mode.direct.unwrap_or(is_device);
        set_flags(&file, direct).map_err(|error| BlockError::Direct { path: path.into(), error })?;
        set_lock(&file, if mode.read_only { libc::F_RDLCK } else { libc::F_WRLCK }).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => BlockError::Locked { path: path.into() },
                _ => BlockError::Geometry { path: path.into(), what: "the lock", error },
            }
        })?;
        let geometry = Shape { file: &file, path, direct, read_only: mode.read_only };
        let geometry =
            if is_device { geometry.of_device(metadata.rdev())? } else { geometry.of_file(metadata.len())? };
        let geometry = with_block_size(geometry, mode.block_size, path)?;
        Ok(Self { file: Arc::new(LockedFile(file)), path: path.into(), geometry, is_device, direct })
    }

    /// The open file. It carries the lock: the disk is locked as long as a copy of it is open.
    #[must_use]
    pub fn file(&self) -> &Arc<LockedFile> {
        &self.file
    }

    /// Where it was found.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// Whether the host's page cache is passed by.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The world-wide identifier of the device, if the host knows one; the same on each host.
    #[must_use]
    pub fn wwid(&self) -> Option<String> {
        let device = self.file.metadata().ok().filter(|_| self.is_device)?.rdev();
        super::sysfs::identifiers(device).into_iter().next()
    }
}

impl BlockSource for BlockFile {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capacity(&self) -> io::Result<u64> {
        let bytes = if self.is_device { device_size(&self.file)? } else { known_size(&self.file)? };
        Ok(bytes - bytes % u64::from(self.geometry.logical_block_size))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn open(path: &Path, read_only: bool) -> Result<File, BlockError> {
    // Non-blocking so that a FIFO does not hold the VMM up; the flag is taken off again.
    let opened = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(path);
    opened.map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::ENOENT) => "check the path, and that the LUN is mapped to this host",
            Some(libc::EACCES | libc::EPERM) => "give the VMM's user access to it, or open it read-only",
            Some(libc::EBUSY) => "release it: it is mounted or belongs to another device",
            Some(libc::EROFS) => "its file system is read-only: open the disk read-only, or remount",
            Some(libc::EISDIR) => "a disk is a regular file or a block device",
            Some(libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => "the device is gone or has no medium: rescan the bus",
            Some(libc::ETXTBSY) => "it is being executed: give the disk another file",
            Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files",
            _ => "check the path and the host's log",
        };
        BlockError::Open { path: path.into(), error, remedy }
    })
}

fn check_identity(path: &Path, wanted: &str, device: Option<u64>) -> Result<(), BlockError> {
    let (path, wanted) = (path.to_path_buf(), wanted.to_owned());
    let Some(device) = device else { return Err(BlockError::IdentityOfFile { path, wanted }) };
    let found = super::sysfs::identifiers(device);
    if identity::names(&wanted, &found) { Ok(()) } else { Err(BlockError::Identity { path, wanted, found }) }
}

fn kind_of(metadata: &std::fs::Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else {
        "of an unknown kind"
    }
}

struct Shape<'a> {
    file: &'a File,
    path: &'a Path,
    direct: bool,
    read_only: bool,
}

impl Shape<'_> {
    fn of_device(&self, device: u64) -> Result<Geometry, BlockError> {
        let failed = |what| move |error| BlockError::Geometry { path: self.path.into(), what, error };
        let logical = ioctl_u32(self.file, libc::BLKSSZGET).map_err(failed("the logical block size"))?;
        let physical = ioctl_u32(self.file, libc::BLKPBSZGET).map_err(failed("the physical block size"))?;
        let capacity = device_size(self.file).map_err(failed("the size"))?;
        let alignment = ioctl_u32(self.file, BLKALIGNOFF).map_err(failed("the alignment"))?;
        let queue = QueueAttributes::of(device);
        let (memory_alignment, offset_alignment) = match self.direct {
            true => dio_alignment(self.file).unwrap_or((logical, logical)),
            false => (1, 1),
        };
        let zeroes = if queue.write_zeroes_max_bytes > 0 { queue.write_zeroes_max_bytes } else { SLOW_ZEROES };
        let range = |max_bytes: u64| {
            let granularity = queue.discard_granularity.max(logical);
            RangeLimits { max_bytes: round_down(max_bytes, logical), granularity }
        };
        // Discard is done as zeroing that may unmap, which needs both.
        let can_discard = queue.discard_max_bytes >= u64::from(logical) && queue.write_zeroes_max_bytes > 0;
        Ok(Geometry {
            capacity,
            logical_block_size: logical,
            physical_block_size: physical,
            // Minus one says that nothing is known.
            alignment_offset: if alignment == u32::MAX { 0 } else { alignment },
            min_io: ioctl_u32(self.file, libc::BLKIOMIN).unwrap_or(0),
            opt_io: ioctl_u32(self.file, libc::BLKIOOPT).unwrap_or(0),
            rotational: queue.rotational,
            read_only: self.read_only,
            discard: (can_discard && !self.read_only).then(|| range(queue.discard_max_bytes)),
            write_zeroes: (!self.read_only).then(|| range(zeroes)),
            memory_alignment,
            offset_alignment,
        })
    }

    fn of_file(&self, capacity: u64) -> Result<Geometry, BlockError> {
        let (memory_alignment, offset_alignment) = match self.direct {
            true => self.file_alignment(),
            false => (1, 1),
        };
        let logical = offset_alignment.max(SECTOR);
        Ok(Geometry {
            capacity,
            logical_block_size: logical,
            physical_block_size: FILE_PHYSICAL_BLOCK.max(logical),
            alignment_offset: 0,
            min_io: FILE_PHYSICAL_BLOCK.max(logical),
            opt_io: 0,
            rotational: false,
            read_only: self.read_only,
            discard: (!self.read_only && can_punch(self.file, capacity)).then_some(FILE_RANGE),
            write_zeroes: (!self.read_only).then_some(FILE_RANGE),
            memory_alignment,
            offset_alignment,
        })
    }

    /// What O_DIRECT demands of a file: what the file system says, or what it accepts.
    fn file_alignment(&self) -> (u32, u32) {
        dio_alignment(self.file).unwrap_or_else(|| {
            let offset = if reads_directly_at(self.file, SECTOR) { SECTOR } else { FILE_PHYSICAL_BLOCK };
            (FILE_PHYSICAL_BLOCK, offset)
        })
    }
}

fn with_block_size(geometry: Geometry, asked: Option<u32>, path: &Path) -> Result<Geometry, BlockError> {
    let host = geometry.logical_block_size;
    let block = asked.unwrap_or(host);
    if !block.is_power_of_two() || block < host || block > host.max(4096) {
        return Err(BlockError::BlockSize { path: path.into(), asked: block, host });
    }
    if geometry.capacity == 0 || !geometry.capacity.is_multiple_of(u64::from(block)) {
        return Err(BlockError::Size { path: path.into(), bytes: geometry.capacity, block });
    }
    let limits = |limits: RangeLimits| RangeLimits {
        max_bytes: round_down(limits.max_bytes, block),
        granularity: limits.granularity.max(block),
    };
    Ok(Geometry {
        logical_block_size: block,
        physical_block_size: geometry.physical_block_size.max(block),
        discard: geometry.discard.map(limits),
        write_zeroes: geometry.write_zeroes.map(limits),
        ..geometry
    })
}

/// `bytes` rounded down to a multiple of `block`, but at least one block.
fn round_down(bytes: u64, block: u32) -> u64 {
    let block = u64::from(block);
    (bytes - bytes % block).max(block)
}

/// Takes O_NONBLOCK off and sets O_DIRECT as wanted.
fn set_flags(file: &File, direct: bool) -> io::Result<()> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    // SAFETY: plain integers; F_SETFL changes only O_DIRECT and O_NONBLOCK here.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) })
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: all-zero is a valid flock: the whole file from its start, and no process, as OFD locks demand.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or(0);
    // SAFETY: F_OFD_SETLK reads one flock.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

fn ioctl_u32(file: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: u32 = 0;
    // SAFETY: all requests that this is called with write one 32-bit integer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

fn device_size(file: &File) -> io::Result<u64> {
    let mut bytes: u64 = 0;
    // SAFETY: BLKGETSIZE64 writes one 64-bit integer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) })?;
    Ok(bytes)
}

/// The size of a regular file as this host knows it. A network file system is not asked: its server may not answer.
fn known_size(file: &File) -> io::Result<u64> {
    Ok(statx(file, libc::AT_STATX_DONT_SYNC, libc::STATX_SIZE)?.stx_size)
}

/// What O_DIRECT demands of addresses and offsets, if the kernel tells (Linux 6.1).
fn dio_alignment(file: &File) -> Option<(u32, u32)> {
    let stat = statx(file, 0, libc::STATX_DIOALIGN).ok()?;
    let told = stat.stx_mask & libc::STATX_DIOALIGN != 0;
    let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    (told && memory.is_power_of_two() && offset.is_power_of_two()).then_some((memory, offset))
}

fn statx(file: &File, flags: libc::c_int, what: libc::c_uint) -> io::Result<libc::statx> {
    // SAFETY: all-zero is a valid statx.
    let mut stat: libc::statx = unsafe { MaybeUninit::zeroed().assume_init() };
    let flags = libc::AT_EMPTY_PATH | flags;
    // SAFETY: the path is an empty C string, which with AT_EMPTY_PATH means the descriptor; one statx is written.
    check(unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, what, &raw mut stat) })?;
    Ok(stat)
}

/// Whether a direct read of `offset` bytes from `offset` works.
fn reads_directly_at(file: &File, offset: u32) -> bool {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let mut page = Box::new(Page([0; 4096]));
    let length = usize::try_from(offset).unwrap_or(0).min(size_of_val(&page.0));
    // SAFETY: the buffer holds at least `length` bytes.
    let read = unsafe { libc::pread(file.as_raw_fd(), page.0.as_mut_ptr().cast(), length, libc::off_t::from(offset)) };
    read >= 0
}

/// Whether holes can be punched: tried past the end, where there is nothing to lose.
fn can_punch(file: &File, capacity: u64) -> bool {
    let Ok(offset) = libc::off_t::try_from(capacity) else { return false };
    fallocate(file.as_raw_fd(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, 4096).is_ok()
}

fn fallocate(fd: RawFd, mode: libc::c_int, offset: libc::off_t, length: libc::off_t) -> io::Result<()> {
    // SAFETY: plain integers; what the call does to the file is the caller's wish.
    check(unsafe { libc::fallocate(fd, mode, offset, length) })
}
