//! A thread for what may wait: opening LUNs, loading kernels, joining workers. The control thread never does.

use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use rackvisor_devices::{ThreadKind, ThreadSpawner};

/// Work that may wait for a disk. It tells its outcome by a message to the control thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// The thread for jobs, which runs one after the other. Dropping this waits for those that are queued, and for its end.
pub struct Jobs {
    /// `None` only while this is being dropped.
    queue: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Jobs {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn new(spawner: &dyn ThreadSpawner) -> std::io::Result<Self> {
        let (queue, jobs) = mpsc::channel::<Job>();
        let thread =
            spawner.spawn(ThreadKind::Jobs, "jobs", Box::new(move || jobs.into_iter().for_each(|job| job())))?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Queues `job`.
    pub fn run(&self, job: Job) {
        let sent = self.queue.as_ref().is_some_and(|queue| queue.send(job).is_ok());
        if !sent {
            tracing::error!("the thread for jobs has ended: the VM cannot be changed any more");
        }
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the thread for jobs panicked");
        }
    }
}
