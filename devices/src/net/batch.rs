//! Frames on their way to the tap: as many as there are go there in one system call.
//!
//! By io_uring, as a call costs more than a small frame does. Frames go one by one where the kernel has no io_uring, or the tap may
//! be full, since those that wait in a ring would be overtaken.

// SQEs carry addresses, and pushing one vows that they stay valid.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, types};

use super::sys::{self, MAX_SEGMENTS, Segments};
use super::tap::HASH_HEADER_SIZE;
use crate::uring::{ENABLE_RINGS, UringError, disabled_ring};

/// Most frames of a batch.
const MAX_FRAMES: usize = 64;
/// The two addresses.
pub(super) const ADDRESSES: usize = 12;
/// The longest header of virtio, and the addresses.
const START: usize = HASH_HEADER_SIZE + ADDRESSES;
/// Marks completions of cancellations.
const CANCELLED: u64 = 1 << 32;

/// What became of a frame.
#[derive(Debug)]
pub(super) enum Fate {
    Sent,
    /// The kernel did not take it.
    Failed(io::Error),
    /// The tap was full.
    Waits,
}

/// A frame of a batch.
pub(super) struct Frame {
    /// The head of its chain.
    pub(super) head: u16,
    /// Bytes, without the header.
    pub(super) length: usize,
    first: usize,
    count: usize,
    /// Bytes that were taken, or a negative errno, once it was tried.
    result: Option<i32>,
}

impl Frame {
    /// What became of it.
    pub(super) fn fate(&self) -> Fate {
        match self.result {
            None => Fate::Waits,
            Some(0..) => Fate::Sent,
            Some(failed) => Fate::Failed(io::Error::from_raw_os_error(failed.saturating_neg())),
        }
    }

    fn ended(&mut self, result: i32) {
        let waits = [libc::EAGAIN, libc::ECANCELED, libc::EINTR];
        self.result = Some(result).filter(|result| !waits.contains(&result.saturating_neg()));
    }
}

/// Frames that go to the tap together, in their order.
pub(super) struct Batch {
    ring: Option<IoUring>,
    /// Whether the tap is never full.
    together: bool,
    frames: Vec<Frame>,
    segments: Segments,
    /// Header and addresses of each frame, where the driver cannot change them after they were looked at.
    starts: Box<[[u8; START]]>,
}

impl Batch {
    /// An empty batch. Made where rings can be: the threads that serve a NIC cannot make any.
    pub(super) fn new() -> Self {
        let ring = ring().inspect_err(|error| tracing::info!(%error, "no io_uring: frames are sent one by one")).ok();
        Self {
            ring,
            together: false,
            frames: Vec::with_capacity(MAX_FRAMES),
            // The last frame may begin where there is room for one segment, and its start needs one more.
            segments: Segments::with_capacity(2 * MAX_SEGMENTS + 1),
            starts: vec![[0; START]; MAX_FRAMES].into_boxed_slice(),
        }
    }

    /// To be called by the thread that sends, before it does.
    pub(super) fn prepare(&mut self) {
        if let Some(ring) = &self.ring
            && let Err(error) = ring.submitter().register_enable_rings()
        {
            tracing::warn!(%error, "a ring of io_uring cannot be enabled: frames are sent one by one");
            self.ring = None;
        }
    }

    /// The worker's own queue of the tap is this from now on.
    pub(super) fn follow(&mut self, tap: BorrowedFd<'_>) {
        self.together = sys::takes_any_number(tap);
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.segments.clear();
    }

    pub(super) fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Whether another frame may begin.
    pub(super) fn has_room(&self) -> bool {
        self.frames.len() < MAX_FRAMES && self.segments.len() < MAX_SEGMENTS
    }

    /// The segments: those that are appended are of the next frame until [`Batch::add`] or [`Batch::abandon`] is called.
    pub(super) fn segments(&mut self) -> &mut Segments {
        &mut self.segments
    }

    /// How many segments the next frame has.
    pub(super) fn begun(&self) -> usize {
        self.segments.len() - self.begin()
    }

    fn begin(&self) -> usize {
        self.frames.last().map_or(0, |last| last.first + last.count)
    }

    /// Where the first `length` bytes of the next frame can be kept.
    pub(super) fn start(&mut self, length: usize) -> &mut [u8] {
        self.starts.get_mut(self.frames.len()).and_then(|start| start.get_mut(..length)).unwrap_or_default()
    }

    /// Has what [`Batch::start`] gave sent instead of the first bytes of the next frame.
    pub(super) fn replace_start(&mut self, length: usize) {
        let begin = self.begin();
        if let Some(start) = self.starts.get_mut(self.frames.len()).and_then(|start| start.get_mut(..length)) {
            self.segments.replace_start(begin, start);
        }
    }

    /// The next frame is complete.
    pub(super) fn add(&mut self, head: u16, length: usize) {
        let (first, count) = (self.begin(), self.begun());
        self.frames.push(Frame { head, length, first, count, result: None });
    }

    /// The next frame is not to be sent.
    pub(super) fn abandon(&mut self) {
        self.segments.truncate(self.begin());
    }

    /// Sends the frames, as many as the tap takes now; `own`: it is that of [`Batch::follow`]. [`Frame::fate`] tells of each.
    pub(super) fn send(&mut self, tap: BorrowedFd<'_>, own: bool) {
        // A lone frame is cheaper without.
        if own
            && self.together
            && self.frames.len() > 1
            && let Some(mut ring) = self.ring.take()
            && self.send_together(&mut ring, tap)
        {
            self.ring = Some(ring);
            return;
        }
        for frame in &mut self.frames {
            let result = loop {
                match self.segments.write_to(tap, frame.first, frame.count) {
                    Ok(taken) => break i32::try_from(taken).unwrap_or(i32::MAX),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => break error.raw_os_error().unwrap_or(libc::EIO).saturating_neg(),
                }
            };
            frame.ended(result);
            if frame.result.is_none() {
                return;
            }
        }
    }

    /// Sends the frames in one system call; `false` if the kernel took none of them, nor ever will.
    fn send_together(&mut self, ring: &mut IoUring, tap: BorrowedFd<'_>) -> bool {
        let tap = types::Fd(tap.as_raw_fd());
        let mut open = 0;
        for (frame, tag) in self.frames.iter().zip(0..) {
            let vectors = self.segments.vectors(frame.first, frame.count);
            let count = u32::try_from(vectors.len()).unwrap_or(0);
            let entry = opcode::Writev::new(tap, vectors.as_ptr(), count).build().user_data(tag);
            // SAFETY: the vectors lie still, and what they name stays, until all frames have ended, which is waited for below.
            open += usize::from(unsafe { ring.submission().push(&entry) }.is_ok());
        }
        let mut cancelling = false;
        while open > 0 {
            let entered = if cancelling { ring.submit_and_wait(1) } else { ring.submit() };
            if let Err(error) = entered
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                if !cancelling && ring.submission().len() == open {
                    tracing::warn!(%error, "io_uring fails: frames are sent one by one");
                    return false;
                }
                // It would read memory that is freed.
                tracing::error!(%error, "io_uring cannot be drained: its thread and memory are kept for ever");
                loop {
                    std::thread::park();
                }
            }
            while let Some(entry) = ring.completion().next() {
                let frame = usize::try_from(entry.user_data()).ok().and_then(|index| self.frames.get_mut(index));
                if let Some(frame) = frame {
                    frame.ended(entry.result());
                    open -= 1;
                }
            }
            if open > 0 && !cancelling && ring.submission().is_empty() {
                // What is open waits for room in the tap, which the worker does itself.
                cancelling = true;
                for (_, tag) in self.frames.iter().zip(0..) {
                    let entry = opcode::AsyncCancel::new(tag).build().user_data(CANCELLED);
                    // SAFETY: no addresses. The ring is empty, and has room for as many.
                    let _ = unsafe { ring.submission().push(&entry) };
                }
            }
        }
        true
    }
}

/// A ring for the frames of a batch, and nothing else.
fn ring() -> Result<IoUring, UringError> {
    let ring = disabled_ring(MAX_FRAMES as u32)?;
    // What goes through a ring no filter of system calls sees.
    let mut restrictions = [
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::AsyncCancel::CODE),
        Restriction::register_op(ENABLE_RINGS),
    ];
    let restricted = ring.submitter().register_restrictions(&mut restrictions);
    restricted.map_err(|error| UringError { what: "restricting the ring", error })?;
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::net::tests::real::{in_namespace, open_tap_with};

    const SIZE: usize = 8000;

    fn pair() -> (UnixDatagram, UnixDatagram) {
        let (ours, host) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        (ours, host)
    }

    /// As many frames as a batch holds, each with its number, cut in two.
    fn fill(batch: &mut Batch, memory: &GuestMemoryMmap, numbers: std::ops::Range<u16>) {
        batch.clear();
        for (number, place) in numbers.zip(0..) {
            let address = place * 0x2000;
            memory.write_slice(&vec![0xa5; SIZE], GuestAddress(address)).unwrap();
            memory.write_slice(&number.to_le_bytes(), GuestAddress(address)).unwrap();
            assert!(batch.has_room());
            batch.segments().push(memory, 0, address, 7, |_| ()).unwrap();
            batch.segments().push(memory, 0, address + 7, SIZE - 7, |_| ()).unwrap();
            batch.add(number, SIZE);
        }
    }

    fn sent(batch: &Batch) -> Vec<u16> {
        let sent = batch.frames().iter().filter(|frame| matches!(frame.fate(), Fate::Sent));
        sent.map(|frame| frame.head).collect()
    }

    fn arrived(host: &UnixDatagram) -> Vec<u16> {
        let mut data = [0; 2 * SIZE];
        let frames = std::iter::from_fn(|| {
            let length = host.recv(&mut data).ok()?;
            assert!(length == SIZE && data[2..SIZE] == [0xa5; SIZE - 2]);
            Some(u16::from_le_bytes([data[0], data[1]]))
        });
        frames.collect()
    }

    #[test]
    fn what_does_not_fit_waits_and_nothing_of_it_is_sent_later() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let (ours, host) = pair();
        let mut batch = Batch::new();
        batch.prepare();
        // Of sockets it would not be believed.
        batch.together = true;
        let mut waited = 0;
        for round in 0..20u16 {
            let first = round * MAX_FRAMES as u16;
            fill(&mut batch, &memory, first..first + MAX_FRAMES as u16);
            assert!(!batch.has_room());
            batch.send(ours.as_fd(), true);
            assert!(batch.ring.is_some(), "the ring serves on");
            let (sent, arrived) = (sent(&batch), arrived(&host));
            assert!(!sent.is_empty() && sent == arrived, "{sent:?} {arrived:?}");
            assert!(sent.iter().copied().eq(first..first + sent.len() as u16), "the last ones wait");
            waited += MAX_FRAMES - sent.len();
        }
        assert!(waited > 0, "the socket was full");
    }

    #[test]
    fn one_by_one_gives_the_same() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let (ours, host) = pair();
        let mut batch = Batch::new();
        batch.follow(ours.as_fd());
        fill(&mut batch, &memory, 0..MAX_FRAMES as u16);
        batch.send(ours.as_fd(), true);
        assert_eq!(sent(&batch), arrived(&host));
        assert!(sent(&batch).len() < MAX_FRAMES, "the socket was full");
    }

    #[test]
    fn frames_go_together_to_a_tap_that_is_never_full_only() {
        in_namespace(|| {
            let tap = open_tap_with(sys::IFF_TAP | sys::IFF_NO_PI);
            let mut batch = Batch::new();
            batch.follow(tap.as_fd());
            assert!(batch.together && batch.ring.is_some());
            // TUNSETSNDBUF
            let bytes: libc::c_int = 100_000;
            // SAFETY: the tap is open, and the request reads an int.
            assert_eq!(unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54d4, &raw const bytes) }, 0);
            batch.follow(tap.as_fd());
            assert!(!batch.together);
        });
    }
}
