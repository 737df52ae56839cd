//! virtio 1.2: one transport core, and devices that know no registers.
//!
//! The transport owns feature negotiation, queue registers, device status and interrupts; a device gets its queues when
//! the driver is ready ([`VirtioDevice::start`]) and gives them back, drained, when it has to stop ([`VirtioDevice::stop`]).
//! Pause, reset, unplug, snapshot and migration are all made of these two: there is no second path.

mod attendant;
pub mod balloon;
#[cfg(any(test, feature = "test-double"))]
pub mod double;
pub mod pci;
mod positions;
pub mod ring;
pub mod rng;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

pub use self::attendant::WorkerError;
pub use self::positions::{Position, Positions};
use crate::GuestMemory;
use crate::interrupt::QueueInterrupt;
use crate::metrics::MetricSource;

/// virtio device types (virtio 1.2 §5). The PCI device ID is 0x1040 plus this (§4.1.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
#[non_exhaustive]
pub enum DeviceType {
    /// Network card, §5.1.
    Net = 1,
    /// Block device, §5.2.
    Block = 2,
    /// Entropy source, §5.4.
    Rng = 4,
    /// Memory balloon, §5.5.
    Balloon = 5,
}

/// One queue that the driver enabled, handed to the device with all that its worker needs.
pub struct ActiveQueue {
    /// Position in the device's list of queues.
    pub index: u16,
    /// The ring, positioned where it stopped last time.
    pub queue: Queue,
    /// Where the worker says how far it is.
    pub positions: Arc<Positions>,
    /// Signalled when the driver kicks this queue. Non-blocking.
    pub kick: EventFd,
    /// Interrupts the driver for this queue.
    pub interrupt: QueueInterrupt,
}

/// How a running device reaches its driver outside its queues. Implemented by the transport; callable from any thread.
pub trait TransportSignals: Send + Sync {
    /// The configuration space changed: bumps its generation and raises the configuration interrupt.
    fn config_changed(&self);

    /// The driver broke the device: sets DEVICE_NEEDS_RESET and raises the configuration interrupt (§2.1.2).
    fn needs_reset(&self, reason: &str);
}

/// What a device is started with.
pub struct Activation {
    /// Negotiated features.
    pub features: u64,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// The queues that the driver enabled, in order of their index. May be fewer than the device has.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the driver.
    pub signals: Arc<dyn TransportSignals>,
}

impl Activation {
    /// Whether the driver accepted the feature with this bit number (0..=63).
    #[must_use]
    pub fn has(&self, feature: u32) -> bool {
        1u64.checked_shl(feature).is_some_and(|bit| self.features & bit != 0)
    }
}

/// A queue as it was when the device stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoppedQueue {
    /// Position in the device's list of queues.
    pub index: u16,
    /// Registers and ring positions.
    pub state: QueueState,
}

/// Why a device could not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// It runs already, or has not drained since its last stop.
    #[error("device is still running: stop it first")]
    Running,
    /// The driver enabled queues that cannot work together.
    #[error("queue {index} is unusable: {reason}")]
    Queue {
        /// Position in the device's list of queues.
        index: u16,
        /// What is wrong with it.
        reason: String,
    },
    /// Its worker thread is gone.
    #[error("worker thread of the device has ended: see the log for why, then restart the VM")]
    WorkerGone,
    /// The host refused something.
    #[error("host refused to start the device: {0}")]
    Host(#[from] std::io::Error),
}

/// An honest "not yet": what a device that has been told to stop still waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Error)]
#[error("still busy: {requests} requests, oldest {} ms", oldest.as_millis())]
pub struct StillBusy {
    /// Requests in flight.
    pub requests: u32,
    /// Age of the oldest of them.
    pub oldest: Duration,
}

/// A virtio device without its transport.
///
/// All calls come from one owner (the transport) under its lock and must return at once: they never wait for a worker, a
/// disk or a guest. Workers are threads that were made with the device and are parked while it is stopped.
pub trait VirtioDevice: Send {
    /// What kind of device this is.
    fn device_type(&self) -> DeviceType;

    /// Features that the device offers, without those of the transport (VERSION_1, RING_INDIRECT_DESC, RING_EVENT_IDX),
    /// which the transport adds.
    fn features(&self) -> u64;

    /// The maximum size of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the device-specific configuration at `offset`; bytes past its end read zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver wrote `data` to the device-specific configuration at `offset`. Writes to read-only fields are dropped.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Starts work on the queues.
    ///
    /// # Errors
    /// [`StartError`]; the device is stopped then and the driver sees DEVICE_NEEDS_RESET.
    fn start(&mut self, activation: Activation) -> Result<(), StartError>;

    /// Stops taking requests and, once nothing is in flight, gives the queues back. Never waits: call it again after a
    /// [`StillBusy`], best when the device has sent [`crate::DeviceEvent::Drained`]. A stopped device answers `Ok` with no
    /// queues.
    ///
    /// # Errors
    /// [`StillBusy`] while requests are in flight: guest memory must not be reused yet.
    fn stop(&mut self) -> Result<Vec<StoppedQueue>, StillBusy>;

    /// Back to power-on, after a successful [`VirtioDevice::stop`]: what the driver configured is forgotten.
    fn reset(&mut self);

    /// The counters of this device.
    fn metrics(&self) -> Arc<dyn MetricSource>;
}
