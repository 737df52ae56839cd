//! Taps: the host side of a NIC.
//!
//! A tap is taken by name or as descriptors that the agent opened, one per queue pair; with descriptors the VMM needs no
//! privilege. Each frame has the header of virtio 1.x before it (§5.1.6), which the kernel checks and obeys: 12 bytes, or 20
//! with room for a hash, which the kernel skips.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use thiserror::Error;

use super::features::{TUN_F_BASE, TUN_F_USO};
use super::sys;

/// Bytes of `struct virtio_net_hdr_mrg_rxbuf`, which precedes every frame (virtio 1.2 §5.1.6).
pub const HEADER_SIZE: usize = 12;
/// Bytes of `struct virtio_net_hdr_v1_hash`, which precedes every frame of a driver that takes HASH_REPORT.
pub const HASH_HEADER_SIZE: usize = 20;
/// Most queues that the kernel gives one tap.
pub const MAX_QUEUES: u16 = 256;
const WANTED_FLAGS: u16 = sys::IFF_TAP | sys::IFF_NO_PI | sys::IFF_VNET_HDR;

/// Why a tap cannot be used. Every message names the tap and the remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TapError {
    /// Not a name that an interface can have.
    #[error("{0:?} is no interface name: use 1 to 15 printable characters without '/', ':', '%' and spaces")]
    Name(String),
    /// No queue, or more than the kernel has.
    #[error("tap {name}: {count} queues asked for: use 1 to {MAX_QUEUES}")]
    Count {
        /// The tap.
        name: String,
        /// Queues asked for.
        count: usize,
    },
    /// /dev/net/tun cannot be opened.
    #[error(
        "/dev/net/tun, needed for tap {name}, cannot be opened: {error}; load the module `tun` or grant access to the device"
    )]
    Driver {
        /// The tap.
        name: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// There is no such tap, and it may not be created.
    #[error(
        "there is no tap {0}, and creating it needs CAP_NET_ADMIN: create it with `ip tuntap add dev {0} mode tap vnet_hdr user USER`, or pass descriptors"
    )]
    Missing(String),
    /// The tap belongs to somebody else.
    #[error(
        "no permission to use tap {0}: give it to this user with `ip tuntap add dev {0} mode tap vnet_hdr user USER`, grant CAP_NET_ADMIN, or pass descriptors"
    )]
    Permission(String),
    /// Somebody else has the tap open.
    #[error(
        "tap {0} is busy: another process has it open; find it with `grep -l 'iff:.*{0}' /proc/[0-9]*/fdinfo/*` and stop it, or use another tap"
    )]
    Busy(String),
    /// An interface of another kind, or a tap with another number of queues.
    #[error("{name} cannot be opened as a tap with {queues} queue(s): it is another kind of interface, or was created {} multi_queue; create it with `ip tuntap add dev {name} mode tap vnet_hdr{}`", if *queues > 1 { "without" } else { "with" }, if *queues > 1 { " multi_queue" } else { "" })]
    Kind {
        /// The interface.
        name: String,
        /// Queues asked for.
        queues: u16,
    },
    /// A descriptor that is no tap at all, or no longer one.
    #[error(
        "descriptor {index} for the NIC is not a tap, or its tap was deleted ({error}): pass descriptors of /dev/net/tun after TUNSETIFF"
    )]
    NotATap {
        /// Position in the list of descriptors.
        index: usize,
        /// The kernel's answer.
        error: io::Error,
    },
    /// Two descriptors are the same queue.
    #[error(
        "descriptors {first} and {second} for the NIC are one queue of tap {name}: open /dev/net/tun anew for each queue"
    )]
    Repeated {
        /// The tap.
        name: String,
        /// Position in the list of descriptors.
        first: usize,
        /// Another position.
        second: usize,
    },
    /// A descriptor of a tap with flags that do not fit.
    #[error("tap {name} has flags {flags:#06x}: open it with IFF_TAP|IFF_NO_PI|IFF_VNET_HDR{}", if *multi { "|IFF_MULTI_QUEUE, one descriptor for each queue pair" } else { "" })]
    Flags {
        /// The tap.
        name: String,
        /// Its flags, from TUNGETIFF.
        flags: u16,
        /// Whether it needs several queues.
        multi: bool,
    },
    /// The descriptors are of different taps.
    #[error("descriptors of both tap {first} and tap {other} were passed for one NIC: pass queues of one tap only")]
    Mixed {
        /// The tap of the first descriptor.
        first: String,
        /// Another.
        other: String,
    },
    /// There is no descriptor left.
    #[error("the descriptors of tap {name} cannot be copied: {error}; raise the limit of descriptors of this process")]
    Copy {
        /// The tap.
        name: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The kernel lacks what the NIC needs.
    #[error("tap {name}: the kernel refused to {action}: {error}; Linux 5.4 or newer is needed")]
    Kernel {
        /// The tap.
        name: String,
        /// What was asked of it.
        action: &'static str,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// An open tap, with one descriptor per queue pair. Closing it puts back what was set.
pub struct Tap {
    name: String,
    queues: Vec<TapQueue>,
    uso: bool,
    /// How it was opened by its name; `None` if it came as descriptors.
    flags: Option<u16>,
    /// `None` for what is not a real tap, in tests.
    asker: Option<sys::Asker>,
    /// The header size that was found. `None` for what is not a real tap, in tests.
    found_header: Option<i32>,
    /// Bytes of the header before each frame.
    header: AtomicUsize,
    /// A program of ours chooses the queues of frames.
    steered: AtomicBool,
    carrier_lost: AtomicBool,
    /// It has a filter of ours.
    filtered: AtomicBool,
}

struct TapQueue {
    fd: OwnedFd,
    attached: AtomicBool,
}

impl Tap {
    /// Opens the tap `name` with `queues` queues (1..=256). Where it does not exist and the process has CAP_NET_ADMIN, the
    /// kernel creates it: it is down then, belongs to no bridge, and goes when the VMM ends. That is logged as a warning.
    ///
    /// # Errors
    /// [`TapError`] for a bad name, a missing, foreign or busy tap, or one that was made with other flags.
    pub fn open(name: &str, queues: u16) -> Result<Self, TapError> {
        let (fds, flags) = attach(name, queues)?;
        Self::from_checked(name.to_owned(), fds, Some(flags))
    }

    /// Takes a tap as descriptors, one per queue pair, that somebody else opened. They become non-blocking.
    ///
    /// # Errors
    /// [`TapError`] if they are not queues of one tap with the flags that are needed.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        let name = check(&fds)?;
        // A VMM that was killed leaves queues out of service and the carrier lost.
        for fd in fds.iter().map(AsFd::as_fd) {
            if sys::interface(fd).is_ok_and(|(_, flags)| flags & sys::IFF_DETACH_QUEUE != 0) {
                let refused =
                    |error| TapError::Kernel { name: name.clone(), action: "take a queue into service", error };
                sys::set_queue(fd, true).map_err(refused)?;
            }
        }
        let tap = Self::from_checked(name, fds, None)?;
        tap.set_carrier(true);
        Ok(tap)
    }

    fn from_checked(name: String, fds: Vec<OwnedFd>, flags: Option<u16>) -> Result<Self, TapError> {
        let queues = fds.into_iter().map(|fd| TapQueue { fd, attached: AtomicBool::new(true) }).collect();
        let mut tap = Self::new(name, queues, flags);
        tap.asker = match sys::Asker::new() {
            Ok(asker) => Some(asker),
            Err(error) => {
                return Err(TapError::Kernel { name: tap.name.clone(), action: "tell about interfaces", error });
            }
        };
        // Dropped after a failure, it puts back what was set so far.
        match tap.prepare() {
            Ok(()) => Ok(tap),
            Err((action, error)) => Err(TapError::Kernel { name: tap.name.clone(), action, error }),
        }
    }

    fn new(name: String, queues: Vec<TapQueue>, flags: Option<u16>) -> Self {
        Self {
            name,
            queues,
            uso: false,
            flags,
            asker: None,
            found_header: None,
            header: AtomicUsize::new(HEADER_SIZE),
            steered: AtomicBool::new(false),
            carrier_lost: AtomicBool::new(false),
            filtered: AtomicBool::new(false),
        }
    }

    fn prepare(&mut self) -> Result<(), (&'static str, io::Error)> {
        for queue in &self.queues {
            sys::set_nonblocking(queue.fd.as_fd()).map_err(|error| ("make it non-blocking", error))?;
        }
        let Some(first) = self.queues.first() else { return Ok(()) };
        let fd = first.fd.as_fd();
        let features = sys::driver_features(fd).map_err(|error| ("tell its features", error))?;
        if features & u32::from(sys::IFF_VNET_HDR) == 0 {
            return Err(("offer IFF_VNET_HDR", io::ErrorKind::Unsupported.into()));
        }
        self.found_header = Some(sys::header_size(fd).map_err(|error| ("tell the header size", error))?);
        self.set_header(HEADER_SIZE).map_err(|error| ("set the header size", error))?;
        self.uso = sys::set_offload(fd, TUN_F_BASE | TUN_F_USO).is_ok();
        if !self.uso {
            sys::set_offload(fd, TUN_F_BASE).map_err(|error| ("offer checksum and TSO offload", error))?;
        }
        sys::set_offload(fd, 0).map_err(|error| ("switch offloads off", error))
    }

    /// Descriptors that keep frames apart but are no taps (sockets), for tests on machines without taps.
    ///
    /// # Panics
    /// If they cannot be made non-blocking.
    #[cfg(any(test, feature = "test-double"))]
    #[expect(clippy::expect_used, reason = "a test fails by panicking, also in its helpers")]
    #[must_use]
    pub fn double(fds: Vec<OwnedFd>) -> Self {
        for fd in &fds {
            sys::set_nonblocking(fd.as_fd()).expect("a descriptor of a socket");
        }
        let queues = fds.into_iter().map(|fd| TapQueue { fd, attached: AtomicBool::new(true) }).collect();
        let mut tap = Self::new("double".to_owned(), queues, None);
        tap.uso = true;
        tap
    }

    /// What whoever looks after the host can do about a tap that fails.
    pub(super) fn remedy(&self) -> &'static str {
        match self.flags {
            Some(_) => "set it up with `ip link set up`, or make it again if it was deleted",
            None => {
                "set it up with `ip link set up`; if it was deleted, end the VM and define the NIC with descriptors of a new one"
            }
        }
    }

    /// Whether the interface behind the descriptors was deleted.
    pub(super) fn is_gone(&self) -> bool {
        self.control().is_some_and(|fd| sys::interface(fd).is_err())
    }

    /// Whether frames can pass, for those who do not see them fail.
    ///
    /// # Errors
    /// `EBADFD` if the interface was deleted, `EIO` if it is down.
    pub(super) fn check(&self) -> io::Result<()> {
        let Some(fd) = self.control() else { return Ok(()) };
        sys::interface(fd)?;
        match self.asker.as_ref().map(|asker| asker.is_up(&self.name)) {
            Some(Ok(false)) => Err(io::Error::from_raw_os_error(libc::EIO)),
            // One in another network namespace cannot be asked by its name.
            _ => Ok(()),
        }
    }

    /// One of the kernel's counters of the interface, where it is in this network namespace.
    pub(super) fn statistic(&self, counter: &str) -> Option<u64> {
        self.found_header?;
        let value = std::fs::read_to_string(format!("/sys/class/net/{}/statistics/{counter}", self.name)).ok()?;
        value.trim().parse().ok()
    }

    /// Has the kernel drop each frame to the guest for which `program` gives 0; `None`: no more. Of all queues in service;
    /// to be repeated after [`Tap::use_queues`] and [`Tap::reopen`].
    ///
    /// # Errors
    /// The kernel's answer; there is no filter then.
    pub(super) fn set_filter(&self, program: Option<&[libc::sock_filter]>) -> io::Result<()> {
        let Some(fd) = self.control() else { return Ok(()) };
        self.filtered.store(program.is_some(), Ordering::Relaxed);
        let done = program.map_or_else(|| sys::detach_filter(fd), |program| sys::attach_filter(fd, program));
        done.inspect_err(|_| {
            // Some queues may have it.
            let _ = sys::detach_filter(fd);
        })
    }

    /// Goes over to the interface that has the name now, if there is one. The descriptors keep their numbers; all queues are in
    /// service, offloads are off, and no program steers. Never makes an interface. A tap that came as descriptors is gone for good.
    ///
    /// # Errors
    /// [`TapError`]; everything is as before then.
    pub(super) fn reopen(&self) -> Result<(), TapError> {
        let Some(flags) = self.flags.filter(|_| self.asker.as_ref().is_some_and(|asker| asker.exists(&self.name)))
        else {
            return Err(TapError::Missing(self.name.clone()));
        };
        let queues = self.queues();
        let kernel = |action| move |error| TapError::Kernel { name: self.name.clone(), action, error };
        let mut fresh = Vec::new();
        for _ in &self.queues {
            let fd = open_driver(&self.name)?;
            sys::set_interface(fd.as_fd(), &self.name, flags)
                .map_err(|error| open_error(&self.name, queues, true, error))?;
            fresh.push(fd);
        }
        if let Some(first) = fresh.first() {
            let size = i32::try_from(self.header()).unwrap_or(i32::MAX);
            sys::set_header_size(first.as_fd(), size).map_err(kernel("set the header size"))?;
            sys::set_offload(first.as_fd(), 0).map_err(kernel("switch offloads off"))?;
        }
        for (queue, fd) in self.queues.iter().zip(&fresh) {
            sys::replace(queue.fd.as_fd(), fd).map_err(kernel("take over a queue"))?;
            queue.attached.store(true, Ordering::Relaxed);
        }
        self.steered.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The interface's name; empty where it could not be found out.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of queues: of queue pairs that the NIC can have.
    #[must_use]
    pub fn queues(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(MAX_QUEUES)
    }

    /// Whether the kernel does UDP segmentation (Linux 6.2 or newer).
    #[must_use]
    pub fn has_uso(&self) -> bool {
        self.uso
    }

    /// The interface's MTU in bytes, where it is in this network namespace.
    #[must_use]
    pub fn mtu(&self) -> Option<u32> {
        let (fd, asker) = (self.control()?, self.asker.as_ref()?);
        // Behind descriptors may be an interface of another namespace, of which another one has the name here.
        let here = self.flags.is_some() || sys::address(fd).ok()? == asker.address(&self.name).ok()?;
        here.then(|| asker.mtu(&self.name).ok()).flatten()
    }

    /// The descriptor of one queue.
    pub(super) fn queue(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(index).map(|queue| queue.fd.as_fd())
    }

    fn control(&self) -> Option<BorrowedFd<'_>> {
        self.found_header?;
        self.queue(0)
    }

    /// Tells the kernel what frames from it may leave undone: `TUN_F_*`.
    pub(super) fn set_offload(&self, flags: u32) -> io::Result<()> {
        self.control().map_or(Ok(()), |fd| sys::set_offload(fd, flags))
    }

    /// Bytes of the header before each frame.
    pub(super) fn header(&self) -> usize {
        self.header.load(Ordering::Relaxed)
    }

    /// Sets the size of the header before each frame: [`HEADER_SIZE`] or [`HASH_HEADER_SIZE`]. Frames in the tap have none yet.
    pub(super) fn set_header(&self, size: usize) -> io::Result<()> {
        self.header.store(size, Ordering::Relaxed);
        let Some(fd) = self.control() else { return Ok(()) };
        sys::set_header_size(fd, i32::try_from(size).unwrap_or(i32::MAX))
    }

    /// Lets `program` choose the queue of each frame; without one the kernel does.
    pub(super) fn steer(&self, program: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if self.steered.load(Ordering::Relaxed) != program.is_some()
            && let Some(fd) = self.control()
        {
            sys::set_steering(fd, program)?;
            self.steered.store(program.is_some(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Takes the first `count` queues into service and the others out of it.
    pub(super) fn use_queues(&self, count: usize) -> io::Result<()> {
        if self.control().is_none() || self.queues.len() == 1 {
            return Ok(());
        }
        // The last is taken out first, so that the kernel's numbers of the others stay.
        for (index, queue) in self.queues.iter().enumerate().rev().filter(|(index, _)| *index >= count) {
            queue.switch(index, false)?;
        }
        let mut joining = self.queues.iter().enumerate().take(count);
        if joining.clone().any(|(_, queue)| !queue.attached.load(Ordering::Relaxed)) {
            // While a tap has a filter, be it of a VMM that crashed, Linux takes no queue into service and reports success.
            self.set_filter(None)?;
        }
        joining.try_for_each(|(index, queue)| queue.switch(index, true))
    }

    /// Shows the link to the host. Kernels before 5.0 and foreign taps cannot: that is logged, and the link works on.
    pub(super) fn set_carrier(&self, up: bool) {
        let Some(fd) = self.control() else { return };
        match sys::set_carrier(fd, up) {
            Ok(()) => self.carrier_lost.store(!up, Ordering::Relaxed),
            Err(error) => {
                tracing::warn!(tap = self.name, %error, up, "the tap's carrier could not be set; the guest's link is");
            }
        }
    }
}

impl TapQueue {
    fn switch(&self, index: usize, attached: bool) -> io::Result<()> {
        // The first queue always serves.
        if index > 0 && self.attached.load(Ordering::Relaxed) != attached {
            sys::set_queue(self.fd.as_fd(), attached)?;
            self.attached.store(attached, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let (Some(fd), Some(found)) = (self.control(), self.found_header) else { return };
        // Whoever shares the descriptors, or opens the tap next, finds it as we did. A tap that is gone needs nothing.
        let _ = self.steer(None);
        if self.filtered.load(Ordering::Relaxed) {
            let _ = sys::detach_filter(fd);
        }
        let _ = self.use_queues(self.queues.len());
        let _ = sys::set_offload(fd, 0);
        let _ = sys::set_header_size(fd, found);
        if self.carrier_lost.load(Ordering::Relaxed) {
            let _ = sys::set_carrier(fd, true);
        }
    }
}

/// Opens queues of the tap `name` as [`Tap::open`] does, and leaves them as they are: for those who pass them on.
///
/// # Errors
/// As [`Tap::open`].
pub fn open_queues(name: &str, queues: u16) -> Result<Vec<OwnedFd>, TapError> {
    attach(name, queues).map(|(fds, _)| fds)
}

/// Queues of the tap `name`, and the flags that they were opened with.
fn attach(name: &str, queues: u16) -> Result<(Vec<OwnedFd>, u16), TapError> {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || !name.bytes().all(allowed) {
        return Err(TapError::Name(name.to_owned()));
    }
    if queues == 0 || queues > MAX_QUEUES {
        return Err(TapError::Count { name: name.to_owned(), count: queues.into() });
    }
    let existed = sys::Asker::new().is_ok_and(|asker| asker.exists(name));
    let mut flags = WANTED_FLAGS | if queues > 1 { sys::IFF_MULTI_QUEUE } else { 0 };
    let mut fds = Vec::new();
    for _ in 0..queues {
        let fd = open_driver(name)?;
        let mut result = sys::set_interface(fd.as_fd(), name, flags);
        // A tap made for several queues serves one as well, but wants to hear it.
        if queues == 1 && result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)) {
            flags |= sys::IFF_MULTI_QUEUE;
            result = sys::set_interface(fd.as_fd(), name, flags);
        }
        result.map_err(|error| open_error(name, queues, existed, error))?;
        fds.push(fd);
    }
    if !existed {
        tracing::warn!(tap = name, "the tap did not exist and was created; it is down and belongs to no bridge");
    }
    Ok((fds, flags))
}

/// The name of the tap whose queues these are.
pub(super) fn check(fds: &[OwnedFd]) -> Result<String, TapError> {
    let multi = fds.len() > 1;
    let wanted = WANTED_FLAGS | if multi { sys::IFF_MULTI_QUEUE } else { 0 };
    let mut first: Option<String> = None;
    for (index, fd) in fds.iter().enumerate() {
        let (name, flags) = sys::interface(fd.as_fd()).map_err(|error| TapError::NotATap { index, error })?;
        if flags & wanted != wanted {
            return Err(TapError::Flags { name, flags, multi });
        }
        let same = |other: &OwnedFd| sys::is_same_file(fd.as_fd(), other.as_fd());
        if let Some(first) = fds.iter().take(index).position(same) {
            return Err(TapError::Repeated { name, first, second: index });
        }
        match &first {
            Some(first) if *first != name => return Err(TapError::Mixed { first: first.clone(), other: name }),
            Some(_) => {}
            None => first = Some(name),
        }
    }
    let name = first.unwrap_or_default();
    if fds.is_empty() || fds.len() > usize::from(MAX_QUEUES) {
        return Err(TapError::Count { name, count: fds.len() });
    }
    Ok(name)
}

fn open_driver(name: &str) -> Result<OwnedFd, TapError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    match options.open("/dev/net/tun") {
        Ok(file) => Ok(file.into()),
        Err(error) => Err(TapError::Driver { name: name.to_owned(), error }),
    }
}

fn open_error(name: &str, queues: u16, existed: bool, error: io::Error) -> TapError {
    let name = name.to_owned();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if existed => TapError::Permission(name),
        Some(libc::EPERM | libc::EACCES) => TapError::Missing(name),
        Some(libc::EBUSY) => TapError::Busy(name),
        Some(libc::EINVAL) => TapError::Kind { name, queues },
        Some(libc::E2BIG) => TapError::Count { name, count: queues.into() },
        _ => TapError::Kernel { name, action: "attach a queue", error },
    }
}
