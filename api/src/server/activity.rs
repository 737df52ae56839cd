//! What a connection is doing, so that those who do nothing can be told from those who are served.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::time::Instant;

use super::Limits;

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing: before the first request or between two.
    Quiet,
    /// The client is sending headers.
    Head,
    /// The client is sending a body.
    Body,
    /// The request is being served, or its answer sent.
    Busy,
}

#[derive(Debug)]
struct Inner {
    phase: Phase,
    since: Instant,
    /// Since when the client has not taken what we write.
    stalled: Option<Instant>,
}

/// Shared by the parts of one connection.
#[derive(Clone, Debug)]
pub(super) struct Activity(Arc<Mutex<Inner>>);

impl Activity {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Inner { phase: Phase::Quiet, since: Instant::now(), stalled: None })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Goes from one phase to another; nothing happens if the connection is in a third one.
    pub(super) fn step(&self, from: Phase, to: Phase) {
        let mut inner = self.lock();
        if inner.phase == from {
            inner.phase = to;
            inner.since = Instant::now();
        }
    }

    /// A request has come in.
    pub(super) fn enter(&self, phase: Phase) {
        let mut inner = self.lock();
        inner.phase = phase;
        inner.since = Instant::now();
    }

    pub(super) fn stalled(&self, stalled: bool) {
        let mut inner = self.lock();
        match (stalled, inner.stalled) {
            (true, None) => inner.stalled = Some(Instant::now()),
            (false, Some(_)) => inner.stalled = None,
            _ => {}
        }
    }

    /// When the connection is to be given up, if nothing changes.
    pub(super) fn deadline(&self, limits: &Limits) -> Option<Instant> {
        let inner = self.lock();
        let by_phase = match inner.phase {
            Phase::Quiet => Some(inner.since + limits.idle),
            Phase::Head => Some(inner.since + limits.head),
            Phase::Body | Phase::Busy => None,
        };
        let by_stall = inner.stalled.map(|since| since + limits.stall);
        [by_phase, by_stall].into_iter().flatten().min()
    }

    /// Since when nobody waits for us on this connection; `None` while a request is being served.
    pub(super) fn unserved_since(&self) -> Option<Instant> {
        let inner = self.lock();
        (inner.phase != Phase::Busy).then_some(inner.since)
    }

    /// A guard that makes this step when dropped.
    pub(super) fn step_at_end(&self, from: Phase, to: Phase) -> StepAtEnd {
        StepAtEnd { activity: self.clone(), from, to }
    }
}

/// See [`Activity::step_at_end`].
#[derive(Debug)]
pub(super) struct StepAtEnd {
    activity: Activity,
    from: Phase,
    to: Phase,
}

impl Drop for StepAtEnd {
    fn drop(&mut self) {
        self.activity.step(self.from, self.to);
    }
}
