//! When a driver whose rings the kernel has is interrupted for what it sent.
//!
//! Who sends many small frames does not wait for each, and interrupts for a few of them cost more than they do, so they are held
//! back. Who sends large ones waits for them (Linux' small queues), so the kernel interrupts it at once, without us.
//!
//! The kernel does not tell what it moves. So the ring is looked at from time to time, while something is sent; a driver that
//! sends nothing costs nothing: its next interrupt comes by the worker, which begins to look then.

use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use crate::net::coalescing::Coalescing;
use crate::virtio::ring::{Chain, Ring};

/// The most that an interrupt is held back, and for the time of how many frames: a socket may have no more than some dozens on
/// their way.
const LONGEST: Duration = Duration::from_millis(1);
const FRAMES: f64 = 16.0;
/// Less is not worth a timer.
const SHORTEST: Duration = Duration::from_micros(50);
/// Fewer frames in [`LONGEST`] are not worth it either.
const FEWEST: f64 = 3.0;
/// The most bytes of a small frame, on average.
const SMALL: u64 = 4096;
/// Frames that tell how large they are.
const LOOKED_AT: u16 = 8;
/// Time from the first interrupt to a look at the ring, and between two looks.
const SOON: Duration = Duration::from_millis(10);
const LATER: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing is sent.
    Idle,
    /// The kernel interrupts the driver.
    Direct,
    /// An interrupt waits for so long.
    Held(Duration),
}

/// How interrupts for what was sent reach the driver of one queue.
#[derive(Debug)]
pub(in crate::net) struct SentCalls {
    state: State,
    /// The available index when the ring was looked at last.
    position: u16,
    since: Instant,
    next: Option<Instant>,
}

/// What a look at the ring shows.
#[derive(Debug, Clone, Copy)]
struct Sight {
    /// The available index.
    position: u16,
    /// Bytes of the last frames on average.
    size: u64,
}

impl SentCalls {
    /// Of a driver that has sent nothing yet.
    pub(super) fn new(now: Instant) -> Self {
        Self { state: State::Idle, position: 0, since: now, next: None }
    }

    /// When the ring is to be looked at.
    pub(in crate::net) fn due(&self) -> Option<Instant> {
        self.next
    }

    /// Whether the kernel interrupts the driver without us.
    pub(in crate::net) fn are_direct(&self) -> bool {
        self.state == State::Direct
    }

    /// How long they are held back.
    pub(in crate::net) fn coalescing(&self) -> Coalescing {
        match self.state {
            State::Held(time) => {
                Coalescing { max_packets: u32::MAX, max_usecs: u32::try_from(time.as_micros()).unwrap_or(u32::MAX) }
            }
            State::Idle | State::Direct => Coalescing::default(),
        }
    }

    /// Looks at the ring if it is time to. `asked`: the kernel has just asked for an interrupt.
    pub(in crate::net) fn follow(&mut self, asked: bool, now: Instant, ring: &Ring, memory: &GuestMemoryMmap) {
        let is_first = self.state == State::Idle && asked;
        if is_first || self.next.is_some_and(|next| next <= now) {
            self.see(now, sight(ring, memory));
        }
    }

    fn see(&mut self, now: Instant, sight: Option<Sight>) {
        let Some(Sight { position, size }) = sight else {
            // The kernel will find what is wrong with it, too.
            (self.state, self.next) = (State::Direct, Some(now + LATER));
            return;
        };
        let frames = position.wrapping_sub(std::mem::replace(&mut self.position, position));
        let time = now.saturating_duration_since(std::mem::replace(&mut self.since, now));
        (self.state, self.next) = match self.state {
            State::Idle => (State::Direct, Some(now + SOON)),
            _ if frames == 0 => (State::Idle, None),
            _ => (suited(frames, time, size), Some(now + LATER)),
        };
    }
}

/// What suits a driver that sent so many frames in this time, of that size.
fn suited(frames: u16, time: Duration, size: u64) -> State {
    let of_one = time.as_secs_f64() / f64::from(frames.max(1));
    let hold = Duration::from_secs_f64(of_one * FRAMES).min(LONGEST);
    let worthwhile = of_one * FEWEST <= LONGEST.as_secs_f64() && hold >= SHORTEST;
    if worthwhile && size <= SMALL { State::Held(hold) } else { State::Direct }
}

fn sight(ring: &Ring, memory: &GuestMemoryMmap) -> Option<Sight> {
    let position = ring.offered(memory).ok()?;
    let mut chain = Chain::default();
    let mut bytes = 0;
    let count = LOOKED_AT.min(ring.size());
    for back in 1..=count {
        let head = ring.head_at(memory, position.wrapping_sub(back)).ok()?;
        ring.walk(memory, head, &mut chain).ok()?;
        bytes += chain.readable().iter().map(|piece| u64::from(piece.length)).sum::<u64>();
    }
    Some(Sight { position, size: bytes / u64::from(count.max(1)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls of a driver that begins to send, has sent `frames` in the first look's time and goes on so.
    fn of(frames: u16, size: u64) -> (SentCalls, Instant) {
        let mut now = Instant::now();
        let mut calls = SentCalls::new(now);
        calls.see(now, Some(Sight { position: 65_500, size }));
        assert!(calls.are_direct(), "until more is known");
        now += SOON;
        assert_eq!(calls.due(), Some(now));
        calls.see(now, Some(Sight { position: 65_500u16.wrapping_add(frames), size }));
        assert_eq!(calls.due(), Some(now + LATER));
        (calls, now)
    }

    #[test]
    fn many_small_frames_are_told_of_together_within_a_millisecond_and_the_time_of_some_frames() {
        for (frames, longest) in [(40, LONGEST), (100, LONGEST), (1000, LONGEST / 5)] {
            let (calls, _) = of(frames, 100);
            let hold = Duration::from_micros(calls.coalescing().max_usecs.into());
            assert!(!calls.are_direct() && calls.coalescing().holds() && hold <= longest, "{frames}: {calls:?}");
            assert!(hold > longest / 2, "{frames}: {calls:?}");
        }
    }

    #[test]
    fn the_kernel_interrupts_at_once_for_few_frames_for_large_ones_and_for_more_than_a_timer_is_worth() {
        for (frames, size) in [(20, 100), (100, 9000), (10_000, 100)] {
            let (calls, _) = of(frames, size);
            assert!(calls.are_direct() && !calls.coalescing().holds(), "{frames} of {size} bytes: {calls:?}");
        }
    }

    #[test]
    fn what_is_sent_decides_anew_each_time_and_a_driver_that_sends_nothing_is_left_alone() {
        let (mut calls, mut now) = of(100, 100);
        let mut position = calls.position;
        for (frames, size, direct) in [(2000, 60_000, true), (2000, 1500, false), (10, 1500, true)] {
            now += LATER;
            position = position.wrapping_add(frames);
            calls.see(now, Some(Sight { position, size }));
            assert_eq!(calls.are_direct(), direct, "{frames} of {size} bytes");
        }
        now += LATER;
        calls.see(now, Some(Sight { position, size: 1500 }));
        assert_eq!((calls.state, calls.due()), (State::Idle, None));
        assert!(
            !calls.are_direct() && !calls.coalescing().holds(),
            "the next interrupt comes by us, and is passed on at once"
        );
    }

    #[test]
    fn a_ring_that_cannot_be_read_is_the_kernels_affair() {
        let (mut calls, now) = of(100, 100);
        calls.see(now, None);
        assert!(calls.are_direct());
    }
}
