//! Interrupts: an MSI-X vector is an eventfd with mask and pending semantics; a line is a level.
//!
//! Who turns the eventfd into an interrupt (an irqfd and a KVM route) is the VMM's business: it implements [`MsiSource`]
//! and [`InterruptLine`].

#[cfg(any(test, feature = "test-double"))]
pub mod double;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

    /// Signals of `event`, which somebody outside the VMM sends, inject the interrupt too, and nobody else sees them, until
    /// [`MsiSource::disconnect`].
    ///
    /// # Errors
    /// What the kernel answered; nothing has changed then.
    fn connect(&self, event: &EventFd) -> io::Result<()>;

    /// Ends what [`MsiSource::connect`] began. A signal that comes from now on waits in `event`.
    fn disconnect(&self, event: &EventFd);
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

/// An eventfd of somebody outside the VMM that fires a vector.
struct Direct {
    event: Arc<EventFd>,
    connected: bool,
}

impl Direct {
    fn connect(&mut self, source: &dyn MsiSource) {
        self.connected = self.connected || source.connect(&self.event).is_ok();
    }

    fn disconnect(&mut self, source: &dyn MsiSource) {
        if std::mem::take(&mut self.connected) {
            source.disconnect(&self.event);
        }
    }
}

/// An MSI-X vector: fires at once when unmasked; remembers to fire when masked (PCI 3.0 §6.8.2.9, §6.8.3.5).
pub struct Vector {
    source: Box<dyn MsiSource>,
    masked: AtomicBool,
    pending: AtomicBool,
    fired: AtomicU64,
    direct: Mutex<Vec<Direct>>,
}

impl Vector {
    /// A masked vector in front of `source`.
    #[must_use]
    pub fn new(source: Box<dyn MsiSource>) -> Self {
        Self {
            source,
            masked: AtomicBool::new(true),
            pending: AtomicBool::new(false),
            fired: AtomicU64::new(0),
            direct: Mutex::default(),
        }
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
        self.direct().iter_mut().for_each(|direct| direct.disconnect(&*self.source));
    }

    /// Unmasks the vector, which injects what became pending meanwhile.
    pub fn unmask(&self) {
        self.masked.store(false, Ordering::SeqCst);
        self.direct().iter_mut().for_each(|direct| direct.connect(&*self.source));
        if self.pending.swap(false, Ordering::SeqCst) {
            self.inject();
        }
    }

    /// Signals of `event` fire the vector without a way through the VMM as long as it is unmasked. While it is masked, or where
    /// the host cannot do that, they stay in `event`, whose owner reads them and calls [`Vector::trigger`].
    pub fn attach(&self, event: Arc<EventFd>) {
        let mut all = self.direct();
        let mut direct = Direct { event, connected: false };
        // Masking comes for the lock after it has set the mark: one of both sees the other.
        if !self.masked.load(Ordering::SeqCst) {
            direct.connect(&*self.source);
        }
        all.push(direct);
    }

    /// Ends what [`Vector::attach`] began: signals of `event` are its owner's again.
    pub fn detach(&self, event: &Arc<EventFd>) {
        self.direct().retain_mut(|direct| {
            let stays = !Arc::ptr_eq(&direct.event, event);
            if !stays {
                direct.disconnect(&*self.source);
            }
            stays
        });
    }

    fn direct(&self) -> MutexGuard<'_, Vec<Direct>> {
        self.direct.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// How often the vector was triggered, by the VMM.
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
pub struct QueueInterrupt(Arc<Route>);

struct Route {
    vectors: Arc<[Arc<Vector>]>,
    chosen: AtomicU16,
    /// What fires the chosen vector beside us.
    attached: Mutex<Option<Arc<EventFd>>>,
}

impl Route {
    fn vector(&self) -> Option<&Vector> {
        self.vectors.get(usize::from(self.chosen.load(Ordering::Acquire))).map(|vector| &**vector)
    }

    fn attached(&self) -> MutexGuard<'_, Option<Arc<EventFd>>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueueInterrupt {
    /// Interrupts through `vector`; `None` stays silent.
    #[must_use]
    pub fn new(vector: Option<Arc<Vector>>) -> Self {
        let interrupt = Self::among(vector.into_iter().collect());
        interrupt.choose(0);
        interrupt
    }

    /// Interrupts through one of `vectors`; silent until [`QueueInterrupt::choose`] says which.
    #[must_use]
    pub fn among(vectors: Arc<[Arc<Vector>]>) -> Self {
        Self(Arc::new(Route { vectors, chosen: AtomicU16::new(NO_VECTOR), attached: Mutex::default() }))
    }

    /// Interrupts through the vector of that number from now on; silent where there is none.
    pub fn choose(&self, vector: u16) {
        let route = &*self.0;
        let attached = route.attached();
        let former = route.vector();
        let next = route.vectors.get(usize::from(vector));
        if let (Some(event), Some(former)) = (&*attached, former) {
            former.detach(event);
        }
        route.chosen.store(vector, Ordering::Release);
        if let (Some(event), Some(next)) = (&*attached, next) {
            next.attach(Arc::clone(event));
        }
    }

    /// The number of the vector, [`NO_VECTOR`] if none was chosen.
    #[must_use]
    pub fn vector(&self) -> u16 {
        self.0.chosen.load(Ordering::Acquire)
    }

    /// Fires the vector, if there is one.
    pub fn trigger(&self) {
        if let Some(vector) = self.0.vector() {
            vector.trigger();
        }
    }

    /// [`Vector::attach`] for the vector that is chosen at any time, instead of what was attached before.
    pub fn attach(&self, event: &Arc<EventFd>) {
        let mut attached = self.0.attached();
        let former = attached.replace(Arc::clone(event));
        let Some(vector) = self.0.vector() else { return };
        if let Some(former) = former {
            vector.detach(&former);
        }
        vector.attach(Arc::clone(event));
    }

    /// Ends what [`QueueInterrupt::attach`] began.
    pub fn detach(&self) {
        if let (Some(event), Some(vector)) = (self.0.attached().take(), self.0.vector()) {
            vector.detach(&event);
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
        let interrupt = QueueInterrupt::among([first, second].map(Arc::new).into());
        interrupt.trigger();
        interrupt.choose(1);
        interrupt.trigger();
        assert!(first_event.read().is_err());
        assert_eq!(second_event.read().unwrap(), 1);
    }

    /// A source that shows whether it is connected, to one at a time.
    struct Switch(Arc<AtomicBool>, EventFd);

    impl MsiSource for Switch {
        fn set_message(&self, _message: MsiMessage) -> io::Result<()> {
            Ok(())
        }

        fn event(&self) -> &EventFd {
            &self.1
        }

        fn connect(&self, _event: &EventFd) -> io::Result<()> {
            assert!(!self.0.swap(true, Ordering::SeqCst));
            Ok(())
        }

        fn disconnect(&self, _event: &EventFd) {
            assert!(self.0.swap(false, Ordering::SeqCst));
        }
    }

    #[test]
    fn what_is_attached_fires_the_chosen_vector_directly_while_that_is_unmasked_and_waits_for_its_owner_else() {
        let switches: [Arc<AtomicBool>; 2] = Default::default();
        let vectors =
            switches.clone().map(|switch| Arc::new(Vector::new(Box::new(Switch(switch, EventFd::new(0).unwrap())))));
        let interrupt = QueueInterrupt::among(vectors.clone().into());
        let call = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let connected = || switches.each_ref().map(|switch| switch.load(Ordering::SeqCst));
        interrupt.attach(&call);
        assert_eq!(connected(), [false, false], "no vector is chosen");
        interrupt.choose(0);
        assert_eq!(connected(), [false, false], "the vector is masked");
        vectors[0].unmask();
        assert_eq!(connected(), [true, false]);
        vectors[0].unmask();
        interrupt.choose(1);
        assert_eq!(connected(), [false, false]);
        vectors[1].unmask();
        assert_eq!(connected(), [false, true]);
        vectors[1].mask();
        assert_eq!(connected(), [false, false]);
        vectors[1].unmask();
        vectors[1].reset();
        assert_eq!(connected(), [false, false]);
        vectors[1].unmask();
        interrupt.detach();
        assert_eq!(connected(), [false, false]);
        vectors[1].unmask();
        interrupt.choose(0);
        assert_eq!(connected(), [false, false], "nothing is attached any more");
    }
}
