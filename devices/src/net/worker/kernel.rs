//! When the kernel has the rings of a worker's pair ([`Vhost`]), and when our own path has them.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use super::super::counters::PairCounters;
use super::super::vhost::Vhost;
use super::{TUNING, Worker, fail};
use crate::pace::Pace;

impl Worker {
    pub(super) fn is_in_kernel(&self) -> bool {
        self.vhost.as_ref().is_some_and(Vhost::runs)
    }

    /// Whether the kernel may have this pair's rings now.
    fn suits_kernel(&self) -> bool {
        let (Some(_), Some(running)) = (&self.vhost, &self.running) else { return false };
        let shared = &self.shared;
        running.path.suits_kernel()
            && running.is_map_current()
            && self.index < usize::from(shared.pairs.load(Ordering::SeqCst))
            && shared.link_up.load(Ordering::SeqCst)
            && shared.is_tap_filtered()
            && !shared.is_tap_lost()
    }

    /// Sees what changed that the frames to come depend on, and takes the rings from the kernel where it must not go on.
    pub(super) fn follow_path(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) {
        let shared = &self.shared;
        let Some(running) = &mut self.running else { return };
        let purges = shared.purges.load(Ordering::SeqCst);
        if std::mem::replace(&mut self.purges, purges) != purges {
            running.path.purge();
        }
        running.path.follow_offloads(shared.offloads.load(Ordering::SeqCst));
        if self.is_in_kernel() && !self.suits_kernel() {
            self.take_back(counters, tap);
        }
    }

    /// Ends what the kernel does, if it has the rings; our own path goes on.
    pub(super) fn take_back(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) {
        if !self.is_in_kernel() {
            return;
        }
        let (Some(vhost), Some(running)) = (&mut self.vhost, &mut self.running) else { return };
        let stopped = vhost.stop();
        running.pace = Pace::begin(TUNING);
        running.path.end_calls(vhost, counters);
        if let Err(error) = stopped {
            counters.vhost_errors.increment();
            tracing::error!(nic = self.shared.id, queue = self.index, %error, "vhost-net does not stop; this pair does without it from now on");
            self.vhost = None;
        }
        counters.vhost_engaged.set(0);
        counters.vhost_hold.set(0);
        if let Err(error) = running.path.take_back(&running.map, tap, &self.watches) {
            fail(&self.shared, &running.signals, &error);
        }
    }

    /// Gives the rings to the kernel if it may have them.
    pub(super) fn hand_over(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) {
        if self.is_in_kernel() || !self.suits_kernel() {
            return;
        }
        let (Some(vhost), Some(running)) = (&mut self.vhost, &mut self.running) else { return };
        match running.path.hand_over(vhost, &running.map, tap, &self.watches, counters) {
            Ok(()) => {
                running.path.serve_calls(vhost, &running.map, &self.shared.coalescing, counters);
                running.pace.stand_back();
                counters.vhost_engaged.set(1);
            }
            Err(error) => {
                counters.vhost_errors.increment();
                running.path.keep_from_kernel();
                self.shared.vhost_failed(self.index, &error.to_string());
                // What neither starts nor stops ends when it is closed.
                self.vhost.take_if(|vhost| vhost.runs());
            }
        }
    }

    /// Does what there is to do for a pair whose rings the kernel has; says whether there is more to do at once.
    pub(super) fn stand_by(&mut self, counters: &PairCounters) -> bool {
        let (Some(vhost), Some(running)) = (&mut self.vhost, &mut self.running) else { return false };
        let more = running.serve_control(&self.shared);
        // After a command was obeyed that may have changed what is held back.
        running.path.serve_calls(vhost, &running.map, &self.shared.coalescing, counters);
        // A memory map that came this moment is followed in the next turn.
        more | !running.is_map_current()
    }

    /// The kernel met something wrong. Our own path meets it, too, and says what.
    pub(super) fn vhost_error(&mut self, counters: &PairCounters) {
        let (Some(vhost), Some(running)) = (&self.vhost, &mut self.running) else { return };
        if vhost.error.read().is_ok() {
            counters.vhost_errors.increment();
            running.path.keep_from_kernel();
            let reason = "it met a ring that is broken, a buffer that is not guest RAM, or a tap that is gone";
            self.shared.vhost_failed(self.index, reason);
        }
    }
}
