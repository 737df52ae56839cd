//! One reader or writer of the console: a descriptor, its place in the backlog, and what it waits for.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backlog::Shared;
use super::sys;

/// How long after a failed write to a log file the next one is tried.
const RETRY: Duration = Duration::from_secs(1);

/// A descriptor: sockets need their own calls so as never to wait.
pub(super) enum Stream {
    /// A Unix socket.
    Socket(OwnedFd),
    /// Anything else.
    File(File),
}

impl Stream {
    fn fd(&self) -> RawFd {
        match self {
            Self::Socket(socket) => socket.as_raw_fd(),
            Self::File(file) => file.as_raw_fd(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Socket(socket) => sys::receive(socket.as_fd(), buffer),
            Self::File(file) => file.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Socket(socket) => sys::send(socket.as_fd(), bytes),
            Self::File(file) => file.write(bytes),
        }
    }

    /// A stream over a copy of an inherited descriptor (stdin, stdout). Where that can be done without changing the mode
    /// of a file that other processes share, it is opened anew so as never to wait.
    pub(super) fn inherited(fd: impl AsFd, write: bool) -> io::Result<Self> {
        let file = File::from(fd.as_fd().try_clone_to_owned()?);
        let kind = file.metadata()?.file_type();
        if kind.is_socket() {
            return Ok(Self::Socket(file.into()));
        }
        if !kind.is_fifo() && !file.is_terminal() {
            return Ok(Self::File(file));
        }
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let twin = File::options().read(!write).write(write).custom_flags(flags).open(path);
        // Without a twin (another user's terminal) a write may wait for the reader, which holds up this thread only.
        Ok(Self::File(twin.unwrap_or(file)))
    }
}

/// What an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Standard input; whether it is a terminal.
    Stdin { terminal: bool },
    /// Standard output.
    Stdout,
    /// The log file.
    LogFile,
    /// The master of the pseudo-terminal.
    Pty,
    /// A client of the socket.
    Client,
}

/// Whether an endpoint is still of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    /// Works, or will again.
    Good,
    /// Its other end is gone.
    Gone,
}

pub(super) struct Endpoint {
    pub(super) kind: Kind,
    stream: Stream,
    /// Input may still come.
    pub(super) reads: bool,
    /// Output still goes there.
    pub(super) writes: bool,
    /// The other end is gone, but what it typed is not all read.
    pub(super) hung_up: bool,
    /// Place in the backlog.
    cursor: u64,
    /// A marker that is not all written, and where the backlog goes on after it.
    staged: Vec<u8>,
    /// The last write found no room.
    full: bool,
    failed_at: Option<Instant>,
    armed: Option<EventSet>,
    /// It is a kind of file that is always ready and that epoll refuses.
    always_ready: bool,
}

impl Endpoint {
    pub(super) fn new(kind: Kind, stream: Stream, cursor: u64) -> Self {
        let regular = |file: &File| file.metadata().is_ok_and(|data| data.is_file());
        Self {
            always_ready: matches!(&stream, Stream::File(file) if regular(file)),
            kind,
            stream,
            reads: !matches!(kind, Kind::Stdout | Kind::LogFile),
            writes: !matches!(kind, Kind::Stdin { .. }),
            hung_up: false,
            cursor,
            staged: Vec::new(),
            full: false,
            failed_at: None,
            armed: None,
        }
    }

    /// Starts anew, for another user of the same descriptor.
    pub(super) fn restart(&mut self, cursor: u64) {
        self.cursor = cursor;
        self.staged.clear();
        self.full = false;
    }

    pub(super) fn file(&self) -> Option<&File> {
        match &self.stream {
            Stream::File(file) => Some(file),
            Stream::Socket(_) => None,
        }
    }

    /// Up to where the other end has everything; the end of time for one that takes no output.
    pub(super) fn progress(&self) -> u64 {
        match (self.writes, self.staged.is_empty()) {
            (false, _) => u64::MAX,
            (true, true) => self.cursor,
            (true, false) => self.cursor.saturating_sub(1),
        }
    }

    /// When to try again by itself, without an event.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.failed_at.map(|failed| failed + RETRY)
    }

    /// Whether input is there without an event.
    pub(super) fn ready_to_read(&self) -> bool {
        self.reads && (self.always_ready || self.hung_up)
    }

    /// Writes what the backlog has beyond this endpoint's place, until there is no more or no room.
    pub(super) fn pump(&mut self, shared: &Shared, scratch: &mut [u8], now: Instant) -> Health {
        if !self.writes || self.full || self.retry_at().is_some_and(|at| now < at) {
            return Health::Good;
        }
        loop {
            let mut length = 0;
            if self.staged.is_empty() {
                let chunk = shared.backlog().read(self.cursor, scratch);
                if chunk.lost > 0 {
                    self.cursor = self.cursor.saturating_add(chunk.lost);
                    self.staged = marker(chunk.lost);
                } else if chunk.length == 0 {
                    return Health::Good;
                }
                length = chunk.length;
            }
            let staged = !self.staged.is_empty();
            let bytes = if staged { &self.staged } else { scratch.get(..length).unwrap_or_default() };
            match self.stream.write(bytes) {
                Ok(0) => return self.failed(&io::Error::from(ErrorKind::WriteZero), now),
                Ok(written) => {
                    self.failed_at = None;
                    if staged {
                        self.staged.drain(..written.min(self.staged.len()));
                    } else {
                        self.cursor = self.cursor.saturating_add(written as u64);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.full = true;
                    return Health::Good;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.failed(&error, now),
            }
        }
    }

    fn failed(&mut self, error: &io::Error, now: Instant) -> Health {
        let stored = self.kind == Kind::LogFile || (self.kind == Kind::Stdout && self.always_ready);
        if !stored {
            return Health::Gone;
        }
        if self.failed_at.replace(now).is_none() {
            tracing::warn!(%error, "cannot write the console's log: the backlog keeps the newest output, trying each second");
        }
        Health::Good
    }

    /// Reads once. `None`: nothing there. `Some(0)`: no more will come.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        match self.stream.read(buffer) {
            Ok(0) => {
                self.reads = false;
                Some(0)
            }
            Ok(length) => Some(length),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                // After a hang-up nothing more can come.
                self.reads &= !(self.hung_up && error.kind() == ErrorKind::WouldBlock);
                None
            }
            Err(_) => {
                self.reads = false;
                Some(0)
            }
        }
    }

    /// The other end has room again.
    pub(super) fn writable(&mut self) {
        self.full = false;
    }

    /// Registers with `epoll` for what is needed now and nothing else. `None` takes it out.
    pub(super) fn arm(&mut self, epoll: &Epoll, token: u64, input_blocked: bool, present: bool) -> io::Result<()> {
        let mut wanted = EventSet::empty();
        let read_on = matches!(self.kind, Kind::Stdin { terminal: true }) || !input_blocked;
        wanted.set(EventSet::IN, self.reads && read_on);
        wanted.set(EventSet::OUT, self.writes && self.full);
        // A two-way descriptor stays in with no interest, so that its hang-up is seen.
        let two_way = self.reads && self.writes || self.kind == Kind::Client;
        let wanted = (present && !self.hung_up && (two_way || !wanted.is_empty())).then_some(wanted);
        if self.always_ready || wanted == self.armed {
            return Ok(());
        }
        let (operation, events) = match (self.armed, wanted) {
            (None, Some(events)) => (ControlOperation::Add, events),
            (Some(_), Some(events)) => (ControlOperation::Modify, events),
            (_, None) => (ControlOperation::Delete, EventSet::empty()),
        };
        match epoll.ctl(operation, self.stream.fd(), EpollEvent::new(events, token)) {
            Ok(()) => self.armed = wanted,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                self.always_ready = true;
                self.full = false;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn marker(lost: u64) -> Vec<u8> {
    format!("\r\n[rackvisor: {lost} bytes of console output lost]\r\n").into_bytes()
}
