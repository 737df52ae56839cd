//! A thread for what may wait: opening LUNs, loading kernels, joining workers. The control thread never does.

use std::sync::mpsc::{self, Sender};

use rackvisor_devices::ThreadSpawner;

/// Work that may wait for a disk. It tells its outcome by a message to the control thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// The thread for jobs, which runs one after the other. It ends when this is dropped.
pub struct Jobs {
    queue: Sender<Job>,
}

impl Jobs {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn new(spawner: &dyn ThreadSpawner) -> std::io::Result<Self> {
        let (queue, jobs) = mpsc::channel::<Job>();
        spawner.spawn("jobs", Box::new(move || jobs.into_iter().for_each(|job| job())))?;
        Ok(Self { queue })
    }

    /// Queues `job`.
    pub fn run(&self, job: Job) {
        if self.queue.send(job).is_err() {
            tracing::error!("the thread for jobs has ended: the VM cannot be changed any more");
        }
    }
}
