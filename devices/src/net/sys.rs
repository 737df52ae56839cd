//! The system calls of the tap path, and nothing else: raw pointers to guest RAM start and end here.
#![allow(unsafe_code)] // ioctl, readv and writev have no safe wrappers for taps and guest memory.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::syscall::check;
use crate::virtio::ring::RingError;

/// Most segments of one `readv` or `writev` (UIO_MAXIOV).
pub(super) const MAX_SEGMENTS: usize = 1024;

pub(super) const IFF_TAP: u16 = 0x0002;
pub(super) const IFF_MULTI_QUEUE: u16 = 0x0100;
pub(super) const IFF_NO_PI: u16 = 0x1000;
pub(super) const IFF_VNET_HDR: u16 = 0x4000;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
pub(super) const IFF_DETACH_QUEUE: u16 = 0x0400;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETFEATURES: libc::c_ulong = 0x8004_54cf;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNGETVNETHDRSZ: libc::c_ulong = 0x8004_54d7;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNGETSNDBUF: libc::c_ulong = 0x8004_54d3;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUNATTACHFILTER: libc::c_ulong = 0x4010_54d5;
const TUNDETACHFILTER: libc::c_ulong = 0x4010_54d6;
const TUNSETSTEERINGEBPF: libc::c_ulong = 0x8004_54e0;
const TUNSETCARRIER: libc::c_ulong = 0x4004_54e2;

/// `struct ifreq` as far as taps use it.
#[repr(C)]
#[derive(Clone, Copy)]
struct IfReq {
    name: [u8; 16],
    /// Flags in the low half, or the MTU.
    value: i32,
    rest: [u8; 20],
}

impl IfReq {
    fn new(name: &str, flags: u16) -> Self {
        let mut request = Self { name: [0; 16], value: i32::from(flags), rest: [0; 20] };
        // The last byte stays zero.
        for (to, from) in request.name.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        request
    }
}

fn ifreq_ioctl(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: &mut IfReq) -> io::Result<()> {
    // SAFETY: `fd` is open, and the requests used with this function read and write a `struct ifreq`, which `IfReq` is.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

fn int_ioctl(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: &mut libc::c_int) -> io::Result<()> {
    // SAFETY: `fd` is open, and the requests used with this function read or write one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

/// Attaches `fd`, an open /dev/net/tun, to the interface `name`.
pub(super) fn set_interface(fd: BorrowedFd<'_>, name: &str, flags: u16) -> io::Result<()> {
    ifreq_ioctl(fd, TUNSETIFF, &mut IfReq::new(name, flags))
}

/// Name and flags of the interface behind `fd`.
pub(super) fn interface(fd: BorrowedFd<'_>) -> io::Result<(String, u16)> {
    let mut request = IfReq::new("", 0);
    ifreq_ioctl(fd, TUNGETIFF, &mut request)?;
    let name = request.name.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
    let [low, high, ..] = request.value.to_le_bytes();
    Ok((name, u16::from_le_bytes([low, high])))
}

/// The flags that the kernel's tap driver knows.
pub(super) fn driver_features(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut features = 0;
    int_ioctl(fd, TUNGETFEATURES, &mut features)?;
    Ok(features.cast_unsigned())
}

/// The size of the header before each frame, in bytes.
pub(super) fn header_size(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let mut size = 0;
    int_ioctl(fd, TUNGETVNETHDRSZ, &mut size)?;
    Ok(size)
}

/// Sets the size of the header before each frame, in bytes.
pub(super) fn set_header_size(fd: BorrowedFd<'_>, mut size: i32) -> io::Result<()> {
    int_ioctl(fd, TUNSETVNETHDRSZ, &mut size)
}

/// Whether the tap takes frames however many the host has not dealt with yet, which is how taps are made: then it never is full.
pub(super) fn takes_any_number(fd: BorrowedFd<'_>) -> bool {
    let mut bytes = 0;
    int_ioctl(fd, TUNGETSNDBUF, &mut bytes).is_ok() && bytes == libc::c_int::MAX
}

/// What may be left undone (checksums, segmentation) in frames that are read from the tap: `TUN_F_*`.
pub(super) fn set_offload(fd: BorrowedFd<'_>, offload: u32) -> io::Result<()> {
    // SAFETY: `fd` is open; the request takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offload)) })
}

/// Sets whether the interface has a carrier.
pub(super) fn set_carrier(fd: BorrowedFd<'_>, up: bool) -> io::Result<()> {
    int_ioctl(fd, TUNSETCARRIER, &mut libc::c_int::from(up))
}

/// Lets `program` choose the queue of each frame; without one the kernel does.
pub(super) fn set_steering(fd: BorrowedFd<'_>, program: Option<BorrowedFd<'_>>) -> io::Result<()> {
    int_ioctl(fd, TUNSETSTEERINGEBPF, &mut program.map_or(-1, |program| program.as_raw_fd()))
}

/// Takes a queue of a multi-queue tap into or out of service.
pub(super) fn set_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let flags = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
    ifreq_ioctl(fd, TUNSETQUEUE, &mut IfReq::new("", flags))
}

/// Has each frame that comes to a queue in service looked at by a classic BPF program. Other queues have none.
pub(super) fn attach_filter(fd: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let argument = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: `fd` is open; the request reads a `struct sock_fprog` and as many instructions as it says. The kernel keeps the
    // pointer, too, and reads it when a queue comes into service: whatever is there then is checked as this program is.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNATTACHFILTER, &raw const argument) })
}

/// Undoes [`attach_filter`], also if there is nothing to undo.
pub(super) fn detach_filter(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `fd` is open; the request takes no argument.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNDETACHFILTER, 0) })
}

/// The Ethernet address of an interface, with its kind: `sa_family` and the first bytes of `sa_data`.
pub(super) type Address = [u8; 8];

/// The address of the interface behind `fd`, wherever that is.
pub(super) fn address(fd: BorrowedFd<'_>) -> io::Result<Address> {
    read_address(fd, "")
}

fn read_address(fd: BorrowedFd<'_>, name: &str) -> io::Result<Address> {
    let mut request = IfReq::new(name, 0);
    ifreq_ioctl(fd, libc::SIOCGIFHWADDR, &mut request)?;
    let ([a, b, c, d], [e, f, g, h, ..]) = (request.value.to_le_bytes(), request.rest);
    Ok([a, b, c, d, e, f, g, h])
}

/// A socket to ask about interfaces of this network namespace, of the kind that reaches no network. It is made where a tap is
/// opened: the threads that serve one may make none.
pub(super) struct Asker(UnixDatagram);

impl Asker {
    pub(super) fn new() -> io::Result<Self> {
        UnixDatagram::unbound().map(Self)
    }

    /// Whether an interface with this name exists.
    pub(super) fn exists(&self, name: &str) -> bool {
        self.ask(name, libc::SIOCGIFINDEX).is_ok()
    }

    /// The MTU of an interface, in bytes.
    pub(super) fn mtu(&self, name: &str) -> io::Result<u32> {
        let mtu = self.ask(name, libc::SIOCGIFMTU)?.value;
        u32::try_from(mtu).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Whether an interface is up.
    pub(super) fn is_up(&self, name: &str) -> io::Result<bool> {
        Ok(self.ask(name, libc::SIOCGIFFLAGS)?.value & libc::IFF_UP != 0)
    }

    /// The address of an interface.
    pub(super) fn address(&self, name: &str) -> io::Result<Address> {
        read_address(self.0.as_fd(), name)
    }

    fn ask(&self, name: &str, property: libc::c_ulong) -> io::Result<IfReq> {
        let mut request = IfReq::new(name, 0);
        ifreq_ioctl(self.0.as_fd(), property, &mut request)?;
        Ok(request)
    }
}

/// Whether both descriptors lead to one open file. A kernel that cannot tell (CONFIG_KCMP) says no.
pub(super) fn is_same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    let pid = libc::pid_t::try_from(std::process::id()).unwrap_or(0);
    // SAFETY: takes numbers only and changes nothing.
    unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one.as_raw_fd(), other.as_raw_fd()) == 0 }
}

/// Puts the open file of `with` in the place of that of `fd`, whose number stays.
pub(super) fn replace(fd: BorrowedFd<'_>, with: &OwnedFd) -> io::Result<()> {
    // SAFETY: both descriptors are open and stay with their owners; only the file behind the first is exchanged.
    check(unsafe { libc::dup3(with.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) })
}

/// Makes reads and writes on `fd` return at once.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `fd` is open; these commands take and give integers.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

/// Sends `frame`, with its header before it.
pub(super) fn send(fd: BorrowedFd<'_>, frame: &[u8]) -> io::Result<()> {
    // SAFETY: the pointer and the length are those of `frame`, which the kernel only reads.
    let done = unsafe { libc::write(fd.as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An array of segments of guest RAM, in the form that `readv` and `writev` take. Made once, reused for every frame.
///
/// The segments are good as long as the memory map lives that they were made from: whoever holds this holds the map.
pub(super) struct Segments {
    list: Vec<libc::iovec>,
}

// SAFETY: the pointers are to guest RAM, which any thread may access, and are used by nobody but the functions below.
unsafe impl Send for Segments {}

impl Segments {
    /// An empty array that never grows past `capacity` segments.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self { list: Vec::with_capacity(capacity) }
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    /// Forgets the first `count` segments.
    pub(super) fn remove_front(&mut self, count: usize) {
        self.list.drain(..count.min(self.list.len()));
    }

    /// Keeps the first `count` segments only.
    pub(super) fn truncate(&mut self, count: usize) {
        self.list.truncate(count);
    }

    /// Appends `length` bytes of guest RAM at `address`, part of the chain at `head`: one segment, or more where regions meet. Tells `visit` the length of
    /// each.
    ///
    /// # Errors
    /// If a part of the range is not guest RAM.
    pub(super) fn push(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        address: u64,
        length: usize,
        mut visit: impl FnMut(usize),
    ) -> Result<(), RingError> {
        for slice in memory.get_slices(GuestAddress(address), length) {
            let slice = slice.map_err(|_| RingError::Unmapped { head, address })?;
            let guard = slice.ptr_guard_mut();
            self.list.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
            visit(slice.len());
        }
        Ok(())
    }

    /// Puts `start`, which is sent instead of the first bytes of the frame that begins with segment `first`, before the rest of
    /// it. The caller keeps it where it is until the frame was sent. Nothing happens if the segments hold less.
    pub(super) fn replace_start(&mut self, first: usize, start: &mut [u8]) {
        let frame = self.list.get(first..).unwrap_or_default();
        let mut left = start.len();
        let gone = frame.iter().take_while(|segment| match left.checked_sub(segment.iov_len) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        });
        let gone = gone.count();
        if let Some(rest) = self.list.get_mut(first + gone).filter(|_| left > 0) {
            rest.iov_base = rest.iov_base.wrapping_byte_add(left);
            rest.iov_len -= left;
        }
        let start = libc::iovec { iov_base: start.as_mut_ptr().cast(), iov_len: start.len() };
        self.list.splice(first..first + gone, [start]);
    }

    /// `count` segments from `first` on, MAX_SEGMENTS at most, as the kernel takes them.
    pub(super) fn vectors(&self, first: usize, count: usize) -> &[libc::iovec] {
        let last = first.saturating_add(count.min(MAX_SEGMENTS));
        self.list.get(first..last).unwrap_or_default()
    }

    /// Sends `count` segments from `first` on as one frame; says how many bytes were taken.
    pub(super) fn write_to(&self, fd: BorrowedFd<'_>, first: usize, count: usize) -> io::Result<usize> {
        let vectors = self.vectors(first, count);
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(0);
        // SAFETY: every segment lies in guest RAM that is mapped as long as its map lives, which the caller holds. The kernel
        // only reads it; the guest may change it meanwhile, which the kernel copes with.
        let done = unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// Receives one frame into the first `count` segments, and what does not fit into `rest`; says how many bytes came.
    pub(super) fn read_from(&mut self, fd: BorrowedFd<'_>, count: usize, rest: &mut [u8]) -> io::Result<usize> {
        let count = count.min(self.list.len()).min(MAX_SEGMENTS - 1);
        let tail = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        // The segment after the last is lent to the rest and restored afterwards, so that the array needs no copy.
        let displaced = match self.list.get_mut(count) {
            Some(place) => Some(std::mem::replace(place, tail)),
            None => {
                self.list.push(tail);
                None
            }
        };
        let segments = libc::c_int::try_from(count + 1).unwrap_or(1);
        // SAFETY: every segment lies in guest RAM that is mapped as long as its map lives, which the caller holds, but for
        // the last, which is `rest`, borrowed mutably for the time of the call.
        let done = unsafe { libc::readv(fd.as_raw_fd(), self.list.as_ptr(), segments) };
        let result = usize::try_from(done).map_err(|_| io::Error::last_os_error());
        match (displaced, self.list.get_mut(count)) {
            (Some(segment), Some(place)) => *place = segment,
            _ => self.list.truncate(count),
        }
        result
    }
}
