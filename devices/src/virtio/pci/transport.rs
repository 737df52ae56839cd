//! The transport without PCI: feature negotiation, device status, queue registers, and the device's life behind them
//! (virtio 1.2 §2.1, §2.2, §3.1, §4.1.4.3).
//!
//! ```text
//!            DRIVER_OK               pause              stop drained
//!  Stopped ─────────────► Running ──────────► Stopping ──────────────► Parked ──resume──► Running
//!     ▲                      │ status := 0       │ status := 0           │ status := 0
//!     │      stop drained    ▼                   ▼                       │
//!     ├─────────────────── Resetting ◄───────────┘                       │
//!     └──────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Invariant: the device runs only between DRIVER_OK and the reset, and only on rings that were checked; guest memory of a
//! request is never given back (status reads zero) before the device has let go of it.

use std::sync::Arc;

use virtio_queue::{Queue, QueueState};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::TransportMetrics;
use super::signals::Signals;
use super::view::{QueueView, TransportState};
use crate::GuestMemory;
use crate::interrupt::{NO_VECTOR, QueueInterrupt};
use crate::pci::msix::MsixTable;
use crate::virtio::{
    Activation, ActiveQueue, Positions, StartError, StillBusy, StoppedQueue, TransportSignals, VirtioDevice,
};

/// Device status bits (§2.1).
pub(super) mod status {
    pub(in super::super) const ACKNOWLEDGE: u8 = 1;
    pub(in super::super) const DRIVER: u8 = 2;
    pub(in super::super) const DRIVER_OK: u8 = 4;
    pub(in super::super) const FEATURES_OK: u8 = 8;
    pub(in super::super) const NEEDS_RESET: u8 = 0x40;
    pub(in super::super) const FAILED: u8 = 0x80;
}

/// Feature bits of the transport and the ring (§6).
pub(super) mod feature {
    pub(in super::super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(in super::super) const EVENT_IDX: u64 = 1 << 29;
    pub(in super::super) const VERSION_1: u64 = 1 << 32;
    const RING_PACKED: u64 = 1 << 34;
    const NOTIFICATION_DATA: u64 = 1 << 38;
    const RING_RESET: u64 = 1 << 40;

    /// What this transport adds to every device.
    pub(in super::super) const ALWAYS: u64 = VERSION_1 | INDIRECT_DESC | EVENT_IDX;
    /// What this transport cannot do, whatever a device offers.
    pub(in super::super) const NEVER: u64 = RING_PACKED | NOTIFICATION_DATA | RING_RESET;
}

/// Offsets in the common configuration (§4.1.4.3).
pub(super) mod common {
    pub(in super::super) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(in super::super) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(in super::super) const DRIVER_FEATURE: u64 = 12;
    pub(in super::super) const CONFIG_VECTOR: u64 = 16;
    pub(in super::super) const DEVICE_STATUS: u64 = 20;
    pub(in super::super) const QUEUE_SELECT: u64 = 22;
    pub(in super::super) const QUEUE_SIZE: u64 = 24;
    pub(in super::super) const QUEUE_VECTOR: u64 = 26;
    pub(in super::super) const QUEUE_ENABLE: u64 = 28;
    pub(in super::super) const QUEUE_DESC: u64 = 32;
    pub(in super::super) const QUEUE_DRIVER: u64 = 40;
    pub(in super::super) const QUEUE_DEVICE: u64 = 48;
    pub(in super::super) const QUEUE_ADDRESSES_END: u64 = 56;
    /// Bytes of the structure, with the fields of features that are not offered (they read zero).
    pub(in super::super) const SIZE: u32 = 60;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The device does nothing and holds nothing.
    Stopped,
    /// The device works.
    Running,
    /// Told to stop for a pause, not drained yet.
    Stopping,
    /// Stopped for a pause; the queues know where they were.
    Parked,
    /// Told to stop for a reset, not drained yet.
    Resetting,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Parked => "parked",
            Self::Resetting => "resetting",
        }
    }
}

/// Registers and positions of one queue.
struct QueueRegisters {
    max_size: u16,
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    next_avail: u16,
    next_used: u16,
    positions: Arc<Positions>,
    interrupt: QueueInterrupt,
    kick: Arc<EventFd>,
}

impl QueueRegisters {
    fn reset(&mut self) {
        let Self {
            max_size,
            size,
            enabled,
            descriptors,
            driver,
            device,
            next_avail,
            next_used,
            positions,
            interrupt,
            kick,
        } = self;
        *size = *max_size;
        *enabled = false;
        (*descriptors, *driver, *device) = (0, 0, 0);
        (*next_avail, *next_used) = (0, 0);
        positions.show(0, 0);
        interrupt.choose(NO_VECTOR);
        // A kick for the former driver means nothing to the next one.
        let _ = kick.read();
    }

    /// The ring as the device needs it, once everything about it was checked.
    fn queue<M: GuestMemoryBackend>(&self, memory: &M, event_idx: bool) -> Result<Queue, String> {
        let size = usize::from(self.size);
        // §2.7: descriptors of 16 bytes; 6 bytes plus 2 per entry; 6 bytes plus 8 per entry.
        let parts = [
            ("descriptor table", self.descriptors, 16, 16 * size),
            ("available ring", self.driver, 2, 6 + 2 * size),
            ("used ring", self.device, 4, 6 + 8 * size),
        ];
        for (name, address, alignment, length) in parts {
            if address % alignment != 0 {
                return Err(format!("{name} at {address:#x} is not aligned to {alignment} bytes"));
            }
            if !memory.check_range(GuestAddress(address), length) {
                return Err(format!("{name} at {address:#x}+{length:#x} is not in guest RAM"));
            }
        }
        let state = QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
        };
        Queue::try_from(state).map_err(|error| error.to_string())
    }
}

/// What the transport shares with the PCI function around it.
pub(super) struct Wiring {
    pub(super) signals: Arc<Signals>,
    pub(super) msix: Arc<MsixTable>,
    pub(super) metrics: Arc<TransportMetrics>,
}

pub(super) struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    wiring: Wiring,
    offered: u64,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    phase: Phase,
    paused: bool,
}

impl Transport {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        wiring: Wiring,
        kicks: &[Arc<EventFd>],
    ) -> Self {
        let queues = device.queue_sizes().iter().zip(kicks).map(|(max_size, kick)| QueueRegisters {
            max_size: *max_size,
            size: *max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_avail: 0,
            next_used: 0,
            positions: Arc::default(),
            interrupt: QueueInterrupt::among(Arc::clone(wiring.signals.vectors())),
            kick: Arc::clone(kick),
        });
        let transport = Self {
            queues: queues.collect(),
            offered: (device.features() & !feature::NEVER) | feature::ALWAYS,
            device,
            memory,
            wiring,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            phase: Phase::Stopped,
            paused: false,
        };
        transport.show();
        transport
    }

    /// Leaves a copy of the state for those who look.
    fn show(&self) {
        let queue = |queue: &QueueRegisters| QueueView {
            size: queue.size,
            enabled: queue.enabled,
            positions: Arc::clone(&queue.positions),
        };
        self.wiring.metrics.shown.show(TransportState {
            phase: self.phase.name(),
            status: self.status,
            features: self.driver_features,
            queues: self.queues.iter().map(queue).collect(),
        });
    }

    /// Reads the common configuration, at any width.
    pub(super) fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        let end = offset.saturating_add(data.len() as u64);
        if (offset..end).contains(&common::DEVICE_STATUS) && self.phase == Phase::Resetting {
            // The guest polls for the end of its reset: the one place where the reset goes on.
            let _ = self.try_reset();
        }
        let image = self.image();
        data.fill(0);
        let from = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    /// Writes one register of the common configuration; accesses that are not a whole register are dropped (§4.1.3.1), but
    /// for 64-bit ones, which may be written in halves.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) {
        if self.phase == Phase::Resetting {
            return;
        }
        match *data {
            [value] if offset == common::DEVICE_STATUS => self.write_status(value),
            [a, b] => self.write_word(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                let is_address = matches!(offset, common::QUEUE_DESC | common::QUEUE_DRIVER | common::QUEUE_DEVICE);
                if is_address && let Some(address) = self.queue_address(offset) {
                    *address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                }
            }
            _ => {}
        }
    }

    pub(super) fn read_device(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    pub(super) fn write_device(&mut self, offset: u64, data: &[u8]) {
        if self.phase != Phase::Resetting {
            self.device.write_config(offset, data);
        }
    }

    /// Stops the device and keeps its queue positions.
    pub(super) fn pause(&mut self) -> Result<(), StillBusy> {
        self.paused = true;
        match self.phase {
            Phase::Stopped | Phase::Parked => Ok(()),
            Phase::Resetting => self.try_reset(),
            Phase::Running | Phase::Stopping => self.park(),
        }
    }

    /// Lets the device go on where it was.
    pub(super) fn resume(&mut self) -> Result<(), StartError> {
        if self.phase == Phase::Stopping && self.park().is_err() {
            return Err(StartError::Running);
        }
        self.paused = false;
        if self.phase != Phase::Parked {
            return Ok(());
        }
        self.start()?;
        for queue in self.queues.iter().filter(|queue| queue.enabled) {
            // The worker that heard a kick during the pause is gone, and with it the kick. A full counter is a kick, too.
            let _ = queue.kick.write(1);
        }
        Ok(())
    }

    /// Resets the device, or begins to.
    pub(super) fn try_reset(&mut self) -> Result<(), StillBusy> {
        let stopped = self.device.stop();
        match stopped {
            Ok(_) => self.finish_reset(),
            Err(_) => self.phase = Phase::Resetting,
        }
        self.show();
        stopped.map(drop)
    }

    fn finish_reset(&mut self) {
        let Self {
            device,
            memory: _,
            wiring,
            offered: _,
            status,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            queues,
            phase,
            paused: _,
        } = self;
        device.reset();
        queues.iter_mut().for_each(QueueRegisters::reset);
        wiring.signals.reset();
        // What the operating system set up of MSI-X stays; what the former driver's queues raised does not.
        wiring.msix.forget_pending();
        wiring.metrics.resets.increment();
        *status = 0;
        (*device_feature_select, *driver_feature_select, *driver_features) = (0, 0, 0);
        *queue_select = 0;
        *phase = Phase::Stopped;
    }

    fn park(&mut self) -> Result<(), StillBusy> {
        let parked = match self.device.stop() {
            Ok(stopped) => {
                for StoppedQueue { index, state } in stopped {
                    if let Some(queue) = self.queues.get_mut(usize::from(index)) {
                        (queue.next_avail, queue.next_used) = (state.next_avail, state.next_used);
                        // Chains that a worker gave back untouched count no more.
                        queue.positions.show(state.next_avail, state.next_used);
                    }
                }
                self.phase = Phase::Parked;
                Ok(())
            }
            Err(busy) => {
                self.phase = Phase::Stopping;
                Err(busy)
            }
        };
        self.show();
        parked
    }

    /// Starts the device on the queues that the driver enabled. Where that fails the driver sees DEVICE_NEEDS_RESET.
    fn start(&mut self) -> Result<(), StartError> {
        let started = self.activation().and_then(|activation| self.device.start(activation));
        match &started {
            Ok(()) => self.phase = Phase::Running,
            Err(error) => {
                self.phase = Phase::Stopped;
                self.wiring.signals.needs_reset(&error.to_string());
            }
        }
        self.show();
        started
    }

    fn activation(&self) -> Result<Activation, StartError> {
        let memory = self.memory.memory();
        let event_idx = self.driver_features & feature::EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, registers) in (0u16..).zip(&self.queues).filter(|(_, queue)| queue.enabled) {
            let queue = registers.queue(&*memory, event_idx).map_err(|reason| StartError::Queue { index, reason })?;
            queues.push(ActiveQueue {
                index,
                queue,
                positions: Arc::clone(&registers.positions),
                kick: registers.kick.try_clone()?,
                interrupt: registers.interrupt.clone(),
            });
        }
        Ok(Activation {
            features: self.driver_features,
            memory: self.memory.clone(),
            queues,
            signals: Arc::clone(&self.wiring.signals) as Arc<dyn TransportSignals>,
        })
    }

    /// §2.1.1 and §3.1.1: zero resets, other bits are only ever added, each after the one that it builds on.
    fn write_status(&mut self, value: u8) {
        if value == 0 {
            let _ = self.try_reset();
            return;
        }
        let asked = |bit: u8| value & bit != 0;
        self.status |= value & (status::ACKNOWLEDGE | status::FAILED);
        if asked(status::DRIVER) && self.has(status::ACKNOWLEDGE) {
            self.status |= status::DRIVER;
        }
        if asked(status::FEATURES_OK) && self.has(status::DRIVER) && self.features_acceptable() {
            self.status |= status::FEATURES_OK;
        }
        let usable = self.has(status::FEATURES_OK) && !self.has(status::FAILED) && !self.wiring.signals.is_broken();
        if asked(status::DRIVER_OK) && !self.has(status::DRIVER_OK) && usable {
            self.status |= status::DRIVER_OK;
            self.wiring.signals.driver_ready();
            if self.paused {
                self.phase = Phase::Parked;
                self.show();
            } else {
                // Where it fails the driver reads so from the status.
                let _ = self.start();
            }
        }
    }

    /// §2.2.1, §6.1: only what was offered, and VERSION_1 is no choice.
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered == 0 && self.driver_features & feature::VERSION_1 != 0
    }

    fn has(&self, bit: u8) -> bool {
        self.status & bit != 0
    }

    fn write_word(&mut self, offset: u64, value: u16) {
        match offset {
            common::CONFIG_VECTOR => self.wiring.signals.set_config_vector(value),
            common::QUEUE_SELECT => self.queue_select = value,
            common::QUEUE_SIZE => {
                if let Some(queue) = self.open_queue()
                    && value.is_power_of_two()
                    && value <= queue.max_size
                {
                    queue.size = value;
                }
            }
            common::QUEUE_VECTOR => {
                let vector = self.wiring.signals.checked_vector(value);
                if let Some(queue) = self.selected() {
                    queue.interrupt.choose(vector);
                }
            }
            common::QUEUE_ENABLE if value == 1 => {
                if let Some(queue) = self.open_queue() {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE if !self.has(status::FEATURES_OK) => {
                if let Some(shift) = feature_shift(self.driver_feature_select) {
                    let others = self.driver_features & !(0xffff_ffff << shift);
                    self.driver_features = others | u64::from(value) << shift;
                }
            }
            common::QUEUE_DESC..common::QUEUE_ADDRESSES_END => {
                let (register, shift) = (offset & !7, (offset & 7) * 8);
                if matches!(shift, 0 | 32)
                    && let Some(address) = self.queue_address(register)
                {
                    *address = (*address & !(0xffff_ffff << shift)) | u64::from(value) << shift;
                }
            }
            _ => {}
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue while the driver may still configure it: after the features are agreed, before it is enabled, and
    /// before the device runs. What was checked at the start can never change under the device.
    fn open_queue(&mut self) -> Option<&mut QueueRegisters> {
        if !self.has(status::FEATURES_OK) || self.has(status::DRIVER_OK) {
            return None;
        }
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.enabled)
    }

    fn queue_address(&mut self, register: u64) -> Option<&mut u64> {
        let queue = self.open_queue()?;
        match register {
            common::QUEUE_DESC => Some(&mut queue.descriptors),
            common::QUEUE_DRIVER => Some(&mut queue.driver),
            common::QUEUE_DEVICE => Some(&mut queue.device),
            _ => None,
        }
    }

    /// The whole structure as the driver reads it.
    fn image(&self) -> Vec<u8> {
        let window = |features: u64, select: u32| {
            let [a, b, c, d, ..] = feature_shift(select).map_or(0, |shift| features >> shift).to_le_bytes();
            [a, b, c, d]
        };
        let broken = if self.wiring.signals.is_broken() { status::NEEDS_RESET } else { 0 };
        let mut image = Vec::with_capacity(common::SIZE as usize);
        image.extend(self.device_feature_select.to_le_bytes());
        image.extend(window(self.offered, self.device_feature_select));
        image.extend(self.driver_feature_select.to_le_bytes());
        image.extend(window(self.driver_features, self.driver_feature_select));
        image.extend(self.wiring.signals.config_vector().to_le_bytes());
        image.extend(u16::try_from(self.queues.len()).unwrap_or(u16::MAX).to_le_bytes());
        image.extend([self.status | broken, self.wiring.signals.generation()]);
        image.extend(self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected() {
            image.extend(queue.size.to_le_bytes());
            image.extend(queue.interrupt.vector().to_le_bytes());
            image.extend(u16::from(queue.enabled).to_le_bytes());
            image.extend(self.queue_select.to_le_bytes());
            image.extend([queue.descriptors, queue.driver, queue.device].map(u64::to_le_bytes).as_flattened());
        } else {
            // A queue that does not exist has size zero (§4.1.5.1.3.1).
            image.extend([0; 2]);
            image.extend(NO_VECTOR.to_le_bytes());
        }
        image.resize(common::SIZE as usize, 0);
        image
    }
}

/// Which bits of a 64-bit feature word the selected window shows.
fn feature_shift(select: u32) -> Option<u32> {
    (select < 2).then(|| select * 32)
}
