//! The threads of a machine: when one panics the control thread hears of it, once the thread has let go of all that it had.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use rackvisor_devices::{ThreadKind, ThreadSpawner};

use crate::cpu::vcpu::VcpuEvent;

use super::mailbox::{Generation, Mailbox, Message};

/// Starts threads that tell of their panics.
pub struct WatchedThreads {
    pub spawner: Arc<dyn ThreadSpawner>,
    pub mailbox: Mailbox,
    pub generation: Generation,
}

/// Tells of a panic when it is dropped by one.
struct Alarm {
    thread: String,
    mailbox: Mailbox,
    generation: Generation,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let cause = format!("thread {} of the VMM panicked: its crash report and the log say why", self.thread);
            self.mailbox.send(Message::Vcpu(self.generation, VcpuEvent::Crashed(cause)));
        }
    }
}

impl ThreadSpawner for WatchedThreads {
    fn spawn(&self, kind: ThreadKind, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        let alarm = Alarm { thread: name.to_owned(), mailbox: self.mailbox.clone(), generation: self.generation };
        let watched = move || {
            let _alarm = alarm;
            body();
        };
        self.spawner.spawn(kind, name, Box::new(watched))
    }
}
