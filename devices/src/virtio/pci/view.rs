//! What is shown of a transport to those who must neither wait for it nor hold guest memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use super::TransportMetrics;
use super::layout::BAR;
use crate::metrics::MetricSource;
use crate::pci::config::{COMMAND, ConfigSpace};
use crate::pci::msix::MsixView;
use crate::virtio::Positions;

/// A transport as it was when it last changed.
#[derive(Debug, Clone, Default)]
pub struct TransportState {
    /// `stopped`, `running`, `stopping`, `parked` or `resetting`.
    pub phase: &'static str,
    /// The device status, without DEVICE_NEEDS_RESET (virtio 1.2 §2.1).
    pub status: u8,
    /// The features that the driver chose.
    pub features: u64,
    /// The queues.
    pub queues: Vec<QueueView>,
}

/// A queue as it was when its transport last changed, and where it stands now.
#[derive(Debug, Clone)]
pub struct QueueView {
    /// Entries, as the driver chose.
    pub size: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// Where it stands.
    pub positions: Arc<Positions>,
}

/// No BAR has this address: it is no multiple of the BAR's size.
const UNDECODED: u64 = u64::MAX;

/// Where the driver, or firmware, has put the function.
#[derive(Debug)]
pub(super) struct Place {
    command: AtomicU16,
    bar: AtomicU64,
}

impl Place {
    /// As configuration space says it.
    pub(super) fn of(config: &ConfigSpace) -> Self {
        let place = Self { command: AtomicU16::new(0), bar: AtomicU64::new(UNDECODED) };
        place.follow(config);
        place
    }

    /// Notes what configuration space says now.
    pub(super) fn follow(&self, config: &ConfigSpace) {
        self.command.store(config.word(COMMAND), Ordering::Relaxed);
        self.bar.store(config.bar_address(BAR).unwrap_or(UNDECODED), Ordering::Relaxed);
    }
}

/// A look at a transport from any thread: it waits for nothing, and holds no guest memory.
#[derive(Clone)]
pub struct TransportView(pub(super) Arc<TransportMetrics>);

impl TransportView {
    /// The identifier of the device.
    #[must_use]
    pub fn id(&self) -> &str {
        self.0.signals.id()
    }

    /// Whether the driver broke the device and has to reset it.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.0.signals.is_broken()
    }

    /// The state when it last changed.
    #[must_use]
    pub fn state(&self) -> TransportState {
        self.0.shown.state()
    }

    /// The counters of the transport and of the device behind it.
    #[must_use]
    pub fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::clone(&self.0) as Arc<dyn MetricSource>
    }

    /// The command register of the function (PCI 3.0 §6.2.2).
    #[must_use]
    pub fn command(&self) -> u16 {
        self.0.place.command.load(Ordering::Relaxed)
    }

    /// First guest-physical address of its registers; `None` while it does not decode them.
    #[must_use]
    pub fn bar(&self) -> Option<u64> {
        Some(self.0.place.bar.load(Ordering::Relaxed)).filter(|address| *address != UNDECODED)
    }

    /// Its interrupts.
    #[must_use]
    pub fn interrupts(&self) -> MsixView {
        self.0.msix.view()
    }
}
