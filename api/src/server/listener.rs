//! The socket file: made safely, replaced only when dead, removed only when still ours.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::descriptors::OwnDescriptors;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

/// How long to wait for others who look after sockets of the same folder: each needs microseconds.
const LOCKING: Duration = Duration::from_secs(1);

/// Who may open the socket file, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Its permissions, such as 0o660.
    pub mode: u32,
    /// Its owner, if not this process's user.
    pub uid: Option<u32>,
    /// Its group, if not this process's.
    pub gid: Option<u32>,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self { mode: 0o600, uid: None, gid: None }
    }
}

/// A socket file of ours; dropping it removes the file, unless another has taken its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// The file itself: as long as it is held, no other file can have its number.
    held: OwnedFd,
}

impl SocketFile {
    fn is_at(&self, path: &Path) -> bool {
        let number = |file: rustix::fs::Stat| (file.st_dev, file.st_ino);
        let ours = rustix::fs::fstat(&self.held).map(number);
        matches!((ours, rustix::fs::lstat(path).map(number)), (Ok(ours), Ok(there)) if ours == there)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Without the lock it stays: a successor removes what it finds dead.
        let _lock = match lock_folder(&self.path) {
            Ok(lock) => lock,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "the API socket is left behind");
                return;
            }
        };
        if self.is_at(&self.path)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the API socket; remove it by hand");
        }
    }
}

/// Listens on a new Unix socket at `path`.
pub(super) fn listen(path: &Path, options: SocketOptions) -> io::Result<(UnixListener, SocketFile)> {
    let _lock = lock_folder(path)?;
    remove_dead(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // Until `listen` nobody can connect, so there is no moment in which others could.
    let held = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let file = SocketFile { path: path.to_owned(), held };
    if options.uid.is_some() || options.gid.is_some() {
        std::os::unix::fs::lchown(path, options.uid, options.gid)?;
    }
    fs::set_permissions(path, Permissions::from_mode(options.mode & 0o777))?;
    socket.listen(BACKLOG)?;
    Ok((UnixListener::from(socket), file))
}

/// Keeps other rackvisors from making or removing sockets in the folder of `path`, for as long as this is held. Nothing is
/// held in a folder that cannot be read.
fn lock_folder(path: &Path) -> io::Result<Option<OwnedFd>> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = match rustix::fs::open(folder, flags, Mode::empty()) {
        Ok(folder) => folder,
        Err(Errno::ACCESS) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = Instant::now() + LOCKING;
    loop {
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(folder)),
            Err(Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::new(
                    io::ErrorKind::WouldBlock,
                    "somebody holds a lock on the folder: see lslocks",
                ));
            }
            // A file system without locks.
            Err(_) => return Ok(None),
        }
    }
}

/// A listening Unix socket that this process was started with, as descriptor `number`.
pub(super) fn inherited(number: u32) -> io::Result<UnixListener> {
    let socket = OwnDescriptors::new()?.copy(number)?;
    let listens = sockopt::socket_domain(&socket)? == AddressFamily::UNIX
        && sockopt::socket_type(&socket)? == SocketType::STREAM
        && sockopt::socket_acceptconn(&socket)?;
    if listens { Ok(socket.into()) } else { Err(io::Error::other("it is no Unix stream socket that listens")) }
}

/// Removes the socket of a process that is gone; anything else at `path` is an error.
fn remove_dead(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !found.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "something that is not a socket is already there; choose another path",
        ));
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // One that accepts nobody may have a full queue: that it is there is answer enough.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process is listening there; stop it or choose another path",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_or_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let (listener, file) = listen(&path, SocketOptions::default()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listen(&path, SocketOptions::default()).unwrap_err().kind(), io::ErrorKind::AddrInUse);

        // The process died without cleaning up.
        std::mem::forget(file);
        drop(listener);
        let (_listener, file) = listen(&path, SocketOptions::default()).unwrap();
        drop(file);
        assert!(!path.exists());

        fs::write(&path, "precious").unwrap();
        assert_eq!(listen(&path, SocketOptions::default()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn only_a_socket_that_listens_is_inherited() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, _file) = listen(&folder.path().join("api.sock"), SocketOptions::default()).unwrap();
        let (stream, _other) = UnixStream::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let file = fs::File::open("/dev/null").unwrap();
        let number = |fd: i32| u32::try_from(fd).unwrap();
        inherited(number(listener.as_raw_fd())).unwrap();
        for other in [stream.as_raw_fd(), tcp.as_raw_fd(), file.as_raw_fd(), 1_000_000] {
            assert!(inherited(number(other)).is_err(), "{other}");
        }
    }

    #[test]
    fn the_socket_of_a_successor_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let (_first, file) = listen(&path, SocketOptions::default()).unwrap();
        fs::rename(&path, folder.path().join("old.sock")).unwrap();
        let (_second, _file) = listen(&path, SocketOptions::default()).unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn a_successor_never_has_the_number_of_a_socket_that_is_still_to_be_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        for _ in 0..50 {
            let (first, file) = listen(&path, SocketOptions::default()).unwrap();
            drop(first);
            fs::remove_file(&path).unwrap();
            let (_second, successor) = listen(&path, SocketOptions::default()).unwrap();
            drop(file);
            assert!(path.exists());
            drop(successor);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_socket_that_accepts_nobody_is_alive_and_whoever_looks_does_not_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        socket.listen(0).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        assert_eq!(listen(&path, SocketOptions::default()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn of_many_that_find_a_dead_socket_one_gets_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        for _ in 0..20 {
            std::mem::forget(listen(&path, SocketOptions::default()).unwrap().1);
            let got: Vec<_> = std::thread::scope(|scope| {
                let starting: Vec<_> =
                    (0..8).map(|_| scope.spawn(|| listen(&path, SocketOptions::default()))).collect();
                starting.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
            });
            assert_eq!(got.len(), 1);
            UnixStream::connect(&path).unwrap();
        }
    }

    #[test]
    fn mode_and_owner_are_as_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let own = fs::metadata(folder.path()).unwrap();
        // Only root may give files away.
        let other = if own.uid() == 0 { 4711 } else { own.uid() };
        let options = SocketOptions { mode: 0o660, uid: Some(other), gid: None };
        let (_listener, _file) = listen(&path, options).unwrap();
        let made = fs::metadata(&path).unwrap();
        assert_eq!((made.mode() & 0o777, made.uid(), made.gid()), (0o660, other, own.gid()));
    }
}
