//! One writer at a time across hosts: SCSI-3 persistent reservations (SPC-4 §5.13), and NVMe's (NVM Command Set §3.2).
//!
//! Each host has a key of its own. A VM registers it with the LUN, over every path, and reserves the LUN as *Write
//! Exclusive – Registrants Only*: the array itself then refuses the writes of every host that is not registered. So a host
//! that lost the LUN cannot write it, whatever it believes. Losing is noticed by a conflict or by a look (`guard`), and
//! nothing here ever registers anew what is lost: that would undo a fencing.
//!
//! The VMM asks the kernel (`ioctl`), which takes privileges, or a helper that has them (`pr_helper`).
//!
//! Limits that the operator has to know:
//! - The kernel registers the paths that a dm-multipath device has at the start; all of them have to work then. A path that is
//!   added later has no registration, and writes over it fail with a conflict, unless `multipathd` registers it
//!   (`reservation_key` in `multipath.conf`, the same key as here).
//! - Two VMs on one host are kept apart by the lock on the disk, not by this: a reservation knows hosts.
//! - Two hosts with the same key are one host to the LUN.
//! - A host that was cut off may have writes queued in its kernel. They are refused for as long as another holds the reservation,
//!   not once it gave the LUN up again: switch such a host off before its LUNs are freed.

mod guard;
mod ioctl;
mod keys;
mod pr_helper;
mod scsi;
#[cfg(test)]
pub(super) mod tests;

use std::fmt;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use thiserror::Error;
use tracing::{info, warn};

pub(super) use self::guard::{Guard, GuardThread};
pub use self::keys::Kind;
use self::keys::Table;
pub use self::pr_helper::HelperError;
use super::file::LockedFile;

/// How often a reservation is tried for while others come and go.
const ROUNDS: u32 = 20;
/// Between two of them, for another host that was refused to take its key back.
const ROUND: Duration = Duration::from_millis(100);

/// How to reserve a LUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservationOptions {
    /// The key of this host: no other host that reaches the LUN may have the same.
    pub key: NonZeroU64,
    /// Take the LUN from whoever has it (PREEMPT AND ABORT), for a fail-over.
    pub preempt: bool,
    /// Where a qemu-pr-helper listens that does it, for want of privileges.
    pub helper: Option<PathBuf>,
}

/// How a reservation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Only this host can write.
    Held,
    /// This host can write no more, or is not alone any more.
    Lost {
        /// The key of the host that has it now, if one has.
        holder: Option<u64>,
    },
}

/// Why a command about reservations did not do what it should.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// RESERVATION CONFLICT: another host holds it, or our key is not registered.
    #[error("reservation conflict: another host has the LUN")]
    Conflict,
    /// The device has no persistent reservations.
    #[error(
        "it has no persistent reservations ({0}): they need a SCSI disk, dm-multipath over such, or NVMe with reservations; not a partition"
    )]
    Unsupported(String),
    /// The VMM may not do it.
    #[error(
        "{0}: give the VMM CAP_SYS_ADMIN and CAP_SYS_RAWIO or a reservation.helper, and the whole device rather than a partition"
    )]
    Denied(io::Error),
    /// A path does not work.
    #[error("{0}: all paths to the LUN have to work (multipath -ll)")]
    Unreachable(String),
    /// CHECK CONDITION, most often a unit attention: the command may work when it is given again.
    #[error("the LUN keeps reporting that something about it changed: look at the kernel's log")]
    Attention,
    /// The helper does not do it.
    #[error("the helper at {}: {error}", socket.display())]
    Helper {
        /// Its socket.
        socket: PathBuf,
        /// What is wrong.
        error: HelperError,
    },
    /// Anything else that the LUN said.
    #[error("the LUN answered with {0}")]
    Refused(String),
}

/// Why a LUN cannot be reserved, or a reservation not be looked after.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReservationError {
    /// Another host holds the reservation.
    #[error("{} is reserved by another host (key {key:#x}): end the VM there, or set preempt to take the disk away from it", path.display())]
    Held {
        /// The disk.
        path: PathBuf,
        /// Its key.
        key: u64,
    },
    /// Other hosts are registered, so they could write.
    #[error("{} is registered by other hosts ({}), which could write to it: end what they run on it, or set preempt to remove them", path.display(), Keys(keys))]
    Registered {
        /// The disk.
        path: PathBuf,
        /// Their keys.
        keys: Vec<u64>,
    },
    /// Our own key holds a reservation that is not ours.
    #[error("{} has a reservation ({kind}) that something else made with the key of this host: release it first (sg_persist --out --release, or --clear)", path.display())]
    Kind {
        /// The disk.
        path: PathBuf,
        /// Its type.
        kind: Kind,
    },
    /// Another host was faster.
    #[error("another host{} took {} at the same time: see which of the two shall have it", holder.map(|key| format!(" (key {key:#x})")).unwrap_or_default(), path.display())]
    Taken {
        /// The disk.
        path: PathBuf,
        /// Its key, if it holds the reservation now.
        holder: Option<u64>,
    },
    /// A command failed.
    #[error("cannot {what} {}: {refusal}", path.display())]
    Command {
        /// The disk.
        path: PathBuf,
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        refusal: Refusal,
    },
    /// The key could not be taken back.
    #[error("{} is still registered with the key {key:#x} of this host: another host needs preempt, or take it back (sg_persist --out --clear --param-rk={key:#x})", path.display())]
    Left {
        /// The disk.
        path: PathBuf,
        /// Our key.
        key: u64,
    },
    /// Requests hang.
    #[error("{} stays reserved with the key {key:#x} of this host, as {requests} of its requests are still in flight and may yet write: another host needs preempt, which aborts them", path.display())]
    InFlight {
        /// The disk.
        path: PathBuf,
        /// Our key.
        key: u64,
        /// How many.
        requests: u32,
    },
}

impl ReservationError {
    /// Whether other hosts are in the way, rather than something that does not work.
    #[must_use]
    pub fn is_by_others(&self) -> bool {
        matches!(self, Self::Held { .. } | Self::Registered { .. } | Self::Taken { .. })
    }
}

struct Keys<'a>(&'a [u64]);

impl fmt::Display for Keys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 4;
        for (index, key) in self.0.iter().take(SHOWN).enumerate() {
            write!(f, "{}{key:#x}", if index == 0 { "key " } else { ", " })?;
        }
        let more = self.0.len().saturating_sub(SHOWN);
        if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
    }
}

/// The commands that a LUN takes. All of them may wait for it.
trait Target: Send + Sync {
    /// Who is registered, who holds.
    fn read(&self) -> Result<Table, Refusal>;
    /// Registers `key` for every path of this host, whatever was registered there.
    fn register(&self, key: u64) -> Result<(), Refusal>;
    /// Takes the registrations of this host back.
    fn unregister(&self, key: u64) -> Result<(), Refusal>;
    /// Makes our kind of reservation.
    fn reserve(&self, key: u64) -> Result<(), Refusal>;
    /// Releases it.
    fn release(&self, key: u64) -> Result<(), Refusal>;
    /// Removes all registrations with the key `victim`, aborts what is under way over them, and takes over if it held.
    fn preempt(&self, key: u64, victim: u64) -> Result<(), Refusal>;
    /// Removes all registrations and the reservation.
    fn clear(&self, key: u64) -> Result<(), Refusal>;
}

/// The reservation of an open disk. Dropping it releases it, which may wait for the LUN.
pub struct Reservation {
    target: Box<dyn Target>,
    path: PathBuf,
    key: u64,
    /// Nothing is registered, or nothing is to be done about it any more.
    over: AtomicBool,
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reservation({}, {:#x})", self.path.display(), self.key)
    }
}

impl Reservation {
    /// Registers the key of this host with the disk and reserves it. Waits for the disk.
    ///
    /// A host that was killed finds its own key there, and goes on with it.
    ///
    /// # Errors
    /// [`ReservationError`]; the key is registered no more then. Without `preempt` nobody else's key was touched.
    pub fn acquire(file: Arc<LockedFile>, path: &Path, options: ReservationOptions) -> Result<Self, ReservationError> {
        let target: Box<dyn Target> = match &options.helper {
            Some(socket) if is_device(&file) => Box::new(pr_helper::Helper::new(file, socket)),
            // The kernel knows best why a file cannot be reserved.
            _ => Box::new(ioctl::Device::new(file)),
        };
        Self::acquire_on(target, path, &options)
    }

    fn acquire_on(
        target: Box<dyn Target>,
        path: &Path,
        options: &ReservationOptions,
    ) -> Result<Self, ReservationError> {
        let &ReservationOptions { key, preempt, .. } = options;
        let reservation = Self { target, path: path.into(), key: key.get(), over: AtomicBool::new(true) };
        let table = reservation.read()?;
        if !preempt {
            reservation.refuse_foreign(&table)?;
        }
        reservation.register()?;
        // From here on, dropping it takes the key back.
        reservation.over.store(false, Ordering::Release);
        reservation.take(preempt)?;
        info!(path = %path.display(), key = format_args!("{key:#x}"), "the LUN is reserved for this host");
        Ok(reservation)
    }

    /// Looks whether the reservation is still ours. Waits for the disk.
    ///
    /// # Errors
    /// [`ReservationError`] if the disk does not answer: nothing is known then.
    pub fn check(&self) -> Result<Standing, ReservationError> {
        let table = self.read()?;
        if self.over.load(Ordering::Acquire) || table.is_held_by(self.key) {
            return Ok(Standing::Held);
        }
        Ok(Standing::Lost { holder: table.foreign_holder(self.key) })
    }

    /// Releases the reservation and takes the key back, if they are still ours. Waits for the disk.
    ///
    /// # Errors
    /// [`ReservationError`] if the key may still be registered.
    pub fn release(&self) -> Result<(), ReservationError> {
        if self.over.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        match self.read() {
            // It was lost.
            Ok(table) if !table.has(self.key) => return Ok(()),
            // One command over one path, however many there are and however many work. If the LUN is taken from us right
            // now, it does nothing.
            Ok(table) if table.foreign(self.key).is_empty() && self.target.clear(self.key).is_ok() => return Ok(()),
            _ => {}
        }
        // Unregistering releases as well, and a conflict says that it was lost.
        let _ = self.target.release(self.key);
        let outcome = match self.target.unregister(self.key) {
            Ok(()) | Err(Refusal::Conflict) => Ok(()),
            Err(refusal) => Err(self.failed("take the key back from")(refusal)),
        };
        match self.read() {
            Ok(table) if !table.has(self.key) => Ok(()),
            Ok(_) => outcome.and(Err(ReservationError::Left { path: self.path.clone(), key: self.key })),
            Err(_) => outcome,
        }
    }

    /// Leaves the reservation in place for good, as `requests` of this host may still write.
    pub(super) fn keep(&self, requests: u32) -> ReservationError {
        self.over.store(true, Ordering::Release);
        ReservationError::InFlight { path: self.path.clone(), key: self.key, requests }
    }

    fn register(&self) -> Result<(), ReservationError> {
        self.target.register(self.key).map_err(self.failed("register the key with"))
    }

    /// Reserves until this host is the only one that can write.
    fn take(&self, preempt: bool) -> Result<(), ReservationError> {
        for _ in 0..ROUNDS {
            match self.target.reserve(self.key) {
                Ok(()) | Err(Refusal::Conflict) => {}
                Err(refusal) => return Err(self.failed("reserve")(refusal)),
            }
            let table = self.read()?;
            if table == Table::default() {
                // Another host cleared the LUN when it ended. Nobody has it, so this undoes no fencing.
                self.register()?;
                continue;
            }
            if !table.has(self.key) {
                return Err(ReservationError::Taken {
                    path: self.path.clone(),
                    holder: table.foreign_holder(self.key),
                });
            }
            let foreign = table.foreign(self.key);
            if foreign.is_empty() && table.is_held_by(self.key) {
                return Ok(());
            }
            if preempt {
                self.preempt(&table, &foreign)?;
            } else if let Some(key) = table.foreign_holder(self.key) {
                return Err(ReservationError::Held { path: self.path.clone(), key });
            } else {
                // Another host that came at the same time takes its key back when it sees that it lost.
                std::thread::sleep(ROUND);
            }
        }
        let table = self.read()?;
        self.refuse_foreign(&table)?;
        Err(ReservationError::Taken { path: self.path.clone(), holder: table.foreign_holder(self.key) })
    }

    fn preempt(&self, table: &Table, foreign: &[u64]) -> Result<(), ReservationError> {
        // The holder first: then nobody else can come in.
        let holder = table.holder.filter(|holder| holder.key != self.key).map(|holder| holder.key);
        let others = foreign.iter().copied().filter(|&key| Some(key) != holder);
        let victims: Vec<u64> = holder.into_iter().chain(others).collect();
        if victims.is_empty() {
            return self.refuse_kind(table);
        }
        for victim in victims {
            warn!(path = %self.path.display(), victim = format_args!("{victim:#x}"), "takes the LUN from another host");
            match self.target.preempt(self.key, victim) {
                // It went by itself.
                Ok(()) | Err(Refusal::Conflict) => {}
                Err(refusal) => return Err(self.failed("take over")(refusal)),
            }
        }
        Ok(())
    }

    /// Whoever else has a claim on the LUN.
    fn refuse_foreign(&self, table: &Table) -> Result<(), ReservationError> {
        let path = || self.path.clone();
        if let Some(key) = table.foreign_holder(self.key) {
            return Err(ReservationError::Held { path: path(), key });
        }
        let keys = table.foreign(self.key);
        if keys.is_empty() { self.refuse_kind(table) } else { Err(ReservationError::Registered { path: path(), keys }) }
    }

    fn refuse_kind(&self, table: &Table) -> Result<(), ReservationError> {
        match table.holder {
            Some(holder) if holder.kind != Kind::OURS => {
                Err(ReservationError::Kind { path: self.path.clone(), kind: holder.kind })
            }
            _ => Ok(()),
        }
    }

    fn read(&self) -> Result<Table, ReservationError> {
        self.target.read().map_err(self.failed("read the reservation of"))
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(Refusal) -> ReservationError {
        let path = self.path.clone();
        move |refusal| ReservationError::Command { path, what, refusal }
    }
}

fn is_device(file: &LockedFile) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            warn!(%error, "a reservation is left behind");
        }
    }
}
