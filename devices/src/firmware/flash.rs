//! Flash memory with the variables of the firmware: NOR flash with the Intel command set, as far as edk2 uses it.
//!
//! | command | | then |
//! |---|---|---|
//! | 0x10, 0x40 | program: the next write is data, which clears bits | status |
//! | 0x20, 0xD0 | erase the block of 4 KiB to ones | status |
//! | 0x50 | clear the status | array |
//! | 0x70 | read the status | status |
//! | 0xFF, any other | end of it | array |
//!
//! While the array is read, the guest reads memory ([`FlashMapping`]): no exits. The status is read from here.
//!
//! **When it is stable.** Firmware takes what it wrote for stored once it has gone back to the array, and its variables survive a crash
//! because it orders its writes so. So it is there, at the end of a run of programming, that the bytes go to the file and to
//! the disk, and the vCPU waits for that, as it would for the chip: a variable that was set is not lost by a kill or a crash of
//! the host, and none is torn. It waits [`PATIENCE`] at most, for a thread that does the writing. After that, and while a
//! write has failed, the memory is write-protected: what the guest cannot keep, it is not shown either.
//!
//! **In which order.** What waits to be stored is programming of one range, or erasures of one: before anything else changes, it is
//! stored and synced. So whenever the VMM is killed or the host fails, the store has all commands up to some moment, of the range that was
//! being written then each page (on a disk: each sector) before or after, and nothing of what came later. Firmware relies on no more of a
//! chip: a variable counts once a byte of its own says so, which is programmed last.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_memory::{Bytes, VolatileMemory};

use super::store::{FlashStore, Writer, Written};
use super::{FLASH_BLOCK, FlashArray};
use crate::bus::{BusDevice, VmRequest};
use crate::throttle::Throttle;
use crate::{DeviceEvent, DeviceNotifier, ThreadSpawner};

/// The longest that a vCPU waits for the disk behind the variables: less than what pausing a VM waits for a vCPU.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// The name under which events tell of the flash memory.
pub const DEVICE: &str = "firmware";

/// The last operation is over.
const READY: u8 = 1 << 7;
/// The erasure failed.
const ERASE_ERROR: u8 = 1 << 5;
/// The programming failed.
const PROGRAM_ERROR: u8 = 1 << 4;

const BLOCK: usize = FLASH_BLOCK as usize;

static MAPPING_LOG: Throttle = Throttle::new();

/// Lets the guest read flash memory without an exit (a read-only memory slot of KVM).
pub trait FlashMapping: Send + Sync {
    /// Whether guest reads are answered by the array itself. If not, they come to the device, as writes always do.
    ///
    /// # Errors
    /// What the kernel answered; all is as before then.
    fn set_readable(&self, readable: bool) -> io::Result<()>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Command,
    Data,
    Confirmation,
}

struct State {
    expect: Expect,
    status: u8,
    /// Reads give the array, not the status.
    array: bool,
    /// What of the array is not in the store.
    dirty: Option<Dirty>,
    /// The store does not take what is written.
    failing: bool,
    writer: Writer,
}

/// What changes a range of the array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Programming,
    Erasure,
}

/// A range that was changed and is not stored, all of it in one way.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Dirty {
    range: Range<usize>,
    by: Change,
}

impl Dirty {
    /// Whether a change of `range` can be stored together with it.
    fn takes(&self, range: &Range<usize>, by: Change) -> bool {
        self.by == by && range.start <= self.range.end && self.range.start <= range.end
    }
}

/// A bank of flash memory that the guest can write.
pub struct Flash {
    array: FlashArray,
    mapping: Box<dyn FlashMapping>,
    notifier: Arc<dyn DeviceNotifier>,
    state: Mutex<State>,
}

impl Flash {
    /// Flash memory with the content of `array`, which `store` keeps and `mapping` shows to the guest from now on.
    ///
    /// # Errors
    /// What the kernel answered when it refused the thread or the mapping.
    pub fn new(
        array: FlashArray,
        mapping: Box<dyn FlashMapping>,
        store: Box<dyn FlashStore>,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> io::Result<Self> {
        mapping.set_readable(true)?;
        let writer = Writer::start(store, spawner)?;
        let state = State { expect: Expect::Command, status: READY, array: true, dirty: None, failing: false, writer };
        Ok(Self { array, mapping, notifier, state: Mutex::new(state) })
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.array.size() as u64
    }

    /// Back to power-on. What was written stays.
    pub fn reset(&self) {
        let mut state = self.lock();
        self.end_run(&mut state);
        (state.expect, state.status) = (Expect::Command, READY);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, state: &mut State, command: u8) {
        match command {
            0x10 | 0x40 => self.show_status(state, Expect::Data),
            0x20 => self.show_status(state, Expect::Confirmation),
            0x70 => {
                self.store(state);
                self.show_status(state, Expect::Command);
            }
            0x50 => {
                self.end_run(state);
                state.status = 0;
            }
            _ => self.end_run(state),
        }
    }

    fn show_status(&self, state: &mut State, expect: Expect) {
        state.expect = expect;
        self.show(state, false);
    }

    /// Stores what was written and shows the array again.
    fn end_run(&self, state: &mut State) {
        self.store(state);
        state.expect = Expect::Command;
        self.show(state, true);
    }

    /// What the guest reads changes first, so that a mapping that cannot be had costs speed only.
    fn show(&self, state: &mut State, array: bool) {
        if std::mem::replace(&mut state.array, array) == array {
            return;
        }
        if let Err(error) = self.mapping.set_readable(array)
            && let Some(held_back) = MAPPING_LOG.pass()
        {
            tracing::error!(
                held_back,
                "the mapping of the flash memory cannot be changed to readable={array}: {error}"
            );
        }
    }

    fn program(&self, state: &mut State, offset: usize, data: &[u8]) {
        state.expect = Expect::Command;
        state.status |= READY;
        let range = offset..offset.saturating_add(data.len());
        let changed =
            self.change(state, range, Change::Programming, |index, old| old & data.get(index).copied().unwrap_or(0xff));
        if !changed {
            state.status |= PROGRAM_ERROR;
        }
    }

    fn erase(&self, state: &mut State, offset: usize) {
        state.expect = Expect::Command;
        state.status |= READY;
        let start = offset - offset % BLOCK;
        if !self.change(state, start..start.saturating_add(BLOCK), Change::Erasure, |_, _| 0xff) {
            state.status |= ERASE_ERROR;
        }
    }

    /// Changes a range of the array; says whether that was possible.
    fn change(&self, state: &mut State, range: Range<usize>, by: Change, new: impl Fn(usize, u8) -> u8) -> bool {
        if state.failing && !self.recovers(state) {
            return false;
        }
        if state.dirty.as_ref().is_some_and(|dirty| !dirty.takes(&range, by)) {
            self.store(state);
            if state.failing {
                return false;
            }
        }
        let array = self.array.as_volatile_slice();
        let mut bytes = vec![0; range.len().min(BLOCK)];
        if array.read_slice(&mut bytes, range.start).is_err() {
            return false;
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = new(index, *byte);
        }
        let before = state.dirty.take().map_or(range.clone(), |dirty| dirty.range);
        let start = range.start;
        let range = before.start.min(start)..before.end.max(range.end);
        state.dirty = Some(Dirty { range, by });
        array.write_slice(&bytes, start).is_ok()
    }

    /// Whether a store that failed has taken what it was given, now or at another try.
    fn recovers(&self, state: &mut State) -> bool {
        if state.writer.is_busy() {
            let written = state.writer.wait(Duration::ZERO);
            self.conclude(state, written);
        }
        if state.failing && !state.writer.is_busy() {
            self.store(state);
        }
        !state.failing
    }

    /// Brings what was written to the store.
    fn store(&self, state: &mut State) {
        if state.writer.is_busy() {
            let written = state.writer.wait(Duration::ZERO);
            return self.conclude(state, written);
        }
        let Some(Dirty { range, .. }) = state.dirty.clone() else { return };
        let mut bytes = vec![0; range.len()];
        let written = match self.array.as_volatile_slice().read_slice(&mut bytes, range.start) {
            Ok(()) => state.writer.write(range.start as u64, bytes, PATIENCE),
            Err(error) => Written::Failed(io::Error::other(error.to_string())),
        };
        self.conclude(state, written);
    }

    fn conclude(&self, state: &mut State, written: Written) {
        let reason = match written {
            Written::Done => {
                state.dirty = None;
                if std::mem::replace(&mut state.failing, false) {
                    let detail = "the variables of the firmware are stored again".to_owned();
                    self.notifier.notify(DEVICE, DeviceEvent::BackendRestored { detail });
                }
                return;
            }
            Written::Failed(error) => format!("the variables of the firmware cannot be stored: {error}"),
            Written::Late => {
                format!("the disk with the variables of the firmware has not answered for {} s", PATIENCE.as_secs())
            }
        };
        state.status |= PROGRAM_ERROR;
        if !std::mem::replace(&mut state.failing, true) {
            let reason = format!("{reason}: the guest cannot change them until the host can");
            self.notifier.notify(DEVICE, DeviceEvent::BackendLost { reason });
        }
    }
}

impl BusDevice for Flash {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if !state.array || self.array.as_volatile_slice().read_slice(data, start).is_err() {
            data.fill(state.status);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        let mut state = self.lock();
        let start = usize::try_from(offset).ok()?;
        let first = *data.first()?;
        match state.expect {
            Expect::Command => self.command(&mut state, first),
            Expect::Data => self.program(&mut state, start, data),
            Expect::Confirmation if first == 0xd0 => self.erase(&mut state, start),
            Expect::Confirmation => {
                // A command sequence error (Intel's StrataFlash): nothing is erased.
                state.status |= READY | ERASE_ERROR | PROGRAM_ERROR;
                self.end_run(&mut state);
            }
        }
        None
    }
}

impl Drop for Flash {
    fn drop(&mut self) {
        let mut state = self.lock();
        self.store(&mut state);
        if state.dirty.is_some() {
            tracing::error!("the last change of the firmware's variables is lost: the host does not store it");
        }
    }
}

#[cfg(test)]
mod tests;
