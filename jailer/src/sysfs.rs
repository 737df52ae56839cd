//! The parts of sysfs that a jail has: what rackvisor reads of its LUNs and its taps, and nothing else of the host.
//!
//! A LUN's folder refers to others by relative links (`device`, `slaves/*`, from a partition `..`), so the folders that are mounted keep
//! their paths. Paths of a LUN that multipath finds later are not there until the VM is started anew; its own identifier is.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

/// What a jail has of sysfs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Folders, none of which is in another.
    pub folders: Vec<PathBuf>,
    /// Links and where they lead.
    pub links: Vec<(PathBuf, PathBuf)>,
}

impl Parts {
    /// Adds those of the block device with this number.
    pub fn add_block(&mut self, sysfs: &Path, device: u64) {
        let link = sysfs.join(format!("dev/block/{}:{}", major(device), minor(device)));
        let Ok(real) = fs::canonicalize(&link) else { return };
        for slave in fs::read_dir(real.join("slaves")).into_iter().flatten().flatten() {
            if let Ok(slave) = fs::canonicalize(slave.path()) {
                self.add_disk(&slave);
            }
        }
        self.add_disk(&real);
        self.links.push((link, real));
    }

    /// Adds the counters of an interface.
    pub fn add_interface(&mut self, sysfs: &Path, name: &str) {
        let link = sysfs.join("class/net").join(name);
        if let Ok(real) = fs::canonicalize(&link) {
            self.add_folder(real.join("statistics"));
            self.links.push((link, real));
        }
    }

    fn add_disk(&mut self, folder: &Path) {
        let disk = match folder.parent() {
            Some(disk) if folder.join("partition").exists() => disk,
            _ => folder,
        };
        let device = fs::canonicalize(disk.join("device")).unwrap_or_default();
        // Where the device's folder is not above that of its disk, both are wanted.
        if device.is_absolute() {
            self.add_folder(device);
        }
        self.add_folder(disk.to_owned());
    }

    fn add_folder(&mut self, folder: PathBuf) {
        if self.folders.iter().any(|known| folder.starts_with(known)) {
            return;
        }
        self.folders.retain(|known| !known.starts_with(&folder));
        self.folders.push(folder);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::makedev;

    use super::*;

    #[test]
    fn a_multipath_device_has_its_own_folder_and_those_of_its_paths() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let at = |name: &str| root.join(name);
        for lun in ["2:0:0:0/block/sda", "3:0:0:0/block/sdb"] {
            fs::create_dir_all(at("devices").join(lun)).unwrap();
            symlink("../..", at("devices").join(lun).join("device")).unwrap();
        }
        fs::create_dir_all(at("devices/dm-0/slaves")).unwrap();
        symlink("../../2:0:0:0/block/sda", at("devices/dm-0/slaves/sda")).unwrap();
        symlink("../../3:0:0:0/block/sdb", at("devices/dm-0/slaves/sdb")).unwrap();
        fs::create_dir_all(at("devices/2:0:0:0/block/sda/sda1")).unwrap();
        fs::write(at("devices/2:0:0:0/block/sda/sda1/partition"), "1").unwrap();
        fs::create_dir_all(at("dev/block")).unwrap();
        symlink("../../devices/dm-0", at("dev/block/253:0")).unwrap();
        symlink("../../devices/2:0:0:0/block/sda/sda1", at("dev/block/8:1")).unwrap();

        let mut parts = Parts::default();
        parts.add_block(&root, makedev(8, 1));
        assert_eq!(parts.folders, [at("devices/2:0:0:0")], "a partition has that of its disk");
        parts.add_block(&root, makedev(253, 0));
        parts.add_block(&root, makedev(9, 9));
        parts.folders.sort();
        assert_eq!(parts.folders, ["devices/2:0:0:0", "devices/3:0:0:0", "devices/dm-0"].map(at));
        assert_eq!(parts.links[1], (at("dev/block/253:0"), at("devices/dm-0")));
        assert_eq!(parts.links.len(), 2);
    }
}
