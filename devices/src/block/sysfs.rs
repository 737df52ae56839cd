//! What sysfs tells of a block device.

use std::fs;
use std::path::{Path, PathBuf};

/// Attributes of the request queue of a device; 0 where the host does not tell.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct QueueAttributes {
    /// Bytes.
    pub discard_granularity: u32,
    /// Bytes; 0: discard does not work.
    pub discard_max_bytes: u64,
    /// Bytes; 0: zeroes have to be written.
    pub write_zeroes_max_bytes: u64,
    /// Whether seeks are slow.
    pub rotational: bool,
}

impl QueueAttributes {
    /// The attributes of the device with this number.
    #[must_use]
    pub fn of(device: u64) -> Self {
        let device = directory(device);
        let queue = device.join("queue");
        // A partition has none of its own: its disk has.
        let queue = if queue.is_dir() { queue } else { device.join("../queue") };
        let number = |name| read(&queue.join(name)).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        Self {
            discard_granularity: u32::try_from(number("discard_granularity")).unwrap_or(0),
            discard_max_bytes: number("discard_max_bytes"),
            write_zeroes_max_bytes: number("write_zeroes_max_bytes"),
            rotational: number("rotational") != 0,
        }
    }
}

/// The world-wide identifier of the device with this number: the same for each path to it, on each host.
#[must_use]
pub fn wwid(device: u64) -> Option<String> {
    let directory = directory(device);
    ["device/wwid", "wwid", "dm/uuid"].iter().find_map(|name| read(&directory.join(name))).and_then(|raw| normal(&raw))
}

/// The identifier without the prefix that says where it was read: "naa.6001", and "mpath-36001" of the multipath device
/// above it, are both "6001".
fn normal(raw: &str) -> Option<String> {
    let raw = raw.trim();
    let plain = match raw.strip_prefix("mpath-") {
        // The first digit is the type of the designator.
        Some(rest) => rest.get(1..).unwrap_or_default(),
        None => ["naa.", "eui.", "t10.", "uuid."].iter().find_map(|prefix| raw.strip_prefix(prefix)).unwrap_or(raw),
    };
    let plain: String = plain.split_whitespace().collect::<Vec<_>>().join("_").to_lowercase();
    (!plain.is_empty()).then_some(plain)
}

fn directory(device: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device)))
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lun_has_the_same_identifier_through_its_paths_and_through_multipath() {
        let expected = Some("600140512ab34cd".to_owned());
        assert_eq!(normal("naa.600140512AB34CD\n"), expected);
        assert_eq!(normal("mpath-3600140512ab34cd"), expected);
        assert_eq!(normal("t10.ATA     DISK  7\n"), Some("ata_disk_7".to_owned()));
        assert_eq!(normal("\n"), None);
        assert_eq!(normal("mpath-"), None);
    }

    #[test]
    fn an_unknown_device_has_neither_attributes_nor_an_identifier() {
        let device = libc::makedev(0, 0);
        assert_eq!(QueueAttributes::of(device), QueueAttributes::default());
        assert_eq!(wwid(device), None);
    }
}
