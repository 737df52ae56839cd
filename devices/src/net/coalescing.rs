//! How long a queue's interrupts may be held back (virtio 1.3 §5.1.6.5.9). What is used is shown to the driver all the same.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The parameters of one queue. If one of them is zero, nothing is held back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Coalescing {
    /// Frames before an interrupt.
    pub(super) max_packets: u32,
    /// Microseconds from the first frame to an interrupt.
    pub(super) max_usecs: u32,
}

impl Coalescing {
    /// Bytes of `struct virtio_net_ctrl_coal`.
    pub(super) const SIZE: usize = 8;

    /// As the driver writes it.
    pub(super) fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        let [p0, p1, p2, p3, u0, u1, u2, u3] = bytes;
        let (max_packets, max_usecs) = (u32::from_le_bytes([p0, p1, p2, p3]), u32::from_le_bytes([u0, u1, u2, u3]));
        Self { max_packets, max_usecs }
    }

    /// As the driver reads it.
    pub(super) fn to_bytes(self) -> [u8; Self::SIZE] {
        (u64::from(self.max_packets) | u64::from(self.max_usecs) << 32).to_le_bytes()
    }

    /// Whether anything is held back.
    pub(super) fn holds(self) -> bool {
        self.max_usecs > 0 && self.max_packets > 1
    }

    /// Until when an interrupt for `frames` frames may wait, the first of which came at `since`. `None`: it is due.
    pub(super) fn until(self, frames: u32, since: Instant) -> Option<Instant> {
        let held = self.max_usecs > 0 && frames < self.max_packets;
        held.then(|| since + Duration::from_micros(self.max_usecs.into()))
    }
}

/// The parameters of all queues by index. Set by the first worker, looked at by all.
pub(super) struct CoalescingTable(Vec<AtomicU64>);

impl CoalescingTable {
    /// Nothing is held back in any of `queues` queues.
    pub(super) fn new(queues: usize) -> Self {
        Self((0..queues).map(|_| AtomicU64::new(0)).collect())
    }

    /// Those of a queue.
    pub(super) fn get(&self, queue: u16) -> Coalescing {
        let bits = self.0.get(usize::from(queue)).map_or(0, |place| place.load(Ordering::Relaxed));
        Coalescing::from_bytes(bits.to_le_bytes())
    }

    /// Changes those of the queues that `which` chooses.
    pub(super) fn set(&self, which: Queues, to: Coalescing) {
        for (queue, place) in (0..).zip(&self.0) {
            if which.has(queue) {
                place.store(u64::from_le_bytes(to.to_bytes()), Ordering::Relaxed);
            }
        }
    }
}

/// Some of a card's receive and transmit queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Queues {
    All,
    Receive,
    Transmit,
    One(u16),
}

impl Queues {
    fn has(self, queue: u16) -> bool {
        match self {
            Self::All => true,
            Self::Receive => queue.is_multiple_of(2),
            Self::Transmit => !queue.is_multiple_of(2),
            Self::One(index) => index == queue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_waits_for_frames_or_time_whichever_comes_first_and_not_at_all_if_one_is_zero() {
        let since = Instant::now();
        let of = |max_packets, max_usecs| Coalescing { max_packets, max_usecs };
        assert_eq!(of(15, 10).until(14, since), Some(since + Duration::from_micros(10)));
        assert_eq!(of(15, 10).until(15, since), None);
        assert_eq!(of(0, 10).until(1, since), None);
        assert_eq!(of(15, 0).until(1, since), None);
        let last = of(u32::MAX, u32::MAX);
        assert!(last.until(1, since).is_some());
        assert_eq!(Coalescing::from_bytes(of(15, 10).to_bytes()), of(15, 10));
        assert_eq!(of(15, 10).to_bytes(), [15, 0, 0, 0, 10, 0, 0, 0]);
    }

    /// The commands of the example in §5.1.6.5.9.
    #[test]
    fn the_last_command_for_a_queue_counts_whether_it_was_for_all_or_for_one() {
        let table = CoalescingTable::new(4);
        let of = |max_packets| Coalescing { max_packets, max_usecs: 10 };
        let all = || (0..5).map(|queue| table.get(queue).max_packets).collect::<Vec<u32>>();
        table.set(Queues::Receive, of(1));
        assert_eq!(all(), [1, 0, 1, 0, 0]);
        table.set(Queues::One(0), of(2));
        table.set(Queues::One(1), of(4));
        assert_eq!(all(), [2, 4, 1, 0, 0]);
        table.set(Queues::Transmit, of(5));
        assert_eq!(all(), [2, 5, 1, 5, 0]);
        table.set(Queues::All, Coalescing::default());
        assert_eq!(all(), [0; 5]);
    }
}
