//! QEMU's helper for persistent reservations, as a host agent starts it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::process::await_listener;

/// A qemu-pr-helper with its socket in a folder of its own, which anybody may write to. Dropping it kills it.
pub struct PrHelper {
    process: Child,
    folder: TempDir,
}

impl PrHelper {
    /// Starts one.
    ///
    /// # Panics
    /// Without qemu-pr-helper (Debian package qemu-system-common), which each laboratory with a SAN has.
    #[expect(clippy::new_without_default, reason = "it starts a process")]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let process = Self::run(&folder);
        Self { process, folder }
    }

    fn run(folder: &TempDir) -> Child {
        let socket = folder.path().join("socket");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new("qemu-pr-helper");
        command.arg("-k").arg(&socket).arg("-f").arg(folder.path().join("pid"));
        let process = command.stdout(Stdio::null()).spawn().unwrap();
        await_listener(&socket);
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        process
    }

    /// The folder of its socket, which a jail has to share.
    pub fn folder(&self) -> &str {
        self.folder.path().to_str().unwrap()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Whether somebody is connected to it. Its end of the connection is in the network namespace of the other, so /proc/net/unix
    /// does not tell.
    pub fn is_connected(&self) -> bool {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap();
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        // The first one listens.
        targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count() > 1
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts another one in its place, after [`PrHelper::kill`].
    pub fn start_again(&mut self) {
        self.process = Self::run(&self.folder);
    }
}

impl Drop for PrHelper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
