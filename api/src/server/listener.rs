//! The socket file: made safely, replaced only when dead, removed only when still ours.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketType, sockopt};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::descriptors::OwnDescriptors;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

/// A socket file of ours; dropping it removes the file, unless another has taken its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|file| file.dev() == self.device && file.ino() == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the API socket; remove it by hand");
        }
    }
}

/// Listens on a new Unix socket at `path`, mode 0600.
pub(super) fn listen(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    remove_dead(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // Until `listen` nobody can connect, so there is no moment in which others could.
    let made = fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.to_owned(), device: made.dev(), inode: made.ino() };
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG)?;
    Ok((UnixListener::from(socket), file))
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
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process is listening there; stop it or choose another path",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_or_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let (listener, file) = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);

        // The process died without cleaning up.
        std::mem::forget(file);
        drop(listener);
        let (_listener, file) = listen(&path).unwrap();
        drop(file);
        assert!(!path.exists());

        fs::write(&path, "precious").unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn only_a_socket_that_listens_is_inherited() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, _file) = listen(&folder.path().join("api.sock")).unwrap();
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
        let (_first, file) = listen(&path).unwrap();
        fs::rename(&path, folder.path().join("old.sock")).unwrap();
        let (_second, _file) = listen(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }
}
