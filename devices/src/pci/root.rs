//! The root of bus 0: who sits in which slot, and what of it is mapped.
//!
//! Invariant: what is mapped is always a subset of what the functions ask for. A guest that asks for the impossible (two BARs
//! at one address, a BAR outside the windows) gets a BAR that nobody answers at, until one of them moves away.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::access::{CONFIG_PORTS_BASE, CONFIG_PORTS_LENGTH, ConfigPorts, Ecam, Slots};
use super::config::{COMMAND, COMMAND_IO, COMMAND_MEMORY, bar_register};
use super::{BarKind, BarMapping, PciFunction};
use crate::IoEvents;
use crate::bus::{Bus, BusDevice, BusError};
use crate::throttle::Throttle;
use crate::virtio::StillBusy;

/// Slots of bus 0.
pub const SLOT_COUNT: u8 = 32;

static UNMAPPED_LOG: Throttle = Throttle::new();
static IOEVENT_LOG: Throttle = Throttle::new();

/// Where BARs may lie. Ends are exclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Guest-physical addresses for 32-bit memory BARs.
    pub low: Range<u64>,
    /// Guest-physical addresses for 64-bit memory BARs.
    pub high: Range<u64>,
    /// Ports.
    pub io: Range<u64>,
}

impl Windows {
    /// The whole of each address space.
    pub const ANYWHERE: Self = Self { low: 0..1 << 32, high: 1 << 32..u64::MAX, io: 0..1 << 16 };

    fn allow(&self, kind: BarKind, address: u64, length: u64) -> bool {
        let Some(end) = address.checked_add(length) else { return false };
        let inside = |window: &Range<u64>| address >= window.start && end <= window.end;
        match kind {
            BarKind::Io => inside(&self.io),
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => inside(&self.low) || inside(&self.high),
            BarKind::Fixed => true,
        }
    }
}

/// Why a function could not be put into a slot.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SlotError {
    /// There is no such slot.
    #[error("PCI slot {0} does not exist: use 0 to 31")]
    BadSlot(u8),
    /// Another function is there.
    #[error("PCI slot {0} is taken: use a free one")]
    Taken(u8),
}

/// The BARs do not fit.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("BAR {index} of PCI slot {slot} ({length:#x} bytes) does not fit into its window: enlarge the window")]
pub struct AssignError {
    /// Slot of the function.
    pub slot: u8,
    /// BAR register.
    pub index: u8,
    /// Bytes.
    pub length: u64,
}

struct Mapped {
    address: u64,
    length: u64,
    kind: BarKind,
    ioevents: Vec<(u64, Arc<EventFd>)>,
}

impl Mapped {
    fn is(&self, bar: &BarMapping) -> bool {
        Some(self.address) == bar.address && self.length == bar.length && self.kind == bar.kind
    }
}

/// What is mapped, by slot and BAR.
type Mappings = BTreeMap<(u8, u8), Mapped>;

/// The root of bus 0.
pub struct Root {
    slots: Arc<Slots>,
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    ioevents: Arc<dyn IoEvents>,
    windows: RwLock<Windows>,
    mappings: Mutex<Mappings>,
}

impl Root {
    /// An empty bus 0 that maps memory BARs into `mmio`, I/O BARs into `pio` and kicks through `ioevents`.
    #[must_use]
    pub fn new(mmio: Arc<Bus>, pio: Arc<Bus>, ioevents: Arc<dyn IoEvents>) -> Self {
        Self {
            slots: Arc::default(),
            mmio,
            pio,
            ioevents,
            windows: RwLock::new(Windows::ANYWHERE),
            mappings: Mutex::default(),
        }
    }

    /// Where BARs may lie from now on; what is mapped stays. [`Windows::ANYWHERE`] at first.
    pub fn set_windows(&self, windows: Windows) {
        *self.windows.write().unwrap_or_else(PoisonError::into_inner) = windows;
    }

    /// Claims ports 0xCF8–0xCFF on the port bus given to [`Root::new`]. Byte accesses to 0xCF9, which lies between, go to
    /// offset 0 of `reset_control`.
    ///
    /// # Errors
    /// [`BusError`] if one of the ports is taken.
    pub fn claim_config_ports(&self, reset_control: Option<Arc<dyn BusDevice>>) -> Result<(), BusError> {
        let ports = ConfigPorts { slots: Arc::downgrade(&self.slots), reset_control };
        self.pio.insert(CONFIG_PORTS_BASE, CONFIG_PORTS_LENGTH, Arc::new(ports))
    }

    /// Configuration space of buses 0 to 255 as memory, for the host bridge to place.
    #[must_use]
    pub fn ecam(&self) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::downgrade(&self.slots)))
    }

    /// Puts `function` into `slot` and maps what it decodes already.
    ///
    /// # Errors
    /// [`SlotError`] if there is no such slot or it is taken.
    pub fn insert(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<(), SlotError> {
        if slot >= SLOT_COUNT {
            return Err(SlotError::BadSlot(slot));
        }
        if !self.slots.insert(slot, function) {
            return Err(SlotError::Taken(slot));
        }
        self.remap(slot);
        Ok(())
    }

    /// Takes the function out of `slot` and unmaps it.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        let function = self.slots.remove(slot);
        self.remap(slot);
        function
    }

    /// The function in `slot`.
    #[must_use]
    pub fn function(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        self.slots.get(slot)
    }

    /// Makes the buses and ioeventfds follow the BARs of the function in `slot`. To be called by the vCPU thread that got
    /// [`crate::bus::VmRequest::BarsChanged`], before it goes on.
    pub fn remap(&self, slot: u8) {
        let mut mappings = self.lock();
        let wanted = self.slots.get(slot).map_or_else(Vec::new, |f| f.bars());
        let stale: Vec<u8> = mappings
            .range((slot, 0)..=(slot, u8::MAX))
            .filter(|((_, index), mapped)| !wanted.iter().any(|bar| bar.index == *index && mapped.is(bar)))
            .map(|((_, index), _)| *index)
            .collect();
        for index in &stale {
            if let Some(mapped) = mappings.remove(&(slot, *index)) {
                self.unmap(slot, &mapped);
            }
        }
        self.map_missing(&mut mappings, slot, &wanted);
        if stale.is_empty() {
            return;
        }
        // Who was in the way may have left: BARs that found their address taken get another chance.
        for other in (0..SLOT_COUNT).filter(|other| *other != slot) {
            if let Some(function) = self.slots.get(other) {
                self.map_missing(&mut mappings, other, &function.bars());
            }
        }
    }

    /// Gives every BAR an address, enables decoding and maps: what firmware does, for guests that boot without any. 64-bit BARs
    /// come from the high window, 32-bit ones from the low window, in order of slots and registers, naturally aligned; so the
    /// outcome follows from the configuration alone. The windows hold for what the guest moves later, too.
    ///
    /// # Errors
    /// [`AssignError`] when a window is full.
    pub fn assign_bars(&self, windows: &Windows) -> Result<(), AssignError> {
        self.set_windows(windows.clone());
        let (mut low, mut high, mut io) = (windows.low.clone(), windows.high.clone(), windows.io.clone());
        for slot in 0..SLOT_COUNT {
            let Some(function) = self.slots.get(slot) else { continue };
            let mut decode = 0;
            for bar in function.bars() {
                let (window, enable) = match bar.kind {
                    BarKind::Fixed => continue,
                    BarKind::Io => (&mut io, COMMAND_IO),
                    BarKind::Memory32 { .. } => (&mut low, COMMAND_MEMORY),
                    BarKind::Memory64 { .. } => (&mut high, COMMAND_MEMORY),
                };
                let error = AssignError { slot, index: bar.index, length: bar.length };
                let address = take(window, bar.length).ok_or(error)?;
                write_bar(&*function, &bar, address);
                decode |= enable;
            }
            if decode != 0 {
                let mut command = [0; 2];
                function.config_read(COMMAND, &mut command);
                let command = u16::from_le_bytes(command) | decode;
                let _ = function.config_write(COMMAND, &command.to_le_bytes());
            }
        }
        for slot in 0..SLOT_COUNT {
            self.remap(slot);
        }
        Ok(())
    }

    /// Resets every function and unmaps what they no longer decode.
    ///
    /// # Errors
    /// The [`StillBusy`] of the busiest function: call again once it has drained. Resetting twice is harmless.
    pub fn reset(&self) -> Result<(), StillBusy> {
        self.slots.reset_latch();
        let mut busy: Option<StillBusy> = None;
        for function in (0..SLOT_COUNT).filter_map(|slot| self.slots.get(slot)) {
            if let Err(this) = function.reset() {
                busy = Some(busy.map_or(this, |other| if this.oldest > other.oldest { this } else { other }));
            }
        }
        for slot in 0..SLOT_COUNT {
            self.remap(slot);
        }
        busy.map_or(Ok(()), Err)
    }

    fn lock(&self) -> MutexGuard<'_, Mappings> {
        self.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn map_missing(&self, mappings: &mut Mappings, slot: u8, wanted: &[BarMapping]) {
        for bar in wanted {
            let key = (slot, bar.index);
            if let Some(address) = bar.address
                && !mappings.contains_key(&key)
                && let Some(mapped) = self.map(slot, bar, address)
            {
                mappings.insert(key, mapped);
            }
        }
    }

    fn map(&self, slot: u8, bar: &BarMapping, address: u64) -> Option<Mapped> {
        let allowed = self.windows.read().unwrap_or_else(PoisonError::into_inner).allow(bar.kind, address, bar.length);
        let claimed = if allowed {
            self.bus(bar.kind).insert(address, bar.length, Arc::clone(&bar.device)).map_err(|e| e.to_string())
        } else {
            Err("the address is outside of the windows for BARs".to_owned())
        };
        if let Err(reason) = claimed {
            if let Some(held_back) = UNMAPPED_LOG.pass() {
                let bar = bar.index;
                tracing::warn!(slot, bar, address, held_back, "guest placed a BAR where it stays unmapped: {reason}");
            }
            return None;
        }
        let mut mapped = Mapped { address, length: bar.length, kind: bar.kind, ioevents: Vec::new() };
        if bar.kind != BarKind::Io {
            for (offset, event) in &bar.ioevents {
                self.register(slot, &mut mapped, *offset, event);
            }
        }
        Some(mapped)
    }

    /// A kick without ioeventfd still works: the write is trapped and the function signals the event itself.
    fn register(&self, slot: u8, mapped: &mut Mapped, offset: u64, event: &Arc<EventFd>) {
        let Some(address) = mapped.address.checked_add(offset).filter(|_| offset < mapped.length) else { return };
        match self.ioevents.register(address, event) {
            Ok(()) => mapped.ioevents.push((address, Arc::clone(event))),
            Err(error) => {
                if let Some(held_back) = IOEVENT_LOG.pass() {
                    tracing::warn!(slot, address, held_back, "kicks will be slow: no ioeventfd: {error}");
                }
            }
        }
    }

    fn unmap(&self, slot: u8, mapped: &Mapped) {
        for (address, event) in &mapped.ioevents {
            if let Err(error) = self.ioevents.unregister(*address, event)
                && let Some(held_back) = IOEVENT_LOG.pass()
            {
                tracing::warn!(slot, address, held_back, "ioeventfd of a moved BAR stays behind: {error}");
            }
        }
        self.bus(mapped.kind).remove(mapped.address);
    }

    fn bus(&self, kind: BarKind) -> &Bus {
        if kind == BarKind::Io { &self.pio } else { &self.mmio }
    }
}

/// Takes `length` naturally aligned bytes from the start of `window`. Address zero means "unassigned" in a BAR, so it is
/// never given out.
fn take(window: &mut Range<u64>, length: u64) -> Option<u64> {
    let address = window.start.max(1).checked_next_multiple_of(length)?;
    let end = address.checked_add(length).filter(|end| *end <= window.end)?;
    window.start = end;
    Some(address)
}

fn write_bar(function: &dyn PciFunction, bar: &BarMapping, address: u64) {
    let register = bar_register(bar.index);
    let bytes = address.to_le_bytes();
    let wide = matches!(bar.kind, BarKind::Memory64 { .. });
    let bytes = bytes.get(..if wide { 8 } else { 4 }).unwrap_or_default();
    let _ = function.config_write(register, bytes);
}
