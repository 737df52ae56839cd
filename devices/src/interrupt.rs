//! Interrupts: an MSI-X vector is an eventfd with mask and pending semantics; a line is a level.
//!
//! Who turns the eventfd into an interrupt (an irqfd and a KVM route) is the VMM's business: it implements [`MsiSource`]
//! and [`InterruptLine`].

#[cfg(any(test, feature = "test-double"))]
pub mod double;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// The message that an MSI or MSI-X interrupt writes (PCI 3.0 §6.8).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address, 0xFEExxxxx on x86.
    pub address: u64,
    /// Data: vector and delivery mode.
    pub data: u32,
}

/// One message-signalled interrupt that the VMM can inject.
pub trait MsiSource: Send + Sync {
    /// Signals of [`MsiSource::event`] inject `message` from now on.
    ///
    /// # Errors
    /// What the kernel answered; the former message stays then.
    fn set_message(&self, message: MsiMessage) -> io::Result<()>;

    /// The eventfd that injects the interrupt.
    fn event(&self) -> &EventFd;
}

/// Makes [`MsiSource`]s: one for each vector of each device.
pub trait MsiController: Send + Sync {
    /// A new source with no message yet.
    ///
    /// # Errors
    /// When descriptors or routes ran out.
    fn create(&self) -> io::Result<Box<dyn MsiSource>>;
}

/// A level-triggered or edge-triggered interrupt line of the chipset (a GSI).
pub trait InterruptLine: Send + Sync {
    /// Sets the level of the line.
    fn set(&self, asserted: bool);

    /// Raises and lowers an edge-triggered line.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// An MSI-X vector: fires at once when unmasked; remembers to fire when masked (PCI 3.0 §6.8.2.9, §6.8.3.5).
pub struct Vector {
    source: Box<dyn MsiSource>,
    masked: AtomicBool,
    pending: AtomicBool,
    fired: AtomicU64,
}

impl Vector {
    /// A masked vector in front of `source`.
    #[must_use]
    pub fn new(source: Box<dyn MsiSource>) -> Self {
        Self { source, masked: AtomicBool::new(true), pending: AtomicBool::new(false), fired: AtomicU64::new(0) }
    }

    /// Fires the vector, or marks it pending while it is masked. Any thread may call this.
    pub fn trigger(&self) {
        self.fired.fetch_add(1, Ordering::Relaxed);
        if !self.masked.load(Ordering::SeqCst) {
            self.inject();
            return;
        }
        self.pending.store(true, Ordering::SeqCst);
        // An unmask between the two lines above has not seen the pending bit: whoever clears it injects.
        if !self.masked.load(Ordering::SeqCst) && self.pending.swap(false, Ordering::SeqCst) {
            self.inject();
        }
    }

    /// Masks the vector.
    pub fn mask(&self) {
        self.masked.store(true, Ordering::SeqCst);
    }

    /// Unmasks the vector, which injects what became pending meanwhile.
    pub fn unmask(&self) {
        self.masked.store(false, Ordering::SeqCst);
        if self.pending.swap(false, Ordering::SeqCst) {
            self.inject();
        }
    }

    /// Whether the vector waits for its unmasking: its bit in the pending bit array.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Back to power-on: masked, nothing pending.
    pub fn reset(&self) {
        self.mask();
        self.pending.store(false, Ordering::SeqCst);
    }

    /// Routes the vector to `message`.
    ///
    /// # Errors
    /// What the kernel answered; the former message stays then.
    pub fn set_message(&self, message: MsiMessage) -> io::Result<()> {
        self.source.set_message(message)
    }

    /// How often the vector was triggered.
    #[must_use]
    pub fn fired(&self) -> u64 {
        self.fired.load(Ordering::Relaxed)
    }

    fn inject(&self) {
        // An eventfd write fails only when its counter is full: then the interrupt is on its way already.
        let _ = self.source.event().write(1);
    }
}

/// No vector at all (VIRTIO_MSI_NO_VECTOR, virtio 1.2 §4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// How a queue interrupts its driver: a vector, or nothing where the driver chose none ([`NO_VECTOR`]). The choice may change
/// while the queue works: some drivers assign vectors after they have enabled their queues.
#[derive(Clone)]
pub struct QueueInterrupt {
    vectors: Arc<[Arc<Vector>]>,
    chosen: Arc<AtomicU16>,
}

impl QueueInterrupt {
    /// Interrupts through `vector`; `None` stays silent.
    #[must_use]
    pub fn new(vector: Option<Arc<Vector>>) -> Self {
        let chosen = if vector.is_some() { 0 } else { NO_VECTOR };
        Self { vectors: vector.into_iter().collect(), chosen: Arc::new(AtomicU16::new(chosen)) }
    }

    /// Interrupts through the one of `vectors` that `chosen` names at that moment; silent where it names none.
    #[must_use]
    pub fn chosen(vectors: Arc<[Arc<Vector>]>, chosen: Arc<AtomicU16>) -> Self {
        Self { vectors, chosen }
    }

    /// Fires the vector, if there is one.
    pub fn trigger(&self) {
        if let Some(vector) = self.vectors.get(usize::from(self.chosen.load(Ordering::Acquire))) {
            vector.trigger();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::double::test_vector as vector;
    use super::*;

    #[test]
    fn a_masked_vector_that_fires_becomes_pending_and_fires_once_on_unmask() {
        let (vector, event) = vector();
        vector.trigger();
        vector.trigger();
        assert!(vector.is_pending());
        assert!(event.read().is_err(), "nothing may be injected while masked");
        vector.unmask();
        assert_eq!(event.read().unwrap(), 1);
        assert!(!vector.is_pending());
        assert_eq!(vector.fired(), 2);
    }

    #[test]
    fn an_unmasked_vector_fires_at_once_and_masking_holds_the_next_one_back() {
        let (vector, event) = vector();
        vector.unmask();
        vector.trigger();
        assert_eq!(event.read().unwrap(), 1);
        vector.mask();
        vector.trigger();
        assert!(event.read().is_err());
        vector.reset();
        vector.unmask();
        assert!(event.read().is_err(), "a reset forgets what was pending");
    }

    #[test]
    fn no_interrupt_is_lost_when_mask_and_trigger_race() {
        let (vector, event) = vector();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..10_000 {
                    vector.mask();
                    vector.unmask();
                }
            });
            for _ in 0..10_000 {
                vector.trigger();
                let mut seen = event.read().is_ok();
                while !seen {
                    std::thread::yield_now();
                    vector.unmask();
                    seen = event.read().is_ok();
                }
            }
        });
    }

    #[test]
    fn a_queue_follows_its_vector_when_the_driver_chooses_another_one() {
        let (first, first_event) = vector();
        let (second, second_event) = vector();
        first.unmask();
        second.unmask();
        let chosen = Arc::new(AtomicU16::new(NO_VECTOR));
        let interrupt = QueueInterrupt::chosen([first, second].map(Arc::new).into(), Arc::clone(&chosen));
        interrupt.trigger();
        chosen.store(1, Ordering::Release);
        interrupt.trigger();
        assert!(first_event.read().is_err());
        assert_eq!(second_event.read().unwrap(), 1);
    }
}
