//! The system calls of vhost-net (linux/vhost.h), and nothing else: addresses of guest RAM go to the kernel here.
#![allow(unsafe_code)] // ioctl has no safe wrapper for vhost.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

use crate::syscall::check;

const VHOST_GET_FEATURES: libc::c_ulong = 0x8008_af00;
const VHOST_SET_FEATURES: libc::c_ulong = 0x4008_af00;
const VHOST_SET_OWNER: libc::c_ulong = 0xaf01;
const VHOST_SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const VHOST_SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const VHOST_SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const VHOST_SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const VHOST_SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const VHOST_SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const VHOST_SET_VRING_ERR: libc::c_ulong = 0x4008_af22;
const VHOST_SET_VRING_BUSYLOOP_TIMEOUT: libc::c_ulong = 0x4008_af23;
const VHOST_NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

/// As many regions as the kernel takes by default (`max_mem_regions` of the module vhost).
const MAX_REGIONS: usize = 64;

/// What the kernel signals, or waits for, at a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    Kick,
    Call,
    Error,
}

/// A part of guest RAM: `struct vhost_memory_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Region {
    /// Guest-physical address.
    pub(super) guest: u64,
    /// Bytes.
    pub(super) size: u64,
    /// Where it is mapped in this process.
    pub(super) host: u64,
    pub(super) padding: u64,
}

/// Where a ring lies in this process.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingAddresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// `struct vhost_memory` with room for all regions.
#[repr(C)]
struct Memory {
    count: u32,
    padding: u32,
    regions: [Region; MAX_REGIONS],
}

/// `struct vhost_vring_state` and `struct vhost_vring_file`.
#[repr(C)]
struct Word {
    ring: u32,
    value: i32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct Addresses {
    ring: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// Hands the kernel a plain struct, of which it makes a copy.
///
/// # Safety
/// `request` must read no more than a `T`, and what the addresses in it name must stay mapped as long as `device` uses it.
unsafe fn give<T>(device: &File, request: libc::c_ulong, argument: &T) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the pointer is that of a `T`, which the caller vouches for.
    check(unsafe { libc::ioctl(device.as_raw_fd(), request, std::ptr::from_ref(argument)) })
}

fn give_word(device: &File, request: libc::c_ulong, ring: u32, value: i32) -> io::Result<()> {
    // SAFETY: the requests used with this function read a ring's number and an integer. Descriptors are counted by the kernel.
    unsafe { give(device, request, &Word { ring, value }) }
}

/// The features that the kernel's vhost-net has.
pub(super) fn features(device: &File) -> io::Result<u64> {
    let mut features = 0u64;
    // SAFETY: the request writes 64 bits.
    check(unsafe { libc::ioctl(device.as_raw_fd(), VHOST_GET_FEATURES, &raw mut features) })?;
    Ok(features)
}

/// Sets the features that the driver negotiated.
pub(super) fn set_features(device: &File, features: u64) -> io::Result<()> {
    // SAFETY: the request reads 64 bits.
    unsafe { give(device, VHOST_SET_FEATURES, &features) }
}

/// Makes this process, and its memory, the one that the kernel's thread works in.
pub(super) fn set_owner(device: &File) -> io::Result<()> {
    // SAFETY: the request has no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), VHOST_SET_OWNER) })
}

/// Has the kernel look for work on a ring for so many microseconds before it asks for kicks, as long as nobody else wants the
/// processor.
pub(super) fn set_polling(device: &File, ring: u32, microseconds: i32) -> io::Result<()> {
    give_word(device, VHOST_SET_VRING_BUSYLOOP_TIMEOUT, ring, microseconds)
}

/// Tells where guest RAM is.
///
/// # Safety
/// It must stay mapped as long as the device has a backend.
pub(super) unsafe fn set_memory(device: &File, regions: impl Iterator<Item = Region>) -> io::Result<()> {
    let mut memory = Memory { count: 0, padding: 0, regions: [Region::default(); MAX_REGIONS] };
    for region in regions {
        let place = usize::try_from(memory.count).ok().and_then(|count| memory.regions.get_mut(count));
        *place.ok_or_else(|| io::Error::from_raw_os_error(libc::E2BIG))? = region;
        memory.count += 1;
    }
    // SAFETY: the request reads as many regions as `count` says, which are there; the caller vouches for what they name.
    unsafe { give(device, VHOST_SET_MEM_TABLE, &memory) }
}

/// Sets the size of a ring, and the position from which its available entries are taken.
pub(super) fn set_ring(device: &File, ring: u32, size: u16, base: u16) -> io::Result<()> {
    give_word(device, VHOST_SET_VRING_NUM, ring, size.into())?;
    give_word(device, VHOST_SET_VRING_BASE, ring, base.into())
}

/// Tells where a ring is.
///
/// # Safety
/// It must stay mapped as long as the device has a backend.
pub(super) unsafe fn set_addresses(device: &File, ring: u32, at: RingAddresses) -> io::Result<()> {
    let RingAddresses { descriptors, available, used } = at;
    // SAFETY: the request reads a `struct vhost_vring_addr`; the caller vouches for what it names.
    unsafe { give(device, VHOST_SET_VRING_ADDR, &Addresses { ring, flags: 0, descriptors, used, available, log: 0 }) }
}

/// Sets an eventfd of a ring; `None`: no more.
pub(super) fn set_event(device: &File, ring: u32, which: Event, event: Option<&EventFd>) -> io::Result<()> {
    let request = match which {
        Event::Kick => VHOST_SET_VRING_KICK,
        Event::Call => VHOST_SET_VRING_CALL,
        Event::Error => VHOST_SET_VRING_ERR,
    };
    give_word(device, request, ring, event.map_or(-1, AsRawFd::as_raw_fd))
}

/// Starts a ring on a queue of a tap; `None` stops it, and nothing is in flight when this returns.
pub(super) fn set_backend(device: &File, ring: u32, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
    give_word(device, VHOST_NET_SET_BACKEND, ring, tap.map_or(-1, |tap| tap.as_raw_fd()))
}
