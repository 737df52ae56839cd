//! What the VMM gets as descriptors: taps, the API socket, and what the jailer itself was started with.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstat, openat, statat, unlinkat};
use rustix::io::{Errno, FdFlags, dup2, fcntl_dupfd_cloexec, fcntl_setfd};

use crate::cli::TapOption;
use crate::error::{JailError, refused, refused_at};
use crate::sys;
use crate::trusted::{self, Found};

/// Descriptors that will be handed over, open as the numbers that the command line names.
#[derive(Debug, Default)]
pub struct Handed {
    /// All numbers.
    pub numbers: Vec<u32>,
    taps: Vec<(String, Vec<OwnedFd>)>,
    listener: Option<UnixListener>,
}

impl Handed {
    /// Checks those to keep and takes the numbers for taps. Call this before the program opens anything.
    ///
    /// # Errors
    /// A descriptor to keep is not open, or is a folder, which would be a way out of the jail; one for a tap is open already.
    pub fn reserve(keep: &[u32], taps: &[TapOption]) -> Result<Self, JailError> {
        for number in keep {
            match fs::metadata(format!("/proc/self/fd/{number}")) {
                Ok(object) if object.is_dir() => {
                    let text = format!("--keep-fd {number}: it is a folder, which would be a way out of the jail");
                    return Err(JailError::Unusable(text));
                }
                Ok(_) => (),
                Err(error) => return Err(JailError::Unusable(format!("--keep-fd {number}: it is not open: {error}"))),
            }
        }
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let mut null = null.map_err(refused("open /dev/null"))?;
        // It must not sit on one of the numbers itself.
        while taps.iter().any(|tap| tap.fds.contains(&null.as_raw_fd().cast_unsigned())) {
            let next = null.as_raw_fd().saturating_add(1);
            null = fcntl_dupfd_cloexec(&null, next).map_err(refused("open /dev/null"))?;
        }
        let mut handed = Self { numbers: keep.to_vec(), taps: Vec::new(), listener: None };
        for tap in taps {
            let places: Result<_, _> = tap.fds.iter().map(|number| reserve(&null, *number)).collect();
            handed.taps.push((tap.name.clone(), places?));
            handed.numbers.extend(&tap.fds);
        }
        Ok(handed)
    }

    /// Opens the taps.
    ///
    /// # Errors
    /// There is no such interface; what the kernel refused.
    pub fn open_taps(&mut self) -> Result<(), JailError> {
        for (name, places) in &mut self.taps {
            // Else the kernel would make one.
            if !Path::new("/sys/class/net").join(&*name).exists() {
                return Err(JailError::Unusable(format!(
                    "--tap {name}: this host has no such interface; make it first"
                )));
            }
            let multi_queue = places.len() > 1;
            for place in places {
                let tun = trusted::find(Path::new("/dev/net/tun"), None)?;
                let readable = format!("/proc/self/fd/{}", tun.fd.as_raw_fd());
                let opened = rustix::fs::open(readable, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
                let opened = opened.map_err(refused("open /dev/net/tun"))?;
                let queue = sys::open_tap(opened, name, multi_queue).map_err(refused(format!("open tap {name}")))?;
                dup2(&queue, place).map_err(refused("hand over a tap"))?;
            }
        }
        Ok(())
    }

    /// Adds the API socket; gives the number that it has.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn add(&mut self, listener: UnixListener) -> Result<u32, JailError> {
        fcntl_setfd(&listener, FdFlags::empty()).map_err(refused("hand over the API socket"))?;
        let number = listener.as_raw_fd().cast_unsigned();
        self.numbers.push(number);
        self.listener = Some(listener);
        Ok(number)
    }
}

fn reserve(null: &OwnedFd, number: u32) -> Result<OwnedFd, JailError> {
    let wanted = number.cast_signed();
    match fcntl_dupfd_cloexec(null, wanted).map_err(refused(format!("take descriptor {number}")))? {
        place if place.as_raw_fd() == wanted => Ok(place),
        _ => Err(JailError::Unusable(format!("--tap: descriptor {number} is open already, or named twice"))),
    }
}

/// Listens on a new Unix socket of root's, mode 0600, in place of one that nobody listens on.
///
/// # Errors
/// The path is in use, or somebody but root could change what it leads to.
pub fn listen(path: &Path) -> Result<(UnixListener, OwnFile), JailError> {
    let (folder, name) = trusted::parent(path)?;
    folder.only_owner_writes()?;
    // Below the folder that was opened, whatever its path leads to by now.
    let at = PathBuf::from(format!("/proc/self/fd/{}", folder.fd.as_raw_fd())).join(&name);
    match statat(&folder.fd, &name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => (),
        Err(error) => return Err(refused_at("examine", path)(error)),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            let text =
                format!("{}: something that is not a socket is already there; choose another path", path.display());
            return Err(JailError::Unusable(text));
        }
        Ok(_) if UnixStream::connect(&at).is_ok() => {
            let text =
                format!("{}: another process is listening there; stop it or choose another path", path.display());
            return Err(JailError::Unusable(text));
        }
        Ok(_) => unlinkat(&folder.fd, &name, AtFlags::empty()).map_err(refused_at("remove the dead socket", path))?,
    }
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(&at);
    rustix::process::umask(before);
    let listener = listener.map_err(refused_at("listen on", path))?;
    Ok((listener, OwnFile::at(folder, name)?))
}

/// A file that this process has made; dropping it removes the file, unless another has taken its place.
#[derive(Debug)]
pub struct OwnFile {
    folder: Found,
    name: OsString,
    /// Held open, as its number would be given to another file else.
    file: OwnedFd,
}

impl OwnFile {
    /// The one that was just made.
    ///
    /// # Errors
    /// It is not there.
    pub fn at(folder: Found, name: OsString) -> Result<Self, JailError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&folder.fd, &name, flags, Mode::empty());
        let file = file.map_err(refused_at("open", Path::new(&name)))?;
        Ok(Self { folder, name, file })
    }

    fn is_still_there(&self) -> rustix::io::Result<bool> {
        let now = statat(&self.folder.fd, &self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        let ours = fstat(&self.file)?;
        Ok((now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino))
    }
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        if self.is_still_there() == Ok(true) {
            // Nobody can be told of more than that it is still there, which is seen.
            let _ = unlinkat(&self.folder.fd, &self.name, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_api_socket_is_roots_alone_replaces_a_dead_one_and_goes_with_its_jailer() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("SKIPPED: this test takes root");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let (listener, file) = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listen(&path).unwrap_err().to_string().contains("listening there"));
        // As if it was killed.
        std::mem::forget(file);
        drop(listener);
        drop(listen(&path).unwrap());
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(listen(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn descriptors_are_taken_once_and_none_is_a_way_out() {
        let tap = |fds: &[u32]| [TapOption { name: "tap0".into(), fds: fds.to_vec() }];
        let handed = Handed::reserve(&[], &tap(&[900, 901])).unwrap();
        assert_eq!(handed.numbers, [900, 901]);
        assert!(Handed::reserve(&[], &tap(&[901])).is_err());
        assert!(Handed::reserve(&[], &tap(&[902, 902])).is_err());
        assert!(Handed::reserve(&[], &tap(&[902])).is_ok());
        let (folder, file) = (fs::File::open("/").unwrap(), fs::File::open("/dev/null").unwrap());
        let number = |file: &fs::File| file.as_raw_fd().cast_unsigned();
        assert!(Handed::reserve(&[number(&folder)], &[]).unwrap_err().to_string().contains("way out"));
        assert!(Handed::reserve(&[899], &[]).is_err());
        assert!(Handed::reserve(&[number(&file)], &[]).is_ok());
    }
}
