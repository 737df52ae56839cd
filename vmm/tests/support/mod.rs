//! A VM in this process, and a guest of a few integer instructions.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "each test uses some of it, and fails by panicking"
)]

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rackvisor::VmConfig;
use rackvisor_api::config::{BootConfig, DiskConfig, MacAddr, NicConfig, TapFds};
use rackvisor_api::size::ByteSize;
use rackvisor_devices::net::open_queues;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// `jmp $`
pub const SPIN: &[u8] = &[0xeb, 0xfe];

/// A kernel of this code: an ELF image with one segment at 1 MiB and a PVH note (gABI; Xen PHYS32_ENTRY is note type 18).
pub fn kernel(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const BASE: u64 = 0x10_0000;
    let note: Vec<u8> = [4u32, 4, 18]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .chain(*b"Xen\0")
        .chain((BASE as u32).to_le_bytes())
        .collect();
    let header = |kind: u32, offset: u64, address: u64, length: u64| -> Vec<u8> {
        let words = [offset, address, address, length, length, 4];
        [kind, 5].iter().flat_map(|w| w.to_le_bytes()).chain(words.iter().flat_map(|w| w.to_le_bytes())).collect()
    };
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2u16, 62].iter().flat_map(|w| w.to_le_bytes()));
    image.extend(1u32.to_le_bytes());
    image.extend([BASE, 64, 0].iter().flat_map(|w| w.to_le_bytes()));
    image.extend(0u32.to_le_bytes());
    image.extend([64u16, 56, 2, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()));
    image.extend(header(4, HEADERS, 0, note.len() as u64));
    image.extend(header(1, HEADERS + note.len() as u64, BASE, code.len() as u64));
    image.extend(note);
    image.extend(code);
    image
}

/// A folder for a VM.
pub struct Place {
    /// The folder.
    pub folder: tempfile::TempDir,
}

impl Place {
    /// `None`, said aloud, where there is no KVM.
    pub fn new() -> Option<Self> {
        if let Err(error) = rackvisor::kvm::open() {
            eprintln!("SKIPPED: a VM with a tiny guest: {error}");
            return None;
        }
        Some(Self { folder: tempfile::tempdir().unwrap() })
    }

    /// A VM that runs this code.
    pub fn config(&self, code: &[u8]) -> VmConfig {
        let path = self.folder.path().join("kernel");
        fs::write(&path, kernel(code)).unwrap();
        let mut config = VmConfig::new("tiny", ByteSize::mib(128));
        config.boot = Some(BootConfig::with_kernel(path));
        config
    }

    /// A configuration with a NIC that wants this many passed descriptors.
    pub fn with_nic(&self, passed: u16) -> VmConfig {
        let mut config = self.config(SPIN);
        config.nics.push(nic("net0", 1, passed));
        config
    }

    /// A disk of 4 KiB in the folder.
    pub fn disk(&self, id: &str) -> DiskConfig {
        let path = self.folder.path().join(id);
        fs::File::create(&path).unwrap().write_all(&[0; 4096]).unwrap();
        DiskConfig::new(id, path)
    }
}

/// A NIC that wants this many passed descriptors.
pub fn nic(id: &str, last: u8, passed: u16) -> NicConfig {
    let (tap_fds, mac) = (Some(TapFds::Passed(passed)), MacAddr::new([2, 0, 0, 0, 0, last]).unwrap());
    NicConfig { tap: None, tap_fds, queues: passed, ..NicConfig::new(id, "", mac) }
}

/// Queues of a new tap that goes with the last of them; `None`, said aloud, where this process may make none.
pub fn queues(name: &str, count: u16) -> Option<Vec<OwnedFd>> {
    open_queues(&tap_name(name), count).map_err(|error| eprintln!("SKIPPED: a VM with a tap: {error}")).ok()
}

/// The name of a tap of this process.
pub fn tap_name(name: &str) -> String {
    format!("{name}{}", std::process::id())
}
