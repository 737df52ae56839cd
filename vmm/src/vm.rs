//! Rackvisor as a library: a VM in this process, driven by the same controller that the HTTP server calls.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rackvisor_api::config::VmConfig;
use rackvisor_api::control::{Control, Reply, Request, Response, VmInfo};
use rackvisor_api::problem::{Code, Problem};
use rackvisor_api::state::{Action, VmState};
use rackvisor_devices::PlainThreads;

use crate::assembly::HostOptions;
use crate::control::{ControlLoop, Handle, Lifetime, Message};
use crate::telemetry::Telemetry;

/// The longest that a request may take: draining a hung disk takes most of it.
const ANSWER: Duration = Duration::from_secs(60);
/// How often [`Vm::wait_for`] looks.
const LOOK: Duration = Duration::from_millis(5);

/// A VM. Dropping it ends the guest with its disks flushed.
///
/// ```no_run
/// # fn main() -> Result<(), rackvisor::Problem> {
/// use std::time::Duration;
/// let config = rackvisor::VmConfig::from_file("db01.toml")?;
/// let vm = rackvisor::Vm::define(config)?;
/// vm.boot()?;
/// vm.wait_for(rackvisor::VmState::Stopped, Duration::from_secs(600))?;
/// # Ok(())
/// # }
/// ```
pub struct Vm {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Starts a control thread and gives it `config`.
    ///
    /// # Errors
    /// The [`Problem`] with the configuration, or what the host refused.
    pub fn define(config: VmConfig) -> Result<Self, Problem> {
        Self::define_with_fds(config, Vec::new())
    }

    /// As [`Vm::define`], with the descriptors of taps that are passed for its NICs, in their order.
    ///
    /// # Errors
    /// As [`Vm::define`]; `bad-descriptors` if there are more or less than the NICs want.
    pub fn define_with_fds(config: VmConfig, fds: Vec<OwnedFd>) -> Result<Self, Problem> {
        Self::define_with_options(config, fds, HostOptions::default())
    }

    /// As [`Vm::define_with_fds`], with what this program decides for all boots.
    ///
    /// # Errors
    /// As [`Vm::define_with_fds`].
    pub fn define_with_options(config: VmConfig, fds: Vec<OwnedFd>, options: HostOptions) -> Result<Self, Problem> {
        let host =
            |e: &dyn std::fmt::Display| Problem::new(Code::OutOfResources, e.to_string(), "free some on the host");
        let control = ControlLoop::new(Arc::new(PlainThreads), Lifetime::Served, options).map_err(|e| host(&e))?;
        let handle = control.handle();
        let body = move || {
            if let Err(error) = control.run() {
                tracing::error!(%error, "the control loop failed");
            }
        };
        let thread = std::thread::Builder::new().name("control".into()).spawn(body).map_err(|e| host(&e))?;
        let vm = Self { handle, thread: Some(thread) };
        vm.request(Request::Define(Box::new(config), fds.into()))?;
        Ok(vm)
    }

    /// Sends any request and waits for its answer.
    ///
    /// # Errors
    /// The [`Problem`] that an HTTP client would get.
    pub fn request(&self, request: Request) -> Result<Response, Problem> {
        let (reply, answer) = Reply::to_thread();
        self.handle.submit(request, reply);
        answer.wait(ANSWER)
    }

    /// Boots the guest.
    ///
    /// # Errors
    /// [`Problem`]: nothing has changed then.
    pub fn boot(&self) -> Result<(), Problem> {
        self.act(Action::Boot)
    }

    /// Acts on the guest.
    ///
    /// # Errors
    /// [`Problem`]: nothing has changed then.
    pub fn act(&self, action: Action) -> Result<(), Problem> {
        self.request(Request::Act(action)).map(drop)
    }

    /// The VM as it is now.
    ///
    /// # Errors
    /// `vm-undefined` after it was forgotten.
    pub fn describe(&self) -> Result<VmInfo, Problem> {
        match self.request(Request::Describe)? {
            Response::Vm(info) => Ok(*info),
            _ => Err(Problem::new(Code::Internal, "a description was answered with something else", "report this")),
        }
    }

    /// Waits until the VM is in `state`.
    ///
    /// # Errors
    /// `control-timeout` with the state it is in, after `patience`.
    pub fn wait_for(&self, state: VmState, patience: Duration) -> Result<(), Problem> {
        let deadline = Instant::now() + patience;
        loop {
            let now = self.describe()?.state;
            if now == state {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let detail = format!("the VM is {now}, not {state}, after {} s", patience.as_secs());
                return Err(Problem::new(Code::ControlTimeout, detail, "give it more time, or look at its console"));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What can be looked at of this VM, also by [`crate::telemetry::crash`].
    #[must_use]
    pub fn telemetry(&self) -> Telemetry {
        self.handle.telemetry.clone()
    }

    /// What the API server needs of this VM: serve it, or read its events and metrics.
    #[must_use]
    pub fn control(&self) -> Arc<dyn Control> {
        Arc::new(self.handle.clone())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.handle.mailbox.send(Message::Terminate);
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the control thread panicked");
        }
    }
}
