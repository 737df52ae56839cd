//! Receive-side scaling: which queue pair receives a frame, and what its hash is (virtio 1.2 §5.1.6.4.3, §5.1.6.5.7).
//!
//! A tap with several queues puts each frame into one of them before we see it, so the choice is made in the kernel, by a
//! program of ours ([`program`]). It is loaded once, when the card is made, and never changes: what the driver wants lies in
//! memory that it shares with us ([`sys::State`]), so that a driver's command needs neither a privilege nor the verifier.
//! That memory holds two configurations. A new one is written where the program does not look, and then takes over with one
//! store; a frame that was under way meanwhile goes to the first queue, and none is steered by a half-written table.
//!
//! The hash that the driver is told (HASH_REPORT) is calculated anew by [`hash`], as the kernel does not hand its own on.

mod assembler;
pub(super) mod config;
pub(super) mod flow;
pub(super) mod hash;
mod layout;
mod program;
mod sys;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use self::config::RssConfig;
use self::hash::Hasher;
use self::layout::{Slot, WORDS};
use self::sys::State;

/// The program with what it is told to do.
pub(super) struct Steering {
    program: OwnedFd,
    state: State,
}

impl Steering {
    /// Loads the program. It is not attached to any tap yet.
    ///
    /// # Errors
    /// What the kernel answered: EPERM without CAP_BPF, and E2BIG without CAP_PERFMON, as the verifier then follows what
    /// processors may do by speculation.
    pub(super) fn new() -> io::Result<Self> {
        let map = sys::create_map(WORDS)?;
        let program = sys::load_program(&program::build(map.as_fd()), &mut [])?;
        Ok(Self { program, state: State::new(map.as_fd(), WORDS)? })
    }

    /// The program, to be attached to a tap.
    pub(super) fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Steers by `config` from now on, with the hash that `hasher` makes of its key. For the first worker alone.
    pub(super) fn set(&self, config: &RssConfig, hasher: &Hasher) {
        layout::write(self.state.words(), Slot { config, hasher });
    }
}
