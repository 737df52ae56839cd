//! What the standard library cannot do with Unix sockets: connect without waiting, and wait for one of several with a deadline.
#![allow(unsafe_code)] // socket(2), connect(2) and poll(2) have no safe form among our dependencies.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::syscall;

/// A deadline, and how far away it was.
#[derive(Clone, Copy)]
pub(crate) struct By {
    pub(crate) at: Instant,
    pub(crate) within: Duration,
}

impl By {
    pub(crate) fn after(within: Duration) -> Self {
        Self { at: Instant::now() + within, within }
    }
}

/// Connects to the socket at `path` at once or not at all: `EAGAIN` where others wait for the same listener.
/// The stream never blocks.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointer is passed; a new descriptor comes back or -1.
    let fd = syscall::value(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: [0; 108] };
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address is a whole `sockaddr_un` that lives over the call, and its path ends with a NUL.
    syscall::check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(UnixStream::from(socket))
}

/// Waits until one of `descriptors` is readable or closed, at the latest until `deadline`; says which is the first.
pub(crate) fn readable<const N: usize>(
    descriptors: [RawFd; N],
    deadline: Option<Instant>,
) -> io::Result<Option<usize>> {
    let mut polled = descriptors.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // Rounded up, so that the deadline has passed when the wait is over.
        let timeout = left.map_or(-1, |left| i32::try_from(left.as_millis()).unwrap_or(i32::MAX - 1) + 1);
        // SAFETY: the pointer and the count are those of an array that is borrowed mutably.
        match syscall::value(unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, timeout) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(0) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
            Ok(_) => return Ok(polled.iter().position(|polled| polled.revents != 0)),
        }
    }
}
