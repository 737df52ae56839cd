//! The real jailer around the real VMM.

use std::ffi::OsStr;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::{rackvisor_binary, unique};

/// Why VMs cannot be jailed here.
pub fn jail_is_missing() -> Option<&'static str> {
    let root = rustix::process::geteuid().is_root();
    assert!(root || std::env::var_os("LAB").is_none(), "the lab's user is not root");
    (!root).then_some("only root can build a jail")
}

/// Ends the test, loudly, where VMs cannot be jailed.
#[macro_export]
macro_rules! needs_jail {
    () => {
        if let Some(why) = $crate::jail_is_missing() {
            return $crate::skip(why);
        }
    };
}

/// Whether every VM is to be jailed.
pub fn all_are_jailed() -> bool {
    std::env::var_os("RACKVISOR_JAIL").is_some()
}

/// Ends the test, loudly, where every VM is jailed and what it tests cannot be had in a jail, for this reason.
#[macro_export]
macro_rules! impossible_in_a_jail {
    ($why:expr) => {
        if $crate::all_are_jailed() {
            return $crate::skip($why);
        }
    };
}

/// The `rackvisor-jailer` next to the `rackvisor` under test.
pub fn jailer_binary() -> PathBuf {
    rackvisor_binary().with_file_name("rackvisor-jailer")
}

/// A place for a jailed VM. Nothing may be left of it in the end.
pub struct Jail {
    /// The name of the VM.
    pub id: String,
    /// Its user and group.
    pub uid: u32,
    base: TempDir,
}

impl Default for Jail {
    fn default() -> Self {
        Self::new()
    }
}

impl Jail {
    /// A new one.
    pub fn new() -> Self {
        let number = unique();
        Self {
            id: format!("vm-{}-{number}", std::process::id()),
            uid: 200_000 + number,
            base: tempfile::tempdir().unwrap(),
        }
    }

    /// Where the jailer has its folders.
    pub fn base(&self) -> &Path {
        self.base.path()
    }

    /// Where it has that of this VM.
    pub fn folder(&self) -> PathBuf {
        self.base().join(&self.id)
    }

    /// The VMM's process id, as the jailer notes it.
    pub fn vmm(&self) -> Option<u32> {
        let note = std::fs::read_to_string(self.folder().join("vmm")).ok()?;
        note.split_whitespace().next()?.parse().ok()
    }

    /// Lets its user have a file.
    pub fn give(&self, path: &Path) {
        chown(path, Some(self.uid), Some(self.uid)).unwrap();
    }

    /// The jailer, with `options`, which go before what is usual; arguments for rackvisor may follow.
    pub fn command(&self, options: &[&str]) -> Command {
        let (uid, vmm) = (self.uid.to_string(), rackvisor_binary());
        let usual = [
            ("--id", OsStr::new(&self.id)),
            ("--uid", OsStr::new(&uid)),
            ("--gid", OsStr::new(&uid)),
            ("--base", self.base().as_os_str()),
            ("--vmm", vmm.as_os_str()),
        ];
        let mut jailer = Command::new(jailer_binary());
        for (option, value) in usual.iter().filter(|(option, _)| !options.contains(option)) {
            jailer.arg(option).arg(value);
        }
        jailer.args(options).arg("--").stdin(Stdio::null());
        jailer
    }
}
