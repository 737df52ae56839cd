//! Knows whether somebody has the slave of our pseudo-terminal open.
//!
//! A master whose slave is closed is always "hung up", and nothing but an inotify watch tells when it is opened again.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use super::sys;

/// Size of an inotify event without a name; the watch of a single file never gives names.
const EVENT: usize = 16;

/// Counts the opens of the slave.
pub(super) struct SlaveWatch {
    inotify: File,
    opens: u64,
}

impl SlaveWatch {
    /// Watches the slave at `path`.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { inotify: sys::watch_opens(path)?, opens: 0 })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.inotify.as_raw_fd()
    }

    /// The master said that nobody has it open.
    pub(super) fn closed(&mut self) {
        self.opens = 0;
    }

    /// Takes in what happened. Says whether the slave was closed by all and opened anew, and whether it is open.
    pub(super) fn update(&mut self) -> (bool, bool) {
        let mut renewed = false;
        let mut buffer = [0; 64 * EVENT];
        while let Ok(length) = self.inotify.read(&mut buffer) {
            for event in buffer.get(..length).unwrap_or_default().chunks_exact(EVENT) {
                let mask = event.get(4..8).and_then(|mask| mask.try_into().ok()).map_or(0, u32::from_ne_bytes);
                if mask & libc::IN_OPEN != 0 {
                    renewed |= self.opens == 0;
                    self.opens += 1;
                }
                if mask & libc::IN_CLOSE != 0 {
                    self.opens = self.opens.saturating_sub(1);
                }
                if mask & libc::IN_Q_OVERFLOW != 0 {
                    // What was missed may have been an open; if it was none, the master says so at once.
                    self.opens = self.opens.max(1);
                }
            }
            if length < buffer.len() {
                break;
            }
        }
        (renewed, self.opens > 0)
    }
}
