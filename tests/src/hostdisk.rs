//! Block devices that the kernel makes out of nothing. They need root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::eventually;

/// A null_blk device: takes writes, gives zeroes, at once.
pub struct NullBlk {
    settings: PathBuf,
    /// The device.
    pub path: PathBuf,
}

impl NullBlk {
    /// A device of so many MiB, or `None` where the kernel has none to give.
    pub fn new(mebibytes: u32) -> Option<Self> {
        let _ = Command::new("modprobe").args(["null_blk", "nr_devices=0"]).status();
        let name = format!("rv{}-{}", std::process::id(), crate::unique());
        let settings = Path::new("/sys/kernel/config/nullb").join(&name);
        fs::create_dir(&settings).ok()?;
        let set = |what: &str, value: &str| fs::write(settings.join(what), value).unwrap();
        set("size", &mebibytes.to_string());
        set("power", "1");
        // Its name was its number until Linux 6.5.
        let index = fs::read_to_string(settings.join("index")).unwrap();
        let names = [PathBuf::from("/dev").join(&name), PathBuf::from(format!("/dev/nullb{}", index.trim()))];
        let path = eventually("null_blk makes a device", || names.iter().find(|path| path.exists()).cloned());
        Some(Self { settings, path })
    }
}

impl Drop for NullBlk {
    fn drop(&mut self) {
        let _ = fs::write(self.settings.join("power"), "0");
        let _ = fs::remove_dir(&self.settings);
    }
}

/// A device-mapper device that reads as zeroes and forgets what is written, and whose size can be changed under its users.
pub struct Mapped {
    name: String,
    /// The device.
    pub path: PathBuf,
}

impl Mapped {
    /// A device of so many MiB, or `None` where the kernel has none to give.
    pub fn new(mebibytes: u64) -> Option<Self> {
        let name = format!("rv{}-{}", std::process::id(), crate::unique());
        let created = dmsetup(&["create", &name, "--table", &table(mebibytes)]);
        created.then(|| Self { path: Path::new("/dev/mapper").join(&name), name })
    }

    /// Gives it another size.
    pub fn resize(&self, mebibytes: u64) {
        assert!(dmsetup(&["reload", &self.name, "--table", &table(mebibytes)]));
        // What is in flight is of no interest, and nobody has a file system on it.
        assert!(dmsetup(&["suspend", "--nolockfs", &self.name]) && dmsetup(&["resume", &self.name]));
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        dmsetup(&["remove", "--retry", &self.name]);
    }
}

fn table(mebibytes: u64) -> String {
    format!("0 {} zero", mebibytes << 11)
}

fn dmsetup(arguments: &[&str]) -> bool {
    Command::new("dmsetup").args(arguments).status().is_ok_and(|status| status.success())
}
