//! The io_uring backend: one ring per queue, one system call per turn of its worker.
//!
//! The rings are made disabled with the disk, before filters go on, and enabled by the worker that uses them. Linux 6.1
//! has all that is used; what the kernel makes cheaper (deferred task work) is left out where it refuses it.
//!
//! A worker needs these system calls: `io_uring_enter`; `io_uring_register` to enable its ring and, at the end,
//! to let go of the file; `fcntl` to unlock it; `write` to eventfds
//! (interrupts); `close` of eventfds that it was handed; and what memory allocation, clocks, futexes and the end of a
//! thread need.

// SQEs carry addresses, and pushing one vows that they stay valid.
#![allow(unsafe_code)]

mod buffer;
mod transfer;

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use self::buffer::{AlignedBuffer, Vectors};
use self::transfer::{Action, Step, Transfer};
use super::backend::{BlockBackend, Completion, Event, Geometry, Operation, Request, Signal};
use super::error::BlockError;
use super::file::LockedFile;
use super::metrics::QueueMetrics;
use crate::uring::{ENABLE_RINGS, disabled_ring};

/// The file that all requests are for, as it is registered.
const DISK: types::Fixed = types::Fixed(0);
/// The most iovecs that the kernel takes at once.
const MAX_VECTORS: usize = 1024;
/// Size and number of the buffers that misaligned requests go through, one at a time each.
const BOUNCE_BYTES: usize = 128 << 10;
const BOUNCE_BUFFERS: usize = 8;
/// What is written at once where zeroes have to be written: the same bytes several times.
const ZEROES_BYTES: usize = 64 << 10;
const ZEROES_REPEATED: usize = 16;
/// Room in the ring besides requests: polls and their removal.
const SPARE_ENTRIES: u32 = 8;

/// Marks completions in `user_data`: the request id below it, or the signal and its generation.
const TAG_SIGNAL: u64 = 1 << 32;
const TAG_IGNORED: u64 = 1 << 33;

/// What a restricted ring is still told by its thread: the second is IORING_UNREGISTER_FILES.
const RESTRICTED_TO: [u8; 2] = [ENABLE_RINGS, 3];

struct Task {
    transfer: Transfer,
    vectors: Vectors,
    misaligned: bool,
    bounce: Option<usize>,
}

#[derive(Default)]
struct Watch {
    event: Option<EventFd>,
    generation: u16,
}

/// Executes the requests of one queue with io_uring.
pub struct UringBackend {
    ring: IoUring,
    /// Keeps the file, and with it the lock on the disk.
    _file: Arc<LockedFile>,
    geometry: Geometry,
    metrics: Arc<QueueMetrics>,
    tasks: Vec<Task>,
    bounce: Vec<AlignedBuffer>,
    bounce_free: Vec<usize>,
    /// Requests that wait for a bounce buffer.
    waiting: VecDeque<u16>,
    zeroes: Option<AlignedBuffer>,
    watches: [Watch; 2],
    /// Requests that the kernel has.
    in_flight: u32,
    /// Requests that failed before the kernel got them.
    failed: Vec<Completion>,
}

impl UringBackend {
    /// A ring for `depth` requests at once on `file`.
    ///
    /// # Errors
    /// [`BlockError::Uring`] if the kernel refuses io_uring or lacks an operation.
    pub fn new(
        file: Arc<LockedFile>,
        geometry: Geometry,
        depth: u16,
        metrics: Arc<QueueMetrics>,
    ) -> Result<Self, BlockError> {
        let ring = disabled_ring(u32::from(depth) + SPARE_ENTRIES)?;
        let failed = |what| move |error| BlockError::Uring { what, error };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(failed("asking for operations"))?;
        let needed = [
            (opcode::Readv::CODE, "readv"),
            (opcode::Writev::CODE, "writev"),
            (opcode::Read::CODE, "read"),
            (opcode::Write::CODE, "write"),
            (opcode::Fsync::CODE, "fsync"),
            (opcode::Fallocate::CODE, "fallocate"),
            (opcode::PollAdd::CODE, "poll"),
            (opcode::PollRemove::CODE, "poll removal"),
        ];
        for (code, what) in needed {
            if !probe.is_supported(code) {
                return Err(failed(what)(io::ErrorKind::Unsupported.into()));
            }
        }
        ring.submitter().register_files(&[file.as_raw_fd()]).map_err(failed("registering the disk"))?;
        // What goes through a ring no filter of system calls sees.
        let mut restrictions: Vec<_> = needed.map(|(code, _)| Restriction::sqe_op(code)).into();
        let flags = squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC;
        restrictions.push(Restriction::sqe_flags_allowed(flags.bits()));
        restrictions.extend(RESTRICTED_TO.map(Restriction::register_op));
        ring.submitter().register_restrictions(&mut restrictions).map_err(failed("restricting the ring"))?;
        let task = || Task {
            transfer: Transfer::new(Operation::Flush, 0, 0, 1),
            vectors: Vectors::default(),
            misaligned: false,
            bounce: None,
        };
        Ok(Self {
            ring,
            _file: file,
            geometry,
            metrics,
            tasks: (0..depth).map(|_| task()).collect(),
            bounce: Vec::new(),
            bounce_free: Vec::new(),
            waiting: VecDeque::new(),
            zeroes: None,
            watches: Default::default(),
            in_flight: 0,
            failed: Vec::new(),
        })
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the addresses in an entry are those of a request, valid until it ends as `submit` demands, or of
            // buffers and iovecs of this backend, which live and lie still until nothing is in flight.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    /// Hands the next part of request `id` to the kernel.
    fn issue(&mut self, id: u16) {
        let Some(task) = self.tasks.get(usize::from(id)) else { return };
        let entry = match task.transfer.action {
            Action::Transfer if task.misaligned => match self.bounced_entry(id) {
                Ok(Some(entry)) => entry,
                Ok(None) => return self.waiting.push_back(id),
                Err(errno) => return self.failed.push(Completion { id, result: Err(errno) }),
            },
            Action::Transfer => self.direct_entry(id),
            Action::WriteZeroes => match self.zeroes_entry(id) {
                Ok(entry) => entry,
                Err(errno) => return self.failed.push(Completion { id, result: Err(errno) }),
            },
            Action::Sync => opcode::Fsync::new(DISK).flags(types::FsyncFlags::DATASYNC).build(),
            Action::PunchHole | Action::ZeroRange => self.range_entry(id),
        };
        let again = self.tasks.get(usize::from(id)).is_some_and(|task| task.transfer.retries > 0);
        let flags = if again { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        match self.push(&entry.flags(flags).user_data(u64::from(id))) {
            Ok(()) => self.in_flight += 1,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.failed.push(Completion { id, result: Err(errno) });
            }
        }
    }

    fn direct_entry(&mut self, id: u16) -> squeue::Entry {
        let Some(task) = self.tasks.get_mut(usize::from(id)) else { return opcode::Nop::new().build() };
        let vectors = task.vectors.rest();
        let vectors = vectors.get(..MAX_VECTORS).unwrap_or(vectors);
        let flags = write_flags(task.transfer.operation);
        let (offset, reading) = (task.transfer.position(), task.transfer.operation == Operation::Read);
        task.transfer.issued = vectors.iter().map(|vector| vector.iov_len as u64).sum();
        if let [one] = vectors
            && let Ok(length) = u32::try_from(one.iov_len)
        {
            let base = one.iov_base.cast::<u8>();
            return match reading {
                true => opcode::Read::new(DISK, base, length).offset(offset).build(),
                false => opcode::Write::new(DISK, base, length).offset(offset).rw_flags(flags).build(),
            };
        }
        let (base, count) = (vectors.as_ptr(), u32::try_from(vectors.len()).unwrap_or(0));
        match reading {
            true => opcode::Readv::new(DISK, base, count).offset(offset).build(),
            false => opcode::Writev::new(DISK, base, count).offset(offset).rw_flags(flags).build(),
        }
    }

    /// `None`: all bounce buffers are in use.
    fn bounced_entry(&mut self, id: u16) -> Result<Option<squeue::Entry>, i32> {
        let Some(index) = self.take_bounce_buffer()? else { return Ok(None) };
        let (Some(task), Some(buffer)) = (self.tasks.get_mut(usize::from(id)), self.bounce.get(index)) else {
            return Err(libc::EIO);
        };
        task.bounce = Some(index);
        let length = usize::try_from(task.transfer.remaining()).unwrap_or(usize::MAX).min(buffer.len());
        task.transfer.issued = length as u64;
        let (offset, short) = (task.transfer.position(), u32::try_from(length).unwrap_or(0));
        if task.transfer.operation == Operation::Read {
            return Ok(Some(opcode::Read::new(DISK, buffer.as_ptr(), short).offset(offset).build()));
        }
        // SAFETY: the vectors are those of the request, valid until it ends.
        unsafe { buffer.gather(task.vectors.rest(), length) };
        let flags = write_flags(task.transfer.operation);
        Ok(Some(opcode::Write::new(DISK, buffer.as_ptr(), short).offset(offset).rw_flags(flags).build()))
    }

    fn take_bounce_buffer(&mut self) -> Result<Option<usize>, i32> {
        if let Some(index) = self.bounce_free.pop() {
            return Ok(Some(index));
        }
        if self.bounce.len() == BOUNCE_BUFFERS {
            return Ok(None);
        }
        let alignment = (self.geometry.memory_alignment as usize).max(4096);
        self.bounce.push(AlignedBuffer::new(BOUNCE_BYTES, alignment).ok_or(libc::ENOMEM)?);
        Ok(Some(self.bounce.len() - 1))
    }

    fn zeroes_entry(&mut self, id: u16) -> Result<squeue::Entry, i32> {
        if self.zeroes.is_none() {
            let alignment = (self.geometry.memory_alignment as usize).max(4096);
            self.zeroes = Some(AlignedBuffer::new(ZEROES_BYTES, alignment).ok_or(libc::ENOMEM)?);
        }
        let (Some(task), Some(zeroes)) = (self.tasks.get_mut(usize::from(id)), &self.zeroes) else {
            return Err(libc::EIO);
        };
        let mut left = usize::try_from(task.transfer.remaining()).unwrap_or(usize::MAX);
        let mut vectors = [libc::iovec { iov_base: zeroes.as_ptr().cast(), iov_len: 0 }; ZEROES_REPEATED];
        for vector in &mut vectors {
            vector.iov_len = left.min(ZEROES_BYTES);
            left -= vector.iov_len;
        }
        let used = vectors.split(|vector| vector.iov_len == 0).next().unwrap_or_default();
        task.vectors.set(used);
        Ok(self.direct_entry(id))
    }

    fn range_entry(&mut self, id: u16) -> squeue::Entry {
        let Some(task) = self.tasks.get_mut(usize::from(id)) else { return opcode::Nop::new().build() };
        let limits = match task.transfer.operation {
            Operation::Discard => self.geometry.discard,
            _ => self.geometry.write_zeroes,
        };
        let length = task.transfer.remaining().min(limits.map_or(u64::MAX, |limits| limits.max_bytes));
        task.transfer.issued = length;
        let mode = match task.transfer.action {
            Action::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
            _ => libc::FALLOC_FL_ZERO_RANGE,
        };
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        opcode::Fallocate::new(DISK, length).offset(task.transfer.position()).mode(mode).build()
    }

    /// Takes what the kernel says of request `id`; gives its completion if it has ended.
    fn completed(&mut self, id: u16, result: i32) -> Option<Completion> {
        self.in_flight = self.in_flight.saturating_sub(1);
        let task = self.tasks.get_mut(usize::from(id))?;
        let before = task.transfer.done;
        let step = task.transfer.complete(result);
        let bytes = usize::try_from(task.transfer.done - before).unwrap_or(0);
        if let Some(index) = task.bounce.take() {
            if task.transfer.operation == Operation::Read
                && let Some(buffer) = self.bounce.get(index)
            {
                // SAFETY: the vectors are those of the request, which has not ended yet.
                unsafe { buffer.scatter(task.vectors.rest(), bytes) };
            }
            self.bounce_free.push(index);
        }
        task.vectors.advance(bytes);
        match step {
            Step::Again => {
                self.issue(id);
                None
            }
            Step::Done(result) => Some(Completion { id, result }),
        }
    }

    fn arm(&mut self, signal: Signal) -> io::Result<()> {
        let Some(Watch { event: Some(event), generation }) = self.watches.get(signal as usize) else { return Ok(()) };
        let entry = opcode::PollAdd::new(types::Fd(event.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        let entry = entry.user_data(signal_tag(signal, *generation));
        self.push(&entry)
    }

    fn signalled(&mut self, entry: &cqueue::Entry, events: &mut Vec<Event>) -> io::Result<()> {
        for signal in [Signal::Kick, Signal::Command] {
            let current = self.watches.get(signal as usize).map_or(0, |watch| watch.generation);
            if entry.user_data() == signal_tag(signal, current) {
                events.push(Event::Signal(signal));
                if !cqueue::more(entry.flags()) {
                    self.arm(signal)?;
                }
            }
        }
        Ok(())
    }

    /// Submits, and waits if there is nothing to take.
    fn enter(&self, timeout: Option<Duration>) -> io::Result<()> {
        let entered = match timeout {
            None => self.ring.submitter().submit_and_wait(1),
            Some(Duration::ZERO) => self.ring.submit(),
            Some(limit) => {
                let limit = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&limit);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match entered {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Interrupted, timed out, or first the completions that there are have to be taken.
                Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }
}

fn signal_tag(signal: Signal, generation: u16) -> u64 {
    TAG_SIGNAL | (signal as u64) << 16 | u64::from(generation)
}

fn write_flags(operation: Operation) -> i32 {
    match operation {
        Operation::Write { stable: true } => libc::RWF_DSYNC,
        _ => 0,
    }
}

impl BlockBackend for UringBackend {
    fn prepare(&mut self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    fn watch(&mut self, signal: Signal, event: Option<EventFd>) -> io::Result<()> {
        let Some(watch) = self.watches.get_mut(signal as usize) else { return Ok(()) };
        let (watched, old) = (watch.event.is_some(), watch.generation);
        watch.generation = old.wrapping_add(1);
        let former = std::mem::replace(&mut watch.event, event);
        if watched {
            let removal = opcode::PollRemove::new(signal_tag(signal, old)).build().user_data(TAG_IGNORED);
            self.push(&removal)?;
        }
        self.arm(signal)?;
        // An entry that still waits to be submitted names the former descriptor: submit it before that closes.
        self.enter(Some(Duration::ZERO))?;
        drop(former);
        Ok(())
    }

    unsafe fn submit(&mut self, request: Request<'_>) {
        let geometry = &self.geometry;
        let Some(task) = self.tasks.get_mut(usize::from(request.id)) else { return };
        let Request { operation, offset, length, .. } = request;
        task.transfer = Transfer::new(operation, offset, length, geometry.offset_alignment);
        task.bounce = None;
        task.vectors.set(request.buffers);
        let aligned = task.vectors.aligned(geometry.memory_alignment, geometry.offset_alignment);
        // More vectors than the kernel takes would be cut anywhere, also within a block.
        let too_many = geometry.offset_alignment > 1 && request.buffers.len() > MAX_VECTORS;
        task.misaligned = !aligned || too_many;
        if task.misaligned {
            self.metrics.bounced.increment();
        }
        self.issue(request.id);
    }

    fn start(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() { Ok(()) } else { self.enter(Some(Duration::ZERO)) }
    }

    fn is_ready(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun() || !self.failed.is_empty()
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        if self.ring.completion().is_empty() && self.failed.is_empty() {
            self.enter(timeout)?;
        } else if !self.ring.submission().is_empty() {
            self.enter(Some(Duration::ZERO))?;
        }
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            if entry.user_data() & TAG_SIGNAL != 0 {
                self.signalled(&entry, events)?;
            } else if entry.user_data() & TAG_IGNORED == 0 {
                let id = u16::try_from(entry.user_data()).unwrap_or(u16::MAX);
                let done = self.completed(id, entry.result());
                events.extend(done.map(Event::Done));
            }
        }
        while (!self.bounce_free.is_empty() || self.bounce.len() < BOUNCE_BUFFERS)
            && let Some(id) = self.waiting.pop_front()
        {
            self.issue(id);
        }
        events.extend(self.failed.drain(..).map(Event::Done));
        Ok(())
    }
}

impl Drop for UringBackend {
    fn drop(&mut self) {
        let mut events = Vec::new();
        self.waiting.clear();
        while self.in_flight > 0 {
            // Closing a ring does not end what the kernel has begun, and it would write to memory that is freed.
            if let Err(error) = self.wait(None, &mut events) {
                tracing::error!(%error, "io_uring cannot be drained: its thread and memory are kept for ever");
                loop {
                    std::thread::park();
                }
            }
            events.clear();
        }
        // A ring is torn down some time after it was closed: let go of the disk now.
        let _ = self.ring.submitter().unregister_files();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stable_write_asks_the_kernel_for_stable_data() {
        assert_eq!(write_flags(Operation::Write { stable: true }), libc::RWF_DSYNC);
        assert_eq!(write_flags(Operation::Write { stable: false }), 0);
        assert_eq!(write_flags(Operation::Read), 0);
    }
}
