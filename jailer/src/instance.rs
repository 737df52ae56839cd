//! What a jailed VM has on the host: a folder, which is locked while it runs.
//!
//! ```text
//! BASE/            root, 0755
//!   ID/            root, 0711; locked (flock) by the jailer that has it
//!     run/         the VMM's, 0700: its /run
//!     vmm          the VMM's process id and when it started
//!     cgroups      the folders of its cgroups
//! ```
//!
//! The jail itself leaves nothing: its root is a tmpfs in a mount namespace, which goes with the last process. So what a jailer that was killed
//! leaves are these files, perhaps a cgroup, and for a moment a VMM that is dying. The next run takes the lock, waits for
//! that VMM's end and removes them. Nothing here is ever reached through `run`, which the VMM can change as it likes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, FlockOperation, Gid, Mode, OFlags, Uid, chownat, flock, mkdirat, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::cgroup;
use crate::cli::Id;
use crate::error::{JailError, refused, refused_at};
use crate::trusted;

/// How long a VMM that was killed has for its end: it may have to wait for disks.
const LAST_WORDS: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
const VMM: &str = "vmm";
const CGROUPS: &str = "cgroups";
const RUN: &str = "run";
/// More than any of the notes has.
const MAX_NOTE: u64 = 64 << 10;

/// The folder of a VM, locked. Dropping it removes the folder.
#[derive(Debug)]
pub struct Instance {
    id: Id,
    base: OwnedFd,
    folder: OwnedFd,
    path: PathBuf,
}

impl Instance {
    /// Takes the folder of `id` below `base`, which is made if only it is missing, and removes what an earlier run left.
    ///
    /// # Errors
    /// [`JailError::InUse`]; [`JailError::Untrusted`]; [`JailError::Remains`].
    pub fn claim(base: &Path, id: &Id) -> Result<Self, JailError> {
        let base = make_base(base)?;
        let path = base.path.join(id.as_str());
        let folder = loop {
            match mkdirat(&base.fd, id.as_str(), Mode::from_raw_mode(0o711)) {
                Ok(()) | Err(Errno::EXIST) => (),
                Err(error) => return Err(refused_at("make", &path)(error)),
            }
            let folder = open_own(&base.fd, &path, id)?;
            flock(&folder, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
                Errno::WOULDBLOCK => JailError::InUse { id: id.to_string(), folder: path.clone() },
                error => refused_at("lock", &path)(error),
            })?;
            // Whoever had it may have removed it between our open and our lock.
            if is_still(&base.fd, id.as_str(), &folder)? {
                break folder;
            }
        };
        let instance = Self { id: id.clone(), base: base.fd, folder, path };
        instance.remove_remains()?;
        Ok(instance)
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder that is the VMM's own.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn make_run(&self, uid: u32, gid: u32) -> Result<OwnedFd, JailError> {
        let at = self.path.join(RUN);
        mkdirat(&self.folder, RUN, Mode::RWXU).map_err(refused_at("make", &at))?;
        let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        chownat(&self.folder, RUN, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(refused_at("give away", &at))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.folder, RUN, flags, Mode::empty()).map_err(refused_at("open", &at))
    }

    /// Notes the process of the VMM, for the next run and for whoever looks after the host.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn note_vmm(&self, pid: Pid) -> Result<(), JailError> {
        let started = started(pid).ok_or(Errno::SRCH).map_err(refused("examine the VMM's process"))?;
        self.note(VMM, &format!("{} {started}\n", pid.as_raw_nonzero()))
    }

    /// Notes the folders of its cgroups, before they are made.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn note_cgroups(&self, folders: &[PathBuf]) -> Result<(), JailError> {
        self.note(CGROUPS, &folders.iter().map(|folder| format!("{}\n", folder.display())).collect::<String>())
    }

    fn note(&self, name: &str, text: &str) -> Result<(), JailError> {
        let at = self.path.join(name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.folder, name, flags, Mode::from_raw_mode(0o644)).map_err(refused_at("make", &at))?;
        File::from(file).write_all(text.as_bytes()).map_err(refused_at("write", &at))
    }

    fn read(&self, name: &str) -> Result<Option<String>, JailError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(&self.folder, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            file => file.map_err(refused_at("open", &self.path.join(name)))?,
        };
        let mut text = String::new();
        let read = File::from(file).take(MAX_NOTE).read_to_string(&mut text);
        read.map_err(refused_at("read", &self.path.join(name)))?;
        Ok(Some(text))
    }

    fn remove_remains(&self) -> Result<(), JailError> {
        if let Some(note) = self.read(VMM)? {
            self.end_vmm(&note)?;
        }
        for folder in self.read(CGROUPS)?.unwrap_or_default().lines() {
            cgroup::remove(Path::new(folder)).map_err(|error| self.remains(format!("cgroup {folder}: {error}")))?;
        }
        self.empty()
    }

    /// Kills the VMM that `note` tells of, if it lives.
    fn end_vmm(&self, note: &str) -> Result<(), JailError> {
        // A note that was not written to its end is of a VMM that was never let go.
        let mut words = note.split_whitespace();
        let pid = words.next().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
        let (Some(pid), Some(noted)) = (pid, words.next()) else { return Ok(()) };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(()),
            process => process.map_err(refused("open the process of an earlier VMM"))?,
        };
        // Another process may have got its number.
        if started(pid).is_none_or(|started| started.to_string() != noted) {
            return Ok(());
        }
        match pidfd_send_signal(&process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => (),
            Err(error) => return Err(refused("kill the VMM of an earlier run")(error)),
        }
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        let waited = poll(&mut ended, Some(&LAST_WORDS)).map_err(refused("wait for the VMM of an earlier run"))?;
        if waited == 0 {
            let pid = pid.as_raw_nonzero();
            return Err(self.remains(format!("its VMM, process {pid}, was killed but does not end; look at its disks")));
        }
        Ok(())
    }

    fn empty(&self) -> Result<(), JailError> {
        // Does not follow links, neither in it nor in its place, and the path to it is only root's to change.
        match std::fs::remove_dir_all(self.path.join(RUN)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(self.remains(format!("{}: {error}", self.path.join(RUN).display())));
            }
            _ => (),
        }
        for note in [VMM, CGROUPS] {
            match unlinkat(&self.folder, note, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => (),
                Err(error) => return Err(self.remains(format!("{}: {error}", self.path.join(note).display()))),
            }
        }
        Ok(())
    }

    fn remains(&self, reason: String) -> JailError {
        JailError::Remains { id: self.id.to_string(), reason }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let removed = self.remove_remains().and_then(|()| {
            unlinkat(&self.base, self.id.as_str(), AtFlags::REMOVEDIR).map_err(refused_at("remove", &self.path))
        });
        if let Err(error) = removed {
            eprintln!("rackvisor-jailer: {error}; the next run of {} tries again", self.id);
        }
    }
}

fn make_base(path: &Path) -> Result<trusted::Found, JailError> {
    let (folder, name) = trusted::parent(path)?;
    match mkdirat(&folder.fd, &name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => (),
        Err(error) => return Err(refused_at("make", path)(error)),
    }
    let base = trusted::find(path, None)?;
    if !base.is_folder() {
        return Err(JailError::Unusable(format!("{} is no folder", base.path.display())));
    }
    base.only_owner_writes()?;
    Ok(base)
}

fn open_own(base: impl AsFd, path: &Path, id: &Id) -> Result<OwnedFd, JailError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let untrusted = |reason: &str| JailError::Untrusted { path: path.into(), reason: reason.into() };
    let folder = openat(base, id.as_str(), flags, Mode::empty()).map_err(|error| match error {
        Errno::LOOP | Errno::NOTDIR => untrusted("it is no folder, but a link or a file"),
        error => refused_at("open", path)(error),
    })?;
    let stat = rustix::fs::fstat(&folder).map_err(refused_at("examine", path))?;
    match (stat.st_uid, stat.st_mode & 0o022) {
        (0, 0) => Ok(folder),
        (0, _) => Err(untrusted("it is writable by others")),
        (uid, _) => Err(untrusted(&format!("it belongs to uid {uid}"))),
    }
}

/// Whether `name` is still what `folder` was opened as.
fn is_still(base: impl AsFd, name: &str, folder: impl AsFd) -> Result<bool, JailError> {
    let ours = rustix::fs::fstat(folder).map_err(refused("examine the VM's folder"))?;
    match statat(base, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(now) => Ok((now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(refused("examine the VM's folder")(error)),
    }
}

/// When a process started, in clock ticks since the host did (proc(5): the 22nd field, the 20th after the name).
fn started(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A pause between two tries.
pub const MOMENT: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{chown, symlink};
    use std::process::{Command, Stdio};
    use std::str::FromStr;

    use super::*;

    fn id() -> Id {
        Id::from_str("vm").unwrap()
    }

    fn folder() -> Option<tempfile::TempDir> {
        if rustix::process::geteuid().is_root() {
            return Some(tempfile::tempdir().unwrap());
        }
        eprintln!("SKIPPED: this test takes root");
        None
    }

    #[test]
    fn a_vm_is_claimed_once_and_leaves_nothing() {
        let Some(folder) = folder() else { return };
        let base = folder.path().join("base");
        let first = Instance::claim(&base, &id()).unwrap();
        first.make_run(1234, 1234).unwrap();
        let path = base.join("vm");
        assert!(matches!(Instance::claim(&base, &id()), Err(JailError::InUse { .. })));
        assert!(path.join("run").exists(), "a second one changes nothing");
        drop(first);
        assert!(!path.exists());
        drop(Instance::claim(&base, &id()).unwrap());
    }

    #[test]
    fn what_is_not_roots_is_neither_used_nor_changed() {
        let Some(folder) = folder() else { return };
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("base")).unwrap();
        fs::create_dir_all(at("precious/run")).unwrap();
        fs::write(at("precious/run/data"), "x").unwrap();
        symlink(at("precious"), at("base/vm")).unwrap();
        let refusal = || match Instance::claim(&at("base"), &id()) {
            Err(JailError::Untrusted { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        assert!(refusal().contains("a link or a file"));
        fs::remove_file(at("base/vm")).unwrap();
        fs::create_dir_all(at("base/vm/run/precious")).unwrap();
        chown(at("base/vm"), Some(1234), None).unwrap();
        assert!(refusal().contains("belongs to uid 1234"));
        assert!(at("base/vm/run/precious").exists() && at("precious/run/data").exists());
    }

    #[test]
    fn remains_are_removed_and_links_among_them_lead_nowhere() {
        let Some(folder) = folder() else { return };
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("precious")).unwrap();
        fs::write(at("precious/data"), "x").unwrap();
        let mut vmm = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let left = Instance::claim(&at("base"), &id()).unwrap();
        left.make_run(1234, 1234).unwrap();
        left.note_vmm(Pid::from_child(&vmm)).unwrap();
        symlink(at("precious"), at("base/vm/run/link")).unwrap();
        fs::create_dir(at("base/vm/run/folder")).unwrap();
        // As if it was killed: the lock goes, the files stay.
        let Instance { folder: lock, .. } = &left;
        flock(lock, FlockOperation::Unlock).unwrap();
        std::mem::forget(left);

        let next = Instance::claim(&at("base"), &id()).unwrap();
        assert!(!vmm.wait().unwrap().success(), "the VMM that was left was killed");
        assert_eq!(fs::read_dir(at("base/vm")).unwrap().count(), 0);
        assert!(at("precious/data").exists());
        drop(next);
    }

    #[test]
    fn a_process_that_got_the_number_of_a_vmm_is_left_alone() {
        let Some(folder) = folder() else { return };
        let mut other = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let instance = Instance::claim(&folder.path().join("base"), &id()).unwrap();
        let started = started(Pid::from_child(&other)).unwrap();
        for note in [format!("{} {}", other.id(), started - 1), other.id().to_string(), "x 1".into(), String::new()] {
            instance.end_vmm(&note).unwrap();
            assert!(other.try_wait().unwrap().is_none(), "{note:?}");
        }
        instance.end_vmm(&format!("{} {started}\n", other.id())).unwrap();
        assert!(other.wait().is_ok());
    }
}
