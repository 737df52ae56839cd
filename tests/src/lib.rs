//! What the integration tests share: the real `rackvisor` in a folder of its own, real guests, and looks at both.
//!
//! Tests of KVM begin with [`needs_kvm!`]: where KVM cannot run stock kernels they print a line that begins with
//! `SKIPPED:` and end (in the lab, which has such a KVM, they fail instead). Deadlines only guard against hangs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, also in its helpers"
)]

mod eventlog;
mod exits;
mod guest;
mod hostdisk;
mod jail;
mod laps;
mod linux;
mod node;
mod pairwise;
mod pr_helper;
mod process;
mod programs;
mod san;
mod sdn;
mod spoil;
mod swtpm;
mod tables;
mod tap;
mod terminal;
mod tiny;
mod uefi;
mod vmm;

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub use eventlog::{EventLog, LogEvent};
pub use exits::{Trace, exits};
pub use guest::Guest;
pub use hostdisk::{Mapped, NullBlk};
pub use jail::{Jail, all_are_jailed, jail_is_missing, jailer_binary};
pub use laps::Laps;
pub use linux::{
    Kernel, guest_folder, linux, linux_that_runs, linux_with_fio, linux_with_net, linux_with_tpm, stock_kernel,
};
pub use node::{Node, nodes};
pub use pairwise::pairwise;
pub use pr_helper::PrHelper;
pub use process::{Census, Mappings, assert_nothing_more, filtered_threads};
pub use programs::{good, output, rackctl};
pub use san::{San, san_is_missing};
pub use sdn::{Bridge, Ovn, Port, PortOptions, Station, sdn_is_missing};
pub use spoil::spoil_everything;
pub use swtpm::{Swtpm, swtpm_is_missing};
pub use tables::check_tables;
pub use tap::{Rarps, Tap, taps_are_missing};
pub use terminal::Terminal;
pub use tiny::Tiny;
pub use uefi::{
    Keys, Loader, assert_secure_boot, boot_entries, boot_order, boot_past_unsigned_loader, booted_disk,
    global_variable, make_boot_entry, mark_disk, mount_variables, uefi, uefi_disk, uefi_disk_with, uefi_with_smm,
};
pub use vmm::{Rackvisor, rackctl_binary, rackvisor_binary};

/// How long anything may take before it counts as hung. Guests in the lab are some 10 times slower than elsewhere.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Why guests cannot run here.
pub fn kvm_is_missing() -> Option<&'static str> {
    static VERDICT: OnceLock<bool> = OnceLock::new();
    let fit = *VERDICT.get_or_init(|| rackvisor::doctor::examine().fit);
    assert!(fit || std::env::var_os("LAB").is_none(), "the lab's KVM is not fit: {}", rackvisor::doctor::examine());
    (!fit).then_some("this host's KVM cannot run stock kernels (rackvisor doctor); run it by tests/lab/run")
}

/// Why vhost-net cannot be had here.
pub fn vhost_is_missing() -> Option<&'static str> {
    let there = std::path::Path::new("/dev/vhost-net").exists();
    assert!(there || std::env::var_os("LAB").is_none(), "the lab has no /dev/vhost-net");
    (!there).then_some("this host has no /dev/vhost-net (modprobe vhost_net)")
}

/// Says that the test of this thread does not run; past the test harness, which hides what successful tests print.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {}: {why}", thread.name().unwrap_or("a test"));
}

/// Prints a figure that a test found; past the test harness, as [`skip`].
pub fn tell(figure: &str) {
    let thread = std::thread::current();
    let _ = writeln!(std::io::stderr(), "{}: {figure}", thread.name().unwrap_or("a test"));
}

/// Ends the test, loudly, where there is no KVM that runs stock kernels.
#[macro_export]
macro_rules! needs_kvm {
    () => {
        if let Some(why) = $crate::kvm_is_missing() {
            return $crate::skip(why);
        }
    };
}

/// Ends the test, loudly, where there is no KVM that runs stock kernels, or no vhost-net.
#[macro_export]
macro_rules! needs_vhost {
    () => {
        if let Some(why) = $crate::kvm_is_missing().or_else($crate::vhost_is_missing) {
            return $crate::skip(why);
        }
    };
}

/// A number that this process has not had yet.
fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Waits until `done` gives something.
///
/// # Panics
/// After [`PATIENCE`].
pub fn eventually<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(result) = done() {
            return result;
        }
        assert!(Instant::now() < deadline, "{what}: not within {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Numbers that follow from a seed: splitmix64.
pub struct Random(pub u64);

impl Random {
    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next one below `limit`, a small number.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.draw() % limit as u64).unwrap()
    }
}

/// `length` bytes that follow from `seed`. Each block of 512 bytes differs from all others.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let pool: Vec<u8> = (0..1024).flat_map(|_| random.draw().to_le_bytes()).collect();
    let mut bytes = Vec::with_capacity(length + 512);
    while bytes.len() < length {
        let from = random.below(7000);
        bytes.extend((bytes.len() as u64).to_le_bytes());
        bytes.extend(&pool[from..from + 504]);
    }
    bytes.truncate(length);
    bytes
}

/// What `sha256sum` says of these bytes.
pub fn sha256(bytes: &[u8]) -> String {
    use std::process::{Command, Stdio};
    let mut program = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    program.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = program.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

/// Compares contents without printing megabytes.
///
/// # Panics
/// With the first difference.
pub fn assert_same_bytes(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}: length");
    if found == wanted {
        return;
    }
    if let Some(at) = found.iter().zip(wanted).position(|(f, w)| f != w) {
        let end = (at + 16).min(found.len());
        panic!("{what}: byte {at:#x} differs: {:02x?} instead of {:02x?}", &found[at..end], &wanted[at..end]);
    }
}
