//! What a NIC counts, per queue pair.

use crate::metrics::{Counter, Gauge, Sample, Value};

/// How many of the plain counters, the first ones, are of frames.
const FRAMES: usize = 4;

/// Counters of one queue pair. Bytes are those of Ethernet frames, without the virtio header.
#[derive(Debug, Default)]
pub(super) struct PairCounters {
    pub(super) rx_packets: Counter,
    pub(super) rx_bytes: Counter,
    pub(super) tx_packets: Counter,
    pub(super) tx_bytes: Counter,
    pub(super) rx_kicks: Counter,
    pub(super) tx_kicks: Counter,
    pub(super) rx_interrupts: Counter,
    pub(super) tx_interrupts: Counter,
    /// Frames had to wait in the tap because the driver had given no buffers.
    pub(super) rx_starved: Counter,
    /// The tap took no more frames, and the driver's had to wait.
    pub(super) tx_tap_full: Counter,
    /// A direction had to wait for its limit.
    pub(super) rx_throttled: Counter,
    pub(super) tx_throttled: Counter,
    /// The worker found frames of the driver without having slept.
    pub(super) tx_polled: Counter,
    /// Frames, of both directions, that the worker was less eager to take, so that more come at once.
    pub(super) moderated: Counter,
    pub(super) rx_drops: RxDrops,
    pub(super) tx_drops: TxDrops,
    /// Whether vhost-net has the rings.
    pub(super) vhost_engaged: Gauge,
    /// Microseconds for which interrupts for what vhost-net sent are held back, without the driver's wish.
    pub(super) vhost_hold: Gauge,
    /// vhost-net failed, or found a ring broken.
    pub(super) vhost_errors: Counter,
}

/// Frames from the tap that did not reach the driver, and chains of the driver that could take none.
#[derive(Debug, Default)]
pub(super) struct RxDrops {
    pub(super) link_down: Counter,
    /// Larger than the driver's buffers.
    pub(super) oversize: Counter,
    /// Needs an offload that the driver has switched off.
    pub(super) offload: Counter,
    /// Not wanted by the driver.
    pub(super) filtered: Counter,
    /// Was in the tap before the driver was, or was cut in two by a stop.
    pub(super) stale: Counter,
    /// The tap gave an error instead of a frame.
    pub(super) tap_error: Counter,
    /// A chain that is too small for a header or has too many parts.
    pub(super) bad_buffer: Counter,
}

/// Frames of the driver that did not reach the tap.
#[derive(Debug, Default)]
pub(super) struct TxDrops {
    pub(super) link_down: Counter,
    /// Larger than any frame may be.
    pub(super) oversize: Counter,
    /// Too short, with device-writable parts, or with too many parts.
    pub(super) malformed: Counter,
    /// Under an address that is not the card's.
    pub(super) spoofed: Counter,
    /// The kernel refused the frame, most often for its header.
    pub(super) refused: Counter,
    /// The tap is down or gone.
    pub(super) tap_error: Counter,
}

/// What has passed through a pair.
#[derive(Debug, Clone, Copy)]
pub(super) struct Passed {
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
}

impl Passed {
    /// What has come since `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            sent: self.sent.wrapping_sub(before.sent),
            received: self.received.wrapping_sub(before.received),
            sent_bytes: self.sent_bytes.wrapping_sub(before.sent_bytes),
            received_bytes: self.received_bytes.wrapping_sub(before.received_bytes),
        }
    }
}

impl PairCounters {
    /// Frames and bytes so far.
    pub(super) fn passed(&self) -> Passed {
        Passed {
            sent: self.tx_packets.value(),
            received: self.rx_packets.value(),
            sent_bytes: self.tx_bytes.value(),
            received_bytes: self.rx_bytes.value(),
        }
    }

    /// Hands every sample to `visit`, labelled with the NIC and the number of the pair. `vhost`: without frames, which the
    /// kernel counts then, but with what tells how vhost-net does.
    pub(super) fn collect(&self, nic: &str, queue: usize, vhost: bool, visit: &mut dyn FnMut(Sample)) {
        let labels = || vec![("nic", nic.to_owned()), ("queue", queue.to_string())];
        let plain: [(&'static str, &'static str, &Counter); 14] = [
            ("net_rx_packets", "Frames that the guest received.", &self.rx_packets),
            ("net_rx_bytes", "Bytes of the frames that the guest received.", &self.rx_bytes),
            ("net_tx_packets", "Frames that the guest sent.", &self.tx_packets),
            ("net_tx_bytes", "Bytes of the frames that the guest sent.", &self.tx_bytes),
            ("net_rx_kicks", "Kicks of the receive queue.", &self.rx_kicks),
            ("net_tx_kicks", "Kicks of the transmit queue.", &self.tx_kicks),
            ("net_rx_interrupts", "Interrupts of the receive queue.", &self.rx_interrupts),
            ("net_tx_interrupts", "Interrupts of the transmit queue.", &self.tx_interrupts),
            ("net_rx_starved", "Times that frames waited for the guest to give buffers.", &self.rx_starved),
            ("net_tx_tap_full", "Times that the tap took no more frames.", &self.tx_tap_full),
            ("net_rx_throttled", "Times that frames to the guest waited for its limit.", &self.rx_throttled),
            ("net_tx_throttled", "Times that frames of the guest waited for its limit.", &self.tx_throttled),
            ("net_tx_polls", "Times that the worker found frames of the guest without having slept.", &self.tx_polled),
            (
                "net_moderated",
                "Frames that the worker was less eager to take, so that more come at once.",
                &self.moderated,
            ),
        ];
        for (name, help, counter) in plain.into_iter().skip(if vhost { FRAMES } else { 0 }) {
            visit(Sample { name, help, labels: labels(), value: Value::Counter(counter.value()) });
        }
        if vhost {
            let help = "Whether vhost-net moves the frames of the pair; if not, the VMM does.";
            let value = Value::Gauge(self.vhost_engaged.value() as f64);
            visit(Sample { name: "net_vhost_engaged", help, labels: labels(), value });
            let help = "Microseconds for which interrupts for frames that vhost-net sent are held back, as they are many and small.";
            let value = Value::Gauge(self.vhost_hold.value() as f64);
            visit(Sample { name: "net_vhost_hold_microseconds", help, labels: labels(), value });
            let help = "Times that vhost-net failed or found a ring of the guest broken.";
            let value = Value::Counter(self.vhost_errors.value());
            visit(Sample { name: "net_vhost_errors", help, labels: labels(), value });
        }
        let rx = &self.rx_drops;
        let tx = &self.tx_drops;
        let drops = [
            ("net_rx_drops", "link_down", &rx.link_down),
            ("net_rx_drops", "oversize", &rx.oversize),
            ("net_rx_drops", "offload", &rx.offload),
            ("net_rx_drops", "filtered", &rx.filtered),
            ("net_rx_drops", "stale", &rx.stale),
            ("net_rx_drops", "tap_error", &rx.tap_error),
            ("net_rx_drops", "bad_buffer", &rx.bad_buffer),
            ("net_tx_drops", "link_down", &tx.link_down),
            ("net_tx_drops", "oversize", &tx.oversize),
            ("net_tx_drops", "malformed", &tx.malformed),
            ("net_tx_drops", "spoofed", &tx.spoofed),
            ("net_tx_drops", "refused", &tx.refused),
            ("net_tx_drops", "tap_error", &tx.tap_error),
        ];
        for (name, reason, counter) in drops {
            let mut labels = labels();
            labels.push(("reason", reason.to_owned()));
            let help = "Frames that were dropped, by reason.";
            visit(Sample { name, help, labels, value: Value::Counter(counter.value()) });
        }
    }
}
