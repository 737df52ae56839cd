//! Transmission: from the driver's buffers straight to the tap, without a copy.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::batch::{ADDRESSES, Batch, Fate};
use super::lane::Lane;
use super::sys::MAX_SEGMENTS;
use super::worker::Context;
use super::{MAX_FRAME, MIN_FRAME};
use crate::limiter::THROTTLE_SLICE;
use crate::metrics::Counter;
use crate::pace::moderation::{Level, Moderation};
use crate::pace::{self, Pace};
use crate::virtio::ring::{Chain, RingError};

/// Chains and bytes per turn, so that receiving, commands and the driver's view of the ring are not kept waiting.
const TURN_CHAINS: u32 = 64;
const TURN_BYTES: usize = 256 << 10;

/// One transmit queue.
pub(super) struct Tx {
    pub(super) lane: Lane,
    chain: Chain,
    /// There may be chains in the ring.
    pub(super) pending: bool,
    /// The ring was seen empty, and kicks are not asked for yet.
    drained: bool,
    /// Chains are given until then to gather.
    pub(super) gathering: Option<Instant>,
    /// The driver has to wait for its limit until then.
    pub(super) throttled: Option<Instant>,
    /// The tap is full: nothing to do until it is writable.
    pub(super) blocked: bool,
    broken: bool,
}

/// What is left of the limits of a turn.
struct Left {
    chains: u32,
    bytes: usize,
}

/// Why no more frames are added to a batch.
enum End<'a> {
    /// The limits of the turn.
    Turn,
    /// The batch is full.
    Batch,
    /// The ring is empty.
    Ring,
    /// The driver's limit.
    Throttled(Duration),
    /// This chain is not to be sent, which is counted there.
    Refused(u16, &'a Counter),
}

impl Tx {
    pub(super) fn new(lane: Lane) -> Self {
        Self {
            chain: Chain::with_capacity(lane.ring.chain_limit().into()),
            lane,
            pending: true,
            drained: false,
            gathering: None,
            throttled: None,
            blocked: false,
            broken: false,
        }
    }

    /// Whether the driver broke the ring.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Sends what the driver has queued, up to the limits of a turn; says whether there is more to do at once. Once the ring is
    /// empty, [`Tx::rest`] comes next.
    pub(super) fn service(
        &mut self,
        context: &Context<'_>,
        moderation: &mut Moderation,
        batch: &mut Batch,
    ) -> Result<bool, RingError> {
        self.throttled = None;
        if self.broken {
            return Ok(false);
        }
        let result = self.turn(context, moderation, batch);
        let settled = context.settle(&mut self.lane, &context.counters.tx_interrupts, result.is_err());
        let result = result.and_then(|more| settled.map(|()| more));
        self.broken = result.is_err();
        result
    }

    fn turn(
        &mut self,
        context: &Context<'_>,
        moderation: &mut Moderation,
        batch: &mut Batch,
    ) -> Result<bool, RingError> {
        if !self.pending || self.blocked || self.gather(context, moderation)? {
            return Ok(false);
        }
        self.lane.ring.disable_kicks(context.memory)?;
        let mut left = Left { chains: TURN_CHAINS, bytes: TURN_BYTES };
        loop {
            // Frames before a broken chain are sent all the same.
            let end = self.fill(context, batch, &mut left);
            batch.send(context.tap, context.in_use);
            let waiting = self.account(context, batch)?;
            let end = end?;
            if waiting > 0 {
                self.lane.ring.rewind(waiting + u16::from(matches!(end, End::Refused(..))));
                self.tap_is_full(context);
                return Ok(false);
            }
            match end {
                End::Turn => return Ok(true),
                End::Batch => {}
                End::Ring => {
                    self.drained = true;
                    return Ok(false);
                }
                End::Throttled(pause) => {
                    context.counters.tx_throttled.increment();
                    self.throttled = Some(context.now + pause.min(THROTTLE_SLICE));
                    return Ok(false);
                }
                End::Refused(head, counter) => {
                    counter.increment();
                    self.use_up(context, head)?;
                }
            }
        }
    }

    /// Puts frames into the batch.
    fn fill<'a>(&mut self, context: &Context<'a>, batch: &mut Batch, left: &mut Left) -> Result<End<'a>, RingError> {
        batch.clear();
        let limiter = &context.shared.tx_limiter;
        loop {
            if left.chains == 0 || left.bytes == 0 {
                return Ok(End::Turn);
            }
            // Where there is a limit, it is for each frame to say whether the next may go.
            if !batch.has_room() || (limiter.is_on() && !batch.frames().is_empty()) {
                return Ok(End::Batch);
            }
            if let Some(pause) = limiter.wait(context.now) {
                return Ok(End::Throttled(pause));
            }
            let Some(head) = self.lane.ring.next_head(context.memory)? else { return Ok(End::Ring) };
            left.chains -= 1;
            match self.lay_out(context, batch, head) {
                Ok(Ok(length)) => {
                    batch.add(head, length);
                    left.bytes = left.bytes.saturating_sub(length);
                }
                Ok(Err(counter)) => {
                    batch.abandon();
                    return Ok(End::Refused(head, counter));
                }
                Err(error) => {
                    batch.abandon();
                    return Err(error);
                }
            }
        }
    }

    /// Counts what was sent, and gives it back to the driver; says how many of the last frames wait for the tap.
    fn account(&mut self, context: &Context<'_>, batch: &Batch) -> Result<u16, RingError> {
        let (counters, drops) = (context.counters, &context.counters.tx_drops);
        let waiting = batch.frames().iter().rev().take_while(|frame| matches!(frame.fate(), Fate::Waits)).count();
        let tried = batch.frames().len() - waiting;
        for frame in batch.frames().iter().take(tried) {
            let length = u64::try_from(frame.length).unwrap_or(u64::MAX);
            match frame.fate() {
                Fate::Sent => {
                    context.shared.tx_limiter.charge(length, context.now);
                    counters.tx_packets.increment();
                    counters.tx_bytes.add(length);
                    context.shared.tap_works();
                }
                Fate::Failed(error) if super::is_tap_failure(&error) => {
                    drops.tap_error.increment();
                    context.shared.tap_failed("send", &error);
                }
                // One that waits before others that were sent would come too late.
                Fate::Failed(_) | Fate::Waits => drops.refused.increment(),
            }
            self.use_up(context, frame.head)?;
        }
        Ok(u16::try_from(waiting).unwrap_or(u16::MAX))
    }

    fn use_up(&mut self, context: &Context<'_>, head: u16) -> Result<(), RingError> {
        self.lane.count_frame();
        self.lane.ring.put_used(context.memory, head, 0)
    }

    fn tap_is_full(&mut self, context: &Context<'_>) {
        context.counters.tx_tap_full.increment();
        if context.in_use {
            self.blocked = true;
        } else {
            // It is another pair that is told when that queue of the tap has room.
            self.throttled = Some(context.now + THROTTLE_SLICE);
        }
    }

    /// Whether chains are still to gather; the driver kicks sooner if they have.
    fn gather(&mut self, context: &Context<'_>, moderation: &mut Moderation) -> Result<bool, RingError> {
        self.gathering = None;
        let Level { goal, .. } = moderation.level();
        if goal == 1 {
            return Ok(false);
        }
        let waiting = self.lane.ring.waiting(context.memory)?;
        let Some(rest) = moderation.rest(waiting, 0, context.now) else { return Ok(false) };
        if self.lane.ring.kick_after(context.memory, goal)? {
            return Ok(false);
        }
        self.gathering = Some(context.now + rest);
        Ok(true)
    }

    /// After all was sent: has more frames gather, or looks for some as long as that pays, then asks for kicks; says whether
    /// there is more to do at once.
    pub(super) fn rest(&mut self, context: &Context<'_>, pace: &mut Pace) -> Result<bool, RingError> {
        if self.broken || !std::mem::take(&mut self.drained) {
            return Ok(false);
        }
        let result = self.ask_for_more(context, pace);
        self.broken = result.is_err();
        result
    }

    fn ask_for_more(&mut self, context: &Context<'_>, pace: &mut Pace) -> Result<bool, RingError> {
        if self.gather(context, &mut pace.moderation)? {
            return Ok(false);
        }
        let window = pace.polling.window();
        pace.settled = Instant::now();
        if !window.is_zero() {
            if pace::look(window, || self.lane.ring.is_available(context.memory)) {
                context.counters.tx_polled.increment();
                return Ok(true);
            }
            pace.polling.waited(window, false);
        }
        self.pending = self.lane.ring.enable_kicks(context.memory)?;
        Ok(self.pending)
    }

    /// Lays a frame out; gives its length without the header, or where it is counted that it is not to be sent.
    fn lay_out<'a>(
        &mut self,
        context: &Context<'a>,
        batch: &mut Batch,
        head: u16,
    ) -> Result<Result<usize, &'a Counter>, RingError> {
        let drops = &context.counters.tx_drops;
        self.lane.ring.walk(context.memory, head, &mut self.chain)?;
        let (smallest, largest) = (context.header + MIN_FRAME, context.header + MAX_FRAME);
        let mut total = 0usize;
        for piece in self.chain.readable() {
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            total = total.saturating_add(length);
            // What is too large is dropped: where the rest of it lies does not matter.
            if total <= largest {
                batch.segments().push(context.memory, head, piece.address, length, |_| ())?;
            }
        }
        if !self.chain.writable().is_empty() || total < smallest || batch.begun() > MAX_SEGMENTS {
            return Ok(Err(&drops.malformed));
        }
        if total > largest {
            return Ok(Err(&drops.oversize));
        }
        if !context.link_up {
            return Ok(Err(&drops.link_down));
        }
        if context.shared.antispoof && !self.is_own(context, batch, head)? {
            return Ok(Err(&drops.spoofed));
        }
        // The start of the frame may have needed one more.
        if batch.begun() > MAX_SEGMENTS {
            return Ok(Err(&drops.malformed));
        }
        Ok(Ok(total - context.header))
    }

    /// Whether the frame goes out under the card's own address, which is made sure of.
    fn is_own(&self, context: &Context<'_>, batch: &mut Batch, head: u16) -> Result<bool, RingError> {
        let length = context.header + ADDRESSES;
        let start = batch.start(length);
        let mut left = &mut *start;
        for piece in self.chain.readable() {
            let length = left.len().min(usize::try_from(piece.length).unwrap_or(usize::MAX));
            let (now, later) = left.split_at_mut(length);
            let unmapped = RingError::Unmapped { head, address: piece.address };
            context.memory.read_slice(now, GuestAddress(piece.address)).map_err(|_| unmapped)?;
            left = later;
        }
        let is_own = start.last_chunk() == Some(&context.shared.mac);
        batch.replace_start(length);
        Ok(is_own)
    }
}
