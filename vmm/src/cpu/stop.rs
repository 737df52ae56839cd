//! How all vCPUs come to a standstill without anybody waiting for them: each holds a [`Moving`] until it stands still, and the
//! last one to let go tells the control thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::vcpu::{EventSink, VcpuEvent};

/// An honest "not yet": vCPUs that were told to stop and have not. One whose access a device has not answered yet (flash that
/// waits for its disk) stops when it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{left} vCPUs have not stopped for {} ms, the first is vCPU {index}", age.as_millis())]
pub struct VcpusBusy {
    /// Index of the first of them.
    pub index: usize,
    /// How many there are.
    pub left: usize,
    /// How long ago they were told.
    pub age: Duration,
}

/// vCPUs on their way to a standstill.
pub struct Stopping {
    moving: Box<[AtomicBool]>,
    left: AtomicUsize,
    since: Instant,
    events: EventSink,
}

impl Stopping {
    /// Of `count` vCPUs; `events` is told when all stand still. Each of them must be given its [`Moving`].
    #[must_use]
    pub fn new(count: usize, events: &EventSink) -> Arc<Self> {
        Arc::new(Self {
            moving: (0..count).map(|_| AtomicBool::new(true)).collect(),
            left: AtomicUsize::new(count),
            since: Instant::now(),
            events: Arc::clone(events),
        })
    }

    /// What vCPU `index` holds until it stands still.
    #[must_use]
    pub fn moving(self: &Arc<Self>, index: usize) -> Moving {
        Moving { index, all: Arc::clone(self) }
    }

    /// Whether all stand still. What they did before is seen then.
    ///
    /// # Errors
    /// [`VcpusBusy`].
    pub fn outcome(&self) -> Result<(), VcpusBusy> {
        let mut moving = self.moving.iter().enumerate().filter(|(_, moving)| moving.load(Ordering::Acquire));
        match moving.next() {
            None => Ok(()),
            Some((index, _)) => Err(VcpusBusy { index, left: 1 + moving.count(), age: self.since.elapsed() }),
        }
    }
}

/// Held by a vCPU that was told to stop until it has. A thread that has ended, for whatever reason, holds nothing and runs no guest.
pub struct Moving {
    index: usize,
    all: Arc<Stopping>,
}

impl std::fmt::Debug for Moving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Moving").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        if let Some(moving) = self.all.moving.get(self.index) {
            moving.store(false, Ordering::Release);
        }
        if self.all.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            (self.all.events)(VcpuEvent::Stopped);
        }
    }
}
