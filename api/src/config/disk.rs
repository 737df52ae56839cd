//! Disks (virtio-blk).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::{check_id, check_path, check_queue_size, check_queues, check_slot};
use super::cpu_list::CpuList;
use super::limits::{Limits, LimitsPatch};
use super::patch::{Patch, apply, set};
use super::{ReservationConfig, default_queue_size, one_queue};
use crate::problem::{Pointer, Problem};
use crate::span::Span;

/// What `stall_after` may be: the disks are looked at once a second.
const STALL: std::ops::RangeInclusive<Span> = Span::seconds(1)..=Span::seconds(24 * 3600);

/// A virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The name of the device, unique in the VM: 1 to 32 letters, digits, `_` and `-`.
    #[schema(pattern = "^[A-Za-z0-9_-]{1,32}$")]
    pub id: String,
    /// The block device or raw image that holds the data.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Let the guest read only.
    #[serde(default)]
    #[schema(default = false)]
    pub read_only: bool,
    /// How many request queues; each has its own worker thread.
    #[serde(default = "one_queue")]
    #[schema(minimum = 1, maximum = 32, default = 1)]
    pub queues: u16,
    /// Entries of each queue: a power of two, 16 to 1024.
    #[serde(default = "default_queue_size")]
    #[schema(minimum = 16, maximum = 1024, default = 256)]
    pub queue_size: u16,
    /// Bypass the host's page cache (O_DIRECT). Default: yes for block devices, no for files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// The serial number that the guest sees: at most 20 bytes of printable ASCII. Default: from the world-wide
    /// identifier of the LUN, the same on each host; else the id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 20)]
    pub serial: Option<String>,
    /// The PCI slot on bus 0. Default: the first free one, in configuration order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 30)]
    pub slot: Option<u8>,
    /// The place in the order in which firmware tries disks and NICs, the lowest first. Default: it is not in that order; if
    /// none is, the firmware decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_index: Option<u16>,
    /// When a write counts as done.
    #[serde(default)]
    pub cache: CacheMode,
    /// The world-wide identifier of the LUN, as sysfs, `scsi_id`, multipath or the array write it (`naa.6001…`, `36001…`,
    /// `0x6001…`): any other LUN is refused before a byte moves. Default: whatever is found at `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 255)]
    pub wwid: Option<String>,
    /// Keep other hosts from writing the LUN. Not for read-only disks. Default: they are not kept from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<ReservationConfig>,
    /// What happens when the host reports an I/O error.
    #[serde(default)]
    pub on_error: OnError,
    /// How long a request may be outstanding before a `disk-stalled` event says so: 1 s to 24 h.
    #[serde(default = "half_a_minute")]
    #[schema(default = "30s")]
    pub stall_after: Span,
    /// What the disk may do per second.
    #[serde(default)]
    pub limits: Limits,
    /// The group of `disk_groups` whose limits it shares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The host CPUs of each queue's worker thread: none, one list for all, or one for each queue.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 32)]
    pub affinity: Vec<CpuList>,
}

/// What happens when the host reports an I/O error. A reservation conflict always goes to the guest.
///
/// There is no way to ignore errors: nothing is completed that did not happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The guest is told.
    #[default]
    Report,
    /// The VM is paused with the request kept; `resume` tries it again.
    Stop,
    /// As `stop` where the host has run out of space, as `report` otherwise.
    Enospc,
}

fn half_a_minute() -> Span {
    Span::seconds(30)
}

/// When a write to a disk counts as done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// When the host has it; a flush makes it durable. The guest is told of the cache.
    #[default]
    Writeback,
    /// When it is durable. The guest needs no flush.
    Writethrough,
}

impl DiskConfig {
    /// A disk with the defaults for everything else.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            read_only: false,
            queues: one_queue(),
            queue_size: default_queue_size(),
            direct: None,
            serial: None,
            slot: None,
            boot_index: None,
            cache: CacheMode::default(),
            wwid: None,
            reservation: None,
            on_error: OnError::default(),
            stall_after: half_a_minute(),
            limits: Limits::default(),
            group: None,
            affinity: Vec::new(),
        }
    }

    /// What the disk says about which LUN it is and who may write it.
    fn check_claim(&self, at: &Pointer) -> Result<(), Problem> {
        let printable =
            |wwid: &String| (1..=255).contains(&wwid.len()) && wwid.bytes().all(|b| (0x20..0x7f).contains(&b));
        if self.wwid.as_ref().is_some_and(|wwid| !printable(wwid)) {
            let detail = "this world-wide identifier is not possible";
            let remedy = "use 1 to 255 bytes of printable ASCII, as in /sys/block/*/device/wwid";
            return Err(Problem::invalid(&at.key("wwid"), detail, remedy));
        }
        if self.read_only && self.reservation.is_some() {
            let detail = "a read-only disk needs no reservation";
            return Err(Problem::invalid(&at.key("reservation"), detail, "leave it out, or let the guest write"));
        }
        self.reservation.as_ref().map_or(Ok(()), |reservation| reservation.check(&at.key("reservation")))
    }

    /// Checks what can be told from the disk alone; `at` is where it stands in the document.
    ///
    /// # Errors
    /// The first field that breaks its rule.
    pub fn check(&self, at: &Pointer) -> Result<(), Problem> {
        check_id(&self.id, &at.key("id"))?;
        check_path(&self.path, &at.key("path"))?;
        check_queues(self.queues, 32, &at.key("queues"))?;
        check_queue_size(self.queue_size, &at.key("queue_size"))?;
        check_slot(self.slot, &at.key("slot"))?;
        self.check_claim(at)?;
        self.limits.check(&at.key("limits"))?;
        if !STALL.contains(&self.stall_after) {
            let detail = format!("a request cannot count as stalled after {}", self.stall_after);
            return Err(Problem::invalid(&at.key("stall_after"), detail, "choose 1s to 24h"));
        }
        if self.affinity.len() > 1 && self.affinity.len() != usize::from(self.queues) {
            let detail = format!("{} lists of CPUs for {} queues", self.affinity.len(), self.queues);
            return Err(Problem::invalid(&at.key("affinity"), detail, "give one list for all queues, or one for each"));
        }
        match &self.serial {
            Some(serial) if serial.len() > 20 || !serial.bytes().all(|b| (0x20..0x7f).contains(&b)) => {
                Err(Problem::invalid(
                    &at.key("serial"),
                    "this serial number is not possible",
                    "use at most 20 bytes of printable ASCII",
                ))
            }
            _ => Ok(()),
        }
    }
}

/// Changes to a disk, as a JSON merge patch (RFC 7396): a field that is absent stays, `null` goes back to its default.
///
/// While the guest exists only `limits`, `on_error` and `stall_after` may change. Any patch, the empty one too, reads the size of
/// the disk again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskPatch {
    /// Another `path`; cannot be null.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<String>)]
    pub path: Patch<PathBuf>,
    /// Another `read_only`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<bool>)]
    pub read_only: Patch<bool>,
    /// Another `queues`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u16>)]
    pub queues: Patch<u16>,
    /// Another `queue_size`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u16>)]
    pub queue_size: Patch<u16>,
    /// Another `direct`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<bool>)]
    pub direct: Patch<bool>,
    /// Another `serial`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<String>)]
    pub serial: Patch<String>,
    /// Another `slot`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u8>)]
    pub slot: Patch<u8>,
    /// Another `boot_index`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u16>)]
    pub boot_index: Patch<u16>,
    /// Another `cache`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<CacheMode>)]
    pub cache: Patch<CacheMode>,
    /// Another `wwid`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<String>)]
    pub wwid: Patch<String>,
    /// Another `reservation`, as a whole; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<ReservationConfig>)]
    pub reservation: Patch<ReservationConfig>,
    /// Another `on_error`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<OnError>)]
    pub on_error: Patch<OnError>,
    /// Another `stall_after`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<Span>)]
    pub stall_after: Patch<Span>,
    /// Changes to `limits`; null takes all of them away.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<LimitsPatch>)]
    pub limits: Patch<LimitsPatch>,
    /// Another `group`; null leaves the group.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<String>)]
    pub group: Patch<String>,
    /// Another `affinity`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<Vec<CpuList>>)]
    pub affinity: Patch<Vec<CpuList>>,
}

impl DiskPatch {
    /// Whether it changes only what may change while the guest exists.
    pub fn is_live(&self) -> bool {
        let Self { on_error, stall_after, limits, .. } = self.clone();
        *self == Self { on_error, stall_after, limits, ..Self::default() }
    }

    /// The disk after the patch. Not yet checked against the rest of the VM: see [`super::VmConfig::with_disk`].
    ///
    /// # Errors
    /// A required field is null.
    pub fn apply(&self, disk: &DiskConfig) -> Result<DiskConfig, Problem> {
        let fresh = DiskConfig::new("", "");
        Ok(DiskConfig {
            id: disk.id.clone(),
            path: self.path.required(&disk.path, "path")?,
            read_only: set(self.read_only, disk.read_only, fresh.read_only),
            queues: set(self.queues, disk.queues, fresh.queues),
            queue_size: set(self.queue_size, disk.queue_size, fresh.queue_size),
            direct: apply(&self.direct, &disk.direct),
            serial: apply(&self.serial, &disk.serial),
            slot: apply(&self.slot, &disk.slot),
            boot_index: apply(&self.boot_index, &disk.boot_index),
            cache: set(self.cache, disk.cache, fresh.cache),
            wwid: apply(&self.wwid, &disk.wwid),
            reservation: apply(&self.reservation, &disk.reservation),
            on_error: set(self.on_error, disk.on_error, fresh.on_error),
            stall_after: set(self.stall_after, disk.stall_after, fresh.stall_after),
            limits: LimitsPatch::apply_to(&self.limits, &disk.limits),
            group: apply(&self.group, &disk.group),
            affinity: set(self.affinity.clone(), disk.affinity.clone(), fresh.affinity),
        })
    }
}
