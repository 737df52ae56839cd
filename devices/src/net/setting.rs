//! A value that the first worker sets and all look at in every turn.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A value behind a lock, with a number that tells without the lock whether it is still the one that was seen last.
pub(super) struct Setting<T> {
    value: Mutex<Arc<T>>,
    /// Grows with each change.
    generation: AtomicU64,
}

impl<T> Setting<T> {
    pub(super) fn new(value: T) -> Self {
        Self { value: Mutex::new(Arc::new(value)), generation: AtomicU64::new(0) }
    }

    /// The value, with its generation.
    pub(super) fn get(&self) -> (u64, Arc<T>) {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        (self.generation.load(Ordering::SeqCst), Arc::clone(&value))
    }

    /// Brings `seen`, which [`Setting::get`] gave, up to date.
    pub(super) fn follow(&self, seen: &mut (u64, Arc<T>)) {
        if self.generation.load(Ordering::SeqCst) != seen.0 {
            *seen = self.get();
        }
    }

    pub(super) fn set(&self, to: T) {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        *value = Arc::new(to);
        self.generation.fetch_add(1, Ordering::SeqCst);
    }
}

impl<T: Clone> Setting<T> {
    pub(super) fn change(&self, change: impl FnOnce(&mut T)) {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut value));
        self.generation.fetch_add(1, Ordering::SeqCst);
    }
}
