//! A swtpm of this program's own, for `rackvisor run --tpm`. Agents start theirs by themselves.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rackvisor_api::config::TpmConfig;
use thiserror::Error;

/// Starts what its arguments say, which listens on standard output, and ends it when standard input does: so swtpm ends with this
/// process whatever ends that, and this process needs no right to end others.
const KEEPER: &str = r#""$@" & exec >/dev/null 2>&1; read -r _; kill $!; wait"#;

/// How long one whose VM has just ended may take to go, as when a VM is started again at once.
const GOING: Duration = Duration::from_secs(2);

/// Why there is no TPM.
#[derive(Debug, Error)]
pub enum SwtpmError {
    /// It is not installed.
    #[error("--tpm: there is no program swtpm: install it (Debian package swtpm)")]
    Missing,
    /// The configuration names another one.
    #[error("--tpm: the configuration names a TPM already: leave one of the two out")]
    Twice,
    /// Another process uses the state.
    #[error("--tpm: another swtpm serves the state in {}: a TPM belongs to one VM at a time", .0.display())]
    InUse(PathBuf),
    /// The host refused something.
    #[error("--tpm: cannot {action} {}: {error}", path.display())]
    Host {
        /// What was asked for.
        action: &'static str,
        /// The folder, socket or program.
        path: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// A swtpm that runs until this is dropped or the process ends.
pub struct Swtpm {
    socket: PathBuf,
    _keeper: ChildStdin,
}

impl Swtpm {
    /// Starts one with its state in `folder`, which is made if it is not there, and with it a new TPM.
    ///
    /// # Errors
    /// [`SwtpmError`]. What swtpm itself finds wrong is in `swtpm.log` in the folder.
    pub fn start(folder: &Path) -> Result<Self, SwtpmError> {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&paths).map(|path| path.join("swtpm")).find(|path| path.is_file());
        let program = program.ok_or(SwtpmError::Missing)?;
        let refused = |action, path: &Path| {
            let path = path.to_owned();
            move |error| SwtpmError::Host { action, path, error }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(refused("make", folder))?;
        let folder = fs::canonicalize(folder).map_err(refused("find", folder))?;
        let socket = folder.join("swtpm.sock");
        let end = Instant::now() + GOING;
        while UnixStream::connect(&socket).is_ok() {
            if Instant::now() > end {
                return Err(SwtpmError::InUse(folder));
            }
            thread::sleep(Duration::from_millis(20));
        }
        // What an earlier one left behind.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(refused("listen on", &socket))?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", KEEPER, "swtpm"]).arg(&program).args(["socket", "--tpm2", "--ctrl", "type=unixio,fd=1"]);
        command.arg("--tpmstate").arg(with_path("dir=", &folder));
        command.arg("--log").arg(with_path("file=", &folder.join("swtpm.log")));
        // Of a process group of its own, so that keys of the terminal do not end it before the VM.
        command.process_group(0).stdin(Stdio::piped()).stdout(OwnedFd::from(listener)).stderr(Stdio::null());
        let keeper = command.spawn().map_err(refused("start", &program))?.stdin;
        let _keeper = keeper.ok_or(SwtpmError::Missing)?;
        Ok(Self { socket, _keeper })
    }

    /// What names it in the configuration of a VM.
    pub fn config(&self) -> TpmConfig {
        TpmConfig { socket: self.socket.clone() }
    }
}

fn with_path(option: &str, path: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(option);
    argument.push(path);
    argument
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// Asks for its capabilities.
    fn answers(socket: &Path) -> bool {
        let Ok(mut stream) = UnixStream::connect(socket) else { return false };
        let mut capabilities = [0; 8];
        stream.write_all(&1_u32.to_be_bytes()).is_ok() && stream.read_exact(&mut capabilities).is_ok()
    }

    #[test]
    fn swtpm_serves_its_folder_alone_and_ends_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("new").join("tpm");
        let swtpm = match Swtpm::start(&state) {
            Ok(swtpm) => swtpm,
            Err(SwtpmError::Missing) => {
                eprintln!("SKIPPED: swtpm is not installed (Debian package swtpm)");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let socket = swtpm.config().socket;
        assert!(answers(&socket));
        assert!(matches!(Swtpm::start(&state), Err(SwtpmError::InUse(_))));
        drop(swtpm);
        let again = Swtpm::start(&state).unwrap();
        assert!(answers(&again.config().socket), "{}", fs::read_to_string(state.join("swtpm.log")).unwrap_or_default());
        drop(again);
        let end = Instant::now() + Duration::from_secs(20);
        while answers(&socket) {
            assert!(Instant::now() < end, "it goes on");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_folder_that_cannot_be_is_named() {
        let error = Swtpm::start(Path::new("/proc/tpm")).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("/proc/tpm") || error.contains("install"), "{error}");
    }
}
