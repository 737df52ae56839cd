//! What the control thread looks after while disks are in use: errors, requests that take too long, and growth.
//!
//! The disks are looked at once a second, by counters and an ioctl that wait for nothing: a LUN that grows is noticed
//! also where no uevent comes, as in a network namespace of its own.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use rackvisor_api::events::{ErrorAction, EventKind};
use rackvisor_api::state::VmState;
use rackvisor_devices::block::RescanError;

use super::controller::Controller;
use super::operation::{Operation, Purpose};

const LOOK: Duration = Duration::from_secs(1);
const SECTOR: u64 = 512;

/// What was last seen of the disks of a machine.
#[derive(Debug, Default)]
pub struct DiskWatch {
    next: Option<Instant>,
    /// Since when disks have been stalled, by their ids.
    stalled: HashMap<String, Instant>,
}

impl DiskWatch {
    /// For a machine that has just been made.
    pub fn from_now() -> Self {
        Self { next: Some(Instant::now() + LOOK), stalled: HashMap::new() }
    }
}

/// A request that the host failed.
pub struct IoFailure {
    pub operation: &'static str,
    pub offset: u64,
    pub bytes: u64,
    pub errno: i32,
}

impl Controller {
    /// When the disks are to be looked at, if there are any.
    pub(super) fn next_look_at_disks(&self) -> Option<Instant> {
        let disks = self.config.as_ref().is_some_and(|config| !config.disks.is_empty());
        self.disk_watch.next.filter(|_| disks && self.inventory.is_some())
    }

    /// Tells of disks that stall, that have recovered, and that grew.
    pub(super) fn look_at_disks(&mut self, now: Instant) {
        if self.next_look_at_disks().is_none_or(|next| now < next) {
            return;
        }
        self.disk_watch.next = Some(now + LOOK);
        let (Some(config), Some(inventory)) = (&self.config, &self.inventory) else { return };
        let mut events = Vec::new();
        for disk in &config.disks {
            let Some(live) = inventory.disk(&disk.id) else { continue };
            if let Err(error @ RescanError::Unknown { .. }) = live.rescan() {
                tracing::debug!(disk = disk.id, %error, "the disk cannot be measured");
            }
            let (requests, oldest) = live.in_flight();
            let device = disk.id.clone();
            let since = self.disk_watch.stalled.get(&disk.id).copied();
            match (since, requests > 0 && oldest > disk.stall_after.duration()) {
                (None, true) => {
                    self.disk_watch.stalled.insert(device.clone(), now);
                    events.push(EventKind::DiskStalled { device, requests, oldest_ms: millis(oldest) });
                }
                (Some(since), false) => {
                    self.disk_watch.stalled.remove(&disk.id);
                    let stalled_ms = millis(now.saturating_duration_since(since));
                    events.push(EventKind::DiskRecovered { device, stalled_ms });
                }
                _ => continue,
            }
            live.set_stalled(since.is_none());
        }
        for event in events {
            tracing::warn!(vm = self.name(), ?event, "a disk answers late");
            self.publish(event);
        }
    }

    /// Whether requests to the disk have been outstanding for too long.
    pub(super) fn is_stalled(&self, disk: &str) -> bool {
        self.disk_watch.stalled.contains_key(disk)
    }

    /// A disk failed a request. If it is held, the VM is paused until somebody has seen to it.
    pub(super) fn io_error(&mut self, device: String, failure: IoFailure, held: bool) {
        let IoFailure { operation, offset, bytes, errno } = failure;
        let (sector, detail) = (offset / SECTOR, io::Error::from_raw_os_error(errno).to_string());
        let action = if held { ErrorAction::Stopped } else { ErrorAction::Reported };
        let cause = format!("disk \"{device}\": {operation} of {bytes} bytes at sector {sector}: {detail}");
        let operation = operation.to_owned();
        self.publish(EventKind::DiskError { device, operation, sector, bytes, errno, detail, action });
        if !held {
            return;
        }
        match &mut self.operation {
            None if self.state == VmState::Running => self.begin(Purpose::Pause { cause: Some(cause) }, None),
            Some(Operation::Drain { purpose: Purpose::Pause { cause: told }, .. }) => drop(told.get_or_insert(cause)),
            // The VM is already being stopped. If it is to go on afterwards, the request is tried again then.
            _ => {}
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
