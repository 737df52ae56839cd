//! The TPM emulator behind a guest's TPM, as a host agent starts it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rackvisor_api::config::TpmConfig;
use rustix::process::{Pid, Signal, kill_process};

use crate::process::await_listener;

/// Why there can be no TPM here.
pub fn swtpm_is_missing() -> Option<&'static str> {
    let there = Command::new("swtpm").arg("--version").output().is_ok();
    (!there).then_some("swtpm is not installed (Debian package swtpm)")
}

/// A swtpm with its state in a folder. Dropping it kills it.
pub struct Swtpm {
    process: Child,
    folder: PathBuf,
}

impl Swtpm {
    /// Starts it with its state and its socket in `folder`, which may have the state of an earlier one.
    pub fn start(folder: &Path) -> Self {
        let process = Self::run(folder);
        Self { process, folder: folder.to_owned() }
    }

    /// The same for a new TPM that has registers for SHA-256 alone, as it is made for a VM. Each further kind costs firmware time.
    ///
    /// # Panics
    /// Without swtpm_setup (Debian package swtpm-tools).
    pub fn start_new(folder: &Path) -> Self {
        fs::create_dir(folder).unwrap();
        let mut setup = Command::new("swtpm_setup");
        setup.args(["--tpm2", "--pcr-banks", "sha256", "--runas", "root", "--tpmstate"]).arg(folder);
        let output = setup.output().unwrap();
        assert!(output.status.success(), "swtpm_setup: {}", String::from_utf8_lossy(&output.stdout));
        Self::start(folder)
    }

    fn run(folder: &Path) -> Child {
        let socket = folder.join("swtpm.sock");
        let _ = fs::remove_file(&socket);
        let state = format!("dir={}", folder.display());
        let control = format!("type=unixio,path={}", socket.display());
        let mut command = Command::new("swtpm");
        command.args(["socket", "--tpm2", "--tpmstate", &state, "--ctrl", &control]);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        await_listener(&socket);
        process
    }

    /// What names it in the configuration of a VM.
    pub fn config(&self) -> TpmConfig {
        TpmConfig { socket: self.folder.join("swtpm.sock") }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts it again with the state that it left.
    pub fn start_again(&mut self) {
        self.kill();
        self.process = Self::run(&self.folder);
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.kill();
    }
}
