//! What the device, its handle and its workers share: settings that workers look at, and the ways to tell somebody.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vmm_sys_util::eventfd::EventFd;

use super::coalescing::{Coalescing, CoalescingTable, Queues};
use super::control::Command;
use super::counters::PairCounters;
use super::features::{CTRL_VLAN, GUEST_OFFLOADS, bit, tap_offload};
use super::filter::{Filter, Mac};
use super::setting::Setting;
use super::steering::Steering;
use super::steering::hash::Hasher;
use super::tap::Tap;
use super::traffic::Traffic;
use super::{ETHERNET, MAX_FRAME};
use crate::limiter::{Limiter, Limits};
use crate::metrics::{MetricSource, Sample};
use crate::throttle::Throttle;
use crate::virtio::TransportSignals;
use crate::{DeviceEvent, DeviceNotifier};

pub(super) struct Shared {
    pub(super) id: String,
    pub(super) tap: Tap,
    pub(super) counters: Vec<PairCounters>,
    /// Bytes of the largest frame that no offload makes larger, without its header.
    pub(super) plain_frame: usize,
    /// Wakes each worker, to look at its commands and at what is below.
    pub(super) wakes: Vec<EventFd>,
    pub(super) link_up: AtomicBool,
    /// Grows when the link goes down: what a tap holds then is stale, even if the link is up again when a worker looks.
    pub(super) purges: AtomicU64,
    /// Offloads that the driver takes: feature bits. Set by the first worker.
    pub(super) offloads: AtomicU64,
    /// What the driver wants to receive.
    pub(super) filter: Setting<Filter>,
    /// How long interrupts are held back.
    pub(super) coalescing: CoalescingTable,
    /// The hashes that the driver wants to hear of.
    pub(super) hasher: Setting<Option<Hasher>>,
    /// What chooses the queues of frames, on a card that offers RSS.
    pub(super) steering: Option<Steering>,
    /// Whether it does, rather than the kernel alone. Set by the first worker.
    pub(super) steered: AtomicBool,
    /// The address that the card has by its configuration.
    pub(super) mac: Mac,
    /// Drop what the driver sends under another address.
    pub(super) antispoof: bool,
    /// What may come to the driver per second, and what it may send.
    pub(super) rx_limiter: Limiter,
    pub(super) tx_limiter: Limiter,
    /// The driver is asked to announce the card, and has not answered.
    pub(super) announcing: AtomicBool,
    /// Grows with each request to announce the card.
    pub(super) announcements: AtomicU64,
    /// Queue pairs in use. Set by the first worker.
    pub(super) pairs: AtomicU16,
    /// Grows with each change of `pairs` or `hasher`, which is in force once all workers follow it.
    pub(super) pairs_generation: AtomicU64,
    /// Workers that have yet to follow the last of these changes.
    pub(super) pairs_waiting: AtomicU16,
    /// Workers that have yet to stop.
    pub(super) draining: AtomicU16,
    tap_lost: AtomicBool,
    /// Grows each time that the tap's descriptors have another file behind them.
    pub(super) tap_generation: AtomicU64,
    command_refused: AtomicBool,
    /// What the kernel counts, where vhost-net moves the frames.
    vhost: Option<Traffic>,
    vhost_log: Throttle,
    /// The tap holds no frames that the filter refuses: vhost-net may read it.
    tap_filtered: AtomicBool,
    signals: Mutex<Option<Weak<dyn TransportSignals>>>,
    notifier: Arc<dyn DeviceNotifier>,
}

/// What a card is by its configuration.
pub(super) struct CardOptions {
    pub(super) id: String,
    pub(super) mac: Mac,
    pub(super) antispoof: bool,
    pub(super) link_up: bool,
    /// Frames are moved by vhost-net.
    pub(super) vhost: bool,
    pub(super) rx_limits: Limits,
    pub(super) tx_limits: Limits,
    pub(super) steering: Option<Steering>,
}

impl Shared {
    pub(super) fn new(card: CardOptions, tap: Tap, wakes: Vec<EventFd>, notifier: Arc<dyn DeviceNotifier>) -> Self {
        let CardOptions { id, mac, antispoof, link_up, vhost, rx_limits, tx_limits, steering } = card;
        let vhost = vhost.then(|| Traffic::new(&tap));
        // The tap's MTU may change while we run; this is only how much room is kept ready.
        let mtu = tap.mtu().and_then(|mtu| usize::try_from(mtu).ok()).unwrap_or(1500);
        Self {
            id,
            tap,
            plain_frame: (mtu.saturating_add(ETHERNET)).min(MAX_FRAME),
            counters: wakes.iter().map(|_| PairCounters::default()).collect(),
            coalescing: CoalescingTable::new(2 * wakes.len()),
            wakes,
            link_up: AtomicBool::new(link_up),
            purges: AtomicU64::new(0),
            offloads: AtomicU64::new(0),
            filter: Setting::new(Filter::new(mac, false)),
            hasher: Setting::new(None),
            steering,
            steered: AtomicBool::new(false),
            mac,
            antispoof,
            rx_limiter: Limiter::new(rx_limits),
            tx_limiter: Limiter::new(tx_limits),
            announcing: AtomicBool::new(false),
            announcements: AtomicU64::new(0),
            pairs: AtomicU16::new(1),
            pairs_generation: AtomicU64::new(0),
            pairs_waiting: AtomicU16::new(0),
            draining: AtomicU16::new(0),
            tap_lost: AtomicBool::new(false),
            tap_generation: AtomicU64::new(0),
            command_refused: AtomicBool::new(false),
            vhost,
            vhost_log: Throttle::new(),
            tap_filtered: AtomicBool::new(false),
            signals: Mutex::new(None),
            notifier,
        }
    }

    /// Queue pairs that the driver could use.
    pub(super) fn max_pairs(&self) -> u16 {
        u16::try_from(self.wakes.len()).unwrap_or(u16::MAX)
    }

    /// As before the first driver, for one that negotiated `features`.
    pub(super) fn forget_driver(&self, features: u64) {
        self.pairs.store(1, Ordering::SeqCst);
        self.offloads.store(features & GUEST_OFFLOADS, Ordering::SeqCst);
        self.filter.set(Filter::new(self.mac, features & bit(CTRL_VLAN) != 0));
        self.coalescing.set(Queues::All, Coalescing::default());
        self.hasher.set(None);
        self.steered.store(false, Ordering::SeqCst);
    }

    /// Makes the tap work as the driver wants it.
    pub(super) fn prepare_tap(&self) -> io::Result<()> {
        let steered = self.steering.as_ref().filter(|_| self.steered.load(Ordering::SeqCst));
        self.tap.use_queues(self.pairs.load(Ordering::SeqCst).into())?;
        self.tap.steer(steered.map(Steering::program))?;
        self.tap.set_offload(tap_offload(self.offloads.load(Ordering::SeqCst)))
    }

    /// Has the tap drop what the driver does not want, where vhost-net is to read it. First worker only: it may wait for the
    /// kernel's network lock.
    pub(super) fn filter_tap(&self) {
        if self.vhost.is_none() {
            return;
        }
        let (_, filter) = self.filter.get();
        let done = self.tap.set_filter(filter.program().as_deref());
        self.tap_filtered.store(done.is_ok(), Ordering::SeqCst);
        if let Err(error) = done {
            self.vhost_failed(0, &format!("the tap does not take the guest's receive filter: {error}"));
        }
        self.wake_kernel_users();
    }

    /// Whether the tap drops what the driver does not want.
    pub(super) fn is_tap_filtered(&self) -> bool {
        self.tap_filtered.load(Ordering::SeqCst)
    }

    /// Something changed that decides whether vhost-net may go on: those whose frames it moves sleep.
    pub(super) fn wake_kernel_users(&self) {
        if self.vhost.is_some() {
            self.wake_all();
        }
    }

    /// vhost-net cannot move the frames of a pair; our own path does. Guests can cause it: the log is throttled.
    pub(super) fn vhost_failed(&self, queue: usize, reason: &str) {
        if let Some(held_back) = self.vhost_log.pass() {
            tracing::warn!(nic = self.id, queue, held_back, "vhost-net does not move frames, the VMM does: {reason}");
        }
    }

    /// Asks the network, and the driver if it takes such requests, to hear where the card is.
    pub(super) fn announce(&self) {
        self.announcements.fetch_add(1, Ordering::SeqCst);
        self.wake(0);
    }

    /// Asks the driver to announce the card.
    pub(super) fn ask_to_announce(&self) {
        self.announcing.store(true, Ordering::SeqCst);
        self.config_changed();
    }

    fn config_changed(&self) {
        let signals = self.signals.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(signals) = signals.and_then(|signals| signals.upgrade()) {
            signals.config_changed();
        }
    }

    pub(super) fn wake(&self, worker: usize) {
        if let Some(event) = self.wakes.get(worker) {
            // It fails only when the counter is full, and then the worker is awake.
            let _ = event.write(1);
        }
    }

    pub(super) fn wake_all(&self) {
        for worker in 0..self.wakes.len() {
            self.wake(worker);
        }
    }

    pub(super) fn set_signals(&self, signals: Option<Weak<dyn TransportSignals>>) {
        *self.signals.lock().unwrap_or_else(PoisonError::into_inner) = signals;
    }

    /// Sets the link and tells the driver, if there is one.
    pub(super) fn set_link(&self, up: bool) {
        if self.link_up.swap(up, Ordering::SeqCst) == up {
            return;
        }
        if !up {
            self.purges.fetch_add(1, Ordering::SeqCst);
        }
        self.wake_all();
        self.config_changed();
    }

    pub(super) fn notify(&self, event: DeviceEvent) {
        self.notifier.notify(&self.id, event);
    }

    /// The tap failed: told once, until it works again.
    pub(super) fn tap_failed(&self, action: &str, error: &io::Error) {
        if self.tap_lost.swap(true, Ordering::Relaxed) {
            return;
        }
        let (tap, remedy) = (self.tap.name(), self.tap.remedy());
        tracing::warn!(nic = self.id, tap, action, %error, "the tap fails; frames are dropped: {remedy}");
        self.notify(DeviceEvent::BackendLost { reason: format!("tap {tap}: cannot {action}: {error}; {remedy}") });
        // The first worker looks after it.
        self.wake(0);
    }

    pub(super) fn is_tap_lost(&self) -> bool {
        self.tap_lost.load(Ordering::Relaxed)
    }

    /// The tap refused what the driver asked for. Logged the first time only: the driver can ask as often as it likes.
    pub(super) fn command_refused(&self, command: &Command, error: &io::Error) {
        if !self.command_refused.swap(true, Ordering::Relaxed) {
            let tap = self.tap.name();
            tracing::warn!(nic = self.id, tap, ?command, %error, "the tap refuses what the driver asks for; so does the NIC");
        }
    }

    /// A frame went through the tap.
    pub(super) fn tap_works(&self) {
        if self.tap_lost.load(Ordering::Relaxed) && self.tap_lost.swap(false, Ordering::Relaxed) {
            let tap = self.tap.name();
            tracing::info!(nic = self.id, tap, "the tap works again");
            self.notify(DeviceEvent::BackendRestored { detail: format!("tap {tap} works again") });
        }
    }
}

impl MetricSource for Shared {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        for (queue, counters) in self.counters.iter().enumerate() {
            counters.collect(&self.id, queue, self.vhost.is_some(), visit);
        }
        if let Some(traffic) = &self.vhost {
            traffic.collect(&self.id, &self.tap, visit);
        }
    }
}
