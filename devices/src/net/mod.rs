//! Network cards: virtio-net (virtio 1.2 §5.1), and the taps behind it.
//!
//! [`device::VirtioNet`] is what the transport sees; it owns one worker thread per queue pair and sends them messages. A
//! worker (`worker`) waits in epoll for its commands, its rings and its queue of the tap, and runs the two halves of the data
//! path, `rx` and `tx`, whose frames go to the tap together (`batch`); the first one also answers the control queue (`control`,
//! `obey`). Which pair receives a frame is for the kernel to say, as the driver told it (`steering`). The data path is the only
//! part that knows how frames travel, and `path` is its seam: there the kernel's (`vhost`) takes the place of `rx` and `tx`, with
//! the same features, control queue and lifecycle before it.

mod announce;
mod batch;
mod coalescing;
mod control;
mod counters;
pub mod device;
pub mod features;
mod filter;
mod lane;
mod obey;
mod path;
mod rx;
mod setting;
mod shared;
mod steering;
mod sys;
pub mod tap;
mod tap_fds;
#[cfg(test)]
mod tests;
mod traffic;
mod tx;
mod vhost;
mod watches;
mod worker;

use std::io;

pub use device::{NetError, NetHandle, NetOptions, NetState, VirtioNet};
pub use tap::{Tap, TapError, open_queues};
pub use tap_fds::{TapFds, is_tap};

/// Ethernet header with two VLAN tags.
const ETHERNET: usize = 14 + 8;
/// The largest frame, without its header: 64 KiB of IP packet (virtio 1.2 §5.1.6.3.1) and VLAN tags.
const MAX_FRAME: usize = ETHERNET + 65535;
/// The smallest: the kernel refuses less than an Ethernet header.
const MIN_FRAME: usize = 14;

/// Whether a tap that gives this error is down or gone, rather than at odds with one frame.
fn is_tap_failure(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::ENODEV | libc::EBADFD | libc::EBADF | libc::ENXIO))
}
