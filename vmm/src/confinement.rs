//! Which paths the process may open, where the command line says so: Landlock.
//!
//! The kernel refuses all others from the first thread on, whatever a thread is made to ask for. [`Confinement::check`] refuses
//! configurations before anything of theirs is opened, in better words than the kernel's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus,
};
use rackvisor_api::config::{SerialMode, VmConfig};
use rackvisor_api::problem::{Code, Pointer, Problem};
use thiserror::Error;

/// What is known of Landlock here. A kernel that knows less refuses less.
const KNOWN: ABI = ABI::V5;
/// What the process looks at whatever its VM is.
const LOOKED_AT: [&str; 2] = ["/proc", "/sys"];
/// The devices that it opens as its VM needs them.
const DEVICES: [&str; 5] = ["/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/ptmx", "/dev/pts"];

/// Why the process is not confined.
#[derive(Debug, Error)]
pub enum ConfinementError {
    /// A path is not there, or cannot be looked at.
    #[error("--landlock: {path}: {error}; what is named must exist", path = path.display())]
    Path {
        /// Which one.
        path: PathBuf,
        /// What the kernel answered.
        error: io::Error,
    },
    /// The kernel refused.
    #[error("--landlock: {0}; it needs CONFIG_SECURITY_LANDLOCK, and landlock among the kernel's `lsm=`")]
    Refused(#[from] RulesetError),
    /// The kernel did nothing.
    #[error(
        "--landlock: the kernel has no Landlock, or it is off; it needs CONFIG_SECURITY_LANDLOCK, and landlock among its `lsm=`"
    )]
    Missing,
}

/// What to leave open.
#[derive(Debug, Default, Clone)]
pub struct Allowed {
    /// Files and folders with all beneath them, to read, write, make and remove.
    pub write: Vec<PathBuf>,
    /// Files and folders with all beneath them, to read.
    pub read: Vec<PathBuf>,
    /// Files of the program's own that are written, and made anew, by their paths.
    pub logs: Vec<PathBuf>,
    /// The socket of the API, which is made and removed.
    pub socket: Option<PathBuf>,
}

/// The paths that a VM may name.
#[derive(Debug, Clone)]
pub struct Confinement {
    write: Vec<PathBuf>,
    read: Vec<PathBuf>,
}

impl Confinement {
    /// Confines the calling thread and those that it starts, for good, to what is `allowed` and to what each VM needs: /proc,
    /// /sys and the devices of KVM, taps and terminals. What is open stays so. Links are followed: what they lead to counts.
    ///
    /// # Errors
    /// [`ConfinementError`].
    pub fn enter(allowed: &Allowed) -> Result<Self, ConfinementError> {
        let all = AccessFs::from_all(KNOWN);
        let first = AccessFs::from_all(ABI::V1);
        let rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(first)?;
        let mut rules = rules.set_compatibility(CompatLevel::BestEffort).handle_access(all)?.create()?;
        let read = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::IoctlDev;
        let write = all & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock);
        for path in &allowed.write {
            rules = open_to(rules, path, write)?;
        }
        for path in &allowed.read {
            rules = open_to(rules, path, read)?;
        }
        for file in &allowed.logs {
            rules = open_to(rules, folder_of(file), AccessFs::WriteFile | AccessFs::MakeReg)?;
        }
        if let Some(socket) = &allowed.socket {
            rules = open_to(rules, folder_of(socket), AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::ReadDir)?;
        }
        let exists = |path: &&Path| path.exists();
        for path in LOOKED_AT.map(Path::new).iter().copied().filter(exists) {
            rules = open_to(rules, path, read)?;
        }
        for path in DEVICES.map(Path::new).iter().copied().filter(exists) {
            rules = open_to(rules, path, read | AccessFs::WriteFile)?;
        }
        // For the names of functions, in the report of a panic.
        if let Ok(program) = std::env::current_exe() {
            rules = open_to(rules, &program, AccessFs::ReadFile.into())?;
        }
        let RestrictionStatus { ruleset, .. } = rules.restrict_self()?;
        if ruleset == RulesetStatus::NotEnforced {
            return Err(ConfinementError::Missing);
        }
        Ok(Self { write: resolved(&allowed.write), read: resolved(&allowed.read) })
    }

    /// Whether all paths of a VM are within.
    ///
    /// # Errors
    /// A [`Problem`] that names the field, the path and the option.
    pub fn check(&self, config: &VmConfig) -> Result<(), Problem> {
        let root = Pointer::root();
        let boot = root.key("boot");
        if let Some(source) = &config.boot {
            for (name, image) in [("kernel", &source.kernel), ("initrd", &source.initrd)] {
                image.as_deref().map_or(Ok(()), |path| self.check_path(path, false, &boot.key(name)))?;
            }
            if let Some(firmware) = &source.firmware {
                self.check_path(&firmware.code, false, &boot.key("firmware").key("code"))?;
                self.check_path(&firmware.vars, true, &boot.key("firmware").key("vars"))?;
            }
        }
        for (index, disk) in config.disks.iter().enumerate() {
            self.check_path(&disk.path, !disk.read_only, &root.key("disks").index(index).key("path"))?;
        }
        match (&config.serial.mode, &config.serial.path) {
            (SerialMode::File | SerialMode::Socket, Some(path)) => {
                self.check_path(folder_of(path), true, &root.key("serial").key("path"))
            }
            _ => Ok(()),
        }
    }

    /// What is not there is within: who opens it says so.
    fn check_path(&self, path: &Path, write: bool, at: &Pointer) -> Result<(), Problem> {
        let Ok(place) = fs::canonicalize(path) else { return Ok(()) };
        let within = |allowed: &[PathBuf]| allowed.iter().any(|allowed| place.starts_with(allowed));
        if within(&self.write) || !write && within(&self.read) {
            return Ok(());
        }
        let detail = format!(
            "{} is beneath no path that this process may {}",
            path.display(),
            if write { "write to" } else { "read" }
        );
        let remedy = "name it when rackvisor is started: --landlock PATH, or --landlock-ro PATH to read only";
        Err(Problem::new(Code::Unusable, detail, remedy).at(at))
    }
}

/// Adds a path to the rules; a file takes what there is for files.
fn open_to(rules: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, ConfinementError> {
    let wrong = |error| ConfinementError::Path { path: path.to_owned(), error };
    let is_folder = fs::metadata(path).map_err(wrong)?.is_dir();
    let access = if is_folder { access } else { access & AccessFs::from_file(KNOWN) };
    let place = PathFd::new(path).map_err(|error| wrong(io::Error::other(error)))?;
    Ok(rules.add_rule(PathBeneath::new(place, access))?)
}

fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn resolved(paths: &[PathBuf]) -> Vec<PathBuf> {
    paths.iter().filter_map(|path| fs::canonicalize(path).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use rackvisor_api::config::{BootConfig, DiskConfig, SerialConfig};
    use rackvisor_api::size::ByteSize;

    use super::*;

    fn folders() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let [inside, outside] = ["inside", "outside"].map(|name| root.path().join(name));
        for folder in [&inside, &outside] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("file"), "content").unwrap();
        }
        (root, inside, outside)
    }

    /// What `body` says in a thread that is confined to `allowed`; `None` where the kernel has no Landlock.
    fn confined<T: Send>(allowed: &Allowed, body: impl FnOnce(&Confinement) -> T + Send) -> Option<T> {
        let confined = || match Confinement::enter(allowed) {
            Ok(confinement) => Some(body(&confinement)),
            Err(error @ (ConfinementError::Missing | ConfinementError::Refused(_))) => {
                eprintln!("SKIPPED: a test of Landlock: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        };
        thread::scope(|scope| scope.spawn(confined).join().unwrap())
    }

    #[test]
    fn the_kernel_refuses_what_is_not_named_and_a_link_is_where_it_leads() {
        let (_root, inside, outside) = folders();
        std::os::unix::fs::symlink(outside.join("file"), inside.join("link")).unwrap();
        let allowed = Allowed { write: vec![inside.clone()], ..Allowed::default() };
        let is_refused = |path: &Path| {
            OpenOptions::new().write(true).open(path).is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
        };
        confined(&allowed, |_| {
            assert!(!is_refused(&inside.join("file")));
            assert!(is_refused(&outside.join("file")) && is_refused(&inside.join("link")));
            assert!(fs::read(outside.join("file")).is_err() && fs::read_dir(&outside).is_err());
            fs::write(inside.join("new"), "").unwrap();
            drop(UnixListener::bind(inside.join("socket")).unwrap());
            fs::remove_file(inside.join("socket")).unwrap();
            fs::read("/proc/self/status").unwrap();
        });
        fs::write(outside.join("file"), "other threads may").unwrap();
    }

    #[test]
    fn what_is_named_for_reading_is_only_read_and_logs_are_only_written() {
        let (_root, inside, outside) = folders();
        let allowed = Allowed {
            read: vec![inside.clone()],
            logs: vec![outside.join("log")],
            socket: Some(outside.join("socket")),
            ..Allowed::default()
        };
        confined(&allowed, |_| {
            assert_eq!(fs::read(inside.join("file")).unwrap(), b"content");
            assert!(fs::write(inside.join("file"), "").is_err() && fs::write(inside.join("new"), "").is_err());
            OpenOptions::new().append(true).create(true).open(outside.join("log")).unwrap();
            assert!(fs::read(outside.join("log")).is_err());
            drop(UnixListener::bind(outside.join("socket")).unwrap());
            fs::remove_file(outside.join("socket")).unwrap();
        });
    }

    #[test]
    fn a_configuration_is_refused_with_its_field_the_path_and_the_option() {
        let (_root, inside, outside) = folders();
        let confinement = Confinement { write: vec![inside.clone()], read: vec![outside.clone()] };
        let mut config = VmConfig::new("vm", ByteSize::mib(128));
        config.boot = Some(BootConfig::with_kernel(outside.join("file")));
        config.disks = vec![DiskConfig::new("a", inside.join("file")), DiskConfig::new("b", outside.join("file"))];
        config.disks[1].read_only = true;
        config.serial = SerialConfig { mode: SerialMode::Socket, path: Some(inside.join("socket")) };
        confinement.check(&config).unwrap();
        config.disks[1].read_only = false;
        let problem = confinement.check(&config).unwrap_err();
        assert_eq!((problem.code, problem.pointer.as_deref()), (Code::Unusable, Some("/disks/1/path")));
        assert!(problem.detail.contains("outside/file") && problem.remedy.contains("--landlock PATH"), "{problem}");
        config.disks.pop();
        config.serial.path = Some(outside.join("socket"));
        assert_eq!(confinement.check(&config).unwrap_err().pointer.as_deref(), Some("/serial/path"));
        config.serial.path = Some("/nowhere/socket".into());
        confinement.check(&config).unwrap();
    }

    #[test]
    fn what_is_named_must_exist() {
        let allowed = Allowed { write: vec!["/nowhere".into()], ..Allowed::default() };
        let error = thread::spawn(move || Confinement::enter(&allowed).unwrap_err().to_string()).join().unwrap();
        assert!(error.contains("/nowhere") || error.contains("CONFIG_SECURITY_LANDLOCK"), "{error}");
    }
}
