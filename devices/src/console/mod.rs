//! Where the serial port goes: a bounded backlog and its readers (stdio, file, pty, Unix socket).
//!
//! A vCPU thread only appends to the backlog ([`ConsoleOutput::append`]) and, when the console's thread sleeps, signals an
//! eventfd. The thread `console` does all I/O, without ever waiting for one reader. The backlog keeps the newest
//! [`BACKLOG_LIMIT`] bytes; each reader has its own place in it. A reader that is overtaken gets a line that says how many
//! bytes it missed, then the oldest that are still there. New readers get the whole backlog first.

mod backlog;
mod endpoint;
mod escape;
mod pty;
mod server;
mod socket;
mod sys;
mod terminal;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::{ThreadKind, ThreadSpawner};

use backlog::Shared;
use server::{Control, Opened, Server};

pub use backlog::BACKLOG_LIMIT;
pub use terminal::{RawTerminal, restore_terminal};

/// Clients of a console socket at one time.
pub const CLIENT_LIMIT: usize = 16;

/// Called on the console's thread when the user types the escape sequence.
pub type EscapeHook = Box<dyn Fn() + Send>;

/// Where the console goes.
pub enum ConsoleMode {
    /// Nowhere: the backlog is kept, nobody reads it, no thread runs.
    Off,
    /// This process's standard input and output. Raw mode is the caller's: see [`RawTerminal`].
    Stdio {
        /// Called when the user types Ctrl-A X at a terminal; Ctrl-A Ctrl-A sends one Ctrl-A. Without it, and where
        /// standard input is no terminal, all bytes go to the guest.
        escape: Option<EscapeHook>,
    },
    /// Output only, appended to this file, which is made with mode 0600 if it is not there. Never truncated: a log
    /// rotation by copy and truncate works. While it cannot be written (disk full) it is tried again each second.
    File(PathBuf),
    /// A new pseudo-terminal, see [`Console::pty_path`]. Who opens it gets the backlog first.
    Pty,
    /// A Unix stream socket at this path, mode 0600, for up to [`CLIENT_LIMIT`] clients at once: all see all output and
    /// each may type. A dead socket file is replaced, a live one refused. Removed at the end.
    Socket(PathBuf),
}

/// Why there is no console.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// The kernel refused something that every console needs.
    #[error("cannot set up the console ({what}): {source}; raise the limits on files and threads of this process")]
    Setup {
        /// What was being made.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The output file cannot be opened.
    #[error("cannot open the console file {path}: {source}; check its folder and permissions")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Another process serves this socket.
    #[error("console socket {path} is in use by another process: choose another path or end that process")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is something at the path that is not a socket.
    #[error(
        "console socket {path}: there is a file of another kind, which is not touched; remove it or choose another path"
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error(
        "cannot make the console socket {path}: {source}; check its folder, permissions and length (at most 107 bytes)"
    )]
    Socket {
        /// The path.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// Takes what users type. Implemented by the serial port.
pub trait InputSink: Send + Sync {
    /// Takes as many of `bytes` as there is room for and returns how many. After it took fewer than all, it calls
    /// [`ConsoleOutput::wake_input`] once there is room again. Called on the console's thread; must not block.
    fn push(&self, bytes: &[u8]) -> usize;
}

/// The guest's end of the console: cheap to clone, never blocks.
#[derive(Clone)]
pub struct ConsoleOutput {
    shared: Arc<Shared>,
}

impl ConsoleOutput {
    /// Appends `bytes` to the backlog. Called on vCPU threads.
    pub fn append(&self, bytes: &[u8]) {
        self.shared.append(bytes);
    }

    /// Says that the [`InputSink`] has room again.
    pub fn wake_input(&self) {
        self.shared.input_room.store(true, Ordering::SeqCst);
        self.shared.wake();
    }
}

/// A console and its thread. Dropping it ends both at once; [`Console::shutdown`] lets the readers have the rest first.
pub struct Console {
    shared: Arc<Shared>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
    pty_path: Option<PathBuf>,
    /// Removes the socket file when it goes.
    _socket: Option<socket::SocketFile>,
}

impl Console {
    /// Opens what `mode` says and starts the thread `console` (none for [`ConsoleMode::Off`]).
    ///
    /// # Errors
    /// [`ConsoleError`]; nothing stays behind then.
    pub fn new(mode: ConsoleMode, spawner: &dyn ThreadSpawner) -> Result<Self, ConsoleError> {
        let threaded = !matches!(mode, ConsoleMode::Off);
        Self::start(threaded, spawner, |server| server.open(mode))
    }

    /// Starts a console whose readers are opened by `open`.
    fn start(
        threaded: bool,
        spawner: &dyn ThreadSpawner,
        open: impl FnOnce(&mut Server) -> Result<Opened, ConsoleError>,
    ) -> Result<Self, ConsoleError> {
        let setup = |what| move |source| ConsoleError::Setup { what, source };
        let shared = Arc::new(Shared::new(threaded).map_err(setup("eventfd"))?);
        let control = Arc::new(Control::default());
        if !threaded {
            return Ok(Self { shared, control, thread: None, pty_path: None, _socket: None });
        }
        let mut server = Server::new(Arc::clone(&shared), Arc::clone(&control)).map_err(setup("epoll"))?;
        let opened = open(&mut server)?;
        let thread =
            spawner.spawn(ThreadKind::Console, "console", Box::new(move || server.run())).map_err(setup("thread"))?;
        Ok(Self { shared, control, thread: Some(thread), pty_path: opened.pty_path, _socket: opened.socket })
    }

    /// The guest's end.
    #[must_use]
    pub fn output(&self) -> ConsoleOutput {
        ConsoleOutput { shared: Arc::clone(&self.shared) }
    }

    /// Sends what users type to `sink`. Until then it waits.
    pub fn set_input(&self, sink: Arc<dyn InputSink>) {
        self.control.set_input(Some(sink));
        self.shared.input_room.store(true, Ordering::SeqCst);
        self.shared.wake();
    }

    /// The terminal to open in mode [`ConsoleMode::Pty`]: `/dev/pts/N`.
    #[must_use]
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty_path.as_deref()
    }

    /// The newest output: at most `limit` bytes of the backlog.
    #[must_use]
    pub fn recent(&self, limit: usize) -> Vec<u8> {
        self.shared.recent(limit)
    }

    /// Waits until every reader that is there has all output so far, at most until `deadline`. Says whether it has.
    pub fn flush(&self, deadline: Instant) -> bool {
        self.thread.is_none() || self.control.flush(&self.shared, deadline)
    }

    /// Gives the readers what is left, at most until `deadline`, and ends the thread. Says whether they got everything.
    pub fn shutdown(mut self, deadline: Instant) -> bool {
        let flushed = self.flush(deadline);
        self.end();
        flushed
    }

    fn end(&mut self) {
        self.control.set_input(None);
        let Some(thread) = self.thread.take() else { return };
        // A thread that hangs in the kernel (a dead network disk under a log file) must not take the caller along.
        if self.control.stop(&self.shared, Instant::now() + Duration::from_secs(1)) {
            let _ = thread.join();
        } else {
            tracing::error!("the console thread hangs in a write and is left behind: check what the console writes to");
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests;
