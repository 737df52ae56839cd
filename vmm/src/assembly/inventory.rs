//! What describes a machine from outside, also while a job has the machine itself.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rackvisor_api::config::{BALLOON_ID, DiskConfig, DiskGroup, Limits, Link, NicConfig};
use rackvisor_api::control::{DiskCounters, NicCounters};
use rackvisor_devices::block::{BlockHandle, Geometry, RescanError};
use rackvisor_devices::generation::GenerationId;
use rackvisor_devices::limiter::Limiter;
use rackvisor_devices::metrics::{MetricSource, Sample, Value};
use rackvisor_devices::net::NetHandle;
use rackvisor_devices::virtio::balloon::BalloonHandle;
use rackvisor_devices::virtio::pci::VirtioPci;

use super::clock::LiveClock;
use super::{disks, limits};
use crate::telemetry::Parts;

/// A disk that is open.
#[derive(Clone)]
pub struct LiveDisk {
    handle: BlockHandle,
}

impl LiveDisk {
    /// The disk behind `handle`.
    #[must_use]
    pub fn new(handle: BlockHandle) -> Self {
        Self { handle }
    }

    /// Its shape now.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.handle.geometry()
    }

    /// Looks at its size again.
    ///
    /// # Errors
    /// [`RescanError`] if it cannot be read or has shrunk.
    pub fn rescan(&self) -> Result<(), RescanError> {
        self.handle.rescan().map(drop)
    }

    /// The world-wide identifier of the LUN, if the host knows one.
    #[must_use]
    pub fn wwid(&self) -> Option<String> {
        self.handle.wwid()
    }

    /// The serial number that the guest reads.
    #[must_use]
    pub fn serial(&self) -> String {
        self.handle.serial()
    }

    /// Number and greatest age of the requests that are outstanding.
    #[must_use]
    pub fn in_flight(&self) -> (u32, Duration) {
        self.handle.in_flight()
    }

    /// Failed requests that are kept until the VM is resumed.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.handle.held()
    }

    /// Shows in the metrics whether requests are outstanding for too long.
    pub fn set_stalled(&self, stalled: bool) {
        self.handle.set_stalled(stalled);
    }

    /// Takes over what of the configuration may change while the disk is in use.
    pub fn configure(&self, config: &DiskConfig) {
        self.handle.set_error_policy(disks::error_policy(config.on_error));
        self.handle.set_limits(limits::of_disks(&config.limits));
    }

    /// What it did since the boot.
    #[must_use]
    pub fn counters(&self) -> DiskCounters {
        let totals = Totals::of(&*self.handle.metrics());
        let requests = |operation| totals.with("disk_requests", "op", operation);
        DiskCounters {
            reads: requests("read"),
            writes: requests("write"),
            flushes: requests("flush"),
            discards: requests("discard") + requests("write_zeroes"),
            read_bytes: totals.all("disk_read_bytes"),
            written_bytes: totals.all("disk_written_bytes"),
            errors: totals.all("disk_errors"),
        }
    }
}

/// A NIC that is open.
#[derive(Clone)]
pub struct LiveNic {
    handle: NetHandle,
}

impl LiveNic {
    /// The NIC behind `handle`.
    #[must_use]
    pub fn new(handle: NetHandle) -> Self {
        Self { handle }
    }

    /// Takes over what of the configuration may change while the NIC is in use.
    pub fn configure(&self, config: &NicConfig) {
        self.handle.set_link(config.link == Link::Up);
        self.handle.set_limits(limits::of_nic(&config.rx_limits), limits::of_nic(&config.tx_limits));
    }

    /// Tells the network where the NIC is.
    pub fn announce(&self) {
        self.handle.announce();
    }

    /// What it did since the boot.
    #[must_use]
    pub fn counters(&self) -> NicCounters {
        let totals = Totals::of(&*self.handle.metrics());
        NicCounters {
            rx_frames: totals.all("net_rx_packets"),
            rx_bytes: totals.all("net_rx_bytes"),
            rx_dropped: totals.all("net_rx_drops"),
            tx_frames: totals.all("net_tx_packets"),
            tx_bytes: totals.all("net_tx_bytes"),
            tx_dropped: totals.all("net_tx_drops"),
            errors: totals.with("net_rx_drops", "reason", "tap_error")
                + totals.with("net_tx_drops", "reason", "tap_error"),
        }
    }
}

/// The counters of one device, added up over its queues. Things are counted in one place, the metrics.
struct Totals(Vec<Sample>);

impl Totals {
    fn of(source: &dyn MetricSource) -> Self {
        let mut samples = Vec::new();
        source.collect(&mut |sample| samples.push(sample));
        Self(samples)
    }

    fn all(&self, name: &str) -> u64 {
        self.sum(|sample| sample.name == name)
    }

    fn with(&self, name: &str, label: &str, value: &str) -> u64 {
        self.sum(|sample| sample.name == name && sample.labels.iter().any(|(l, v)| *l == label && v == value))
    }

    fn sum(&self, matches: impl Fn(&Sample) -> bool) -> u64 {
        let count = |sample: &Sample| match sample.value {
            Value::Counter(count) => count,
            _ => 0,
        };
        self.0.iter().filter(|s| matches(s)).map(count).sum()
    }
}

/// Handles to everything in a machine that can be described or changed from outside.
#[derive(Clone, Default)]
pub struct Inventory {
    /// The pseudo-terminal of the console, if it has one.
    pub serial_path: Option<PathBuf>,
    /// What can be looked at from any thread.
    pub parts: Parts,
    /// What counts time for the guest.
    pub clock: Option<LiveClock>,
    /// The generation ID, if there is one.
    pub generation: Option<Arc<GenerationId>>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonHandle>,
    disks: Vec<(String, LiveDisk)>,
    groups: Vec<(String, Arc<Limiter>)>,
    nics: Vec<(String, LiveNic)>,
    transports: Vec<Arc<VirtioPci>>,
}

impl Inventory {
    /// Nothing yet but a console.
    #[must_use]
    pub fn new(serial_path: Option<PathBuf>) -> Self {
        Self { serial_path, ..Self::default() }
    }

    /// Adds the groups of disks that share limits.
    pub fn add_groups(&mut self, groups: &[DiskGroup]) {
        let limiter = |group: &DiskGroup| Arc::new(Limiter::new(limits::of_disks(&group.limits)));
        self.groups.extend(groups.iter().map(|group| (group.id.clone(), limiter(group))));
    }

    /// The limits of the group with this id.
    #[must_use]
    pub fn group(&self, id: &str) -> Option<&Arc<Limiter>> {
        self.groups.iter().find(|(name, _)| name == id).map(|(_, limiter)| limiter)
    }

    /// Gives a group other limits.
    pub fn limit_group(&self, id: &str, limits: &Limits) {
        if let Some(group) = self.group(id) {
            group.set(limits::of_disks(limits));
        }
    }

    /// Asks the guest to give the balloon this many bytes, if there is one.
    pub fn resize_balloon(&self, size: u64) {
        if let (Some(balloon), Some(transport)) = (&self.balloon, self.transport(BALLOON_ID)) {
            balloon.set_size(size);
            transport.signals().config_changed();
        }
    }

    /// Adds a disk.
    pub fn add_disk(&mut self, id: &str, disk: LiveDisk) {
        self.disks.push((id.to_owned(), disk));
    }

    /// Adds a NIC.
    pub fn add_nic(&mut self, id: &str, nic: LiveNic) {
        self.nics.push((id.to_owned(), nic));
    }

    /// Adds the transport of a device.
    pub fn add_transport(&mut self, transport: Arc<VirtioPci>) {
        self.parts.metrics.push(transport.metrics());
        self.parts.transports.push(transport.view());
        self.transports.push(transport);
    }

    /// The disk with this id.
    #[must_use]
    pub fn disk(&self, id: &str) -> Option<&LiveDisk> {
        self.disks.iter().find(|(name, _)| name == id).map(|(_, disk)| disk)
    }

    /// The NIC with this id.
    #[must_use]
    pub fn nic(&self, id: &str) -> Option<&LiveNic> {
        self.nics.iter().find(|(name, _)| name == id).map(|(_, nic)| nic)
    }

    /// The transport of the device with this id.
    #[must_use]
    pub fn transport(&self, id: &str) -> Option<&VirtioPci> {
        self.transports.iter().find(|t| t.id() == id).map(|t| &**t)
    }

    /// All transports, in order of their slots' assignment.
    #[must_use]
    pub fn transports(&self) -> &[Arc<VirtioPci>] {
        &self.transports
    }

    /// Makes everything that was written to the disks stable, then gives their reservations up. May wait for a disk.
    #[must_use]
    pub fn flush_disks(&self) -> Vec<String> {
        let failures = |(id, disk): &(String, LiveDisk)| {
            let flush = match disk.handle.in_flight() {
                (0, _) => disk.handle.flush().err().map(|e| format!("disk \"{id}\": the last flush failed: {e}")),
                // It hangs, and would hang the flush as well.
                (requests, _) => Some(format!("disk \"{id}\": {requests} requests had no answer when the guest ended")),
            };
            let release = disk.handle.release_reservation().err();
            [flush, release.map(|e| format!("disk \"{id}\": its reservation is left behind: {e}"))]
        };
        self.disks.iter().flat_map(failures).flatten().collect()
    }
}
