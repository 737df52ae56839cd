//! What the device, its handles and its workers share.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::backend::{BlockSource, Geometry};
use super::error::RescanError;
use super::metrics::BlockMetrics;
use super::request::{ID_BYTES, Rules};
use super::reservation::Guard;
use crate::virtio::TransportSignals;
use crate::{DeviceEvent, DeviceNotifier};

/// Between log lines about failing requests of one disk. Counters and events miss none.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

pub(super) struct Disk {
    pub id: String,
    /// What measures the disk, until the device is dropped.
    pub source: Mutex<Option<Arc<dyn BlockSource>>>,
    pub geometry: Geometry,
    /// Bytes, as the guest sees it.
    pub capacity: AtomicU64,
    /// Whether writes may stay in a volatile cache until a flush, as the driver chose.
    pub writeback: AtomicBool,
    pub identity: [u8; ID_BYTES],
    pub notifier: Arc<dyn DeviceNotifier>,
    pub metrics: Arc<BlockMetrics>,
    /// Queues that were told to stop and have not done so.
    pub stopping: AtomicU32,
    /// The way to the driver, while there is one.
    pub signals: Mutex<Option<Arc<dyn TransportSignals>>>,
    pub log: LogLimit,
    /// The world-wide identifier of the LUN, where the host knows one.
    pub wwid: Option<String>,
    /// What looks after the reservation of the LUN, if it has one.
    pub guard: Option<Guard>,
}

impl Disk {
    pub fn rules(&self, stable: bool) -> Rules<'_> {
        let capacity = self.capacity.load(Ordering::Relaxed);
        Rules { geometry: &self.geometry, capacity, stable, identity: &self.identity }
    }

    /// A queue that was told to stop has drained.
    pub fn queue_stopped(&self) {
        if self.stopping.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.notifier.notify(&self.id, DeviceEvent::Drained);
        }
    }

    /// A request failed on the host, and the guest is told.
    pub fn io_error(&self, errno: i32, operation: &'static str, offset: u64, length: u64) {
        if let Some(unsaid) = self.log.allow() {
            let reason = std::io::Error::from_raw_os_error(errno);
            warn!(disk = self.id, operation, offset, length, %reason, unsaid, "I/O error, reported to the guest");
        }
        let operation = format!("{operation} of {length} bytes at {offset}");
        self.notifier.notify(&self.id, DeviceEvent::IoError { operation, errno });
    }

    /// The driver broke the ring of queue `index`.
    pub fn broken(&self, index: u16, reason: &str) {
        if let Some(unsaid) = self.log.allow() {
            warn!(disk = self.id, queue = index, reason, unsaid, "the guest's driver broke the ring: it has to reset");
        }
        let reason = format!("queue {index}: {reason}");
        self.notifier.notify(&self.id, DeviceEvent::NeedsReset { reason });
    }

    /// The backend of a queue failed for good.
    pub fn lost(&self, error: &std::io::Error) {
        error!(disk = self.id, %error, "the I/O engine failed: restart the VM");
        self.notifier.notify(&self.id, DeviceEvent::BackendLost { reason: format!("the I/O engine failed: {error}") });
    }

    /// Looks at the size anew and tells the driver if it grew; gives the size.
    pub fn rescan(&self) -> Result<u64, RescanError> {
        let source = self.source.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let source = source.ok_or_else(|| RescanError::Closed { id: self.id.clone() })?;
        let to = source.capacity().map_err(|error| RescanError::Unknown { id: self.id.clone(), error })?;
        let to = to - to % u64::from(self.geometry.logical_block_size);
        let from = self.capacity.fetch_max(to, Ordering::Relaxed);
        if to < from {
            warn!(disk = self.id, from, to, "the disk shrank, which the guest cannot follow: restore its size");
            return Err(RescanError::Shrunk { id: self.id.clone(), from, to });
        }
        if to > from {
            info!(disk = self.id, from, to, "the disk grew");
            self.metrics.capacity.set(to);
            // Not under the lock: the transport may call back.
            let signals = self.signals.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(signals) = signals {
                signals.config_changed();
            }
            self.notifier.notify(&self.id, DeviceEvent::Resized { bytes: to });
        }
        Ok(to)
    }

    pub fn set_signals(&self, signals: Option<Arc<dyn TransportSignals>>) {
        let former = std::mem::replace(&mut *self.signals.lock().unwrap_or_else(PoisonError::into_inner), signals);
        drop(former);
    }
}

/// Lets one log line through per interval, and counts the others.
#[derive(Debug)]
pub(super) struct LogLimit {
    epoch: Instant,
    /// Milliseconds since `epoch` from which the next line may go.
    next: AtomicU64,
    unsaid: AtomicU64,
}

impl LogLimit {
    pub fn new() -> Self {
        Self { epoch: Instant::now(), next: AtomicU64::new(0), unsaid: AtomicU64::new(0) }
    }

    /// The number of lines left out since the last one, if a line may go now.
    pub fn allow(&self) -> Option<u64> {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let now = millis(self.epoch.elapsed());
        let next = self.next.load(Ordering::Relaxed);
        let after = now.saturating_add(millis(LOG_INTERVAL));
        if now >= next && self.next.compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(self.unsaid.swap(0, Ordering::Relaxed));
        }
        self.unsaid.fetch_add(1, Ordering::Relaxed);
        None
    }
}
