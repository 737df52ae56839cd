//! Interrupts without a KVM, for tests: the test reads the eventfd that would inject.
#![allow(clippy::expect_used, reason = "a test fails by panicking, also in its helpers")]

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{MsiController, MsiMessage, MsiSource, Vector};

/// A source that takes any message.
pub struct TestMsi(EventFd);

impl MsiSource for TestMsi {
    fn set_message(&self, _message: MsiMessage) -> io::Result<()> {
        Ok(())
    }

    fn event(&self) -> &EventFd {
        &self.0
    }

    fn connect(&self, _event: &EventFd) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn disconnect(&self, _event: &EventFd) {}
}

/// Makes sources, and sends the eventfd of each to the test.
pub struct TestMsis(Sender<EventFd>);

impl TestMsis {
    /// A controller, and where the eventfds of its sources come out.
    #[must_use]
    pub fn new() -> (Self, Receiver<EventFd>) {
        let (events, received) = channel();
        (Self(events), received)
    }
}

impl MsiController for TestMsis {
    fn create(&self) -> io::Result<Box<dyn MsiSource>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        // A test that does not look at interrupts has dropped the other end.
        let _ = self.0.send(event.try_clone()?);
        Ok(Box::new(TestMsi(event)))
    }
}

/// A masked vector, and the eventfd that counts what it injects.
///
/// # Panics
/// When no descriptors are left.
#[must_use]
pub fn test_vector() -> (Vector, EventFd) {
    let event = EventFd::new(EFD_NONBLOCK).expect("descriptors are left");
    (Vector::new(Box::new(TestMsi(event.try_clone().expect("descriptors are left")))), event)
}
