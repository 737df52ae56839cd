//! A thread for what may wait: opening LUNs, loading kernels, joining workers. The control thread never does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use rackvisor_devices::{ThreadKind, ThreadSpawner};

/// Work that may wait for a disk. It tells its outcome by a message to the control thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// The outcome of a part of a job, or that it panicked: whoever waits for the job must hear of it all the same.
///
/// # Errors
/// What to tell.
pub fn caught<T>(what: &str, part: impl FnOnce() -> T) -> Result<T, String> {
    // What the part was changing is taken apart afterwards, not used.
    catch_unwind(AssertUnwindSafe(part)).map_err(|_| format!("{what} panicked: the crash report and the log say why"))
}

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
        let work = move || {
            for job in jobs {
                if let Err(told) = caught("a job", job) {
                    tracing::error!("{told}");
                }
            }
        };
        let thread = spawner.spawn(ThreadKind::Jobs, "jobs", Box::new(work))?;
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

#[cfg(test)]
mod tests {
    use rackvisor_devices::PlainThreads;

    use super::*;

    #[test]
    fn a_job_that_panics_does_not_take_the_next_one_along() {
        let jobs = Jobs::new(&PlainThreads).unwrap();
        let (done, heard) = mpsc::channel();
        jobs.run(Box::new(|| panic!("on purpose")));
        jobs.run(Box::new(move || done.send(caught("this", || panic!("again"))).unwrap()));
        let told: Result<(), String> = heard.recv().unwrap();
        assert!(told.unwrap_err().starts_with("this panicked"));
    }
}
