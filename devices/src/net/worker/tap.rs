//! What a worker does for the tap itself: follows a link that goes up or down, finds a tap again that was deleted, and announces
//! where the card is.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::super::announce::{self, Rounds};
use super::super::counters::PairCounters;
use super::super::sys;
use super::super::tap::TapError;
use super::super::watches::Token;
use super::Worker;

/// Between two looks for a tap that was deleted, or for how the tap is that the kernel reads.
const RETRY: Duration = Duration::from_secs(1);

impl Worker {
    /// The first worker shows the link to the host: it may wait for the kernel's network lock, which others must not.
    pub(super) fn follow_link(&mut self) {
        let up = self.shared.link_up.load(Ordering::SeqCst);
        if self.index == 0 && self.carrier != up {
            self.shared.tap.set_carrier(up);
            self.carrier = up;
        }
    }

    /// The first worker sees whether a tap that was deleted has been made again, once a second while it is lost; as often
    /// whether the tap works from which the kernel moves frames, which keeps to itself what it meets there; and a second later
    /// whether one still is there that had no frame when it told of something.
    pub(super) fn look_after_tap(&mut self) {
        let shared = &self.shared;
        let lost = shared.is_tap_lost();
        let in_kernel = self.is_in_kernel();
        if self.index > 0 || !(lost || in_kernel || self.suspect) {
            self.retry = None;
            return;
        }
        let now = Instant::now();
        if !(lost || in_kernel) && self.retry.is_none() {
            self.retry = Some(now + RETRY);
        }
        if self.retry.is_some_and(|retry| now < retry) {
            return;
        }
        self.retry = Some(now + RETRY);
        self.suspect = false;
        if !(lost || in_kernel) {
            if shared.tap.is_gone() {
                shared.tap_failed("receive frames", &std::io::Error::from_raw_os_error(libc::EBADFD));
                shared.wake_all();
            }
            return;
        }
        if !lost {
            if let Err(error) = shared.tap.check() {
                shared.tap_failed("pass frames", &error);
                shared.wake_all();
            }
            return;
        }
        if !shared.tap.is_gone() {
            return;
        }
        let reopened = shared.tap.reopen().and_then(|()| {
            let name = shared.tap.name().to_owned();
            shared.prepare_tap().map_err(|error| TapError::Kernel { name, action: "prepare it for the driver", error })
        });
        match reopened {
            Ok(()) => {
                if !self.carrier {
                    shared.tap.set_carrier(false);
                }
                shared.filter_tap();
                shared.tap_generation.fetch_add(1, Ordering::SeqCst);
                shared.tap_works();
                shared.wake_all();
            }
            Err(error) => tracing::debug!(nic = shared.id, %error, "the tap is not back"),
        }
    }

    /// Watches the tap anew if there is another file behind its descriptor, which ended the former watch.
    pub(super) fn follow_tap(&mut self, counters: &PairCounters, tap: BorrowedFd<'_>) {
        let generation = self.shared.tap_generation.load(Ordering::SeqCst);
        if std::mem::replace(&mut self.tap_generation, generation) == generation {
            return;
        }
        self.batch.follow(tap);
        if let Some(running) = &mut self.running {
            // What the kernel met may have been the end of the former one.
            running.path.allow_kernel();
        }
        if self.is_in_kernel() {
            // The kernel holds the former file. Our own path watches the new one from now on.
            self.take_back(counters, tap);
        } else if let Some(running) = &mut self.running {
            self.watches.add(tap.as_raw_fd(), Token::Tap, EventSet::IN | EventSet::OUT);
            running.path.mark_all();
        }
    }

    /// Does a round of an announcement if one is due.
    pub(super) fn announce(&mut self, tap: BorrowedFd<'_>) {
        let shared = &self.shared;
        if self.index > 0 {
            return;
        }
        let now = Instant::now();
        let wanted = shared.announcements.load(Ordering::SeqCst);
        if std::mem::replace(&mut self.announcements, wanted) != wanted {
            self.rounds = Some(Rounds::begin(now));
        }
        let Some(rounds) = self.rounds.take_if(|rounds| rounds.next() <= now) else { return };
        self.rounds = rounds.after(now);
        if !shared.link_up.load(Ordering::SeqCst) {
            return;
        }
        let (_, filter) = shared.filter.get();
        if let Err(error) = sys::send(tap, &announce::rarp(filter.mac(), shared.tap.header())) {
            tracing::warn!(nic = shared.id, tap = shared.tap.name(), %error, "an announcement could not be sent");
        }
        if self.running.as_ref().is_some_and(|running| running.announces) {
            shared.ask_to_announce();
        }
    }
}
