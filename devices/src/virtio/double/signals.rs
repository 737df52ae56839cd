//! What a device says outside its rings, written down.

// poll(2) has no safe wrapper among our dependencies.
#![allow(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::virtio::TransportSignals;
use crate::{DeviceEvent, DeviceNotifier};

struct Log<T> {
    entries: Mutex<Vec<T>>,
    grown: Condvar,
}

impl<T> Default for Log<T> {
    fn default() -> Self {
        Self { entries: Mutex::new(Vec::new()), grown: Condvar::new() }
    }
}

impl<T: Clone> Log<T> {
    fn push(&self, entry: T) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
        self.grown.notify_all();
    }

    fn all(&self) -> Vec<T> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn wait(&self, timeout: Duration, wanted: impl Fn(&T) -> bool) -> Option<T> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (entries, _) = self
            .grown
            .wait_timeout_while(entries, timeout, |entries| !entries.iter().any(&wanted))
            .unwrap_or_else(PoisonError::into_inner);
        entries.iter().find(|entry| wanted(entry)).cloned()
    }
}

/// A transport that writes down what its device signals.
#[derive(Default)]
pub struct RecordedSignals {
    /// `Some`: needs reset, and why. `None`: the configuration changed.
    log: Log<Option<String>>,
}

impl RecordedSignals {
    /// How often the device said that its configuration changed.
    #[must_use]
    pub fn config_changes(&self) -> usize {
        self.log.all().iter().filter(|entry| entry.is_none()).count()
    }

    /// Why the device asked for a reset, each time it did.
    #[must_use]
    pub fn reset_reasons(&self) -> Vec<String> {
        self.log.all().into_iter().flatten().collect()
    }

    /// How often the device asked for a reset.
    #[must_use]
    pub fn resets(&self) -> usize {
        self.log.entries.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten().count()
    }

    /// Waits until the device has asked for a reset; gives the first reason.
    #[must_use]
    pub fn wait_needs_reset(&self, timeout: Duration) -> Option<String> {
        self.log.wait(timeout, Option::is_some).flatten()
    }
}

impl TransportSignals for RecordedSignals {
    fn config_changed(&self) {
        self.log.push(None);
    }

    fn needs_reset(&self, reason: &str) {
        self.log.push(Some(reason.to_owned()));
    }
}

/// A VM that writes down what its devices tell it.
#[derive(Default)]
pub struct RecordedNotifier {
    log: Log<(String, DeviceEvent)>,
}

impl RecordedNotifier {
    /// All that was told so far: the device and its event.
    #[must_use]
    pub fn events(&self) -> Vec<(String, DeviceEvent)> {
        self.log.all()
    }

    /// Waits until `wanted` holds for an event that was told; gives the first such event.
    pub fn wait(&self, timeout: Duration, wanted: impl Fn(&DeviceEvent) -> bool) -> Option<DeviceEvent> {
        self.log.wait(timeout, |(_, event)| wanted(event)).map(|(_, event)| event)
    }
}

impl DeviceNotifier for RecordedNotifier {
    fn notify(&self, device: &str, event: DeviceEvent) {
        self.log.push((device.to_owned(), event));
    }
}

/// Also where the kernel interrupts the call, as it does to a thread that has made a ring of io_uring, when that ring ends.
pub(super) fn poll_readable(fd: RawFd, timeout: Duration) -> bool {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1);
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, as the count says.
        let ready = unsafe { libc::poll(&raw mut poll, 1, millis) };
        if ready == 1 || end <= Instant::now() {
            return ready == 1;
        }
    }
}
