//! Aligned host buffers, and the iovecs of requests.

// Allocation with an alignment, and copies from and to memory that the guest shares.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use vm_memory::VolatileSlice;

/// Zeroed memory with an alignment.
#[derive(Debug)]
pub(super) struct AlignedBuffer {
    memory: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer is owned memory like a Box<[u8]>.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// `length` (not 0) zero bytes at a multiple of `alignment`; `None` if there is no memory.
    pub fn new(length: usize, alignment: usize) -> Option<Self> {
        let layout = Layout::from_size_align(length.max(1), alignment).ok()?;
        // SAFETY: the layout has a size that is not 0.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { memory, layout })
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.layout.size()
    }

    fn volatile(&self) -> VolatileSlice<'_> {
        // SAFETY: the memory is valid for its size as long as `self` lives.
        unsafe { VolatileSlice::new(self.memory.as_ptr(), self.layout.size()) }
    }

    /// Fills the buffer with the first `length` bytes that `vectors` name.
    ///
    /// # Safety
    /// The vectors must name valid memory.
    pub unsafe fn gather(&self, vectors: &[libc::iovec], length: usize) {
        // SAFETY: as the caller vows.
        unsafe { self.copy(vectors, length, |guest, own| guest.copy_to_volatile_slice(own)) }
    }

    /// Copies the first `length` bytes of the buffer to where `vectors` point.
    ///
    /// # Safety
    /// The vectors must name valid memory.
    pub unsafe fn scatter(&self, vectors: &[libc::iovec], length: usize) {
        // SAFETY: as the caller vows.
        unsafe { self.copy(vectors, length, |guest, own| own.copy_to_volatile_slice(guest)) }
    }

    /// # Safety
    /// The vectors must name valid memory.
    unsafe fn copy(&self, vectors: &[libc::iovec], length: usize, copy: impl Fn(VolatileSlice, VolatileSlice)) {
        let mut at = 0;
        for vector in vectors {
            let piece = vector.iov_len.min(length - at);
            // SAFETY: the piece is within what the caller vows to be valid.
            let guest = unsafe { VolatileSlice::new(vector.iov_base.cast(), piece) };
            let Ok(own) = self.volatile().subslice(at, piece) else { return };
            copy(guest, own);
            at += piece;
            if at == length {
                return;
            }
        }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) }
    }
}

/// The iovecs of a request, as they shrink from the front while it goes on. Lies still in memory while the kernel reads it.
#[derive(Debug, Default)]
pub(super) struct Vectors {
    all: Vec<libc::iovec>,
    first: usize,
}

// SAFETY: the addresses are only handed to the kernel or to `AlignedBuffer`, under the contract of `BlockBackend::submit`.
unsafe impl Send for Vectors {}

impl Vectors {
    pub fn set(&mut self, vectors: &[libc::iovec]) {
        self.all.clear();
        self.first = 0;
        self.all.extend_from_slice(vectors);
    }

    /// What is left.
    pub fn rest(&self) -> &[libc::iovec] {
        self.all.get(self.first..).unwrap_or_default()
    }

    /// Drops `bytes` from the front.
    pub fn advance(&mut self, mut bytes: usize) {
        while let Some(vector) = self.all.get_mut(self.first) {
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                vector.iov_len -= bytes;
                return;
            }
            bytes -= vector.iov_len;
            self.first += 1;
        }
    }

    /// Whether all addresses are multiples of `memory`, and all lengths of `length`.
    pub fn aligned(&self, memory: u32, length: u32) -> bool {
        let (memory, length) = (memory.max(1) as usize, length.max(1) as usize);
        self.all.iter().all(|v| (v.iov_base as usize).is_multiple_of(memory) && v.iov_len.is_multiple_of(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vectors(parts: &mut [Vec<u8>]) -> Vec<libc::iovec> {
        parts.iter_mut().map(|p| libc::iovec { iov_base: p.as_mut_ptr().cast(), iov_len: p.len() }).collect()
    }

    #[test]
    fn bytes_are_gathered_and_scattered_in_order_across_vectors() {
        let mut parts = [vec![1; 3], vec![2; 5], vec![3; 2]];
        let raw = vectors(&mut parts);
        let buffer = AlignedBuffer::new(4096, 4096).unwrap();
        assert_eq!(buffer.as_ptr() as usize % 4096, 0);
        // SAFETY: the parts live.
        unsafe { buffer.gather(&raw, 9) };
        let mut seen = [0_u8; 10];
        buffer.volatile().copy_to(&mut seen);
        assert_eq!(seen, [1, 1, 1, 2, 2, 2, 2, 2, 3, 0]);
        buffer.volatile().copy_from(&[9_u8; 7]);
        // SAFETY: the parts live.
        unsafe { buffer.scatter(&raw, 7) };
        assert_eq!(parts, [vec![9; 3], vec![9, 9, 9, 9, 2], vec![3; 2]]);
    }

    #[test]
    fn vectors_shrink_from_the_front() {
        let mut parts = [vec![0; 3], vec![0; 5]];
        let raw = vectors(&mut parts);
        let mut rest = Vectors::default();
        rest.set(&raw);
        rest.advance(2);
        assert_eq!(rest.rest().iter().map(|v| v.iov_len).collect::<Vec<_>>(), [1, 5]);
        rest.advance(4);
        assert_eq!(rest.rest()[0].iov_base as usize, parts[1].as_ptr() as usize + 3);
        rest.advance(100);
        assert!(rest.rest().is_empty());
    }
}
