//! What a worker waits for.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::shared::Shared;

/// What an event is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Token {
    Wake,
    Tap,
    RxKick,
    TxKick,
    ControlKick,
    /// An interrupt that was held back is due, or a look at a ring that the kernel has.
    Timer,
    /// The kernel wants the driver interrupted.
    Call,
    /// The kernel found a ring broken.
    VhostError,
}

impl Token {
    const ALL: [Self; 8] = [
        Self::Wake,
        Self::Tap,
        Self::RxKick,
        Self::TxKick,
        Self::ControlKick,
        Self::Timer,
        Self::Call,
        Self::VhostError,
    ];

    /// The token of an event.
    pub(super) fn of(event: &EpollEvent) -> Option<Self> {
        Self::ALL.into_iter().find(|token| *token as u64 == event.data())
    }
}

/// An epoll, in which all but the device's messages is watched edge-triggered.
pub(super) struct Watches {
    epoll: Epoll,
    shared: Arc<Shared>,
    worker: usize,
}

impl Watches {
    /// Watches for messages to `worker` only.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(super) fn new(shared: Arc<Shared>, worker: usize) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        if let Some(wake) = shared.wakes.get(worker) {
            let event = EpollEvent::new(EventSet::IN, Token::Wake as u64);
            epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        }
        Ok(Self { epoll, shared, worker })
    }

    /// Waits for events, at most `timeout` milliseconds (-1: for ever).
    ///
    /// # Errors
    /// The kernel's answer.
    pub(super) fn wait(&self, timeout: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
        self.epoll.wait(timeout, events)
    }

    pub(super) fn add(&self, fd: RawFd, token: Token, events: EventSet) {
        self.control(ControlOperation::Add, fd, token as u64, events);
    }

    /// Looks at `fd` anew: what is there already is an event again.
    pub(super) fn renew(&self, fd: RawFd, token: Token, events: EventSet) {
        self.control(ControlOperation::Modify, fd, token as u64, events);
    }

    pub(super) fn remove(&self, fd: RawFd) {
        self.control(ControlOperation::Delete, fd, 0, EventSet::empty());
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, token: u64, events: EventSet) {
        if let Err(error) = self.epoll.ctl(operation, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token)) {
            tracing::error!(nic = self.shared.id, queue = self.worker, token, %error, "a descriptor cannot be watched");
        }
    }
}
