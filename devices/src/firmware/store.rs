//! Where flash memory is kept, and the thread that writes there.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::block::LockedFile;
use crate::{ThreadKind, ThreadSpawner};

/// Keeps the content of flash memory.
pub trait FlashStore: Send {
    /// Writes `bytes` at `offset` and returns when they outlive a crash of the host.
    ///
    /// # Errors
    /// What the kernel answered.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// A file or block device that keeps the content of flash memory.
pub struct FileStore(pub Arc<LockedFile>);

impl FlashStore for FileStore {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)?;
        self.0.sync_data()
    }
}

/// What became of a write.
#[derive(Debug)]
pub(super) enum Written {
    /// It is on the disk.
    Done,
    /// It failed.
    Failed(io::Error),
    /// It is under way still.
    Late,
}

/// The thread that writes, so that nobody waits for a disk without end.
pub(super) struct Writer {
    jobs: Option<SyncSender<(u64, Vec<u8>)>>,
    answers: Receiver<io::Result<()>>,
    outstanding: bool,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(store: Box<dyn FlashStore>, spawner: &dyn ThreadSpawner) -> io::Result<Self> {
        let (jobs, queue) = mpsc::sync_channel::<(u64, Vec<u8>)>(1);
        let (answer, answers) = mpsc::sync_channel(1);
        let body = move || {
            while let Ok((offset, bytes)) = queue.recv() {
                if answer.send(store.write(offset, &bytes)).is_err() {
                    return;
                }
            }
        };
        let thread = Some(spawner.spawn(ThreadKind::Flash, "flash", Box::new(body))?);
        Ok(Self { jobs: Some(jobs), answers, outstanding: false, thread })
    }

    /// Writes, and waits for it no longer than `patience`. Only when nothing is under way.
    pub(super) fn write(&mut self, offset: u64, bytes: Vec<u8>, patience: Duration) -> Written {
        match &self.jobs {
            Some(jobs) if jobs.try_send((offset, bytes)).is_ok() => self.outstanding = true,
            _ => return Written::Failed(io::Error::other("the thread that writes has ended, see the log")),
        }
        self.wait(patience)
    }

    /// Waits for what is under way.
    pub(super) fn wait(&mut self, patience: Duration) -> Written {
        let answer = self.answers.recv_timeout(patience);
        self.outstanding = matches!(answer, Err(RecvTimeoutError::Timeout));
        match answer {
            Ok(Ok(())) => Written::Done,
            Ok(Err(error)) => Written::Failed(error),
            Err(RecvTimeoutError::Timeout) => Written::Late,
            Err(RecvTimeoutError::Disconnected) => {
                Written::Failed(io::Error::other("the thread that writes panicked, see the log"))
            }
        }
    }

    /// Whether a write is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.outstanding
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        // One that a hung disk holds ends when the disk lets it go.
        if !self.outstanding
            && let Some(Err(_)) = self.thread.take().map(JoinHandle::join)
        {
            tracing::error!("the thread that writes the variables of the firmware panicked");
        }
    }
}
