//! The system calls that the standard library does not have: pseudo-terminals, terminal modes, inotify, sockets made with
//! their final mode, and sends that never wait.
#![allow(unsafe_code)] // Each is one libc call with checked arguments.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::syscall::value;

/// Owns the descriptor that a system call returned.
fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    let fd = value(result)?;
    // SAFETY: the kernel has just made this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new pseudo-terminal in raw mode: its master, non-blocking, and the path of its slave.
pub(super) fn open_pty() -> io::Result<(File, PathBuf)> {
    // SAFETY: a call without pointers.
    let master =
        owned(unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    let fd = master.as_raw_fd();
    // SAFETY: calls without pointers on a descriptor that we own.
    value(unsafe { libc::grantpt(fd) })?;
    // SAFETY: as above.
    value(unsafe { libc::unlockpt(fd) })?;
    let mut name = [0u8; 64];
    // SAFETY: the buffer is writable for the length given.
    let error = unsafe { libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
    let mut mode = terminal_mode(fd)?;
    // SAFETY: the pointer is to a live termios.
    unsafe { libc::cfmakeraw(&raw mut mode) };
    set_terminal_mode(fd, &mode)?;
    Ok((File::from(master), PathBuf::from(OsStr::from_bytes(name.to_bytes()))))
}

/// The mode of the terminal behind `fd`.
pub(super) fn terminal_mode(fd: RawFd) -> io::Result<libc::termios> {
    let mut mode = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the pointer is to room for a termios.
    value(unsafe { libc::tcgetattr(fd, mode.as_mut_ptr()) })?;
    // SAFETY: the call above succeeded and filled it.
    Ok(unsafe { mode.assume_init() })
}

/// Sets the mode of the terminal behind `fd`, at once. Async-signal-safe.
pub(super) fn set_terminal_mode(fd: RawFd, mode: &libc::termios) -> io::Result<()> {
    // SAFETY: the pointer is to a live termios.
    value(unsafe { libc::tcsetattr(fd, libc::TCSANOW, mode) }).map(|_| ())
}

/// Forgets what was written to a terminal and not read from its other end.
pub(super) fn discard_output(fd: BorrowedFd<'_>) {
    // SAFETY: a call without pointers. Nothing depends on its success.
    unsafe { libc::tcflush(fd.as_raw_fd(), libc::TCOFLUSH) };
}

/// Runs `action` when the process exits.
pub(super) fn at_exit(action: extern "C" fn()) {
    // SAFETY: the function lives as long as the process. Without room for it, nothing is restored at exit.
    unsafe { libc::atexit(action) };
}

/// An inotify descriptor that tells of each opening and closing of `path`, non-blocking.
pub(super) fn watch_opens(path: &Path) -> io::Result<File> {
    // SAFETY: a call without pointers.
    let inotify = owned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })?;
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is a live C string.
    value(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), libc::IN_OPEN | libc::IN_CLOSE) })?;
    Ok(File::from(inotify))
}

/// A listening socket at `path`, mode 0600 from its first moment on, non-blocking.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: a call without pointers.
    let socket = owned(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    let fd = socket.as_raw_fd();
    // SAFETY: a call without pointers. On Linux the socket file takes over the socket's mode.
    value(unsafe { libc::fchmod(fd, 0o600) })?;
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    // One byte stays for the end.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::from(io::ErrorKind::InvalidFilename));
    }
    for (to, &from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from as libc::c_char;
    }
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the pointer is to a live sockaddr_un of this length.
    value(unsafe { libc::bind(fd, (&raw const address).cast(), length) })?;
    // SAFETY: a call without pointers.
    value(unsafe { libc::listen(fd, 16) })?;
    Ok(UnixListener::from(socket))
}

/// Sends without waiting and without SIGPIPE.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and length are those of a live slice.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives without waiting.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let (pointer, length) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: the pointer and length are those of a live, writable slice.
    let received = unsafe { libc::recv(socket.as_raw_fd(), pointer, length, libc::MSG_DONTWAIT) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}
