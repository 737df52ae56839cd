//! How frames travel between the rings of a pair and its queue of the tap: our own way (`rx`, `tx`), or the kernel's (`vhost`).
//!
//! Our own is always there. Where the card is to use vhost-net, the kernel has the rings while there is nothing to decide about
//! single frames: the link is up, the pair in use, the tap works and keeps from the guest what its filter refuses, and what the
//! tap held from before is gone. Else our own path has them, going on where the kernel stopped. So a link that is down, stale
//! frames, other offloads, a lost tap and broken rings are dealt with, and counted, in one place, the same for both.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::batch::Batch;
use super::coalescing::{Coalescing, CoalescingTable};
use super::counters::PairCounters;
use super::features;
use super::features::bit;
use super::lane::Lane;
use super::rx::Rx;
use super::tx::Tx;
use super::vhost::Vhost;
use super::watches::{Token, Watches};
use super::worker::Context;
use crate::metrics::Counter;
use crate::pace::Pace;
use crate::pace::moderation::Moderation;
use crate::virtio::StoppedQueue;
use crate::virtio::ring::RingError;

/// Turns that the emptying of a tap of frames from before may take: more frames than a tap's queue commonly holds.
const OLD_TURNS: u32 = 64;

/// The data path of one pair, of which the driver may have enabled one queue only.
pub(super) struct Path {
    rx: Option<Rx>,
    tx: Option<Tx>,
    features: u64,
    /// Turns in which what the tap holds is thrown away.
    purge_turns: u32,
    /// Turns in which each frame of the tap has to be looked at, as it may not fit the driver's offloads.
    sort_turns: u32,
    /// The driver's offloads as they were seen last.
    offloads: u64,
    /// vhost-net could not serve these rings.
    failed: bool,
}

impl Path {
    /// A path that begins with our own. `fresh`: the driver is new, and what the tap holds is not for it.
    pub(super) fn new(rx: Option<Lane>, tx: Option<Lane>, features: u64, offloads: u64, fresh: bool) -> Self {
        let merge = features & bit(features::MRG_RXBUF) != 0;
        Self {
            rx: rx.map(|lane| Rx::new(lane, merge)),
            tx: tx.map(Tx::new),
            features,
            purge_turns: if fresh { OLD_TURNS } else { 0 },
            sort_turns: 0,
            offloads,
            failed: false,
        }
    }

    /// Watches what our own path waits for.
    pub(super) fn watch(&self, watches: &Watches, tap: BorrowedFd<'_>) {
        for (kick, token) in self.kicks() {
            watches.add(kick, token, EventSet::IN);
        }
        watches.add(tap.as_raw_fd(), Token::Tap, EventSet::IN | EventSet::OUT);
    }

    fn unwatch(&self, watches: &Watches, tap: BorrowedFd<'_>) {
        // The transport and the kernel hold the same eventfds: closing ours would not end the watch.
        for (kick, _) in self.kicks() {
            watches.remove(kick);
        }
        watches.remove(tap.as_raw_fd());
    }

    fn kicks(&self) -> impl Iterator<Item = (i32, Token)> {
        let rx = self.rx.as_ref().map(|rx| (rx.lane.kick.as_raw_fd(), Token::RxKick));
        let tx = self.tx.as_ref().map(|tx| (tx.lane.kick.as_raw_fd(), Token::TxKick));
        [rx, tx].into_iter().flatten()
    }

    /// Notes an event of what is watched.
    pub(super) fn mark(&mut self, token: Token, events: EventSet, counters: &PairCounters) {
        let broken = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        match (token, &mut self.rx, &mut self.tx) {
            (Token::Tap, rx, tx) => {
                if let Some(rx) = rx {
                    rx.readable |= broken || events.contains(EventSet::IN);
                }
                if let Some(tx) = tx
                    && (broken || events.contains(EventSet::OUT))
                {
                    tx.blocked = false;
                }
            }
            (Token::RxKick, Some(_), _) => counters.rx_kicks.increment(),
            (Token::TxKick, _, Some(tx)) => {
                counters.tx_kicks.increment();
                tx.pending = true;
            }
            _ => {}
        }
    }

    /// Looks at everything in the next turn, also at a tap that was full.
    pub(super) fn mark_all(&mut self) {
        if let Some(rx) = &mut self.rx {
            rx.readable = true;
        }
        if let Some(tx) = &mut self.tx {
            tx.pending = true;
            tx.blocked = false;
        }
    }

    /// What the tap holds now is not for the driver.
    pub(super) fn purge(&mut self) {
        self.purge_turns = OLD_TURNS;
    }

    /// Follows the driver's offloads: what the tap holds may not fit them.
    pub(super) fn follow_offloads(&mut self, offloads: u64) {
        if std::mem::replace(&mut self.offloads, offloads) != offloads {
            self.sort_turns = OLD_TURNS;
        }
    }

    /// vhost-net cannot serve these rings: our own path has them until the next start, or another tap.
    pub(super) fn keep_from_kernel(&mut self) {
        self.failed = true;
    }

    /// Undoes [`Path::keep_from_kernel`].
    pub(super) fn allow_kernel(&mut self) {
        self.failed = false;
    }

    /// Whether the tap was full when the driver had something to send.
    pub(super) fn is_blocked(&self) -> bool {
        self.tx.as_ref().is_some_and(|tx| tx.blocked)
    }

    /// When a direction goes on that has to wait for its limit.
    pub(super) fn throttled(&self) -> impl Iterator<Item = Instant> {
        let (rx, tx) = (self.rx.as_ref(), self.tx.as_ref());
        [rx.and_then(|rx| rx.throttled), tx.and_then(|tx| tx.throttled)].into_iter().flatten()
    }

    /// When the first interrupt that is held back is due, or frames of the driver have had their time to gather.
    pub(super) fn due(&self) -> Option<Instant> {
        let (rx, tx) = (self.rx.as_ref(), self.tx.as_ref());
        let due = [rx.and_then(|rx| rx.lane.due), tx.and_then(|tx| tx.lane.due), tx.and_then(|tx| tx.gathering)];
        due.into_iter().flatten().min()
    }

    /// Tells the driver at once what it was not told yet.
    pub(super) fn flush(&mut self, memory: &GuestMemoryMmap, counters: &PairCounters) {
        for (lane, interrupts) in self.lanes(counters).into_iter().flatten() {
            // A ring that is not there any more has been told of, or will be when it is worked on.
            let _ = lane.flush(memory, interrupts);
        }
    }

    /// Gives back the buffers that were found in a memory map that is about to go.
    pub(super) fn release(&mut self, counters: &PairCounters) {
        if let Some(rx) = &mut self.rx {
            rx.release(counters);
        }
    }

    /// Does some of what there is to do, in our own way, which is to send only where the pair is not in use: each direction
    /// says whether there is more to do at once. [`Path::rest`] comes next.
    pub(super) fn serve(
        &mut self,
        context: &Context<'_>,
        moderation: &mut Moderation,
        batch: &mut Batch,
    ) -> [Result<bool, RingError>; 2] {
        if !context.in_use {
            return [self.tx.as_mut().map_or(Ok(false), |tx| tx.service(context, moderation, batch)), Ok(false)];
        }
        // First of all, so that what is thrown away cannot be an answer to what the driver sends now.
        if self.purge_turns > 0
            && let Some(rx) = &mut self.rx
        {
            let left = rx.discard(context, &context.counters.rx_drops.stale);
            self.purge_turns = if left { self.purge_turns - 1 } else { 0 };
            if self.purge_turns > 0 {
                return [Ok(true), Ok(false)];
            }
        }
        let sent = self.tx.as_mut().map_or(Ok(false), |tx| tx.service(context, moderation, batch));
        let received = self.rx.as_mut().map_or(Ok(false), |rx| rx.service(context));
        let sorted = self.rx.as_ref().is_none_or(|rx| !rx.readable);
        self.sort_turns = if sorted { 0 } else { self.sort_turns.saturating_sub(1) };
        [sent, received]
    }

    /// After all was done: says whether there is more already.
    pub(super) fn rest(&mut self, context: &Context<'_>, pace: &mut Pace) -> Result<bool, RingError> {
        self.tx.as_mut().map_or(Ok(false), |tx| tx.rest(context, pace))
    }

    /// Whether the kernel may have the rings, as far as this pair is concerned.
    pub(super) fn suits_kernel(&self) -> bool {
        let rings_work = match (&self.rx, &self.tx) {
            (Some(rx), Some(tx)) => rx.is_at_rest() && !tx.is_broken(),
            _ => false,
        };
        rings_work && !self.failed && self.purge_turns == 0 && self.sort_turns == 0 && Vhost::serves(self.features)
    }

    /// Gives the rings to the kernel.
    ///
    /// # Errors
    /// The kernel's answer; our own path goes on then.
    pub(super) fn hand_over(
        &mut self,
        vhost: &mut Vhost,
        memory: &Arc<GuestMemoryMmap>,
        tap: BorrowedFd<'_>,
        watches: &Watches,
        counters: &PairCounters,
    ) -> std::io::Result<()> {
        self.release(counters);
        let (Some(rx), Some(tx)) = (&self.rx, &self.tx) else { return Ok(()) };
        vhost.start(self.features, memory, [&rx.lane, &tx.lane], tap)?;
        rx.lane.ring.give_away();
        tx.lane.ring.give_away();
        self.unwatch(watches, tap);
        Ok(())
    }

    /// Goes on in our own way, after the kernel stopped.
    ///
    /// # Errors
    /// [`RingError`] if a ring is no longer in RAM.
    pub(super) fn take_back(
        &mut self,
        memory: &GuestMemoryMmap,
        tap: BorrowedFd<'_>,
        watches: &Watches,
    ) -> Result<(), RingError> {
        self.watch(watches, tap);
        self.mark_all();
        let rx = self.rx.as_mut().map_or(Ok(()), |rx| rx.lane.ring.resync(memory));
        rx.and(self.tx.as_mut().map_or(Ok(()), |tx| tx.lane.ring.resync(memory)))
    }

    /// Has the kernel interrupt the driver itself where nothing is held back, and does it where it could not, or when it is due.
    pub(super) fn serve_calls(
        &mut self,
        vhost: &mut Vhost,
        memory: &GuestMemoryMmap,
        coalescing: &CoalescingTable,
        counters: &PairCounters,
    ) {
        let now = Instant::now();
        let Vhost { calls, sent, .. } = vhost;
        for (lane, call, interrupts) in self.called(calls, counters) {
            let asked = call.read().is_ok();
            let mut parameters = coalescing.get(lane.index);
            let mut direct = !parameters.holds();
            if lane.sends() {
                sent.follow(asked, now, &lane.ring, memory);
                let mut hold = 0;
                if direct {
                    (parameters, direct) = (sent.coalescing(), sent.are_direct());
                    hold = parameters.max_usecs;
                }
                counters.vhost_hold.set(hold.into());
            }
            lane.set_direct(call, direct);
            lane.pass_on(asked, parameters, now, interrupts);
        }
    }

    /// Interrupts the driver at once where the kernel, which has stopped, wanted it.
    pub(super) fn end_calls(&mut self, vhost: &Vhost, counters: &PairCounters) {
        for (lane, call, interrupts) in self.called(&vhost.calls, counters) {
            lane.set_direct(call, false);
            lane.pass_on(call.read().is_ok(), Coalescing::default(), Instant::now(), interrupts);
        }
    }

    fn called<'a>(
        &'a mut self,
        calls: &'a [Arc<EventFd>; 2],
        counters: &'a PairCounters,
    ) -> impl Iterator<Item = (&'a mut Lane, &'a Arc<EventFd>, &'a Counter)> {
        let lanes = self.lanes(counters).into_iter().zip(calls);
        lanes.filter_map(|(lane, call)| lane.map(|(lane, interrupts)| (lane, call, interrupts)))
    }

    /// Those that the driver has enabled, with what counts their interrupts.
    fn lanes<'a>(&'a mut self, counters: &'a PairCounters) -> [Option<(&'a mut Lane, &'a Counter)>; 2] {
        let rx = self.rx.as_mut().map(|rx| (&mut rx.lane, &counters.rx_interrupts));
        let tx = self.tx.as_mut().map(|tx| (&mut tx.lane, &counters.tx_interrupts));
        [rx, tx]
    }

    /// Stops our own path; gives the queues' positions, to go on from later.
    pub(super) fn stop(self, watches: &Watches, tap: BorrowedFd<'_>, counters: &PairCounters) -> Vec<StoppedQueue> {
        self.unwatch(watches, tap);
        let rx = self.rx.map(|rx| rx.stop(counters));
        rx.into_iter().chain(self.tx.map(|tx| tx.lane.stop())).collect()
    }
}
