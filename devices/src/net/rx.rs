//! Reception: from the tap straight into the driver's buffers, one `readv` per frame and no copy.
//!
//! Chains are taken ahead and laid out as segments until the largest frame fits, and stay laid out until frames fill them. Where
//! frames were small of late, the kernel is given room for a small one only: it looks at all the room for each.
//! A frame that is larger than what the driver has given so far spills into a buffer of ours and is completed when more
//! buffers come, so that neither small rings nor scarce buffers stall reception or lose frames.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::counters::PairCounters;
use super::filter::LOOKED_AT;
use super::lane::Lane;
use super::steering::flow;
use super::sys::{MAX_SEGMENTS, Segments};
use super::tap::{HASH_HEADER_SIZE, HEADER_SIZE};
use super::worker::Context;
use super::{ETHERNET, MAX_FRAME, features};
use crate::limiter::THROTTLE_SLICE;
use crate::metrics::Counter;
use crate::virtio::StoppedQueue;
use crate::virtio::ring::{Chain, RingError};

/// Frames and bytes per turn: see `tx`.
const TURN_FRAMES: u32 = 64;
const TURN_BYTES: usize = 256 << 10;
/// Chains that are looked at per turn.
const TURN_CHAINS: u32 = 1024;
/// What is not larger, with its header, is small: a frame of the usual MTU, 1500.
const SMALL: usize = HEADER_SIZE + ETHERNET + 1500;
/// So many small frames in a row, and the next is likely to be one.
const RUN: u32 = 16;
/// Segments of guest RAM per `readv`; one more is for the spill.
const SEGMENTS: usize = MAX_SEGMENTS - 1;
/// Offset of `num_buffers` in the header (virtio 1.2 §5.1.6); the fields of hashes follow it.
const NUM_BUFFERS: usize = 10;

/// A chain that was taken and waits for a frame.
struct Held {
    head: u16,
    segments: usize,
    bytes: usize,
}

/// A frame that did not fit: the first `placed` bytes are in the held chains, the rest in the spill.
#[derive(Clone, Copy)]
struct Spilled {
    total: usize,
    placed: usize,
}

/// One receive queue.
pub(super) struct Rx {
    pub(super) lane: Lane,
    /// Whether a frame may span chains (VIRTIO_NET_F_MRG_RXBUF).
    merge: bool,
    chain: Chain,
    held: VecDeque<Held>,
    segments: Segments,
    /// Where the segments lie in guest RAM, one for one.
    places: Vec<(u64, usize)>,
    /// Bytes of all held chains.
    capacity: usize,
    spill: Box<[u8]>,
    spilled: Option<Spilled>,
    /// Small frames since the last large one.
    small: u32,
    /// There may be frames in the tap.
    pub(super) readable: bool,
    /// Frames have to wait for the driver's limit until then.
    pub(super) throttled: Option<Instant>,
    starved: bool,
    broken: bool,
}

/// Whether there is room for a frame.
enum Room {
    Ready,
    /// The driver has given no more.
    None,
    /// The driver gives so many useless chains that others must have their turn.
    Later,
}

impl Rx {
    pub(super) fn new(lane: Lane, merge: bool) -> Self {
        Self {
            chain: Chain::with_capacity(lane.ring.chain_limit().into()),
            held: VecDeque::with_capacity(lane.ring.size().into()),
            lane,
            merge,
            segments: Segments::with_capacity(2 * MAX_SEGMENTS),
            places: Vec::with_capacity(2 * MAX_SEGMENTS),
            capacity: 0,
            spill: vec![0; HASH_HEADER_SIZE + MAX_FRAME].into_boxed_slice(),
            spilled: None,
            small: 0,
            readable: true,
            throttled: None,
            starved: false,
            broken: false,
        }
    }

    /// Delivers what the tap has, up to the limits of a turn; says whether there is more to do at once.
    pub(super) fn service(&mut self, context: &Context<'_>) -> Result<bool, RingError> {
        self.throttled = None;
        if self.broken {
            return Ok(false);
        }
        let result = self.receive(context);
        let settled = context.settle(&mut self.lane, &context.counters.rx_interrupts, result.is_err());
        let result = result.and_then(|more| settled.map(|()| more));
        self.broken = result.is_err();
        result
    }

    fn receive(&mut self, context: &Context<'_>) -> Result<bool, RingError> {
        if !(self.readable || self.spilled.is_some()) {
            return Ok(false);
        }
        if !context.link_up {
            return Ok(self.discard(context, &context.counters.rx_drops.link_down));
        }
        self.lane.ring.disable_kicks(context.memory)?;
        let (mut frames, mut bytes, mut chains) = (0, 0, TURN_CHAINS);
        while frames < TURN_FRAMES && bytes < TURN_BYTES {
            match self.make_room(context, &mut chains)? {
                Room::Ready => self.starved = false,
                Room::Later => return Ok(true),
                Room::None => {
                    // The driver may wait for the frames so far before it gives more buffers.
                    self.lane.flush(context.memory, &context.counters.rx_interrupts)?;
                    if self.lane.ring.enable_kicks(context.memory)? {
                        self.lane.ring.disable_kicks(context.memory)?;
                        frames += 1;
                        continue;
                    }
                    if !std::mem::replace(&mut self.starved, true) {
                        context.counters.rx_starved.increment();
                    }
                    return Ok(false);
                }
            }
            let total = match self.spilled.take() {
                Some(spilled) => {
                    self.unspill(context.memory, spilled)?;
                    spilled.total
                }
                None => match self.read_within_limits(context) {
                    Some(total) => total,
                    None => return Ok(false),
                },
            };
            frames += 1;
            bytes += total;
            if self.spilled.is_none() {
                self.deliver(context, total)?;
            }
        }
        Ok(true)
    }

    /// Takes chains until the next frame fits, whatever its size, or there are no more.
    fn make_room(&mut self, context: &Context<'_>, chains: &mut u32) -> Result<Room, RingError> {
        let needed = self.spilled.map(|spilled| spilled.total);
        let wanted = needed.unwrap_or(self.likely(context));
        let enough = |this: &Self| {
            this.segments.len() >= SEGMENTS || if this.merge { this.capacity >= wanted } else { !this.held.is_empty() }
        };
        while !enough(self) {
            let Some(left) = chains.checked_sub(1) else { return Ok(Room::Later) };
            *chains = left;
            let Some(head) = self.lane.ring.next_head(context.memory)? else { break };
            self.hold(context, head)?;
        }
        let Some(needed) = needed else {
            return Ok(if self.held.is_empty() { Room::None } else { Room::Ready });
        };
        if self.capacity >= needed {
            return Ok(Room::Ready);
        }
        if self.held.len() < usize::from(self.lane.ring.size()) && self.segments.len() < SEGMENTS {
            return Ok(Room::None);
        }
        // The driver has given all it has, and it is not enough.
        self.spilled = None;
        context.counters.rx_drops.oversize.increment();
        Ok(Room::Ready)
    }

    /// Lays a chain out. One that no frame can begin in goes back unused.
    fn hold(&mut self, context: &Context<'_>, head: u16) -> Result<(), RingError> {
        self.lane.ring.walk(context.memory, head, &mut self.chain)?;
        let before = self.segments.len();
        let mut bytes = 0usize;
        let places = &mut self.places;
        for piece in self.chain.writable() {
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            bytes = bytes.saturating_add(length);
            let mut next = piece.address;
            self.segments.push(context.memory, head, piece.address, length, |length| {
                places.push((next, length));
                next = next.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
            })?;
        }
        let count = self.segments.len() - before;
        if self.chain.readable().is_empty() && bytes >= context.header && count <= SEGMENTS {
            self.held.push_back(Held { head, segments: count, bytes });
            self.capacity = self.capacity.saturating_add(bytes);
            return Ok(());
        }
        self.segments.truncate(before);
        self.places.truncate(before);
        context.counters.rx_drops.bad_buffer.increment();
        self.lane.ring.put_used(context.memory, head, 0)
    }

    fn read_within_limits(&mut self, context: &Context<'_>) -> Option<usize> {
        if let Some(pause) = context.shared.rx_limiter.wait(context.now) {
            context.counters.rx_throttled.increment();
            self.throttled = Some(context.now + pause.min(THROTTLE_SLICE));
            return None;
        }
        let total = self.read(context)?;
        let bytes = u64::try_from(total.saturating_sub(context.header)).unwrap_or(u64::MAX);
        context.shared.rx_limiter.charge(bytes, context.now);
        Some(total)
    }

    /// The most bytes that the next frame is likely to have, with its header.
    fn likely(&self, context: &Context<'_>) -> usize {
        if self.small >= RUN { SMALL.min(context.largest_frame) } else { context.largest_frame }
    }

    /// How many segments are for a frame of so many bytes at most, and their bytes: whole chains, the first one in any case.
    /// Where no frame may span chains, one at a time is held.
    fn room(&self, likely: usize) -> (usize, usize) {
        let (mut segments, mut bytes) = (0, 0usize);
        for held in &self.held {
            if segments > 0 && (bytes >= likely || segments + held.segments > SEGMENTS) {
                break;
            }
            segments += held.segments;
            bytes = bytes.saturating_add(held.bytes);
        }
        (segments, bytes)
    }

    /// Reads a frame into the held chains. `None` if there is none now.
    fn read(&mut self, context: &Context<'_>) -> Option<usize> {
        let (count, placed) = self.room(self.likely(context));
        let total = self.read_into(context, count)?;
        self.small = if total > SMALL { 0 } else { self.small.saturating_add(1) };
        if total < context.header {
            // No tap does this.
            context.counters.rx_drops.tap_error.increment();
            self.readable = false;
            return None;
        }
        if total > placed {
            if self.merge {
                self.spilled = Some(Spilled { total, placed });
            } else {
                context.counters.rx_drops.oversize.increment();
                return Some(0);
            }
        }
        Some(total)
    }

    fn read_into(&mut self, context: &Context<'_>, count: usize) -> Option<usize> {
        loop {
            let error = match self.segments.read_from(context.tap, count, &mut self.spill) {
                Ok(total) => {
                    context.shared.tap_works();
                    return Some(total);
                }
                Err(error) => error,
            };
            match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock => {}
                _ => {
                    context.counters.rx_drops.tap_error.increment();
                    if super::is_tap_failure(&error) {
                        context.shared.tap_failed("receive", &error);
                    }
                }
            }
            // After an error too: the next frame, or the tap's end, wakes us.
            self.readable = false;
            return None;
        }
    }

    /// Brings the rest of a frame to where it belongs.
    fn unspill(&mut self, memory: &GuestMemoryMmap, spilled: Spilled) -> Result<(), RingError> {
        let rest = self.spill.get(..spilled.total - spilled.placed).unwrap_or_default();
        write_at(&self.places, memory, spilled.placed, rest)
    }

    /// Completes the header of the frame in the first held chains and gives them to the driver.
    fn deliver(&mut self, context: &Context<'_>, total: usize) -> Result<(), RingError> {
        if total < context.header {
            return Ok(());
        }
        let mut head = [0; HASH_HEADER_SIZE + flow::LOOKED_AT];
        let looked_at = if context.hasher.is_some() { flow::LOOKED_AT } else { LOOKED_AT };
        let known = head.get_mut(..total.min(context.header + looked_at)).unwrap_or_default();
        let length = known.len();
        read_at(&self.places, context.memory, 0, known)?;
        let [flags, gso_type, ..] = head;
        let frame = head.get(context.header..).unwrap_or_default();
        if !features::takes(context.offloads, flags, gso_type) {
            context.counters.rx_drops.offload.increment();
            return Ok(());
        }
        if !frame.first_chunk().is_some_and(|start| context.filter.accepts(start)) {
            context.counters.rx_drops.filtered.increment();
            return Ok(());
        }
        let (mut chains, mut room) = (0u16, 0usize);
        for held in &self.held {
            room = room.saturating_add(held.bytes);
            chains = chains.saturating_add(1);
            if room >= total {
                break;
            }
        }
        let frame = head.get(context.header..length).unwrap_or_default();
        let (hash, report) = context.hasher.map_or((0, 0), |hasher| hasher.report(frame));
        let [n0, n1] = chains.to_le_bytes();
        let [h0, h1, h2, h3] = hash.to_le_bytes();
        let [r0, r1] = report.to_le_bytes();
        // The tap leaves these fields as they were (§5.1.6.4.1: one buffer without MRG_RXBUF). The last two bytes are padding.
        let rest = [n0, n1, h0, h1, h2, h3, r0, r1, 0, 0];
        let rest = rest.get(..context.header - NUM_BUFFERS).unwrap_or_default();
        write_at(&self.places, context.memory, NUM_BUFFERS, rest)?;
        let (mut left, mut segments) = (total, 0);
        for held in self.held.drain(..usize::from(chains)) {
            let used = left.min(held.bytes);
            left -= used;
            segments += held.segments;
            self.capacity = self.capacity.saturating_sub(held.bytes);
            self.lane.ring.put_used(context.memory, held.head, u32::try_from(used).unwrap_or(u32::MAX))?;
        }
        self.lane.count_frame();
        self.segments.remove_front(segments);
        self.places.drain(..segments);
        context.counters.rx_packets.increment();
        context.counters.rx_bytes.add(u64::try_from(total - context.header).unwrap_or(0));
        Ok(())
    }

    /// Empties the tap without delivering, for one turn; says whether there may be more.
    pub(super) fn discard(&mut self, context: &Context<'_>, counter: &Counter) -> bool {
        if self.spilled.take().is_some() {
            counter.increment();
        }
        for _ in 0..TURN_FRAMES {
            if !self.readable {
                return false;
            }
            if self.read_into(context, 0).is_some() {
                counter.increment();
            }
        }
        true
    }

    /// Whether it works, and no frame is cut in two.
    pub(super) fn is_at_rest(&self) -> bool {
        !self.broken && self.spilled.is_none()
    }

    /// Gives the held chains back to the ring. Done before the memory map changes, and to stop.
    pub(super) fn release(&mut self, counters: &PairCounters) {
        if self.spilled.take().is_some() {
            counters.rx_drops.stale.increment();
        }
        self.lane.ring.rewind(u16::try_from(self.held.len()).unwrap_or(0));
        self.held.clear();
        self.segments.clear();
        self.places.clear();
        self.capacity = 0;
    }

    /// The queue's positions, to go on from later.
    pub(super) fn stop(mut self, counters: &PairCounters) -> StoppedQueue {
        self.release(counters);
        self.lane.stop()
    }
}

/// Calls `visit` for the parts of `length` bytes from byte `offset` of the segments on: place, and range within the bytes.
fn parts(
    places: &[(u64, usize)],
    mut offset: usize,
    length: usize,
    mut visit: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), RingError>,
) -> Result<(), RingError> {
    let mut done = 0;
    for (address, size) in places {
        if done == length {
            break;
        }
        if offset >= *size {
            offset -= *size;
            continue;
        }
        let count = (*size - offset).min(length - done);
        let start = GuestAddress(address.saturating_add(u64::try_from(offset).unwrap_or(u64::MAX)));
        visit(start, done..done + count)?;
        done += count;
        offset = 0;
    }
    Ok(())
}

fn write_at(places: &[(u64, usize)], memory: &GuestMemoryMmap, offset: usize, data: &[u8]) -> Result<(), RingError> {
    parts(places, offset, data.len(), |address, range| {
        let part = data.get(range).unwrap_or_default();
        memory.write_slice(part, address).map_err(|_| RingError::Unmapped { head: 0, address: address.0 })
    })
}

fn read_at(places: &[(u64, usize)], memory: &GuestMemoryMmap, offset: usize, data: &mut [u8]) -> Result<(), RingError> {
    parts(places, offset, data.len(), |address, range| {
        let part = data.get_mut(range).unwrap_or_default();
        memory.read_slice(part, address).map_err(|_| RingError::Unmapped { head: 0, address: address.0 })
    })
}
