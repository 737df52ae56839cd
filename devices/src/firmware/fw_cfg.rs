//! fw_cfg: how firmware is told what it cannot discover (QEMU docs/specs/fw_cfg.rst).
//!
//! | port | | |
//! |---|---|---|
//! | 0x510 | selector | 16 bits: which item is read, from its start |
//! | 0x511 | data | the next bytes of the item; zero beyond its end |
//! | 0x514 | DMA address | 64 bits, big-endian in two halves; the write of the second starts the transfer |
//!
//! Items are read only, but for live files. Files are items with a name; the directory lists them. Files that describe what the firmware has set
//! up itself come from a source. It is asked whenever the first of them, the one with which firmware begins, is selected:
//! edk2 has the BARs decoded just then, and not when it reads the directory before and the other files after (EnablePciDecoding()
//! of OvmfPkg/AcpiPlatformDxe).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use crate::GuestMemory;
use crate::acpi::AcpiError;
use crate::bus::{BusDevice, VmRequest};
use crate::throttle::Throttle;

/// First port.
pub const FW_CFG_BASE: u64 = 0x510;
/// Ports.
pub const FW_CFG_LENGTH: u64 = 12;

const DATA: u64 = 1;
const DMA: u64 = 4;
const DMA_LOW: u64 = 8;

/// What the DMA address register reads as, where there is DMA.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Items with fixed numbers.
mod key {
    pub(super) const SIGNATURE: u16 = 0x00;
    pub(super) const ID: u16 = 0x01;
    pub(super) const CPU_COUNT: u16 = 0x05;
    pub(super) const MAX_CPUS: u16 = 0x0f;
    pub(super) const DIRECTORY: u16 = 0x19;
    pub(super) const FIRST_FILE: u16 = 0x20;
    /// Formerly "write"; has no meaning.
    pub(super) const IGNORED: u16 = 0x4000;
}

/// Traditional interface and DMA.
const FEATURES: u32 = 0b11;

/// Bits of a DMA command.
mod command {
    pub(super) const ERROR: u32 = 1 << 0;
    pub(super) const READ: u32 = 1 << 1;
    pub(super) const SKIP: u32 = 1 << 2;
    pub(super) const SELECT: u32 = 1 << 3;
    pub(super) const WRITE: u32 = 1 << 4;
}

/// Bytes of a name in the directory and in table-loader commands, with the NUL at its end.
pub const NAME_SIZE: usize = 56;
/// The most zeroes that a transfer gets beyond the end of an item: a vCPU must not be held by a long one.
const MAX_PADDING: usize = 1 << 20;

static SOURCE_LOG: Throttle = Throttle::new();

/// A file for the firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FwCfgFile {
    /// Its name: at most 55 bytes of ASCII.
    pub name: &'static str,
    /// Its content.
    pub data: Arc<[u8]>,
}

impl FwCfgFile {
    /// The file `name` with this content.
    #[must_use]
    pub fn new(name: &'static str, data: Vec<u8>) -> Self {
        Self { name, data: data.into() }
    }
}

/// A file whose content changes, always of the same size.
pub trait LiveFile: Send + Sync {
    /// Bytes.
    fn size(&self) -> usize;

    /// The firmware selects it: what it has in it now.
    fn select(&self) -> Vec<u8>;

    /// The firmware writes `bytes` at `offset`; says whether that is possible.
    fn write(&self, _offset: usize, _bytes: &[u8]) -> bool {
        false
    }
}

/// Makes files from how things are now: always the same names in the same order, and the same size of the first.
pub type FileSource = Box<dyn Fn() -> Result<Vec<FwCfgFile>, AcpiError> + Send + Sync>;

/// A live file of eight bytes that the firmware writes as a whole: the address, which may be anything, where it has put
/// another file. It is told on a vCPU's thread: that must not block.
pub struct AddressFile(pub Box<dyn Fn(u64) + Send + Sync>);

impl LiveFile for AddressFile {
    fn size(&self) -> usize {
        size_of::<u64>()
    }

    fn select(&self) -> Vec<u8> {
        vec![0; self.size()]
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        let (0, Ok(bytes)) = (offset, bytes.try_into()) else { return false };
        (self.0)(u64::from_le_bytes(bytes));
        true
    }
}

#[derive(Default)]
struct State {
    item: Arc<[u8]>,
    offset: usize,
    /// What takes writes to the item.
    live: Option<Arc<dyn LiveFile>>,
    /// The upper half of the DMA address.
    dma_high: u32,
    /// All files, as they were last made; none before the first look at them.
    files: Vec<FwCfgFile>,
}

/// The device.
pub struct FwCfg {
    memory: GuestMemory,
    cpus: u16,
    fixed: Vec<FwCfgFile>,
    live: Vec<(&'static str, Arc<dyn LiveFile>)>,
    source: FileSource,
    state: Mutex<State>,
}

impl FwCfg {
    /// fw_cfg for a machine with `cpus` vCPUs, with `files` and those of `source`.
    #[must_use]
    pub fn new(memory: GuestMemory, cpus: u16, files: Vec<FwCfgFile>, source: FileSource) -> Self {
        Self { memory, cpus, fixed: files, live: Vec::new(), source, state: Mutex::default() }
    }

    /// The same with more files, which are live.
    #[must_use]
    pub fn with_live_files(mut self, files: Vec<(&'static str, Arc<dyn LiveFile>)>) -> Self {
        self.fixed.extend(files.iter().map(|(name, file)| FwCfgFile::new(name, vec![0; file.size()])));
        self.live.extend(files);
        self
    }

    /// Back to power-on.
    pub fn reset(&self) {
        *self.lock() = State::default();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn select(&self, state: &mut State, selector: u16) {
        let selector = selector & !key::IGNORED;
        let index = selector.checked_sub(key::FIRST_FILE).map(usize::from);
        if index == Some(self.fixed.len()) || (state.files.is_empty() && selector >= key::DIRECTORY) {
            self.make_files(state);
        }
        (state.offset, state.live) = (0, None);
        state.item = match selector {
            key::SIGNATURE => Arc::from(*b"QEMU"),
            key::ID => Arc::from(FEATURES.to_le_bytes()),
            key::CPU_COUNT | key::MAX_CPUS => Arc::from(self.cpus.to_le_bytes()),
            key::DIRECTORY => directory(&state.files).into(),
            _ => match index.and_then(|index| state.files.get(index)) {
                Some(file) => {
                    let mine = |(name, _): &&(&str, _)| *name == file.name;
                    state.live = self.live.iter().find(mine).map(|(_, live)| Arc::clone(live));
                    state.live.as_ref().map_or_else(|| Arc::clone(&file.data), |live| live.select().into())
                }
                None => Arc::default(),
            },
        };
    }

    fn make_files(&self, state: &mut State) {
        match (self.source)() {
            Ok(made) => state.files = self.fixed.iter().cloned().chain(made).collect(),
            Err(error) => {
                if state.files.is_empty() {
                    state.files.clone_from(&self.fixed);
                }
                if let Some(held_back) = SOURCE_LOG.pass() {
                    tracing::warn!(held_back, "no ACPI tables for how the firmware set the machine up: {error}");
                }
            }
        }
    }

    /// Carries out the DMA command at `address` and answers there. One that is nowhere in RAM has no answer.
    fn transfer(&self, state: &mut State, address: u64) {
        let memory = self.memory.memory();
        let mut request = [0; 16];
        if memory.read_slice(&mut request, GuestAddress(address)).is_err() {
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, to @ ..] = request;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if control & command::SELECT != 0 {
            let [_, _, high, low] = (control >> 16).to_be_bytes();
            self.select(state, u16::from_be_bytes([high, low]));
        }
        let done = match control & (command::READ | command::WRITE | command::SKIP) {
            0 => true,
            bits if bits & command::READ != 0 => state.read_to(&memory, u64::from_be_bytes(to), length),
            bits if bits & command::WRITE != 0 => state.write_from(&memory, u64::from_be_bytes(to), length),
            _ => {
                state.offset = state.offset.saturating_add(length);
                true
            }
        };
        let answer = if done { 0 } else { command::ERROR };
        // It was read from there just now.
        let _ = memory.write_slice(&answer.to_be_bytes(), GuestAddress(address));
    }
}

impl State {
    fn next(&mut self) -> u8 {
        let byte = self.item.get(self.offset).copied().unwrap_or(0);
        self.offset = self.offset.saturating_add(1);
        byte
    }

    /// Copies the next `length` bytes to `address`; says whether they are all there.
    fn read_to(&mut self, memory: &GuestMemoryMmap, address: u64, length: usize) -> bool {
        let rest = self.item.get(self.offset..).unwrap_or_default();
        let bytes = rest.get(..length).unwrap_or(rest);
        let padding = length - bytes.len();
        self.offset = self.offset.saturating_add(length);
        let Some(end) = address.checked_add(bytes.len() as u64) else { return false };
        padding <= MAX_PADDING
            && memory.write_slice(bytes, GuestAddress(address)).is_ok()
            && memory.write_slice(&vec![0; padding], GuestAddress(end)).is_ok()
    }

    /// Writes `length` bytes from `address` to the item; says whether it takes them.
    fn write_from(&mut self, memory: &GuestMemoryMmap, address: u64, length: usize) -> bool {
        let (Some(live), true) = (&self.live, length <= self.item.len()) else { return false };
        let mut bytes = vec![0; length];
        let written = memory.read_slice(&mut bytes, GuestAddress(address)).is_ok() && live.write(self.offset, &bytes);
        self.offset = self.offset.saturating_add(length);
        written
    }
}

/// A name as the firmware wants it: zeroes up to its length.
pub(crate) fn padded(name: &str) -> [u8; NAME_SIZE] {
    let mut field = [0; NAME_SIZE];
    for (to, from) in field.iter_mut().zip(name.bytes()).take(NAME_SIZE - 1) {
        *to = from;
    }
    field
}

/// How many files there are, then size, number and name of each; all big-endian.
fn directory(files: &[FwCfgFile]) -> Vec<u8> {
    let mut directory = u32::try_from(files.len()).unwrap_or(0).to_be_bytes().to_vec();
    for (key, file) in (key::FIRST_FILE..).zip(files) {
        directory.extend(u32::try_from(file.data.len()).unwrap_or(0).to_be_bytes());
        directory.extend(key.to_be_bytes());
        directory.extend([0; 2]);
        directory.extend(padded(file.name));
    }
    directory
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        match offset {
            DATA => data.fill_with(|| state.next()),
            DMA.. => {
                let start = usize::try_from(offset - DMA).unwrap_or(usize::MAX);
                for (index, byte) in (start..).zip(data) {
                    *byte = DMA_SIGNATURE.get(index).copied().unwrap_or(0xff);
                }
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        let mut state = self.lock();
        match (offset, data) {
            (0, &[low, high]) => self.select(&mut state, u16::from_le_bytes([low, high])),
            (DMA, &[a, b, c, d]) => state.dma_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let high = std::mem::take(&mut state.dma_high);
                let address = u64::from(high) << 32 | u64::from(u32::from_be_bytes([a, b, c, d]));
                self.transfer(&mut state, address);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests;
