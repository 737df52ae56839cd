//! Limits by cgroup: version 2, or 1 for the controllers that the host has there.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::cli::CgroupOption;
use crate::error::{JailError, refused_at};
use crate::instance::MOMENT;
use crate::trusted;

/// How long a cgroup may take to become empty once its processes were killed.
const EMPTIES: Duration = Duration::from_secs(10);

/// The hierarchies that this host has mounted.
#[derive(Debug, Default)]
struct Host {
    v2: Option<PathBuf>,
    /// What version 2 controls.
    controllers: Vec<String>,
    /// Where each controller of version 1 is.
    v1: Vec<(String, PathBuf)>,
}

impl Host {
    fn find() -> Result<Self, JailError> {
        let at = Path::new("/proc/self/mountinfo");
        let mut host = Self::parse(&fs::read_to_string(at).map_err(refused_at("read", at))?);
        if let Some(root) = &host.v2 {
            let names = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
            host.controllers = names.split_whitespace().map(str::to_owned).collect();
        }
        Ok(host)
    }

    /// From mountinfo (proc(5)): the fifth field is where, after ` - ` come type, source and options.
    fn parse(mountinfo: &str) -> Self {
        let mut host = Self::default();
        for line in mountinfo.lines() {
            let Some((mount, kind)) = line.split_once(" - ") else { continue };
            let Some(at) = mount.split_whitespace().nth(4).map(PathBuf::from) else { continue };
            let mut words = kind.split_whitespace();
            match words.next() {
                Some("cgroup2") => host.v2 = host.v2.or(Some(at)),
                Some("cgroup") => {
                    for option in words.nth(1).unwrap_or_default().split(',') {
                        host.v1.push((option.to_owned(), at.clone()));
                    }
                }
                _ => (),
            }
        }
        host
    }

    /// Where the settings of `option` go: the hierarchy, whether it is version 2, the controller, and files with values.
    fn place(&self, option: &CgroupOption) -> Result<Place, JailError> {
        let controller = option.file.split('.').next().unwrap_or_default();
        if let Some(root) = self.v2.as_ref().filter(|_| self.controllers.iter().any(|known| known == controller)) {
            let settings = vec![(option.file.clone(), option.value.clone())];
            return Ok(Place { root: root.clone(), enable: Some(controller.to_owned()), settings });
        }
        let (controller, settings) = version_1(option)?;
        let (_, root) = self.v1.iter().find(|(known, _)| *known == controller).ok_or_else(|| {
            let text = format!("--cgroup {}: this host has no cgroup controller {controller} mounted", option.file);
            JailError::Unusable(text)
        })?;
        Ok(Place { root: root.clone(), enable: None, settings })
    }
}

struct Place {
    root: PathBuf,
    /// The controller of version 2 that must be enabled on the way.
    enable: Option<String>,
    settings: Vec<(String, String)>,
}

/// What version 1 calls it, with its controller.
fn version_1(option: &CgroupOption) -> Result<(String, Vec<(String, String)>), JailError> {
    let CgroupOption { file, value } = option;
    let bad = |form: &str| JailError::Unusable(format!("--cgroup {file}={value}: the form is {file}={form}"));
    let one = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    // Version 1 writes "no limit" as -1.
    let limit = |value: &str| if value == "max" { "-1".to_owned() } else { value.to_owned() };
    Ok(match file.as_str() {
        "cpu.max" => {
            let mut words = value.split_whitespace();
            let quota = words.next().ok_or_else(|| bad("\"QUOTA [PERIOD]\""))?;
            let period = words.next().unwrap_or("100000");
            let settings = vec![one("cpu.cfs_period_us", period), one("cpu.cfs_quota_us", &limit(quota))];
            ("cpu".into(), settings)
        }
        "memory.max" => ("memory".into(), vec![one("memory.limit_in_bytes", &limit(value))]),
        "io.max" => {
            let form = "\"MAJOR:MINOR [rbps|wbps|riops|wiops]=N …\"";
            let (device, limits) = value.split_once(' ').ok_or_else(|| bad(form))?;
            let setting = |limit: &str| {
                let (key, value) = limit.split_once('=')?;
                let what = match key {
                    "rbps" => "read_bps",
                    "wbps" => "write_bps",
                    "riops" => "read_iops",
                    "wiops" => "write_iops",
                    _ => return None,
                };
                let value = if value == "max" { "0" } else { value };
                Some((format!("blkio.throttle.{what}_device"), format!("{device} {value}")))
            };
            let settings: Option<Vec<_>> = limits.split_whitespace().map(setting).collect();
            ("blkio".into(), settings.ok_or_else(|| bad(form))?)
        }
        own => (own.split('.').next().unwrap_or_default().into(), vec![one(own, value)]),
    })
}

/// The cgroups of a VM, which is one with version 2 only.
#[derive(Debug, Default)]
pub struct Cgroups(Vec<Cgroup>);

#[derive(Debug)]
struct Cgroup {
    /// The root of its hierarchy.
    root: PathBuf,
    /// From there on.
    parts: Vec<String>,
    enable: Vec<String>,
    settings: Vec<(String, String)>,
}

impl Cgroup {
    fn path(&self) -> PathBuf {
        self.root.join(self.parts.join("/"))
    }

    /// Makes it and those above it, and writes its settings.
    fn make(&self) -> Result<(), JailError> {
        let mut folder = trusted::find(&self.root, None)?;
        for part in &self.parts {
            for controller in &self.enable {
                write(&folder.fd, &folder.path, "cgroup.subtree_control", &format!("+{controller}"))?;
            }
            let path = folder.path.join(part);
            match mkdirat(&folder.fd, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => (),
                Err(error) => return Err(refused_at("make the cgroup", &path)(error)),
            }
            folder = trusted::find(&path, None)?;
        }
        self.settings.iter().try_for_each(|(file, value)| write(&folder.fd, &folder.path, file, value))
    }
}

fn write(folder: &OwnedFd, path: &Path, file: &str, value: &str) -> Result<(), JailError> {
    let what = format!("write \"{value}\" to");
    let at = path.join(file);
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = openat(folder, file, flags, Mode::empty()).map_err(refused_at(&what, &at))?;
    rustix::io::write(&opened, value.as_bytes()).map(drop).map_err(refused_at(&what, &at))
}

impl Cgroups {
    /// Plans them: `options` in `parent`/`id` of each hierarchy that one of them is for.
    ///
    /// # Errors
    /// A controller that the host lacks, or a value that version 1 has no word for.
    pub fn plan(options: &[CgroupOption], parent: &[String], id: &str) -> Result<Self, JailError> {
        if options.is_empty() { Ok(Self::default()) } else { Self::on(&Host::find()?, options, parent, id) }
    }

    fn on(host: &Host, options: &[CgroupOption], parent: &[String], id: &str) -> Result<Self, JailError> {
        let mut cgroups: Vec<Cgroup> = Vec::new();
        for option in options {
            let Place { root, enable, settings } = host.place(option)?;
            match cgroups.iter_mut().find(|cgroup| cgroup.root == root) {
                Some(cgroup) => {
                    cgroup.enable.extend(enable);
                    cgroup.settings.extend(settings);
                }
                None => {
                    let parts = parent.iter().cloned().chain([id.to_owned()]).collect();
                    cgroups.push(Cgroup { root, parts, enable: enable.into_iter().collect(), settings });
                }
            }
        }
        Ok(Self(cgroups))
    }

    /// Their folders.
    pub fn folders(&self) -> Vec<PathBuf> {
        self.0.iter().map(Cgroup::path).collect()
    }

    /// Makes them.
    ///
    /// # Errors
    /// What the kernel refused, such as a value.
    pub fn make(&self) -> Result<(), JailError> {
        self.0.iter().try_for_each(Cgroup::make)
    }

    /// Puts a process into them.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn take(&self, pid: Pid) -> Result<(), JailError> {
        let pid = pid.as_raw_nonzero().to_string();
        self.0.iter().try_for_each(|cgroup| {
            let folder = trusted::find(&cgroup.path(), None)?;
            write(&folder.fd, &folder.path, "cgroup.procs", &pid)
        })
    }
}

/// Removes a cgroup. What may be left in it is killed, where the kernel can (Linux 5.14, version 2).
///
/// # Errors
/// What the kernel refused: `EBUSY` if it does not become empty.
pub fn remove(folder: &Path) -> io::Result<()> {
    let deadline = Instant::now() + EMPTIES;
    loop {
        match fs::remove_dir(folder) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                let _ = fs::write(folder.join("cgroup.kill"), "1");
                std::thread::sleep(MOMENT);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    const UNIFIED: &str =
        "24 1 0:22 / /sys rw - sysfs sys rw\n25 24 0:23 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
    const HYBRID: &str = "30 24 0:26 / /c/memory rw - cgroup cgroup rw,memory\n31 24 0:27 / /c/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                          32 24 0:28 / /c/blkio rw - cgroup cgroup rw,blkio\n33 24 0:29 / /c/unified rw - cgroup2 cgroup2 rw\n";

    fn options(lines: &[&str]) -> Vec<CgroupOption> {
        lines.iter().map(|line| CgroupOption::from_str(line).unwrap()).collect()
    }

    fn settings(host: &Host, lines: &[&str]) -> Vec<(PathBuf, Vec<String>)> {
        let cgroups = Cgroups::on(host, &options(lines), &["rackvisor".into()], "vm").unwrap();
        let all = |cgroup: &Cgroup| cgroup.settings.iter().map(|(file, value)| format!("{file}={value}")).collect();
        cgroups.0.iter().map(|cgroup| (cgroup.path(), all(cgroup))).collect()
    }

    #[test]
    fn version_2_takes_settings_as_they_are_in_one_cgroup() {
        let mut host = Host::parse(UNIFIED);
        host.controllers = ["cpu", "memory", "pids"].map(str::to_owned).to_vec();
        let lines = ["memory.max=5G", "cpu.max=200000 100000", "memory.swap.max=0"];
        let found = settings(&host, &lines);
        assert_eq!(found, [(PathBuf::from("/sys/fs/cgroup/rackvisor/vm"), lines.map(str::to_owned).to_vec())]);
        let error = Cgroups::on(&host, &options(&["io.max=8:0 rbps=1"]), &[], "vm").unwrap_err().to_string();
        assert!(error.contains("no cgroup controller blkio"), "{error}");
    }

    #[test]
    fn version_1_has_other_words_for_the_same_limits() {
        let host = Host::parse(HYBRID);
        let found = settings(
            &host,
            &["memory.max=5G", "cpu.max=max 50000", "io.max=8:0 rbps=7 wiops=max", "memory.swappiness=0"],
        );
        let expected = [
            ("/c/memory/rackvisor/vm", vec!["memory.limit_in_bytes=5G", "memory.swappiness=0"]),
            ("/c/cpu/rackvisor/vm", vec!["cpu.cfs_period_us=50000", "cpu.cfs_quota_us=-1"]),
            (
                "/c/blkio/rackvisor/vm",
                vec!["blkio.throttle.read_bps_device=8:0 7", "blkio.throttle.write_iops_device=8:0 0"],
            ),
        ];
        let expected = expected.map(|(path, all)| (PathBuf::from(path), all.iter().map(|s| (*s).to_owned()).collect()));
        assert_eq!(found, expected);
        for bad in ["io.max=8:0", "io.max=8:0 fast=1", "io.max=8:0 rbps"] {
            assert!(Cgroups::on(&host, &options(&[bad]), &[], "vm").is_err(), "{bad}");
        }
    }

    #[test]
    fn a_process_is_limited_and_the_cgroup_goes_when_it_has_ended() {
        let plan =
            |parent: &str| Cgroups::plan(&options(&["pids.max=7", "memory.max=64M"]), &[parent.to_owned()], "vm");
        let parent = format!("rackvisor-test-{}", std::process::id());
        if !rustix::process::geteuid().is_root() || plan(&parent).is_err() {
            return eprintln!("SKIPPED: this test takes root and cgroups with pids and memory");
        }
        let cgroups = plan(&parent).unwrap();
        cgroups.make().unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        cgroups.take(Pid::from_child(&child)).unwrap();
        let of_child = fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
        assert!(of_child.lines().any(|line| line.ends_with(&format!("/{parent}/vm"))), "{of_child}");
        child.kill().unwrap();
        child.wait().unwrap();
        for folder in cgroups.folders() {
            remove(&folder).unwrap();
            remove(&folder).unwrap();
            fs::remove_dir(folder.parent().unwrap()).unwrap();
        }
    }
}
