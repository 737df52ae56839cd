//! TPM 2.0: the command response buffer (CRB) of the TCG PC Client Platform TPM Profile 1.05 §6.5.3, in front of swtpm.
//!
//! CRB and not the older FIFO (TIS): edk2's stock OVMF, Windows and Linux take both, it needs no interrupt, no burst counts and no
//! byte-wise FIFO, and QEMU's `tpm-crb`, which libvirt gives TPM 2.0 machines, has shown that all of them work with it.
//!
//! ```text
//!  vCPU ──► registers (crb) ──command──► worker ──► swtpm (link)
//!              ▲                            │
//!              └────────── response ◄───────┘
//! ```
//! A vCPU only copies the command and polls `Start`; the thread `tpm` talks to swtpm. Locality 0 is the only one, as in
//! QEMU: the others belong to dynamic launch, which needs chipset support that no VM has.
//!
//! When swtpm ends, hangs or talks nonsense, each command is answered with TPM_RC_FAILURE from then on, and there is an event.
//! It is not taken up again before the next reset of the VM: its registers (PCRs) would have begun anew under a guest that goes on, which
//! could then make them say anything.

mod crb;
#[cfg(any(test, feature = "test-double"))]
pub mod double;
mod link;
mod ppi;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

pub use self::crb::Crb;
pub use self::ppi::Ppi;

use self::crb::Shared;
use self::link::Link;
use self::worker::{Message, Worker};
use crate::metrics::MetricSource;
use crate::virtio::StillBusy;
use crate::{DeviceNotifier, ThreadKind, ThreadSpawner};

/// Guest-physical address of the registers.
pub const BASE: u64 = 0xfed4_0000;
/// Bytes of the registers: one locality.
pub const LENGTH: u64 = 0x1000;
/// Guest-physical address of the physical presence memory ([`Ppi`]).
pub const PPI_BASE: u64 = 0xfed4_5000;
/// Bytes of the physical presence memory.
pub const PPI_LENGTH: u64 = 0x400;
/// What firmware is told of it in fw_cfg's `etc/tpm/config` (QEMU docs/specs/tpm.rst): where the physical presence memory is, that this
/// is a TPM 2.0, and that the memory is laid out by version 1.30 of the interface.
#[must_use]
pub fn firmware_config() -> Vec<u8> {
    const TPM_2_0: u8 = 2;
    const PPI_1_30: u8 = 1;
    let mut config = (PPI_BASE as u32).to_le_bytes().to_vec();
    config.extend([TPM_2_0, PPI_1_30]);
    config
}

/// Offset of the control area in the registers: what the TPM2 table points at.
pub(crate) const CONTROL_AREA: u64 = 0x40;

/// How long swtpm may take.
#[derive(Debug, Clone, Copy)]
struct Deadlines {
    /// For a command.
    command: Duration,
    /// To be connected to, and to switch the TPM on.
    setup: Duration,
}

impl Default for Deadlines {
    /// The longest command is the making of a key, for which edk2 waits as long.
    fn default() -> Self {
        Self { command: Duration::from_secs(90), setup: Duration::from_secs(10) }
    }
}

/// Why there is no TPM.
#[derive(Debug, Error)]
pub enum TpmError {
    /// The socket cannot be connected to.
    #[error(
        "cannot connect to swtpm at {}: {source}; start `swtpm socket --tpm2 --tpmstate dir=… --ctrl type=unixio,path={}` \
         before the VM, and only one VM with it", path.display(), path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("swtpm did not answer {what} within {} s: look at its process, and whether another VM uses it", within.as_secs())]
    Timeout {
        /// What was asked of it.
        what: &'static str,
        /// How long was waited.
        within: Duration,
    },
    /// It closed the connection.
    #[error("swtpm closed the connection: its log says why; start it again and reset the VM")]
    Closed,
    /// The connection failed.
    #[error("the connection to swtpm failed: {0}")]
    Connection(#[from] io::Error),
    /// It refused something.
    #[error("swtpm refused {what} with error {code:#x}: its log says why")]
    Refused {
        /// What was asked of it.
        what: &'static str,
        /// Its result code.
        code: u32,
    },
    /// It cannot do something that is needed.
    #[error("swtpm cannot do {0}: use version 0.7 or later")]
    Lacks(&'static str),
    /// It plays a TPM 1.2.
    #[error("swtpm is no TPM 2.0: start it with --tpm2")]
    NotTpm2,
    /// What it said is no response.
    #[error("swtpm gave {0} bytes that are no response of a TPM 2.0: use another build of it")]
    Garbled(usize),
    /// The device is being taken apart.
    #[error("the TPM is being taken apart")]
    Ending,
    /// The host refused a thread or a descriptor.
    #[error("the host refused {what}: {source}; raise the limits of descriptors and threads of this process")]
    Host {
        /// What it refused.
        what: &'static str,
        /// What it answered.
        source: io::Error,
    },
}

/// How a TPM is made.
pub struct TpmOptions {
    /// Its name in events and metrics.
    pub id: String,
    /// The control socket of swtpm, started with `--ctrl type=unixio`.
    pub socket: PathBuf,
}

/// A TPM at work. Dropping it ends its thread and lets go of swtpm.
pub struct Tpm {
    shared: Arc<Shared>,
    registers: Arc<Crb>,
    ppi: Arc<Ppi>,
    messages: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Tpm {
    /// Connects to swtpm, switches the TPM on and starts its thread. Waits for swtpm, at most some 10 s.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn new(
        options: TpmOptions,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> Result<Self, TpmError> {
        Self::with_deadlines(options, spawner, notifier, Deadlines::default())
    }

    fn with_deadlines(
        options: TpmOptions,
        spawner: &dyn ThreadSpawner,
        notifier: Arc<dyn DeviceNotifier>,
        deadlines: Deadlines,
    ) -> Result<Self, TpmError> {
        let TpmOptions { id, socket } = options;
        let mut link = Link::connect(&socket, deadlines.setup)?;
        let established = link.power_on(deadlines.setup)?;
        let host = |what| move |source| TpmError::Host { what, source };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("an eventfd"))?;
        let shared = Arc::new(Shared::new(id, notifier, wake, established));
        let (messages, inbox) = mpsc::channel();
        let worker = Worker::new(Arc::clone(&shared), inbox, socket, link, deadlines);
        let thread = spawner.spawn(ThreadKind::Tpm, "tpm", Box::new(move || worker.run())).map_err(host("a thread"))?;
        let registers = Arc::new(Crb::new(Arc::clone(&shared), messages.clone()));
        Ok(Self { shared, registers, ppi: Arc::new(Ppi::new()), messages, thread: Some(thread) })
    }

    /// The registers, [`LENGTH`] bytes at [`BASE`].
    #[must_use]
    pub fn registers(&self) -> Arc<Crb> {
        Arc::clone(&self.registers)
    }

    /// The physical presence memory, [`PPI_LENGTH`] bytes at [`PPI_BASE`].
    #[must_use]
    pub fn ppi(&self) -> Arc<Ppi> {
        Arc::clone(&self.ppi)
    }

    /// Its name in events and metrics.
    #[must_use]
    pub fn id(&self) -> &str {
        self.shared.id()
    }

    /// Whether nothing is in flight; the vCPUs stand still. Never waits: after a [`StillBusy`] it is to be called again, best when
    /// [`DeviceEvent::Drained`](crate::DeviceEvent::Drained) has come.
    ///
    /// # Errors
    /// [`StillBusy`] while swtpm works on a command.
    pub fn stop(&self) -> Result<(), StillBusy> {
        self.shared.stop()
    }

    /// Back to power-on, after a successful [`Tpm::stop`]: the TPM is switched off and on (`_TPM_Init`), and swtpm is taken up
    /// again if it was lost. Waits for it, at most some 20 s; one that does not answer is an event, and the TPM fails each command.
    pub fn reset(&self) {
        let (done, wait) = mpsc::channel();
        if self.messages.send(Message::Reset(done)).is_ok() {
            self.shared.wake();
            // An error means that the worker is gone, which its log says: each command fails.
            let _ = wait.recv();
        }
    }

    /// Its counters.
    #[must_use]
    pub fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::<Shared>::clone(&self.shared)
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        self.shared.end();
        let _ = self.messages.send(Message::Exit);
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the TPM had panicked: report this with the log before it");
        }
    }
}
