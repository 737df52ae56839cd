//! What an owner leaves of its state for those who look, who must neither wait for it nor hold what belongs to it.

use std::sync::{Mutex, PoisonError};

/// A copy of a state: locked only to be replaced or copied.
#[derive(Debug, Default)]
pub(crate) struct Shown<T>(Mutex<T>);

impl<T: Clone> Shown<T> {
    /// To begin with.
    pub(crate) fn new(state: T) -> Self {
        Self(Mutex::new(state))
    }

    /// Leaves the state as it is now.
    pub(crate) fn show(&self, state: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The state as it was left last.
    pub(crate) fn state(&self) -> T {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
