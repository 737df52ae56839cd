//! Where log lines go: a thread of its own writes them, so that no vCPU and no control thread waits for a disk, a terminal or
//! journald. What comes faster than it is taken is dropped, and the log says how much.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

use rackvisor_devices::{ThreadKind, ThreadSpawner};
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::cli::LogFormat;

/// Lines that may wait to be written.
const QUEUE: usize = 1024;
/// Bytes of a line; what is beyond is cut off.
const LONGEST: usize = 8 << 10;
/// How long the end of the program waits for the last lines.
const FAREWELL: Duration = Duration::from_secs(1);
/// journald's native protocol.
const JOURNALD: &str = "/run/systemd/journal/socket";
/// The local syslog daemon.
const SYSLOG: &str = "/dev/log";
/// Daemons have their own facility (RFC 5424 §6.2.1).
const FACILITY: u8 = 3 << 3;

/// Where log lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Standard error.
    Stderr,
    /// The end of this file, which is opened anew after SIGHUP.
    File(PathBuf),
    /// journald, with priorities.
    Journald,
    /// The local syslog daemon, with priorities.
    Syslog,
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stderr" => Ok(Self::Stderr),
            "journald" => Ok(Self::Journald),
            "syslog" => Ok(Self::Syslog),
            other => match other.strip_prefix("file:") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err("stderr, file:PATH, journald and syslog are possible".into()),
            },
        }
    }
}

/// What the thread writes to. Everything is open before the guest runs, but a file that is opened anew.
enum Sink {
    Stderr,
    File {
        path: PathBuf,
        file: File,
    },
    /// A daemon, which may be restarted: it is addressed with each line.
    Daemon {
        path: PathBuf,
        socket: UnixDatagram,
        entry: fn(u8, &str) -> String,
    },
}

impl Sink {
    fn open(destination: &Destination) -> io::Result<Self> {
        let about = |path: &Path, error: io::Error| {
            io::Error::new(error.kind(), format!("cannot log to {}: {error}", path.display()))
        };
        Ok(match destination {
            Destination::Stderr => Self::Stderr,
            Destination::File(path) => {
                Self::File { path: path.clone(), file: append(path).map_err(|error| about(path, error))? }
            }
            Destination::Journald => {
                let path = Path::new(JOURNALD);
                Self::daemon(path, journald_entry).map_err(|error| about(path, error))?
            }
            Destination::Syslog => {
                let path = Path::new(SYSLOG);
                Self::daemon(path, syslog_entry).map_err(|error| about(path, error))?
            }
        })
    }

    /// The daemon that listens at `path`.
    fn daemon(path: &Path, entry: fn(u8, &str) -> String) -> io::Result<Self> {
        UnixDatagram::unbound()?.connect(path)?;
        Ok(Self::Daemon { path: path.to_owned(), socket: UnixDatagram::unbound()?, entry })
    }

    /// Writes a line, which ends in a newline and has no other control characters.
    fn write(&mut self, severity: u8, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr => io::stderr().write_all(line),
            Self::File { file, .. } => file.write_all(line),
            Self::Daemon { path, socket, entry } => {
                let entry = entry(severity, &String::from_utf8_lossy(line.trim_ascii_end()));
                socket.send_to(entry.as_bytes(), path).map(drop)
            }
        }
    }

    /// Opens the file anew; if that fails, the former one goes on.
    fn reopen(&mut self) {
        let Self::File { path, file } = self else { return };
        match append(path) {
            Ok(new) => *file = new,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the log file cannot be opened anew: the old one goes on");
            }
        }
    }
}

fn journald_entry(severity: u8, line: &str) -> String {
    format!("PRIORITY={severity}\nSYSLOG_IDENTIFIER=rackvisor\nMESSAGE={line}\n")
}

fn syslog_entry(severity: u8, line: &str) -> String {
    format!("<{}>rackvisor[{}]: {line}", FACILITY | severity, std::process::id())
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

enum Message {
    Line { severity: u8, text: Vec<u8> },
    Flush(SyncSender<()>),
}

/// The way to the thread, for `tracing_subscriber`.
#[derive(Clone)]
struct Queue {
    sender: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

/// Writes one line.
struct LineWriter<'a> {
    queue: &'a Queue,
    severity: u8,
}

impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut text: Vec<u8> = line.iter().take(LONGEST).copied().collect();
        text.truncate(text.trim_ascii_end().len());
        // A guest's text must not look like lines of ours, nor reach a terminal.
        text.iter_mut().filter(|byte| byte.is_ascii_control()).for_each(|byte| *byte = b' ');
        text.push(b'\n');
        if self.queue.sender.try_send(Message::Line { severity: self.severity, text }).is_err() {
            self.queue.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter { queue: self, severity: severity(Level::INFO) }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> LineWriter<'a> {
        LineWriter { queue: self, severity: severity(*meta.level()) }
    }
}

/// Severities of syslog (RFC 5424 §6.2.1).
fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

/// The log of the program. Dropping it waits, not for long, until the last line is written.
pub struct Log {
    sender: SyncSender<Message>,
    reopen: Arc<AtomicBool>,
}

impl Log {
    /// Has `spawner` start the thread `log`, and everything logged through it from now on.
    ///
    /// # Errors
    /// The destination cannot be opened, or there is no thread left.
    pub fn start(
        destination: &Destination,
        format: LogFormat,
        filter: EnvFilter,
        spawner: &dyn ThreadSpawner,
    ) -> io::Result<Self> {
        let (queue, log) = spawn(Sink::open(destination)?, spawner)?;
        let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(queue).with_target(false);
        let lines = lines.with_ansi(false);
        let stamped = matches!(destination, Destination::Stderr | Destination::File(_));
        match format {
            LogFormat::Human if stamped => lines.init(),
            LogFormat::Human | LogFormat::Plain => lines.without_time().init(),
            LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
        }
        Ok(log)
    }

    /// Set, this has the log file opened anew before the next line: for the handler of SIGHUP.
    pub fn reopen(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.reopen)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let (done, written) = mpsc::sync_channel(1);
        // A queue that is full belongs to a thread that hangs.
        if self.sender.try_send(Message::Flush(done)).is_ok() {
            let _ = written.recv_timeout(FAREWELL);
        }
    }
}

fn spawn(sink: Sink, spawner: &dyn ThreadSpawner) -> io::Result<(Queue, Log)> {
    let (sender, messages) = mpsc::sync_channel(QUEUE);
    let queue = Queue { sender: sender.clone(), lost: Arc::default() };
    let log = Log { sender, reopen: Arc::default() };
    let (lost, reopen) = (Arc::clone(&queue.lost), Arc::clone(&log.reopen));
    spawner.spawn(ThreadKind::Log, "log", Box::new(move || write_lines(sink, &messages, &lost, &reopen)))?;
    Ok((queue, log))
}

fn write_lines(mut sink: Sink, messages: &Receiver<Message>, lost: &AtomicU64, reopen: &AtomicBool) {
    for message in messages {
        let (severity, text) = match message {
            Message::Line { severity, text } => (severity, text),
            Message::Flush(done) => {
                let _ = done.try_send(());
                continue;
            }
        };
        if reopen.swap(false, Ordering::Relaxed) {
            sink.reopen();
        }
        // Where the log cannot be written there is nobody to tell, but those who read of what is lost.
        if sink.write(severity, &text).is_err() {
            lost.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            tracing::warn!(lost, "lines of the log were lost: they came faster than they could be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rackvisor_devices::PlainThreads;

    use super::*;

    fn line(queue: &Queue, text: &str) {
        LineWriter { queue, severity: 4 }.write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn destinations_are_words_or_a_file() {
        assert_eq!("file:/var/log/a".parse(), Ok(Destination::File("/var/log/a".into())));
        assert_eq!("journald".parse(), Ok(Destination::Journald));
        for bad in ["", "file:", "/var/log/a", "Stderr"] {
            assert!(bad.parse::<Destination>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_that_was_moved_away_is_made_anew_when_told_and_no_line_is_lost_or_can_be_forged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (queue, log) = spawn(Sink::open(&Destination::File(path.clone())).unwrap(), &PlainThreads).unwrap();
        line(&queue, "one\n");
        drop(Log { sender: log.sender.clone(), reopen: Arc::default() });
        fs::rename(&path, folder.path().join("old")).unwrap();
        line(&queue, "two\r\nERROR forged\x1b[31m\n");
        drop(Log { sender: log.sender.clone(), reopen: Arc::default() });
        log.reopen().store(true, Ordering::Relaxed);
        line(&queue, "three\n");
        drop(log);
        assert_eq!(fs::read_to_string(folder.path().join("old")).unwrap(), "one\ntwo  ERROR forged [31m\n");
        assert_eq!(fs::read_to_string(path).unwrap(), "three\n");
    }

    #[test]
    fn daemons_get_each_line_with_its_priority_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon");
        let mut received = [0; 256];
        for (entry, wanted) in [
            (
                journald_entry as fn(u8, &str) -> String,
                "PRIORITY=4\nSYSLOG_IDENTIFIER=rackvisor\nMESSAGE=a\n".to_owned(),
            ),
            (syslog_entry, format!("<28>rackvisor[{}]: a", std::process::id())),
        ] {
            assert!(Sink::daemon(&path, entry).is_err(), "there is no daemon");
            let daemon = UnixDatagram::bind(&path).unwrap();
            let (queue, log) = spawn(Sink::daemon(&path, entry).unwrap(), &PlainThreads).unwrap();
            line(&queue, "a\n");
            let length = daemon.recv(&mut received).unwrap();
            assert_eq!(String::from_utf8_lossy(&received[..length]), wanted);
            drop(daemon);
            fs::remove_file(&path).unwrap();
            let daemon = UnixDatagram::bind(&path).unwrap();
            line(&queue, "a\n");
            assert_eq!(daemon.recv(&mut received).unwrap(), length);
            drop(log);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn who_logs_does_not_wait_for_a_sink_that_hangs_and_what_is_lost_is_counted() {
        let (sender, messages) = mpsc::sync_channel(QUEUE);
        let queue = Queue { sender, lost: Arc::default() };
        for _ in 0..QUEUE + 3 {
            line(&queue, &"x".repeat(2 * LONGEST));
        }
        assert_eq!(queue.lost.load(Ordering::Relaxed), 3);
        let Ok(Message::Line { text, .. }) = messages.recv() else { panic!("no line") };
        assert_eq!(text.len(), LONGEST + 1);
    }
}
