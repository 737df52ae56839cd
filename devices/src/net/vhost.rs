//! The kernel's data path: vhost-net, which moves frames between the rings of a pair and its queue of the tap by itself.
//!
//! Kicks reach the kernel directly, and interrupts the driver as long as their vector is unmasked and they are not held back, as
//! the driver or we ([`sent`]) wish; else they come by the same eventfd to the pair's worker, which passes them on to the vector.
#![allow(unsafe_code)] // The kernel gets addresses of guest RAM, which has to outlive their use.

mod sent;
mod sys;
pub(super) mod thread;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use self::sent::SentCalls;
use self::sys::{Event, Region, RingAddresses};
use super::device::RING_INDIRECT_DESC;
use super::features::{MRG_RXBUF, bit};
use super::lane::Lane;

/// The device of the host.
pub(super) const DEVICE: &str = "/dev/vhost-net";
/// VIRTIO_F_RING_EVENT_IDX and VIRTIO_F_VERSION_1, which the transport offers.
const RING_EVENT_IDX: u32 = 29;
const VERSION_1: u32 = 32;
/// How long the kernel looks for more frames before it asks for kicks, in microseconds: a kick costs the guest an exit, and the
/// kernel's thread a sleep. It stops looking as soon as somebody else wants the processor.
const POLLING: i32 = 20;
/// What the kernel does with the rings. All other features are the tap's, or the control queue's.
const FEATURES: u64 = bit(VERSION_1) | bit(RING_INDIRECT_DESC) | bit(RING_EVENT_IDX) | bit(MRG_RXBUF);

/// vhost-net for one pair. Its rings have the numbers 0 (receive) and 1 (transmit).
pub(super) struct Vhost {
    device: File,
    /// What the kernel has the addresses of. Dropped after the device, which ends what the kernel does.
    memory: Option<Arc<GuestMemoryMmap>>,
    /// The kernel wants the driver interrupted, for each ring.
    pub(super) calls: [Arc<EventFd>; 2],
    /// When those for what was sent reach the driver.
    pub(super) sent: SentCalls,
    /// A ring is broken.
    pub(super) error: EventFd,
}

impl Vhost {
    /// Opens the device for a pair that is made. It may wait: not for a vCPU's thread.
    ///
    /// # Errors
    /// The kernel's answer; `Unsupported` where its vhost-net lacks a feature.
    pub(super) fn open() -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
        sys::set_owner(&device)?;
        if sys::features(&device)? & FEATURES != FEATURES {
            return Err(io::ErrorKind::Unsupported.into());
        }
        (0..2).try_for_each(|ring| sys::set_polling(&device, ring, POLLING))?;
        Ok(Self {
            device,
            memory: None,
            calls: [Arc::new(event()?), Arc::new(event()?)],
            sent: SentCalls::new(Instant::now()),
            error: event()?,
        })
    }

    /// Whether the kernel serves a driver with these features as our own path does: without MRG_RXBUF it leaves the number of
    /// buffers in the header as it was (before Linux 6.14), which has to be one (virtio 1.2 §5.1.6.4.1).
    pub(super) fn serves(features: u64) -> bool {
        features & bit(MRG_RXBUF) != 0
    }

    /// Whether the kernel has the rings.
    pub(super) fn runs(&self) -> bool {
        self.memory.is_some()
    }

    /// When [`Vhost::sent`] is to look at the ring.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.runs() { self.sent.due() } else { None }
    }

    /// Has the kernel go on where the rings stand, between them and `tap`. Nobody else may touch the rings until
    /// [`Vhost::stop`].
    ///
    /// # Errors
    /// The kernel's answer. It does nothing then, unless [`Vhost::runs`].
    pub(super) fn start(
        &mut self,
        features: u64,
        memory: &Arc<GuestMemoryMmap>,
        lanes: [&Lane; 2],
        tap: BorrowedFd<'_>,
    ) -> io::Result<()> {
        if self.runs() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        // Of a former start.
        let _ = self.error.read();
        self.sent = SentCalls::new(Instant::now());
        self.memory = Some(Arc::clone(memory));
        let started = self.prepare(features, memory, lanes).and_then(|()| {
            (0..).zip(lanes).try_for_each(|(ring, _)| sys::set_backend(&self.device, ring, Some(tap)))?;
            // Chains that wait were kicked long ago.
            lanes.into_iter().try_for_each(|lane| lane.kick.write(1))
        });
        if started.is_err() {
            let _ = self.stop();
        }
        started
    }

    fn prepare(&self, features: u64, memory: &GuestMemoryMmap, lanes: [&Lane; 2]) -> io::Result<()> {
        let device = &self.device;
        sys::set_features(device, features & FEATURES)?;
        let regions = memory.iter().map(|region| Region {
            guest: region.start_addr().raw_value(),
            size: region.len(),
            host: region.as_ptr() as u64,
            padding: 0,
        });
        // SAFETY: `self.memory` keeps RAM mapped until the rings have stopped or the device is closed.
        unsafe { sys::set_memory(device, regions) }?;
        for ((ring, lane), call) in (0..).zip(lanes).zip(&self.calls) {
            let state = lane.ring.state();
            sys::set_ring(device, ring, state.size, state.next_avail)?;
            let size = usize::from(state.size);
            let at = RingAddresses {
                descriptors: host_address(memory, state.desc_table, 16 * size)?,
                available: host_address(memory, state.avail_ring, 6 + 2 * size)?,
                used: host_address(memory, state.used_ring, 6 + 8 * size)?,
            };
            // SAFETY: as above.
            unsafe { sys::set_addresses(device, ring, at) }?;
            sys::set_event(device, ring, Event::Call, Some(call))?;
            sys::set_event(device, ring, Event::Error, Some(&self.error))?;
            sys::set_event(device, ring, Event::Kick, Some(&lane.kick))?;
        }
        Ok(())
    }

    /// Takes the rings from the kernel, which has used all that it took when this returns.
    ///
    /// # Errors
    /// The kernel's answer: it may still work on them. To drop this ends that.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        for ring in 0..2 {
            sys::set_backend(&self.device, ring, None)?;
            sys::set_event(&self.device, ring, Event::Kick, None)?;
        }
        self.memory = None;
        Ok(())
    }
}

/// Where `length` bytes of guest RAM at `address` lie in this process, in one piece.
fn host_address(memory: &GuestMemoryMmap, address: u64, length: usize) -> io::Result<u64> {
    let slice = memory.get_slice(GuestAddress(address), length).map_err(io::Error::other)?;
    Ok(slice.ptr_guard().as_ptr() as u64)
}
