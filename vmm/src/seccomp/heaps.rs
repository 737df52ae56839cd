//! Keeps the C library from looking at the host when a thread allocates.
#![allow(unsafe_code)] // mallopt(3) has no safe form.

use std::hint::black_box;
use std::io;
use std::thread;

/// Heaps per processor, as many as glibc has by itself.
const PER_PROCESSOR: usize = 8;
/// Bytes of a block that glibc takes from a thread's heap, and not from the kernel (M_MMAP_THRESHOLD, 128 KiB).
const BLOCK: usize = 64 << 10;
/// Blocks that are together more than what glibc leaves at the end of a heap (M_TRIM_THRESHOLD): 128 KiB, or twice the largest block
/// that was taken from the kernel and given back since.
const BLOCKS: usize = 64;

/// Has glibc know what it would find out in whatever thread asks first, by opening files: how many heaps threads share, which is
/// of interest to the ninth that allocates, and how the host counts memory, which is to the first heap that shrinks.
///
/// # Errors
/// There is no thread left for it.
pub fn settle() -> io::Result<()> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let most = i32::try_from(processors.saturating_mul(PER_PROCESSOR)).unwrap_or(i32::MAX);
    // SAFETY: no memory is passed; glibc takes the parameter at any time.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, most) };
    // The heap of the first thread is the program's own, which grows and shrinks in another way.
    let heap = thread::Builder::new().name("heap".to_owned()).spawn(grow_and_shrink)?;
    heap.join().map_err(|_| io::Error::other("the thread that tries a heap panicked"))
}

/// Has the calling thread's heap grow, and shrink.
pub(super) fn grow_and_shrink() {
    drop(black_box([(); BLOCKS].map(|()| Vec::<u8>::with_capacity(BLOCK))));
}

/// Has heaps shrink only by more than this many bytes from now on.
#[cfg(test)]
pub(super) fn keep(bytes: i32) {
    // SAFETY: as above.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, bytes) };
}
