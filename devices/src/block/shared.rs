//! What the device, its handles and its workers share.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::backend::{BlockSource, Geometry, Operation};
use super::error::RescanError;
use super::metrics::BlockMetrics;
use super::request::{ID_BYTES, Rules};
use super::reservation::Guard;
use crate::limiter::{Limiter, THROTTLE_SLICE};
use crate::virtio::TransportSignals;
use crate::{DeviceEvent, DeviceNotifier};

/// Between log lines about failing requests of one disk. Counters and events miss none.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// What happens to a request that fails on the host. A reservation conflict always goes to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum ErrorPolicy {
    /// The guest is told.
    #[default]
    Report,
    /// It is kept, the queue stands still, and a [`DeviceEvent::IoError`] with `held` asks for the VM to be paused. It is
    /// tried again when the device is stopped and started.
    Stop,
    /// As `Stop` where the host is out of space, as `Report` otherwise.
    Enospc,
}

impl ErrorPolicy {
    fn holds(self, errno: i32) -> bool {
        match self {
            _ if errno == libc::EBADE => false,
            Self::Report => false,
            Self::Stop => true,
            Self::Enospc => matches!(errno, libc::ENOSPC | libc::EDQUOT),
        }
    }
}

pub(super) struct Disk {
    pub id: String,
    /// What measures the disk. It belongs to the device: a handle must not keep the disk open and locked.
    source: Weak<dyn BlockSource>,
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
    policy: AtomicU8,
    /// Its own limits, and those of its group.
    pub limiters: Vec<Arc<Limiter>>,
    /// The size that the disk was last seen to have shrunk to; 0: it has not.
    shrunk: AtomicU64,
}

/// What a [`Disk`] begins with.
pub(super) struct Beginning<'a> {
    pub id: String,
    pub source: &'a Arc<dyn BlockSource>,
    pub identity: [u8; ID_BYTES],
    pub notifier: Arc<dyn DeviceNotifier>,
    pub metrics: Arc<BlockMetrics>,
    pub writeback: bool,
    pub policy: ErrorPolicy,
    pub limiters: Vec<Arc<Limiter>>,
    pub wwid: Option<String>,
    pub guard: Option<Guard>,
}

impl Disk {
    pub fn new(beginning: Beginning<'_>) -> Self {
        let Beginning { id, source, identity, notifier, metrics, writeback, policy, limiters, wwid, guard } = beginning;
        let geometry = source.geometry();
        metrics.capacity.set(geometry.capacity);
        Self {
            id,
            source: Arc::downgrade(source),
            geometry,
            capacity: AtomicU64::new(geometry.capacity),
            writeback: AtomicBool::new(writeback),
            identity,
            notifier,
            metrics,
            stopping: AtomicU32::new(0),
            signals: Mutex::new(None),
            log: LogLimit::new(),
            policy: AtomicU8::new(policy as u8),
            limiters,
            wwid,
            guard,
            shrunk: AtomicU64::new(0),
        }
    }

    pub fn set_policy(&self, policy: ErrorPolicy) {
        self.policy.store(policy as u8, Ordering::Relaxed);
    }

    /// Whether a request that failed like this is kept.
    pub fn holds(&self, errno: i32) -> bool {
        let policy = match self.policy.load(Ordering::Relaxed) {
            policy if policy == ErrorPolicy::Stop as u8 => ErrorPolicy::Stop,
            policy if policy == ErrorPolicy::Enospc as u8 => ErrorPolicy::Enospc,
            _ => ErrorPolicy::Report,
        };
        policy.holds(errno)
    }

    /// How long the next request has to wait for a limit, at most until the limits are to be looked at again.
    pub fn throttled(&self, now: Instant) -> Option<Duration> {
        let longest = self.limiters.iter().filter_map(|limiter| limiter.wait(now)).max()?;
        Some(longest.min(THROTTLE_SLICE))
    }

    pub fn rules(&self, stable: bool) -> Rules<'_> {
        let capacity = self.capacity.load(Ordering::Relaxed);
        Rules { geometry: &self.geometry, capacity, stable, identity: &self.identity }
    }

    /// A request has started.
    pub fn charge(&self, operation: Operation, length: u64, now: Instant) {
        let bytes = match operation {
            Operation::Flush => return,
            Operation::Read | Operation::Write { .. } => length,
            Operation::Discard | Operation::WriteZeroes { .. } => 0,
        };
        self.limiters.iter().for_each(|limiter| limiter.charge(bytes, now));
    }

    /// A queue that was told to stop has drained.
    pub fn queue_stopped(&self) {
        if self.stopping.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.notifier.notify(&self.id, DeviceEvent::Drained);
        }
    }

    /// A request failed on the host; it is `held`, or the guest is told.
    pub fn io_error(&self, errno: i32, operation: &'static str, offset: u64, bytes: u64, held: bool) {
        if let Some(unsaid) = self.log.allow() {
            let reason = std::io::Error::from_raw_os_error(errno);
            let outcome = if held { "the request is kept, the VM has to be paused" } else { "reported to the guest" };
            warn!(disk = self.id, operation, offset, bytes, %reason, unsaid, "I/O error: {outcome}");
        }
        self.notifier.notify(&self.id, DeviceEvent::IoError { operation, offset, bytes, errno, held });
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

    /// What measures the disk, unless the device is gone.
    pub fn source(&self) -> Option<Arc<dyn BlockSource>> {
        self.source.upgrade()
    }

    /// Looks at the size anew and tells the driver if it grew; gives the size.
    pub fn rescan(&self) -> Result<u64, RescanError> {
        let source = self.source().ok_or_else(|| RescanError::Closed { id: self.id.clone() })?;
        let to = source.capacity().map_err(|error| RescanError::Unknown { id: self.id.clone(), error })?;
        let to = to - to % u64::from(self.geometry.logical_block_size);
        let from = self.capacity.fetch_max(to, Ordering::Relaxed);
        if to < from {
            if self.shrunk.swap(to.max(1), Ordering::Relaxed) != to.max(1) {
                warn!(disk = self.id, from, to, "the disk shrank, which the guest cannot follow: restore its size");
                self.notifier.notify(&self.id, DeviceEvent::Shrunk { from, to });
            }
            return Err(RescanError::Shrunk { id: self.id.clone(), from, to });
        }
        self.shrunk.store(0, Ordering::Relaxed);
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
