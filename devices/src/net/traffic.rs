//! What passed through a tap by the kernel's own count, for cards whose frames we do not see.

use std::sync::{Mutex, PoisonError};

use super::tap::Tap;
use crate::metrics::{Sample, Value};

/// Names of the kernel's counters of an interface, and what they are for the guest: what a tap receives, the guest sent.
const COUNTERS: [(&str, &str, &str); 4] = [
    ("tx_packets", "net_rx_packets", "Frames that the guest received."),
    ("tx_bytes", "net_rx_bytes", "Bytes of the frames that the guest received."),
    ("rx_packets", "net_tx_packets", "Frames that the guest sent."),
    ("rx_bytes", "net_tx_bytes", "Bytes of the frames that the guest sent."),
];
/// Frames that found the tap full, or that the receive filter refused.
const DROPPED: &str = "tx_dropped";

fn names() -> [&'static str; 5] {
    let [received, received_bytes, sent, sent_bytes] = COUNTERS.map(|(name, ..)| name);
    [received, received_bytes, sent, sent_bytes, DROPPED]
}

/// One of the kernel's counters, from the making of the card on.
#[derive(Debug, Default, Clone, Copy)]
struct Since {
    last: u64,
    sum: u64,
}

impl Since {
    /// The sum, if the kernel's counter stands at `now`. One that went back is of an interface that was made again.
    fn update(&mut self, now: u64) -> u64 {
        self.sum = self.sum.saturating_add(now.checked_sub(self.last).unwrap_or(now));
        self.last = now;
        self.sum
    }
}

/// The traffic of a tap since the card was made.
#[derive(Debug)]
pub(super) struct Traffic(Mutex<[Since; 5]>);

impl Traffic {
    /// Counts from now on.
    pub(super) fn new(tap: &Tap) -> Self {
        let start = names().map(|name| Since { last: tap.statistic(name).unwrap_or(0), sum: 0 });
        Self(Mutex::new(start))
    }

    /// Hands every sample to `visit`, labelled with the NIC, for all its queues together.
    pub(super) fn collect(&self, nic: &str, tap: &Tap, visit: &mut dyn FnMut(Sample)) {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = names().into_iter().zip(counters.iter_mut());
        let mut sums = sums.map(|(name, since)| tap.statistic(name).map_or(since.sum, |now| since.update(now)));
        let labels = || vec![("nic", nic.to_owned()), ("queue", "all".to_owned())];
        for ((_, name, help), sum) in COUNTERS.into_iter().zip(&mut sums) {
            visit(Sample { name, help, labels: labels(), value: Value::Counter(sum) });
        }
        if let Some(sum) = sums.next() {
            let mut labels = labels();
            labels.push(("reason", "tap".to_owned()));
            let help = "Frames that were dropped, by reason.";
            visit(Sample { name: "net_rx_drops", help, labels, value: Value::Counter(sum) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_made_again_begins_at_zero_and_the_sum_goes_on() {
        let mut since = Since { last: 100, sum: 0 };
        assert_eq!([100, 150, 150, 20, 25].map(|now| since.update(now)), [0, 50, 50, 70, 75]);
    }
}
