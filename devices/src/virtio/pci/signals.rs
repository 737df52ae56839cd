//! How a running device reaches its driver outside its queues.
//!
//! Everything here is atomic: a device may call from its worker, or from inside a call of the transport that holds its lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::interrupt::{NO_VECTOR, Vector};
use crate::metrics::Counter;
use crate::throttle::Throttle;
use crate::virtio::TransportSignals;
use crate::{DeviceEvent, DeviceNotifier};

/// ISR status: the configuration changed (virtio 1.2 §4.1.4.5).
pub(super) const ISR_CONFIG: u8 = 1 << 1;

pub(super) struct Signals {
    id: String,
    notifier: Arc<dyn DeviceNotifier>,
    vectors: Arc<[Arc<Vector>]>,
    config_vector: AtomicU16,
    isr: AtomicU8,
    generation: AtomicU8,
    driver_ok: AtomicBool,
    needs_reset: AtomicBool,
    /// The configuration changed before DRIVER_OK, when the driver must not be interrupted yet.
    unreported: AtomicBool,
    log: Throttle,
    pub(super) needs_resets: Counter,
}

impl Signals {
    pub(super) fn new(id: String, notifier: Arc<dyn DeviceNotifier>, vectors: Arc<[Arc<Vector>]>) -> Self {
        Self {
            id,
            notifier,
            vectors,
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            driver_ok: AtomicBool::new(false),
            needs_reset: AtomicBool::new(false),
            unreported: AtomicBool::new(false),
            log: Throttle::new(),
            needs_resets: Counter::default(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The vectors of the function. The driver says what each of them is for.
    pub(super) fn vectors(&self) -> &Arc<[Arc<Vector>]> {
        &self.vectors
    }

    /// The vector number if there is such a vector, else [`NO_VECTOR`] (§4.1.5.1.2.1).
    pub(super) fn checked_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.len() { vector } else { NO_VECTOR }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.checked_vector(vector), Ordering::Release);
    }

    /// Reading the ISR clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Whether the driver has said that it is ready.
    pub(super) fn is_driven(&self) -> bool {
        self.driver_ok.load(Ordering::SeqCst)
    }

    /// The driver is ready: from now on it may be interrupted.
    pub(super) fn driver_ready(&self) {
        self.driver_ok.store(true, Ordering::SeqCst);
        if self.unreported.swap(false, Ordering::SeqCst) {
            self.interrupt();
        }
    }

    /// Back to power-on, when nothing is in flight. The generation goes on: a driver may compare across a reset.
    pub(super) fn reset(&self) {
        self.driver_ok.store(false, Ordering::SeqCst);
        self.unreported.store(false, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.isr.store(0, Ordering::Release);
    }

    fn interrupt(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        if let Some(vector) = self.vectors.get(usize::from(self.config_vector())) {
            vector.trigger();
        }
    }
}

impl TransportSignals for Signals {
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.unreported.store(true, Ordering::SeqCst);
        if self.driver_ok.load(Ordering::SeqCst) && self.unreported.swap(false, Ordering::SeqCst) {
            self.interrupt();
        }
    }

    fn needs_reset(&self, reason: &str) {
        if self.needs_reset.swap(true, Ordering::SeqCst) {
            return;
        }
        self.needs_resets.increment();
        if self.driver_ok.load(Ordering::SeqCst) {
            self.interrupt();
        }
        // A driver that does it over and over fills neither the log nor the events, of which only so many are kept. The counter
        // has them all.
        if let Some(held_back) = self.log.pass() {
            tracing::warn!(device = self.id, held_back, "guest broke the device, it waits for a reset: {reason}");
            self.notifier.notify(&self.id, DeviceEvent::NeedsReset { reason: reason.to_owned() });
        }
    }
}
