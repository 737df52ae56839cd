//! Where a queue stands, for those who look on while it works.

use std::sync::atomic::{AtomicU64, Ordering};

/// Where a device stands in a ring, written by its worker with each batch. Nobody waits: who looks sees both indices of one
/// moment, which may be a batch ago.
///
/// Alone in its cache line, so that no worker waits for that of the queue next to it.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Positions(AtomicU64);

/// No two indices make this.
const UNKNOWN: u64 = u64::MAX;

/// Where a device stands in a ring, both indices as they are counted there, modulo 2^16 (virtio 1.2 §2.7.6, §2.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The available ring is read up to here.
    pub next_avail: u16,
    /// The driver can see used elements up to here.
    pub next_used: u16,
}

impl Position {
    /// Chains that the device has taken and not given back.
    #[must_use]
    pub fn in_flight(self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }
}

impl Positions {
    pub(super) fn show(&self, next_avail: u16, next_used: u16) {
        self.0.store(u64::from(next_avail) << 16 | u64::from(next_used), Ordering::Relaxed);
    }

    /// Somebody has the ring who does not say where it stands.
    pub(super) fn hide(&self) {
        self.0.store(UNKNOWN, Ordering::Relaxed);
    }

    /// Where the ring stands; `None` while the kernel has it (vhost), which tells only once it is stopped
    /// (VHOST_GET_VRING_BASE).
    #[must_use]
    pub fn get(&self) -> Option<Position> {
        match self.0.load(Ordering::Relaxed).to_be_bytes() {
            [0, 0, 0, 0, a, b, c, d] => {
                Some(Position { next_avail: u16::from_be_bytes([a, b]), next_used: u16::from_be_bytes([c, d]) })
            }
            _ => None,
        }
    }
}
