//! Transmission: from the driver's buffers straight to the tap, one `writev` per frame and no copy.

use std::io;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::lane::Lane;
use super::sys::{MAX_SEGMENTS, Segments};
use super::tap::HASH_HEADER_SIZE;
use super::worker::Context;
use super::{MAX_FRAME, MIN_FRAME};
use crate::limiter::THROTTLE_SLICE;
use crate::pace::moderation::{Level, Moderation};
use crate::pace::{self, Pace};
use crate::virtio::ring::{Chain, RingError};

/// Chains and bytes per turn, so that receiving, commands and the driver's view of the ring are not kept waiting.
const TURN_CHAINS: u32 = 64;
const TURN_BYTES: usize = 256 << 10;

/// The two addresses.
const ADDRESSES: usize = 12;
/// The longest header of virtio, and the addresses.
const START: usize = HASH_HEADER_SIZE + ADDRESSES;

/// One transmit queue.
pub(super) struct Tx {
    pub(super) lane: Lane,
    chain: Chain,
    segments: Segments,
    /// The header and the addresses of the frame, where the driver cannot change them after they were looked at.
    start: Box<[u8; START]>,
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

/// What became of one chain.
enum Sent {
    Done(usize),
    Dropped,
    TapFull,
}

impl Tx {
    pub(super) fn new(lane: Lane) -> Self {
        Self {
            chain: Chain::with_capacity(lane.ring.chain_limit().into()),
            lane,
            // One more for the start of the frame.
            segments: Segments::with_capacity(MAX_SEGMENTS + 1),
            start: Box::new([0; START]),
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
    pub(super) fn service(&mut self, context: &Context<'_>, moderation: &mut Moderation) -> Result<bool, RingError> {
        self.throttled = None;
        if self.broken {
            return Ok(false);
        }
        let result = self.turn(context, moderation);
        let settled = context.settle(&mut self.lane, &context.counters.tx_interrupts, result.is_err());
        let result = result.and_then(|more| settled.map(|()| more));
        self.broken = result.is_err();
        result
    }

    fn turn(&mut self, context: &Context<'_>, moderation: &mut Moderation) -> Result<bool, RingError> {
        if !self.pending || self.blocked || self.gather(context, moderation)? {
            return Ok(false);
        }
        self.lane.ring.disable_kicks(context.memory)?;
        let (mut chains, mut bytes) = (0, 0);
        while chains < TURN_CHAINS && bytes < TURN_BYTES {
            chains += 1;
            if let Some(pause) = context.shared.tx_limiter.wait(context.now) {
                context.counters.tx_throttled.increment();
                self.throttled = Some(context.now + pause.min(THROTTLE_SLICE));
                return Ok(false);
            }
            let Some(head) = self.lane.ring.next_head(context.memory)? else {
                self.drained = true;
                return Ok(false);
            };
            match self.send(context, head)? {
                Sent::TapFull => {
                    self.lane.ring.rewind(1);
                    context.counters.tx_tap_full.increment();
                    if context.in_use {
                        self.blocked = true;
                    } else {
                        // It is another pair that is told when that queue of the tap has room.
                        self.throttled = Some(context.now + THROTTLE_SLICE);
                    }
                    return Ok(false);
                }
                Sent::Dropped => {}
                Sent::Done(length) => {
                    bytes += length;
                    context.shared.tx_limiter.charge(u64::try_from(length).unwrap_or(u64::MAX), context.now);
                    context.counters.tx_packets.increment();
                    context.counters.tx_bytes.add(u64::try_from(length).unwrap_or(0));
                }
            }
            self.lane.count_frame();
            self.lane.ring.put_used(context.memory, head, 0)?;
        }
        Ok(true)
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

    fn send(&mut self, context: &Context<'_>, head: u16) -> Result<Sent, RingError> {
        let drops = &context.counters.tx_drops;
        self.lane.ring.walk(context.memory, head, &mut self.chain)?;
        self.segments.clear();
        let (smallest, largest) = (context.header + MIN_FRAME, context.header + MAX_FRAME);
        let mut total = 0usize;
        for piece in self.chain.readable() {
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            total = total.saturating_add(length);
            // What is too large is dropped: where the rest of it lies does not matter.
            if total <= largest {
                self.segments.push(context.memory, head, piece.address, length, |_| ())?;
            }
        }
        if !self.chain.writable().is_empty() || total < smallest || self.segments.len() > MAX_SEGMENTS {
            drops.malformed.increment();
            return Ok(Sent::Dropped);
        }
        if total > largest {
            drops.oversize.increment();
            return Ok(Sent::Dropped);
        }
        if !context.link_up {
            drops.link_down.increment();
            return Ok(Sent::Dropped);
        }
        if context.shared.antispoof && !self.is_own(context, head)? {
            drops.spoofed.increment();
            return Ok(Sent::Dropped);
        }
        if self.segments.len() > MAX_SEGMENTS {
            // The start of the frame needed one more.
            drops.malformed.increment();
            return Ok(Sent::Dropped);
        }
        Ok(self.write(context, total))
    }

    /// Whether the frame goes out under the card's own address, which is made sure of.
    fn is_own(&mut self, context: &Context<'_>, head: u16) -> Result<bool, RingError> {
        let start = self.start.get_mut(..context.header + ADDRESSES).unwrap_or_default();
        let mut left = &mut *start;
        for piece in self.chain.readable() {
            let length = left.len().min(usize::try_from(piece.length).unwrap_or(usize::MAX));
            let (now, later) = left.split_at_mut(length);
            let unmapped = RingError::Unmapped { head, address: piece.address };
            context.memory.read_slice(now, GuestAddress(piece.address)).map_err(|_| unmapped)?;
            left = later;
        }
        let is_own = start.last_chunk() == Some(&context.shared.mac);
        self.segments.replace_start(start);
        Ok(is_own)
    }

    fn write(&self, context: &Context<'_>, total: usize) -> Sent {
        let drops = &context.counters.tx_drops;
        loop {
            let Err(error) = self.segments.write_to(context.tap) else {
                context.shared.tap_works();
                return Sent::Done(total - context.header);
            };
            match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock => return Sent::TapFull,
                _ => {}
            }
            if super::is_tap_failure(&error) {
                drops.tap_error.increment();
                context.shared.tap_failed("send", &error);
            } else {
                drops.refused.increment();
            }
            return Sent::Dropped;
        }
    }
}
