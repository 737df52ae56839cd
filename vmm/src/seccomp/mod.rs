//! System-call filters: what each kind of thread may ask the kernel for, and what happens when it asks for more.
//!
//! The policies are files in `resources/seccomp`, whose README tells how to extend them. The thread that starts those of a
//! machine may do what all of them may, because a filter is inherited and can only be narrowed. Each thread narrows its own
//! before it does anything, and so before a guest runs.
//!
//! A library does not filter its process: embedders that want it hand [`Filters`] to their control loop.

mod heaps;
mod policy;
mod report;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use rackvisor_devices::{ThreadKind, ThreadSpawner};
use seccompiler::{BpfMap, BpfProgram, SeccompAction, TargetArch};
use thiserror::Error;

pub use self::policy::Policy;
pub use self::report::EXIT_VIOLATION;

/// What happens to a thread that makes a system call which its policy does not allow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// The call is not made; the process says which it was and ends with [`EXIT_VIOLATION`].
    #[default]
    On,
    /// The call is made, and the kernel logs it.
    Log,
    /// There are no filters.
    Off,
}

/// Why there are no filters.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// A policy is wrong.
    #[error("the policies in resources/seccomp are wrong: {0}")]
    Policy(String),
    /// Memory could not be prepared.
    #[error("cannot start a thread, to prepare the heaps of threads: {0}")]
    Heap(io::Error),
    /// The report of violations could not be prepared.
    #[error("cannot handle SIGSYS: {0}")]
    Handler(io::Error),
    /// The kernel refused a filter.
    #[error(
        "the kernel refused the system-call filter of thread {thread}: {reason}; it needs CONFIG_SECCOMP_FILTER, or --seccomp off"
    )]
    Refused {
        /// Name of the thread.
        thread: String,
        /// What the kernel answered.
        reason: seccompiler::Error,
    },
}

impl From<SeccompError> for io::Error {
    fn from(error: SeccompError) -> Self {
        Self::other(error)
    }
}

/// The filters of all kinds of threads, and a [`ThreadSpawner`] that puts threads under theirs. Clones share them.
#[derive(Clone)]
pub struct Filters {
    /// `None`: there are none.
    programs: Option<Arc<BpfMap>>,
}

impl Filters {
    /// Compiles the policies. With [`Mode::On`] the whole process handles SIGSYS from now on.
    ///
    /// # Errors
    /// [`SeccompError`].
    pub fn new(mode: Mode) -> Result<Self, SeccompError> {
        let mismatch = match mode {
            Mode::On => SeccompAction::Trap,
            Mode::Log => SeccompAction::Log,
            Mode::Off => return Ok(Self { programs: None }),
        };
        Self::with(policy::compile(&mismatch, TargetArch::x86_64)?, mode)
    }

    /// Prepares the process for these programs.
    fn with(programs: BpfMap, mode: Mode) -> Result<Self, SeccompError> {
        heaps::settle().map_err(SeccompError::Heap)?;
        if mode == Mode::On {
            report::handle_violations().map_err(SeccompError::Handler)?;
        }
        Ok(Self { programs: Some(Arc::new(programs)) })
    }

    /// Puts the calling thread, which is called `name`, under `policy` for the rest of its life, with all threads that it starts.
    ///
    /// # Errors
    /// [`SeccompError::Refused`].
    pub fn enter(&self, policy: Policy, name: &str) -> Result<(), SeccompError> {
        let Some(programs) = &self.programs else { return Ok(()) };
        report::name_thread(name, policy.name());
        let program = programs.get(policy.name()).map_or(&[][..], BpfProgram::as_slice);
        seccompiler::apply_filter(program).map_err(|reason| SeccompError::Refused { thread: name.to_owned(), reason })
    }
}

impl ThreadSpawner for Filters {
    fn spawn(&self, kind: ThreadKind, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        let (filters, own_name) = (self.clone(), name.to_owned());
        let filtered = move || match filters.enter(Policy::Of(kind), &own_name) {
            Ok(()) => body(),
            Err(error) => {
                // Whoever waits for it could not tell why it does not answer, and a thread without a filter must not work.
                tracing::error!(%error, "the VM ends");
                std::process::abort();
            }
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(filtered)
    }
}
