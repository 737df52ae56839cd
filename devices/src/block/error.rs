//! Why a disk could not be made.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::reservation::ReservationError;
use crate::uring::UringError;

/// Why a disk could not be made. Each message names the object and the remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BlockError {
    /// An option is out of range.
    #[error("disk {id}: {what}")]
    Option {
        /// The disk.
        id: String,
        /// What is wrong, and what is right.
        what: String,
    },
    /// The path cannot be opened.
    #[error("cannot open {}: {error}: {remedy}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the kernel answered.
        error: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The path is neither a regular file nor a block device.
    #[error("{} is {kind}: a disk is a regular file or a block device", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The size is no size of a disk.
    #[error("{} has {bytes} bytes: a disk has at least one block and is a multiple of {block} bytes (truncate -s)", path.display())]
    Size {
        /// The path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Its logical block size.
        block: u32,
    },
    /// The asked-for block size does not fit the host's.
    #[error("{} cannot show blocks of {asked} bytes: its own are {host}, and a power of two from there to 4096 is possible", path.display())]
    BlockSize {
        /// The path.
        path: PathBuf,
        /// What was asked for.
        asked: u32,
        /// What the host has.
        host: u32,
    },
    /// O_DIRECT was asked for and is not possible.
    #[error("{} cannot be opened with O_DIRECT: {error}: set direct to false, or put the disk on a file system that does it", path.display())]
    Direct {
        /// The path.
        path: PathBuf,
        /// What the kernel answered.
        error: io::Error,
    },
    /// Another process uses the disk.
    #[error("{} is in use: another process holds its lock (find it with lsof or fuser), and two writers would destroy its content", path.display())]
    Locked {
        /// The path.
        path: PathBuf,
    },
    /// Another LUN than the configuration names.
    #[error("{} is not the LUN {wanted}: {}. Correct the path or the wwid; nothing was read or written", path.display(), Found(found))]
    Identity {
        /// The path.
        path: PathBuf,
        /// The identifier that was asked for.
        wanted: String,
        /// Those that it has.
        found: Vec<String>,
    },
    /// A file has no identifier.
    #[error("{} is a file, which has no world-wide identifier: leave wwid out, or give the path of the LUN {wanted}", path.display())]
    IdentityOfFile {
        /// The path.
        path: PathBuf,
        /// The identifier that was asked for.
        wanted: String,
    },
    /// The LUN cannot be reserved for this host.
    #[error(transparent)]
    Reservation(#[from] ReservationError),
    /// The host did not tell the shape of the disk.
    #[error("cannot get {what} of {}: {error}", path.display())]
    Geometry {
        /// The path.
        path: PathBuf,
        /// What was asked for.
        what: &'static str,
        /// What the kernel answered.
        error: io::Error,
    },
    /// io_uring does not work here.
    #[error(
        "io_uring is unavailable ({what}): {error}: Linux 6.1 or later is needed, with kernel.io_uring_disabled=0 and no filter on it"
    )]
    Uring {
        /// What failed.
        what: &'static str,
        /// What the kernel answered.
        error: io::Error,
    },
    /// A thread cannot be pinned to its CPUs.
    #[error("cannot pin thread {thread} to its CPUs: {error}: name CPUs that are online and allowed to the VMM")]
    Affinity {
        /// The thread.
        thread: String,
        /// What the kernel answered.
        error: io::Error,
    },
    /// No thread, no eventfd.
    #[error("cannot make {what} for disk {id}: {error}: raise the limit of it")]
    Resources {
        /// The disk.
        id: String,
        /// What is lacking.
        what: &'static str,
        /// What the kernel answered.
        error: io::Error,
    },
}

struct Found<'a>(&'a [String]);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("the host tells no identifier of it"),
            found => write!(f, "it is {}", found.join(", ")),
        }
    }
}

/// Why a look at the size of a disk changed nothing.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RescanError {
    /// The device is gone.
    #[error("disk {id} is closed")]
    Closed {
        /// The disk.
        id: String,
    },
    /// The kernel did not tell.
    #[error("cannot get the size of disk {id}: {error}")]
    Unknown {
        /// The disk.
        id: String,
        /// What the kernel answered.
        error: io::Error,
    },
    /// The disk became smaller. The guest keeps seeing the old size; what is beyond the end gives errors.
    #[error("disk {id} shrank from {from} to {to} bytes: the guest cannot follow, restore its size")]
    Shrunk {
        /// The disk.
        id: String,
        /// Size that the guest sees.
        from: u64,
        /// Size that it has.
        to: u64,
    },
}

impl From<UringError> for BlockError {
    fn from(error: UringError) -> Self {
        let UringError { what, error } = error;
        Self::Uring { what, error }
    }
}
