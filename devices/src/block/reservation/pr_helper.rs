//! Reservations by somebody who has the privileges that they take, for a VMM that has none: the protocol of `qemu-pr-helper` (QEMU's
//! docs/interop/pr-helper.rst). A SCSI command goes to the helper's Unix socket with the descriptor of the LUN; status, sense
//! data and what was read come back.
//!
//! Nothing waits for the helper longer than [`TIMEOUT`], whatever it says or does not say. One that does not answer is asked
//! nothing more over this connection until it has, so that a LUN that hangs fills the helper with one command and not with
//! one for each look.
//!
//! A helper without libmpathpersist (Debian's) sends a command to dm-multipath over one path of the active group, each time over the
//! next one, as the kernel does with requests. So what every path has to hear is said again until the LUN says that all have.

#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::keys::Table;
use super::scsi::{self, COMMAND, Deed, retried};
use super::{LockedFile, Refusal, Target};
use crate::block::sysfs;
use crate::socket::{self, By};

/// The longest that a command may take, as without a helper.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a command on the socket.
const REQUEST: usize = 16;
/// Bytes before what was read: status, size, sense data.
const HEADER: usize = 4 + 4 + SENSE;
const SENSE: usize = 96;
/// How often a command is said for each path.
const ROUNDS_PER_PATH: usize = 4;

/// What is wrong with a helper.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HelperError {
    /// Nobody is there, or this process may not speak to it.
    #[error(
        "{0}: start qemu-pr-helper there, and let the user of the VMM write to the socket; in a jail, share the folder of the socket"
    )]
    Connect(io::Error),
    /// It takes its time.
    #[error("it has not answered for {} s: the LUN hangs, or the helper does", .0.as_secs())]
    Silent(Duration),
    /// It hung up.
    #[error("it closed the connection: start it with -v, and it says why")]
    Closed,
    /// It answers with what is none.
    #[error("it answered with {0}, which no qemu-pr-helper does: see what listens on the socket")]
    Garbled(String),
    /// Its commands fail for a reason that may go by, and does not.
    #[error(
        "what it is asked to do keeps failing: it needs CAP_SYS_RAWIO, and if it uses libmpathpersist, all paths and \"reservation_key file\" in multipath.conf"
    )]
    Failing,
    /// Not every path has the key.
    #[error(
        "it reached {reached} of {paths} paths: all of them have to work (multipath -ll), and without libmpathpersist it reaches only those of the active group"
    )]
    Paths {
        /// Registrations of the key.
        reached: usize,
        /// Paths of the device.
        paths: usize,
    },
    /// The socket failed.
    #[error("its socket failed: {0}")]
    Socket(io::Error),
}

impl HelperError {
    fn of_socket(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Socket(error),
        }
    }
}

/// The disk, as a helper reaches it.
pub(super) struct Helper {
    file: Arc<LockedFile>,
    socket: PathBuf,
    /// Paths of the disk, as many as there were at the start: one that is added later is registered by multipathd.
    paths: usize,
    timeout: Duration,
    connection: Mutex<Option<Connection>>,
}

impl Helper {
    /// The disk by way of the helper that listens at `socket`. Nothing is asked yet.
    pub fn new(file: Arc<LockedFile>, socket: &Path) -> Self {
        let paths = file.metadata().map_or(1, |metadata| sysfs::paths(metadata.rdev()));
        Self { file, socket: socket.to_owned(), paths, timeout: TIMEOUT, connection: Mutex::new(None) }
    }

    /// Has a command executed; gives what was read, at most `room` bytes.
    fn execute(&self, command: &[u8; COMMAND], parameters: &[u8], room: usize) -> Result<Vec<u8>, Refusal> {
        let mut message = [0; REQUEST].to_vec();
        message.splice(..COMMAND, *command);
        message.extend(parameters);
        let answer = self.answer(&message, room).map_err(|error| self.failed(error))?;
        scsi::status(answer.status, &answer.sense)?;
        Ok(answer.read)
    }

    fn answer(&self, message: &[u8], room: usize) -> Result<Answer, HelperError> {
        let by = By::after(self.timeout);
        // Taken, not held: who gives the LUN up must not wait for who looks after it.
        let former = self.connection().take();
        if let Some(connection) = former {
            match self.answer_by(connection, message, room, by) {
                // The helper was started again since. A command that is given twice does no more than once.
                Err(HelperError::Closed) => {}
                done => return done,
            }
        }
        let mut connection = Connection::new(socket::connect(&self.socket).map_err(HelperError::Connect)?);
        connection.greet(by)?;
        self.answer_by(connection, message, room, by)
    }

    fn answer_by(
        &self,
        mut connection: Connection,
        message: &[u8],
        room: usize,
        by: By,
    ) -> Result<Answer, HelperError> {
        let answer = connection.execute(message, self.file.as_raw_fd(), room, by);
        if matches!(answer, Ok(_) | Err(HelperError::Silent(_))) {
            *self.connection() = Some(connection);
        }
        answer
    }

    fn connection(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: HelperError) -> Refusal {
        Refusal::Helper { socket: self.socket.clone(), error }
    }

    /// What is left of commands that were said often enough.
    fn settled<T>(&self, outcome: Result<T, Refusal>) -> Result<T, Refusal> {
        match outcome {
            Err(Refusal::Attention) => Err(self.failed(HelperError::Failing)),
            done => done,
        }
    }

    fn act(&self, deed: Deed, key: u64, service_action_key: u64) -> Result<(), Refusal> {
        let (command, parameters) = scsi::reserve_out(deed, key, service_action_key);
        self.settled(retried(|| self.execute(&command, &parameters, 0))).map(drop)
    }

    /// How many paths of any host are registered with `key`.
    fn registered(&self, key: u64) -> Result<usize, Refusal> {
        Ok(self.read()?.keys.iter().filter(|found| **found == key).count())
    }

    /// Registers `key` until each path has it; gives how many have it where that does not come about.
    fn register_paths(&self, key: u64) -> Result<Option<usize>, Refusal> {
        let before = self.registered(key)?;
        let (mut found, mut quiet) = (before, 0);
        for _ in 0..ROUNDS_PER_PATH * self.paths {
            self.act(Deed::RegisterAnyway, 0, key)?;
            let now = self.registered(key)?;
            quiet = if now == found { quiet + 1 } else { 0 };
            found = now;
            // Those from before may be of paths that this host has no more, and stand for none that it has.
            if found >= self.paths && (before == 0 || quiet >= self.paths) {
                return Ok(None);
            }
        }
        Ok(Some(found))
    }
}

impl Target for Helper {
    fn read(&self) -> Result<Table, Refusal> {
        self.settled(scsi::read(|question, answer| {
            let read = self.execute(&scsi::reserve_in(question, answer.len()), &[], answer.len())?;
            answer.iter_mut().zip(&read).for_each(|(to, from)| *to = *from);
            Ok(read.len())
        }))
    }

    fn register(&self, key: u64) -> Result<(), Refusal> {
        let refusal = match self.register_paths(key) {
            Ok(None) => return Ok(()),
            Ok(Some(reached)) => self.failed(HelperError::Paths { reached, paths: self.paths }),
            Err(refusal) => refusal,
        };
        // Whatever becomes of it, what failed is said.
        let _ = self.unregister(key);
        Err(refusal)
    }

    fn unregister(&self, key: u64) -> Result<(), Refusal> {
        for _ in 0..ROUNDS_PER_PATH * self.paths {
            match self.act(Deed::Register, key, 0) {
                // That path has it no more.
                Ok(()) | Err(Refusal::Conflict) => {}
                refused => return refused,
            }
            if self.registered(key)? == 0 {
                break;
            }
        }
        // Who takes it back looks himself whether one is left.
        Ok(())
    }

    fn reserve(&self, key: u64) -> Result<(), Refusal> {
        self.act(Deed::Reserve, key, 0)
    }

    fn release(&self, key: u64) -> Result<(), Refusal> {
        self.act(Deed::Release, key, 0)
    }

    fn preempt(&self, key: u64, victim: u64) -> Result<(), Refusal> {
        self.act(Deed::PreemptAndAbort, key, victim)
    }

    fn clear(&self, key: u64) -> Result<(), Refusal> {
        self.act(Deed::Clear, key, 0)
    }
}

/// What a helper says of a command.
struct Answer {
    status: u8,
    sense: [u8; SENSE],
    read: Vec<u8>,
}

/// A connection to a helper, which never blocks.
struct Connection {
    stream: UnixStream,
    /// What was received of the answer that is awaited.
    received: Vec<u8>,
    /// How much may be read by the command that is not answered yet.
    unanswered: Option<usize>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("unanswered", &self.unanswered).finish_non_exhaustive()
    }
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new(), unanswered: None }
    }

    /// Hears what the helper can do, and asks for nothing of it: there is nothing yet.
    fn greet(&mut self, by: By) -> Result<(), HelperError> {
        self.receive(4, by)?;
        self.received.clear();
        self.send(&[0; 4], None)
    }

    fn execute(&mut self, message: &[u8], lun: RawFd, room: usize, by: By) -> Result<Answer, HelperError> {
        if let Some(room) = self.unanswered {
            // To the command before, which nobody waits for any more.
            self.hear(room, by)?;
        }
        self.send(message, Some(lun))?;
        self.unanswered = Some(room);
        self.hear(room, by)
    }

    fn send(&self, message: &[u8], descriptor: Option<RawFd>) -> Result<(), HelperError> {
        // Nothing else is on its way, so it fits.
        let sent = self.stream.send_with_fds(&[message], descriptor.as_slice());
        match sent.map_err(|error| HelperError::of_socket(error.into()))? {
            all if all == message.len() => Ok(()),
            _ => Err(HelperError::Closed),
        }
    }

    fn hear(&mut self, room: usize, by: By) -> Result<Answer, HelperError> {
        self.receive(HEADER, by)?;
        let number = |at: usize| {
            let bytes = self.received.get(at..).and_then(|rest| rest.first_chunk());
            u32::from_be_bytes(*bytes.unwrap_or(&[0; 4]))
        };
        let (status, size) = (number(0), number(4));
        let Ok(status) = u8::try_from(status) else {
            return Err(HelperError::Garbled(format!("status {status:#x}")));
        };
        let Some(size) = usize::try_from(size).ok().filter(|size| *size <= room) else {
            return Err(HelperError::Garbled(format!("{size} bytes where {room} were asked for")));
        };
        self.receive(HEADER + size, by)?;
        let read = self.received.split_off(HEADER);
        let sense = self.received.get(8..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; SENSE]);
        self.received.clear();
        self.unanswered = None;
        Ok(Answer { status, sense, read })
    }

    /// Waits until there are `length` bytes, and takes no more.
    fn receive(&mut self, length: usize, by: By) -> Result<(), HelperError> {
        while self.received.len() < length {
            match socket::readable([self.stream.as_raw_fd()], Some(by.at)) {
                Ok(Some(_)) => {}
                Ok(None) => return Err(HelperError::Silent(by.within)),
                Err(error) => return Err(HelperError::Socket(error)),
            }
            let had = self.received.len();
            self.received.resize(length, 0);
            let count = self.stream.read(self.received.get_mut(had..).unwrap_or_default());
            self.received.truncate(had + count.as_ref().map_or(0, |count| *count));
            match count {
                Ok(0) => return Err(HelperError::Closed),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(HelperError::of_socket(error)),
            }
        }
        Ok(())
    }
}
