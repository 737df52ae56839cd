//! The newest output of the guest, and how the console's thread learns of it.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Most bytes that the backlog keeps. Its memory grows with what is written.
pub const BACKLOG_LIMIT: usize = 1 << 20;

/// The backlog itself. Positions count all bytes ever written.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: VecDeque<u8>,
    end: u64,
}

/// What a read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Bytes between the reader's place and the oldest byte that is still there.
    pub(super) lost: u64,
    /// Bytes that were copied.
    pub(super) length: usize,
}

impl Backlog {
    fn append(&mut self, bytes: &[u8]) {
        self.end = self.end.saturating_add(bytes.len() as u64);
        let kept = bytes.get(bytes.len().saturating_sub(BACKLOG_LIMIT)..).unwrap_or(bytes);
        let excess = (self.bytes.len() + kept.len()).saturating_sub(BACKLOG_LIMIT);
        self.bytes.drain(..excess);
        let needed = self.bytes.len() + kept.len();
        if needed > self.bytes.capacity() {
            // Doubling, but never beyond the limit.
            let wanted = needed.next_power_of_two().clamp(4096, BACKLOG_LIMIT);
            self.bytes.reserve_exact(wanted.saturating_sub(self.bytes.len()));
        }
        self.bytes.extend(kept);
    }

    /// Position of the oldest byte.
    pub(super) fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Position after the newest byte.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Copies what follows `position`, as far as `buffer` goes.
    pub(super) fn read(&self, position: u64, buffer: &mut [u8]) -> Chunk {
        let lost = self.start().saturating_sub(position);
        let skip = usize::try_from(position.max(self.start()) - self.start()).unwrap_or(usize::MAX);
        let (first, second) = self.bytes.as_slices();
        let mut length = 0;
        for (part, skip) in [(first, skip), (second, skip.saturating_sub(first.len()))] {
            let Some(source) = part.get(skip..) else { continue };
            let Some(room) = buffer.get_mut(length..) else { break };
            let count = source.len().min(room.len());
            if let (Some(room), Some(source)) = (room.get_mut(..count), source.get(..count)) {
                room.copy_from_slice(source);
                length += count;
            }
        }
        Chunk { lost, length }
    }
}

/// What the guest's end and the console's thread share.
pub(super) struct Shared {
    backlog: Mutex<Backlog>,
    /// Wakes the console's thread.
    pub(super) event: EventFd,
    /// The thread knows of new output already, or nobody listens.
    signalled: AtomicBool,
    threaded: bool,
    /// The input sink has room again.
    pub(super) input_room: AtomicBool,
}

impl Shared {
    pub(super) fn new(threaded: bool) -> io::Result<Self> {
        Ok(Self {
            backlog: Mutex::default(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            signalled: AtomicBool::new(!threaded),
            threaded,
            input_room: AtomicBool::new(false),
        })
    }

    pub(super) fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn append(&self, bytes: &[u8]) {
        self.backlog().append(bytes);
        if !self.signalled.swap(true, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// From now on new output wakes the thread; it looks for what came before that itself.
    pub(super) fn listen(&self) {
        self.signalled.store(false, Ordering::SeqCst);
    }

    pub(super) fn wake(&self) {
        if self.threaded {
            // Fails only when the counter is full: then the thread is being woken already.
            let _ = self.event.write(1);
        }
    }

    pub(super) fn recent(&self, limit: usize) -> Vec<u8> {
        let backlog = self.backlog();
        let start = backlog.start().max(backlog.end().saturating_sub(limit as u64));
        let mut bytes = vec![0; usize::try_from(backlog.end() - start).unwrap_or(0)];
        let length = backlog.read(start, &mut bytes).length;
        bytes.truncate(length);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(backlog: &Backlog, position: u64) -> (u64, Vec<u8>) {
        let mut buffer = vec![0; BACKLOG_LIMIT];
        let chunk = backlog.read(position, &mut buffer);
        buffer.truncate(chunk.length);
        (chunk.lost, buffer)
    }

    #[test]
    fn a_reader_gets_what_follows_its_place() {
        let mut backlog = Backlog::default();
        backlog.append(b"hello ");
        backlog.append(b"world");
        assert_eq!(read(&backlog, 0), (0, b"hello world".to_vec()));
        assert_eq!(read(&backlog, 6), (0, b"world".to_vec()));
        assert_eq!(read(&backlog, 11), (0, Vec::new()));
        let mut small = [0; 4];
        assert_eq!(backlog.read(2, &mut small), Chunk { lost: 0, length: 4 });
        assert_eq!(&small, b"llo ");
    }

    #[test]
    fn the_newest_mebibyte_stays_and_what_went_before_it_is_counted() {
        let mut backlog = Backlog::default();
        let pattern: Vec<u8> = (0..=250).collect();
        for _ in 0..10_000 {
            backlog.append(&pattern);
        }
        let all = 251 * 10_000;
        assert_eq!(backlog.end(), all);
        let (lost, bytes) = read(&backlog, 100);
        assert_eq!(lost, all - BACKLOG_LIMIT as u64 - 100);
        assert_eq!(bytes.len(), BACKLOG_LIMIT);
        assert_eq!(bytes[0], ((lost + 100) % 251) as u8);
        assert_eq!(*bytes.last().unwrap(), 250);
    }

    #[test]
    fn memory_grows_with_the_output_and_never_beyond_the_limit() {
        let mut backlog = Backlog::default();
        assert_eq!(backlog.bytes.capacity(), 0);
        backlog.append(b"x");
        assert!(backlog.bytes.capacity() <= 4096);
        backlog.append(&vec![b'y'; 3 * BACKLOG_LIMIT]);
        backlog.append(b"z");
        assert_eq!(backlog.bytes.capacity(), BACKLOG_LIMIT);
        assert_eq!(backlog.bytes.len(), BACKLOG_LIMIT);
        assert_eq!(backlog.end(), 3 * BACKLOG_LIMIT as u64 + 2);
    }
}
