//! Images are read while KVM makes the VM: the two are most of what a boot costs the host, and neither needs the other.

use std::io;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;

use rackvisor_devices::{GuestMemory, ThreadKind, ThreadSpawner};
use vm_memory::GuestAddressSpace;

use super::{BootError, BootImages, LoadedImages};

type Outcome = (BootImages, Result<LoadedImages, BootError>);

/// Images that are being loaded. The thread has ended, and holds no guest memory, once this is finished or dropped.
pub struct Loading {
    thread: Option<JoinHandle<()>>,
    outcome: Receiver<Outcome>,
}

impl Loading {
    /// Begins to load `images` into `memory`, which has `ram` bytes.
    ///
    /// # Errors
    /// What the kernel answered when it refused a thread.
    pub fn begin(
        mut images: BootImages,
        memory: GuestMemory,
        ram: u64,
        spawner: &dyn ThreadSpawner,
    ) -> io::Result<Self> {
        let (done, outcome) = mpsc::sync_channel(1);
        let body = move || {
            let loaded = images.load(&memory.memory(), ram);
            // Nobody waits any more if something else of the machine could not be made.
            let _ = done.send((images, loaded));
        };
        Ok(Self { thread: Some(spawner.spawn(ThreadKind::Images, "images", Box::new(body))?), outcome })
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// [`BootError`] for the first image that is not right.
    pub fn finish(self) -> Result<(BootImages, LoadedImages), BootError> {
        let (images, loaded) = self.outcome.recv().map_err(|_| BootError::Write {
            what: "kernel and initrd",
            reason: "the thread that loads them panicked, see the log".into(),
        })?;
        Ok((images, loaded?))
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the thread that loads the images panicked");
        }
    }
}
