//! The seam between virtio-blk and what stores the bytes.
//!
//! A backend belongs to one queue and to the worker thread of that queue, which waits for nothing but
//! [`BlockBackend::wait`]. A [`BlockSource`] is the disk as a whole.

// Submitting vows that memory stays valid, which no type can say.
#![allow(unsafe_code)]

use std::io;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// Limits of an operation that works on ranges without data, such as discard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeLimits {
    /// The largest range that is done at once, in bytes. Larger ones are split. Never 0.
    pub max_bytes: u64,
    /// Ranges should start and end at multiples of this many bytes.
    pub granularity: u32,
}

/// The shape of a disk. All sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk: a multiple of `logical_block_size`.
    pub capacity: u64,
    /// The smallest unit that can be addressed: a power of two, at least 512.
    pub logical_block_size: u32,
    /// The smallest unit that is written without reading the rest of it first.
    pub physical_block_size: u32,
    /// Where the first physical block starts.
    pub alignment_offset: u32,
    /// The preferred smallest request; 0 where none is.
    pub min_io: u32,
    /// The preferred largest request; 0 where none is.
    pub opt_io: u32,
    /// Whether seeks are slow.
    pub rotational: bool,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What discard can do; `None` where it is not offered.
    pub discard: Option<RangeLimits>,
    /// What write-zeroes can do; `None` where it is not offered.
    pub write_zeroes: Option<RangeLimits>,
    /// What addresses of buffers have to be a multiple of; 1 where it does not matter.
    pub memory_alignment: u32,
    /// What offsets and lengths of each buffer have to be a multiple of; 1 where it does not matter.
    pub offset_alignment: u32,
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reads into the buffers.
    Read,
    /// Writes the buffers. If `stable`, the data is on stable storage when the request completes.
    Write {
        /// Whether it completes only once it would survive a power failure.
        stable: bool,
    },
    /// Makes stable what was written before.
    Flush,
    /// Declares a range as unused. Its content is undefined afterwards.
    Discard,
    /// Makes a range read as zeroes. If `unmap`, space may be given back.
    WriteZeroes {
        /// Whether space may be given back.
        unmap: bool,
        /// As for [`Operation::Write`].
        stable: bool,
    },
}

/// A request to a backend.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Names the request in its completion: less than the depth of the backend, and not in flight already.
    pub id: u16,
    /// What to do.
    pub operation: Operation,
    /// First byte on the disk, a multiple of the logical block size.
    pub offset: u64,
    /// Number of bytes, a multiple of the logical block size; the sum of the lengths of the buffers if there are any.
    pub length: u64,
    /// Memory that is read or written; empty unless the operation reads or writes.
    pub buffers: &'a [libc::iovec],
}

/// The end of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The request that ended.
    pub id: u16,
    /// The number of bytes that were really done, or the errno. Less than was asked for is a failure to whoever asked.
    pub result: Result<u64, i32>,
}

/// What a worker is woken by besides completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// The driver made requests available.
    Kick,
    /// The owner of the worker has a command for it.
    Command,
}

/// What a worker waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A watched eventfd was signalled. May come more often than it was, but is never missed.
    Signal(Signal),
    /// A request ended.
    Done(Completion),
}

/// What executes the requests of one queue.
///
/// A backend continues short transfers and tries again what was interrupted; it answers each request exactly once, in any
/// order, and only [`BlockBackend::wait`] gives answers. Dropping it waits for all that is in flight: memory that a
/// request names must never be written after the backend is gone.
pub trait BlockBackend: Send {
    /// Called once by the worker, before all else.
    ///
    /// # Errors
    /// What the kernel answered; the backend is unusable then.
    fn prepare(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Wakes [`BlockBackend::wait`] when `event` is signalled, from now on and until it is watched anew or not at all.
    /// A signal from before counts too. The backend does not read the eventfd.
    ///
    /// # Errors
    /// What the kernel answered.
    fn watch(&mut self, signal: Signal, event: Option<EventFd>) -> io::Result<()>;

    /// Accepts a request. It may start only with the next [`BlockBackend::wait`]; errors come as its completion.
    ///
    /// # Safety
    /// The memory that `request.buffers` name must stay valid until the completion of the request was given, or the
    /// backend dropped. Others (the guest) may access it at any time.
    unsafe fn submit(&mut self, request: Request<'_>);

    /// Starts what was submitted, and waits for nothing.
    ///
    /// # Errors
    /// What the kernel answered, if the backend cannot go on.
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Whether [`BlockBackend::wait`] has an event to give at once, as far as can be told without the kernel's help.
    fn is_ready(&mut self) -> bool {
        false
    }

    /// Starts what was submitted and appends events to `events`. Waits until there is at least one, or for `timeout`
    /// (`None`: for ever; zero: not at all).
    ///
    /// # Errors
    /// What the kernel answered, if the backend cannot go on. Requests in flight stay in flight.
    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()>;
}

/// A disk as a whole, beside its queues: what it looks like, and whether it grew.
pub trait BlockSource: Send + Sync {
    /// The shape of the disk when it was opened.
    fn geometry(&self) -> Geometry;

    /// The size of the disk now, in bytes. Must not wait for I/O.
    ///
    /// # Errors
    /// What the kernel answered.
    fn capacity(&self) -> io::Result<u64>;

    /// Makes all that was written stable. Waits for the disk.
    ///
    /// # Errors
    /// What the kernel answered: some of what was written may be lost.
    fn sync(&self) -> io::Result<()>;
}
