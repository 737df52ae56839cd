//! Going to the background, and telling how that went.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::descriptors::OwnFile;
use crate::error::{JailError, refused, refused_at};
use crate::{sys, trusted};

/// The longest that it tells.
const MAX_WORDS: u64 = 16 << 10;

/// This process, in the background; whoever started the jailer waits for its word.
#[derive(Debug)]
pub struct Background(File);

impl Background {
    /// Goes there: the process that called this is a new one without terminal, which writes to `log`. The former one ends when
    /// [`Background::tell`] was called, without dropping anything.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn enter(log: &OwnedFd) -> Result<Self, JailError> {
        let (hear, speak) = pipe_with(PipeFlags::CLOEXEC).map_err(refused("make a pipe"))?;
        if sys::fork().map_err(refused("go to the background"))?.is_some() {
            drop(speak);
            std::process::exit(report(File::from(hear)));
        }
        let entered = (|| {
            rustix::process::setsid()?;
            rustix::process::chdir("/")?;
            let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            rustix::stdio::dup2_stdin(&null)?;
            rustix::stdio::dup2_stdout(log)?;
            rustix::stdio::dup2_stderr(log)
        })();
        entered.map_err(refused("go to the background"))?;
        Ok(Self(File::from(speak)))
    }

    /// Tells that all is well, or what is not.
    pub fn tell(mut self, outcome: Result<(), &JailError>) {
        let words = match outcome {
            Ok(()) => "0\n".to_owned(),
            Err(error) => format!("{}\n{error}", error.code()),
        };
        // Whoever waited may have been killed; the VM goes on.
        let _ = self.0.write_all(words.as_bytes());
    }
}

/// Passes on what the background tells; gives the exit code.
fn report(hear: File) -> i32 {
    let mut words = String::new();
    let _ = hear.take(MAX_WORDS).read_to_string(&mut words);
    match words.split_once('\n') {
        Some(("0", _)) => 0,
        Some((code, text)) => {
            eprintln!("rackvisor-jailer: {text}");
            code.parse().unwrap_or(125)
        }
        None => {
            eprintln!("rackvisor-jailer: the process in the background was killed");
            125
        }
    }
}

/// Opens a log file of root's, made with mode 0600.
///
/// # Errors
/// Somebody but root could change what the path leads to; what the kernel refused.
pub fn open_log(path: &Path) -> Result<OwnedFd, JailError> {
    let (folder, name) = trusted::parent(path)?;
    folder.only_owner_writes()?;
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    openat(&folder.fd, &name, flags, Mode::RUSR | Mode::WUSR).map_err(refused_at("open the log", path))
}

/// Writes this process's id to a file, in place of an older one; it is removed when dropped.
///
/// # Errors
/// As [`open_log`].
pub fn write_pid(path: &Path) -> Result<OwnFile, JailError> {
    let (folder, name) = trusted::parent(path)?;
    folder.only_owner_writes()?;
    match unlinkat(&folder.fd, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => (),
        Err(error) => return Err(refused_at("replace", path)(error)),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(&folder.fd, &name, flags, Mode::from_raw_mode(0o644)).map_err(refused_at("make", path))?;
    let made = OwnFile::at(folder, name)?;
    File::from(file).write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(refused_at("write", path))?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_pid_file_replaces_an_older_one_and_goes_unless_it_was_replaced() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("SKIPPED: this test takes root");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let precious = folder.path().join("precious");
        fs::write(&precious, "x").unwrap();
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        let file = write_pid(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(fs::read(&precious).unwrap(), b"x", "what a link led to is left alone");
        let next = write_pid(&path).unwrap();
        drop(file);
        assert!(path.exists());
        drop(next);
        assert!(!path.exists());
    }
}
