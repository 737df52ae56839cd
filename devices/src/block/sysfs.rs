//! What sysfs tells of a block device.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{identity, vpd};

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

/// The identifiers of the device with this number, the best one first; none where the host knows none. They are the same for
/// each path to it, on each host.
#[must_use]
pub fn identifiers(device: u64) -> Vec<String> {
    of_directory(&directory(device))
}

fn of_directory(directory: &Path) -> Vec<String> {
    let mut found = own_identifiers(directory);
    let multipath = read(&directory.join("dm/uuid")).is_none_or(|uuid| uuid.starts_with("mpath-"));
    if directory.join("dm").is_dir() && multipath {
        // What is true of all of its paths.
        for identifier in common(&slaves(directory)) {
            add(&mut found, identifier);
        }
    }
    found
}

fn own_identifiers(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for name in ["device/wwid", "wwid", "dm/uuid", "nguid", "uuid", "eui"] {
        if let Some(identifier) = read(&directory.join(name)).and_then(|raw| identity::normal(&raw)) {
            add(&mut found, identifier);
        }
    }
    for identifier in vpd::designators(&read_page(&directory.join("device/vpd_pg83"))) {
        add(&mut found, identifier);
    }
    // A device without it says so by zeroes.
    found.retain(|identifier| identifier.bytes().any(|byte| !matches!(byte, b'0' | b'-' | b'_')));
    found
}

fn add(found: &mut Vec<String>, identifier: String) {
    if !found.contains(&identifier) {
        found.push(identifier);
    }
}

fn slaves(directory: &Path) -> Vec<Vec<String>> {
    let Ok(entries) = fs::read_dir(directory.join("slaves")) else { return Vec::new() };
    entries.filter_map(Result::ok).map(|entry| own_identifiers(&entry.path())).collect()
}

fn common(slaves: &[Vec<String>]) -> Vec<String> {
    let Some((first, others)) = slaves.split_first() else { return Vec::new() };
    first.iter().filter(|identifier| others.iter().all(|other| other.contains(identifier))).cloned().collect()
}

/// How many paths lead to the device with this number: more than one where multipath gathers them.
#[must_use]
pub fn paths(device: u64) -> usize {
    let folder = directory(device);
    let multipath = folder.join("dm").is_dir();
    let slaves = fs::read_dir(folder.join("slaves")).map_or(0, |entries| entries.filter_map(Result::ok).count());
    if multipath { slaves.max(1) } else { 1 }
}

/// A page of vital product data, which is never longer than this.
fn read_page(path: &Path) -> Vec<u8> {
    let mut page = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(4 + 0xffff).read_to_end(&mut page));
    if read.is_ok() { page } else { Vec::new() }
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

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("rackvisor-sysfs-{}-{name}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn put(&self, name: &str, content: impl AsRef<[u8]>) {
            let path = self.0.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const NAA: &str = "naa.600140512ab34cd000000000000000ff\n";
    const PLAIN: &str = "600140512ab34cd000000000000000ff";

    #[test]
    fn a_disk_has_the_identifiers_of_sysfs_and_of_its_page_each_once() {
        let sda = Folder::new("sda");
        sda.put("device/wwid", NAA);
        let naa = [0x60, 0x01, 0x40, 0x51, 0x2a, 0xb3, 0x4c, 0xd0, 0, 0, 0, 0, 0, 0, 0, 0xff];
        let mut page = vec![0, 0x83, 0, 30, 1, 3, 0, 16];
        page.extend(naa);
        page.extend([2, 1, 0, 6, b'A', b'C', b'M', b'E', b' ', b'7']);
        sda.put("device/vpd_pg83", page);
        assert_eq!(of_directory(&sda.0), [PLAIN, "acme_7"]);
    }

    #[test]
    fn a_multipath_device_has_what_all_of_its_paths_have_and_a_volume_on_top_has_not() {
        let dm = Folder::new("dm");
        dm.put("slaves/sda/device/wwid", NAA);
        dm.put("slaves/sdb/device/wwid", NAA);
        dm.put("dm/name", "lun");
        assert_eq!(of_directory(&dm.0), [PLAIN], "made by hand, without an identifier of its own");
        dm.put("dm/uuid", format!("mpath-3{PLAIN}"));
        assert_eq!(of_directory(&dm.0), [PLAIN]);
        dm.put("slaves/sdb/device/wwid", "naa.5000c500a1b2c3d4");
        dm.put("dm/uuid", "");
        assert_eq!(of_directory(&dm.0), [""; 0], "its paths lead to different disks");
        dm.put("slaves/sdb/device/wwid", NAA);
        dm.put("dm/uuid", "LVM-abc");
        assert_eq!(of_directory(&dm.0), ["lvm-abc"]);
    }

    #[test]
    fn a_namespace_has_its_identifiers_unless_they_are_zeroes() {
        let nvme = Folder::new("nvme");
        nvme.put("wwid", "eui.0025385b71b00001");
        nvme.put("eui", "00 25 38 5b 71 b0 00 01");
        nvme.put("nguid", "00000000-0000-0000-0000-000000000000");
        nvme.put("uuid", "6b8a9d1c-3f5e-4a7b-8c9d-0e1f2a3b4c5d");
        let expected = ["0025385b71b00001", "6b8a9d1c-3f5e-4a7b-8c9d-0e1f2a3b4c5d", "00_25_38_5b_71_b0_00_01"];
        assert_eq!(of_directory(&nvme.0), expected);
    }

    #[test]
    fn an_unknown_device_has_neither_attributes_nor_an_identifier() {
        let device = libc::makedev(0, 0);
        assert_eq!(QueueAttributes::of(device), QueueAttributes::default());
        assert_eq!(identifiers(device), [""; 0]);
    }
}
