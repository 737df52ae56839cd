//! The thread that talks to swtpm.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Duration;

use super::crb::{RC_FAILURE, Shared};
use super::link::Link;
use super::{Deadlines, TpmError};
use crate::DeviceEvent;
use crate::socket;
use crate::throttle::Throttle;

/// How long swtpm may take to switch the TPM off when the VM ends.
const FAREWELL: Duration = Duration::from_secs(1);

static LOST_LOG: Throttle = Throttle::new();

/// What the thread is told.
pub enum Message {
    /// To have a command executed.
    Command(Box<[u8]>),
    /// To bring the TPM back to power-on, and to say when that has been tried.
    Reset(Sender<()>),
    /// To end.
    Exit,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    inbox: Receiver<Message>,
    socket: PathBuf,
    /// Nothing after swtpm was lost, until the next reset.
    link: Option<Link>,
    deadlines: Deadlines,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        inbox: Receiver<Message>,
        socket: PathBuf,
        link: Link,
        deadlines: Deadlines,
    ) -> Self {
        Self { shared, inbox, socket, link: Some(link), deadlines }
    }

    pub(super) fn run(mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(Message::Command(command)) => self.execute(&command),
                Ok(Message::Reset(done)) => {
                    self.reset();
                    // Whoever waited may have gone.
                    let _ = done.send(());
                }
                Ok(Message::Exit) | Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => self.wait(),
            }
        }
        if let Some(mut link) = self.link.take()
            && let Err(error) = link.power_off(FAREWELL)
        {
            tracing::warn!(%error, "the TPM was not switched off");
        }
    }

    /// Waits for messages, or for the end of swtpm.
    fn wait(&mut self) {
        let data = self.link.as_ref().map_or(-1, Link::data);
        match socket::readable([self.shared.wake_event().as_raw_fd(), data], None) {
            Ok(Some(1)) => self.lose(&TpmError::Closed),
            Ok(_) => drop(self.shared.is_ending()),
            Err(error) => {
                // Neither descriptor can be bad. Should poll(2) fail all the same, this must not spin.
                tracing::error!(%error, "the TPM cannot wait for its commands");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    fn execute(&mut self, command: &[u8]) {
        let Some(link) = &mut self.link else { return self.shared.complete(Err(RC_FAILURE)) };
        match link.execute(command, self.deadlines.command, Some(&self.shared)) {
            Ok(response) => self.shared.complete(Ok(&response)),
            Err(error) => {
                self.lose(&error);
                self.shared.complete(Err(RC_FAILURE));
            }
        }
    }

    fn reset(&mut self) {
        let was_lost = self.link.is_none();
        let established = self.power_on().unwrap_or_else(|error| {
            self.lose(&error);
            false
        });
        self.shared.power_on(established);
        if was_lost && self.link.is_some() {
            self.shared.notify(DeviceEvent::BackendRestored { detail: "swtpm answers again".into() });
        }
    }

    fn power_on(&mut self) -> Result<bool, TpmError> {
        let within = self.deadlines.setup;
        let link = match &mut self.link {
            Some(link) => link,
            None => self.link.insert(Link::connect(&self.socket, within)?),
        };
        link.power_on(within)
    }

    /// Gives swtpm up.
    fn lose(&mut self, error: &TpmError) {
        self.link = None;
        if matches!(error, TpmError::Ending) {
            return;
        }
        // A guest that resets itself has each try fail again.
        if let Some(held_back) = LOST_LOG.pass() {
            tracing::error!(held_back, %error, "the TPM fails from now on");
        }
        self.shared.notify(DeviceEvent::BackendLost { reason: format!("the TPM fails from now on: {error}") });
    }
}
