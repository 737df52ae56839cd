//! The control thread: the one owner of the VM, its mailbox and its loop.

mod controller;
mod definition;
mod describe;
mod disks;
mod draining;
mod jobs;
mod mailbox;
mod operation;
mod threads;
mod watchdog;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use rackvisor_api::config::VmConfig;
use rackvisor_api::events::EventLog;
use rackvisor_api::problem::Problem;
use rackvisor_api::state::VmState;
use rackvisor_devices::ThreadSpawner;
use thiserror::Error;

pub use self::controller::Controller;
pub use self::mailbox::{Handle, Inbox, Mailbox, Message};
use crate::assembly::HostOptions;
use crate::telemetry::Telemetry;

/// Why the control loop could not start or go on.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The host refused a descriptor, a thread or a signal handler.
    #[error("cannot set up the control thread: {0}")]
    Host(#[from] std::io::Error),
    /// epoll failed.
    #[error("the control loop cannot wait for events: {0}")]
    Events(event_manager::Error),
}

/// Messages taken before other sources of events get their turn.
const BATCH: usize = 64;

/// A control loop that has not started, and the way to reach it.
pub struct ControlLoop {
    controller: Controller,
    inbox: Inbox,
    handle: Handle,
    end_on: Option<UnixStream>,
}

/// What a control loop lives for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Lifetime {
    /// For its clients, until it is told to end.
    #[default]
    Served,
    /// For one guest: it ends with it.
    WithGuest,
}

/// How things stood when a control loop ended.
#[derive(Debug)]
pub struct LastWord {
    /// The state of the VM.
    pub state: VmState,
    /// Why it is in this state.
    pub cause: Option<String>,
    /// Why the VM that the loop was started with could not be defined or booted.
    pub failure: Option<Problem>,
}

impl ControlLoop {
    /// A loop with no VM yet.
    ///
    /// # Errors
    /// [`ControlError::Host`].
    pub fn new(
        spawner: Arc<dyn ThreadSpawner>,
        lifetime: Lifetime,
        options: HostOptions,
    ) -> Result<Self, ControlError> {
        crate::cpu::vcpu::install_kick_handler().map_err(|e| std::io::Error::from_raw_os_error(e.errno()))?;
        let (mailbox, inbox) = Mailbox::new()?;
        let handle = Handle { mailbox, events: EventLog::new(), telemetry: Telemetry::default() };
        let controller = Controller::new(handle.clone(), spawner, lifetime, options)?;
        Ok(Self { controller, inbox, handle, end_on: None })
    }

    /// How to reach the loop.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Ends the VM, then the loop, when `source` becomes readable: how signals come in.
    pub fn end_on(&mut self, source: UnixStream) {
        self.end_on = Some(source);
    }

    /// Defines the VM, and boots it if `boot`, before any other request is heard. A failure ends the loop and is
    /// [`LastWord::failure`] then.
    pub fn start_with(&mut self, config: VmConfig, boot: bool) {
        self.controller.start_with(config, boot);
    }

    /// Runs until [`Message::Terminate`] has ended the VM.
    ///
    /// # Errors
    /// [`ControlError::Events`].
    pub fn run(self) -> Result<LastWord, ControlError> {
        let mut manager = EventManager::<Loop>::new().map_err(ControlError::Events)?;
        let id = manager.add_subscriber(Loop { controller: self.controller, inbox: self.inbox, end_on: self.end_on });
        loop {
            let controller = &mut manager.subscriber_mut(id).map_err(ControlError::Events)?.controller;
            controller.tick();
            if controller.has_ended() {
                return Ok(controller.last_word());
            }
            let wait = controller.deadline().map_or(-1, milliseconds_until);
            manager.run_with_timeout(wait).map_err(ControlError::Events)?;
        }
    }
}

/// Rounded up, so that the deadline has passed when the wait is over.
fn milliseconds_until(deadline: Instant) -> i32 {
    let left = deadline.saturating_duration_since(Instant::now());
    i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1)
}

struct Loop {
    controller: Controller,
    inbox: Inbox,
    end_on: Option<UnixStream>,
}

impl MutEventSubscriber for Loop {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if let Some(source) = self.end_on.as_mut().filter(|s| s.as_raw_fd() == events.fd()) {
            // Drained, so that it does not wake the loop again; what it says does not matter.
            let _ = source.read(&mut [0; 64]);
            return self.controller.take(Message::Terminate);
        }
        self.inbox.acknowledge();
        for _ in 0..BATCH {
            match self.inbox.take() {
                Some(message) => self.controller.take(message),
                None => return,
            }
        }
        // More may wait: come back after the other sources of events.
        self.inbox.wake_again();
    }

    fn init(&mut self, ops: &mut EventOps) {
        let mailbox = ops.add(Events::new(&self.inbox, EventSet::IN));
        let signals = self.end_on.as_ref().map_or(Ok(()), |s| ops.add(Events::new(s, EventSet::IN)));
        if let Err(error) = mailbox.and(signals) {
            tracing::error!(?error, "the control loop cannot listen to its mailbox");
        }
    }
}
