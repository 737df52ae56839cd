//! What the host's kernel counts and traces of a VM.

use std::fs;
use std::path::{Path, PathBuf};

const KVM: &str = "/sys/kernel/debug/kvm";
const TRACING: &str = "/sys/kernel/tracing";

/// Exits of all vCPUs of the VM of this process, if the kernel tells (debugfs, as root).
pub fn exits(pid: u32) -> Option<u64> {
    // The folder is named by the thread that made the VM.
    let threads: Vec<_> =
        fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten().map(|task| task.file_name()).collect();
    let folders = fs::read_dir(KVM).ok()?.flatten().map(|folder| folder.path());
    let of_thread = |folder: &PathBuf| {
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.split_once('-').is_some_and(|(thread, _)| threads.iter().any(|mine| mine == thread))
    };
    let folder = folders.into_iter().find(of_thread)?;
    fs::read_to_string(folder.join("exits")).ok()?.trim().parse().ok()
}

/// A trace of one kind of KVM's events, on until it is dropped.
pub struct Trace(String);

impl Trace {
    /// Begins a trace, with nothing in it, of the event `name` of KVM; `None` where the kernel has none (tracefs, as root).
    pub fn of(name: &str) -> Option<Self> {
        let switch = format!("{TRACING}/events/kvm/{name}/enable");
        fs::write(Path::new(TRACING).join("trace"), "").ok()?;
        fs::write(&switch, "1").ok()?;
        Some(Self(switch))
    }

    /// The lines so far.
    pub fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(Path::new(TRACING).join("trace")).unwrap();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::write(&self.0, "0");
    }
}
