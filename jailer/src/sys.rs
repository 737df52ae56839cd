//! System calls that have no safe wrapper among our dependencies.
#![allow(unsafe_code)] // fork, exec, signal masks and a few newer calls are the C library's.

use std::ffi::{CString, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;

use rustix::process::Pid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The signals that the jailer waits for: those that it passes on, and that of its child's end.
const AWAITED: [c_int; 7] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGCHLD];

/// Linux UAPI, linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Starts a copy of this process, which must have one thread only. `None` in the copy.
pub fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the jailer never starts a thread, so no lock can be held by one that the copy lacks.
    let pid = check(unsafe { libc::fork() })?;
    Ok(Pid::from_raw(pid))
}

/// Replaces this program; only returns if that failed.
pub fn exec(program: &CString, arguments: &[CString]) -> io::Error {
    let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    pointers.push(ptr::null());
    let environment = [ptr::null()];
    // SAFETY: both arrays are of C strings that live until the call returns, and end with a null pointer.
    unsafe { libc::execve(program.as_ptr(), pointers.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// The signals that are awaited, blocked.
pub struct Signals {
    set: libc::sigset_t,
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks them, so that none gets lost between two waits.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: sigemptyset makes a set of the memory, to which signals that exist are added; sigprocmask fills in `before`.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in AWAITED {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            check(libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr()))?;
            Ok(Self { set: set.assume_init(), before: before.assume_init() })
        }
    }

    /// Waits for the next one and gives its number.
    pub fn wait(&self) -> io::Result<c_int> {
        let mut signal = 0;
        // SAFETY: the set is valid, and the number is written to `signal`.
        match unsafe { libc::sigwait(&raw const self.set, &raw mut signal) } {
            0 => Ok(signal),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Lets them through as before.
    pub fn restore(&self) {
        // SAFETY: the set is valid. Restoring a mask that was valid cannot fail.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut()) };
    }
}

/// Moves this process, or with `NEWPID` its children, into new namespaces.
pub fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // To unshare the table of descriptors would confuse their owners.
    let flags = flags.difference(UnshareFlags::FILES);
    // SAFETY: descriptors stay what they are.
    unsafe { unshare_unsafe(flags) }
}

/// Lets exec close the descriptors `first` to `last`.
pub fn close_at_exec(first: u32, last: u32) -> io::Result<()> {
    let flags = c_int::try_from(libc::CLOSE_RANGE_CLOEXEC).unwrap_or(0);
    // SAFETY: no descriptor is closed now, and no memory is passed.
    check(unsafe { libc::close_range(first, last, flags) }).map(drop)
}

/// Sets what a mount allows (`MOUNT_ATTR_…`), and that it takes no part in what happens to the one that it was copied from.
pub fn restrict_mount(mount: impl AsFd, attributes: u64) -> io::Result<()> {
    let wanted = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let (fd, path, size) = (mount.as_fd().as_raw_fd(), c"".as_ptr(), size_of_val(&wanted));
    // SAFETY: the path is an empty C string, which with AT_EMPTY_PATH means the descriptor; `size` bytes are read of `wanted`.
    let result =
        unsafe { libc::syscall(libc::SYS_mount_setattr, fd, path, libc::AT_EMPTY_PATH, &raw const wanted, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A queue of the tap `name`, with the flags that rackvisor wants.
pub fn open_tap(device: OwnedFd, name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    // The last byte stays zero.
    let room = request.ifr_name.len().saturating_sub(1);
    if name.is_empty() || name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    check(unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    Ok(device)
}
