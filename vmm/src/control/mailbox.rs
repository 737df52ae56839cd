//! The way into the control thread: everybody who wants something of the VM leaves a message and never waits.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use rackvisor_api::control::{Control, Reply, Request};
use rackvisor_api::events::EventLog;
use rackvisor_api::problem::Problem;
use rackvisor_devices::throttle::Throttle;
use rackvisor_devices::{DeviceEvent, DeviceNotifier};
use vmm_sys_util::eventfd::EventFd;

use crate::assembly::{AssemblyError, Machine, Taps};
use crate::cpu::vcpu::VcpuEvent;
use crate::telemetry::Telemetry;

/// Which boot a message belongs to: those of a machine that is gone are dropped.
pub type Generation = u64;

/// What the control thread is told.
pub enum Message {
    /// A client wants something.
    Api(Request, Reply),
    /// A device has something to tell.
    Device {
        /// The boot that it belongs to.
        generation: Generation,
        /// Identifier of the device.
        device: String,
        /// What it tells.
        event: DeviceEvent,
        /// Its place in the mailbox.
        place: Place,
    },
    /// A vCPU has something to tell.
    Vcpu(Generation, VcpuEvent),
    /// A job has checked the descriptors of a definition: all that it has then.
    Claimed(Result<Taps, Problem>),
    /// A job has put the machine together.
    Assembled(Box<Result<Machine, AssemblyError>>),
    /// A job has brought the machine back to power-on.
    Restarted(Box<Machine>, Result<(), AssemblyError>),
    /// A job has taken the machine apart; what its last flush said.
    Dismantled(Result<(), String>),
    /// End the VM and then the control loop.
    Terminate,
}

/// Device events that may wait in the mailbox. A guest can cause any number of them: those beyond are dropped, which the
/// log says; the counters of the device miss none.
const MAX_DEVICE_EVENTS: usize = 256;

/// A device event's place in the mailbox, free again when the event has been taken.
pub struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let place = Self(Arc::clone(taken));
        (taken.fetch_add(1, Ordering::Relaxed) < limit).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where messages for the control thread go. Clones share it.
#[derive(Clone)]
pub struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    /// A mailbox, and the end that the control thread keeps.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> std::io::Result<(Self, Inbox)> {
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (sender, receiver) = mpsc::channel();
        Ok((Self { sender, wake: Arc::clone(&wake) }, Inbox { receiver, wake }))
    }

    /// Leaves a message. Says whether the control thread is still there.
    pub fn send(&self, message: Message) -> bool {
        let sent = self.sender.send(message).is_ok();
        // A full counter means that the thread is being woken already.
        let _ = self.wake.write(1);
        sent
    }

    /// A notifier for the devices of one boot.
    #[must_use]
    pub fn notifier(&self, generation: Generation) -> Arc<dyn DeviceNotifier> {
        Arc::new(Notifier { mailbox: self.clone(), generation, taken: Arc::default(), overflow_log: Throttle::new() })
    }
}

/// The control thread's end of its mailbox.
pub struct Inbox {
    receiver: Receiver<Message>,
    wake: Arc<EventFd>,
}

impl Inbox {
    /// The next message, if there is one.
    #[must_use]
    pub fn take(&self) -> Option<Message> {
        self.receiver.try_recv().ok()
    }

    /// Wakes the thread for what is left in the box.
    pub fn wake_again(&self) {
        let _ = self.wake.write(1);
    }

    /// Forgets the wake-up that brought the thread here.
    pub fn acknowledge(&self) {
        let _ = self.wake.read();
    }
}

impl AsRawFd for Inbox {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

struct Notifier {
    mailbox: Mailbox,
    generation: Generation,
    taken: Arc<AtomicUsize>,
    overflow_log: Throttle,
}

impl DeviceNotifier for Notifier {
    fn notify(&self, device: &str, event: DeviceEvent) {
        // Something waits for these: each is the answer to a stop, comes once per queue and start, or ends the VM. There
        // are never many.
        let vital = matches!(
            event,
            DeviceEvent::Drained | DeviceEvent::IoError { held: true, .. } | DeviceEvent::ReservationLost { .. }
        );
        let limit = if vital { usize::MAX } else { MAX_DEVICE_EVENTS };
        let Some(place) = Place::take(&self.taken, limit) else {
            if let Some(held_back) = self.overflow_log.pass() {
                tracing::warn!(device, held_back, ?event, "too many device events at once: some are dropped");
            }
            return;
        };
        let (generation, device) = (self.generation, device.to_owned());
        self.mailbox.send(Message::Device { generation, device, event, place });
    }
}

/// What the API server and embedders hold of a VM.
#[derive(Clone)]
pub struct Handle {
    /// Where requests go.
    pub mailbox: Mailbox,
    /// What happened.
    pub events: Arc<EventLog>,
    /// What can be looked at.
    pub telemetry: Telemetry,
}

impl Control for Handle {
    fn submit(&self, request: Request, reply: Reply) {
        // A message that nobody takes drops its reply, which answers by itself.
        self.mailbox.send(Message::Api(request, reply));
    }

    fn metrics(&self) -> String {
        self.telemetry.render()
    }

    fn inspect(&self, path: &str) -> Option<serde_json::Value> {
        self.telemetry.inspect(path)
    }

    fn events(&self) -> Arc<EventLog> {
        Arc::clone(&self.events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_device_events_is_bounded_and_never_costs_the_one_that_an_operation_waits_for() {
        let (mailbox, inbox) = Mailbox::new().unwrap();
        let notifier = mailbox.notifier(1);
        for _ in 0..10 * MAX_DEVICE_EVENTS {
            notifier.notify("root", DeviceEvent::NeedsReset { reason: String::new() });
        }
        notifier.notify("root", DeviceEvent::Drained);
        let taken: Vec<_> = std::iter::from_fn(|| inbox.take()).collect();
        assert_eq!(taken.len(), MAX_DEVICE_EVENTS + 1);
        assert!(matches!(taken.last(), Some(Message::Device { event: DeviceEvent::Drained, .. })));
        drop(taken);
        notifier.notify("root", DeviceEvent::Resized { bytes: 1 });
        assert!(inbox.take().is_some(), "there is room again");
    }
}
