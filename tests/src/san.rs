//! The laboratory's SAN: LUNs with two paths each, whose cables tests pull.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{fs, thread};

use rackvisor_api::config::DiskConfig;

/// Why tests that need a SAN cannot run here.
pub fn san_is_missing() -> Option<&'static str> {
    crate::kvm_is_missing().or_else(|| {
        let missing = std::env::var_os("LAB_SAN_LUNS").is_none();
        missing.then_some("there are no LUNs of the laboratory here; run it by tests/lab/run --san=…")
    })
}

/// Ends the test, loudly, where there is no KVM that runs stock kernels, or no SAN.
#[macro_export]
macro_rules! needs_san {
    () => {
        if let Some(why) = $crate::san_is_missing() {
            return $crate::skip(why);
        }
    };
}

/// The SAN, for one test at a time: all LUNs share the two paths. Dropping it plugs every cable in again.
pub struct San {
    luns: Vec<PathBuf>,
    _turn: MutexGuard<'static, ()>,
}

impl San {
    /// The LUN that, without a path, tries for some seconds before its requests fail.
    pub const RETRIES: usize = 0;
    /// The LUN that, without a path, keeps requests for ever.
    pub const QUEUES: usize = 1;
    /// The LUN whose requests fail at once without a path. It has blocks of 4096 bytes.
    pub const FAILS: usize = 2;

    /// Waits for its turn.
    ///
    /// # Panics
    /// Where there is no SAN: begin the test with `needs_san!`.
    pub fn take() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let luns = std::env::var("LAB_SAN_LUNS").unwrap();
        let san = Self { luns: luns.split(' ').map(PathBuf::from).collect(), _turn: turn };
        san.wait_paths(2);
        san
    }

    /// The device of LUN `index`.
    pub fn lun(&self, index: usize) -> PathBuf {
        let lun = self.luns.get(index).cloned();
        lun.unwrap_or_else(|| panic!("{} LUNs are too few: give tests/lab/run more", self.luns.len()))
    }

    /// LUN `index` as the disk `id`.
    pub fn disk(&self, id: &str, index: usize) -> DiskConfig {
        DiskConfig::new(id, self.lun(index))
    }

    /// LUN `index` as the disk `id` of another host: a second initiator, so to the LUN it is one.
    pub fn disk_of_second_host(&self, id: &str, index: usize) -> DiskConfig {
        let luns = std::env::var("LAB_SAN_LUNS_HOST2").expect("there is one host only: tests/lab/run --san=hosts=2");
        DiskConfig::new(id, luns.split(' ').nth(index).unwrap())
    }

    /// The name of LUN `index`, which `lab-san` and multipath know it by.
    pub fn name(&self, index: usize) -> String {
        self.lun(index).file_name().unwrap().to_string_lossy().into_owned()
    }

    /// The size of LUN `index` as the host knows it now, in bytes.
    pub fn size(&self, index: usize) -> u64 {
        let sectors: u64 = self.attribute(index, "size").parse().unwrap();
        sectors * 512
    }

    /// What sysfs says of LUN `index`.
    pub fn attribute(&self, index: usize, name: &str) -> String {
        let device = fs::canonicalize(self.lun(index)).unwrap();
        let path = PathBuf::from("/sys/class/block").join(device.file_name().unwrap()).join(name);
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    /// The first `mebibytes` of LUN `index`, read from the LUN itself, past every cache of this host.
    pub fn read(&self, index: usize, mebibytes: usize) -> Vec<u8> {
        let input = format!("if={}", self.lun(index).display());
        let count = format!("count={mebibytes}");
        let dd = Command::new("dd").args([&*input, "bs=1M", &count, "iflag=direct,fullblock"]).output().unwrap();
        assert!(dd.status.success(), "dd: {}", String::from_utf8_lossy(&dd.stderr));
        dd.stdout
    }

    /// Pulls the cable of path 0 or 1 of all LUNs.
    pub fn fail_path(&self, path: usize) {
        lab_san(&["fail-path", &path.to_string()]);
    }

    /// Pulls both.
    pub fn fail_all_paths(&self) {
        self.fail_path(0);
        self.fail_path(1);
    }

    /// Plugs it in again.
    pub fn restore_path(&self, path: usize) {
        lab_san(&["restore-path", &path.to_string()]);
    }

    /// Plugs in both, and waits until every LUN has them.
    pub fn restore_all_paths(&self) {
        self.restore_path(0);
        self.restore_path(1);
        self.wait_paths(2);
    }

    /// Waits until each LUN has exactly `count` usable paths.
    pub fn wait_paths(&self, count: usize) {
        lab_san(&["wait-paths", &count.to_string(), "120"]);
    }

    /// Grows LUN `index`; returns when this host knows it.
    pub fn grow(&self, index: usize, size: &str) {
        lab_san(&["grow", &self.name(index), size]);
    }
}

impl Drop for San {
    fn drop(&mut self) {
        for path in ["0", "1"] {
            let _ = Command::new("lab-san").args(["restore-path", path]).status();
        }
        if !thread::panicking() {
            self.wait_paths(2);
        }
    }
}

fn lab_san(arguments: &[&str]) {
    let output = Command::new("lab-san").args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "lab-san {}: {said}", arguments.join(" "));
}
