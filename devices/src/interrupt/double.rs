//! Interrupts without a KVM, for tests: the test reads the eventfd that would inject.
#![allow(clippy::expect_used, reason = "a test fails by panicking, also in its helpers")]

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

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
}

/// Makes sources, and keeps the eventfds of all for the test.
#[derive(Clone, Default)]
pub struct TestMsis(Arc<Mutex<Vec<EventFd>>>);

impl TestMsis {
    /// How often the source that was made as number `index` injected since this was last asked.
    ///
    /// # Panics
    /// When fewer sources were made.
    #[must_use]
    pub fn injected(&self, index: usize) -> u64 {
        let events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.get(index).expect("no such source").read().unwrap_or(0)
    }
}

impl MsiController for TestMsis {
    fn create(&self) -> io::Result<Box<dyn MsiSource>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event.try_clone()?);
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
