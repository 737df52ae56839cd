//! Transmission: from the driver's buffers straight to the tap, one `writev` per frame and no copy.

use std::io;

use super::lane::Lane;
use super::sys::{MAX_SEGMENTS, Segments};
use super::worker::Context;
use super::{MAX_FRAME, MIN_FRAME};
use crate::virtio::ring::{Chain, RingError};

/// Chains and bytes per turn, so that receiving, commands and the driver's view of the ring are not kept waiting.
const TURN_CHAINS: u32 = 64;
const TURN_BYTES: usize = 256 << 10;

/// One transmit queue.
pub(super) struct Tx {
    pub(super) lane: Lane,
    chain: Chain,
    segments: Segments,
    /// There may be chains in the ring.
    pub(super) pending: bool,
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
            segments: Segments::with_capacity(MAX_SEGMENTS),
            pending: true,
            blocked: false,
            broken: false,
        }
    }

    /// Sends what the driver has queued, up to the limits of a turn; says whether there is more to do at once.
    pub(super) fn service(&mut self, context: &Context<'_>) -> Result<bool, RingError> {
        if !self.pending || self.blocked || self.broken {
            return Ok(false);
        }
        let result = self.lane.ring.disable_kicks(context.memory).and_then(|()| self.turn(context));
        // What was done before a broken chain is done.
        let flushed = self.lane.flush(context.memory, &context.counters.tx_interrupts);
        let result = result.and_then(|more| flushed.map(|()| more));
        self.broken = result.is_err();
        result
    }

    fn turn(&mut self, context: &Context<'_>) -> Result<bool, RingError> {
        let (mut chains, mut bytes) = (0, 0);
        while chains < TURN_CHAINS && bytes < TURN_BYTES {
            chains += 1;
            let Some(head) = self.lane.ring.next_head(context.memory)? else {
                if self.lane.ring.enable_kicks(context.memory)? {
                    self.lane.ring.disable_kicks(context.memory)?;
                    continue;
                }
                self.pending = false;
                return Ok(false);
            };
            match self.send(context, head)? {
                Sent::TapFull => {
                    self.lane.ring.rewind(1);
                    self.blocked = true;
                    context.counters.tx_tap_full.increment();
                    return Ok(false);
                }
                Sent::Dropped => {}
                Sent::Done(length) => {
                    bytes += length;
                    context.counters.tx_packets.increment();
                    context.counters.tx_bytes.add(u64::try_from(length).unwrap_or(0));
                }
            }
            self.lane.ring.put_used(context.memory, head, 0)?;
        }
        Ok(true)
    }

    fn send(&mut self, context: &Context<'_>, head: u16) -> Result<Sent, RingError> {
        let drops = &context.counters.tx_drops;
        self.lane.ring.walk(context.memory, head, &mut self.chain)?;
        self.segments.clear();
        let mut total = 0usize;
        for piece in self.chain.readable() {
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            total = total.saturating_add(length);
            // What is too large is dropped: where the rest of it lies does not matter.
            if total <= MAX_FRAME {
                self.segments.push(context.memory, head, piece.address, length, |_| ())?;
            }
        }
        if !self.chain.writable().is_empty() || total < MIN_FRAME || self.segments.len() > MAX_SEGMENTS {
            drops.malformed.increment();
            return Ok(Sent::Dropped);
        }
        if total > MAX_FRAME {
            drops.oversize.increment();
            return Ok(Sent::Dropped);
        }
        if !context.link_up {
            drops.link_down.increment();
            return Ok(Sent::Dropped);
        }
        Ok(self.write(context, total))
    }

    fn write(&self, context: &Context<'_>, total: usize) -> Sent {
        let drops = &context.counters.tx_drops;
        loop {
            let Err(error) = self.segments.write_to(context.tap) else {
                context.shared.tap_works();
                return Sent::Done(total - super::tap::HEADER_SIZE);
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
