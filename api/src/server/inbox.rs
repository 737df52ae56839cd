//! What descriptors have come with the request that a connection is receiving.
//!
//! A client sends them with the request (any of its bytes, best the first) and waits for the answer before it sends the next
//! request: descriptors that nobody has taken by then are closed. Only what is /dev/net/tun is kept even so long, so nobody
//! ever asks the driver of a descriptor that a client made up.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};
use tokio::sync::Semaphore;

use crate::descriptors::{Descriptors, MAX_DESCRIPTORS, Received};
use crate::problem::{Code, Problem};

/// The most descriptors that the server holds for all requests that are not answered yet.
pub(super) const MAX_HELD: usize = 256;
/// /dev/net/tun.
const TUN: (u32, u32) = (10, 200);

/// Shared by the parts of one connection.
#[derive(Clone, Debug)]
pub(super) struct Inbox {
    contents: Arc<Mutex<Contents>>,
    places: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Contents {
    came: Descriptors,
    /// Why all of them were closed, and those that still come are.
    refused: Option<Problem>,
}

impl Inbox {
    /// Nothing has come. `places` are those of the server: one for each descriptor.
    pub(super) fn new(places: &Arc<Semaphore>) -> Self {
        Self { contents: Arc::default(), places: Arc::clone(places) }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts in what came with the last bytes.
    pub(super) fn add(&self, received: Received) {
        let Received { fds, truncated, .. } = received;
        if fds.is_empty() && !truncated {
            return;
        }
        let mut contents = self.lock();
        let fit = if truncated { Err(lost()) } else { fit(&fds, contents.came.len()) };
        let places =
            u32::try_from(fds.len()).ok().and_then(|n| Arc::clone(&self.places).try_acquire_many_owned(n).ok());
        match fit.and_then(|()| places.ok_or_else(full)) {
            Ok(places) if contents.refused.is_none() => contents.came.add(fds, places),
            Ok(_) => {}
            Err(problem) => {
                contents.came = Descriptors::default();
                contents.refused.get_or_insert(problem);
            }
        }
    }

    /// Takes out all that has come.
    ///
    /// # Errors
    /// Why they were closed.
    pub(super) fn take(&self) -> Result<Descriptors, Problem> {
        let Contents { came, refused } = std::mem::take(&mut *self.lock());
        refused.map_or(Ok(came), Err)
    }

    /// Sees that none has come; closes those that have.
    ///
    /// # Errors
    /// `bad-descriptors`.
    pub(super) fn expect_none(&self) -> Result<(), Problem> {
        let came = self.take()?.len();
        if came == 0 {
            return Ok(());
        }
        let remedy = "only PUT /v1/vm and PUT /v1/vm/nics/{id} take the descriptors of taps";
        Err(Problem::new(Code::BadDescriptors, format!("{came} came with a request that takes none"), remedy))
    }
}

/// Whether these descriptors may come after `before` others.
fn fit(fds: &[OwnedFd], before: usize) -> Result<(), Problem> {
    if before + fds.len() > MAX_DESCRIPTORS {
        let detail = format!("more than {MAX_DESCRIPTORS} came with the request");
        let remedy = "define the VM with some NICs, and add the others with PUT /v1/vm/nics/{id}";
        return Err(Problem::new(Code::BadDescriptors, detail, remedy));
    }
    match fds.iter().position(|fd| !is_tun(fd)) {
        None => Ok(()),
        Some(index) => {
            let detail = format!("number {} of those that came with the request is no /dev/net/tun", before + index);
            let remedy = "pass descriptors of /dev/net/tun after TUNSETIFF; the first is number 0";
            Err(Problem::new(Code::BadDescriptors, detail, remedy))
        }
    }
}

/// Asks the kernel alone: neither a driver nor a file system, which may not answer.
fn is_tun(fd: &OwnedFd) -> bool {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    statx(fd, "", flags, StatxFlags::TYPE).is_ok_and(|file| {
        FileType::from_raw_mode(file.stx_mode.into()) == FileType::CharacterDevice
            && (file.stx_rdev_major, file.stx_rdev_minor) == TUN
    })
}

fn lost() -> Problem {
    let detail = format!("some got lost: more than {MAX_DESCRIPTORS} came at once, or the VMM has no free numbers");
    Problem::new(Code::BadDescriptors, detail, "send fewer, or raise the VMM's limit of descriptors (ulimit -n)")
}

fn full() -> Problem {
    let detail = format!("requests that are not answered yet hold {MAX_HELD} descriptors");
    Problem::new(Code::OutOfResources, detail, "try again when they are answered")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_that_got_lost_on_the_way_refuse_the_request_but_not_the_next_one() {
        let inbox = Inbox::new(&Arc::new(Semaphore::new(MAX_HELD)));
        inbox.add(Received { bytes: 1, fds: Vec::new(), truncated: true });
        assert_eq!(inbox.take().unwrap_err().code, Code::BadDescriptors);
        assert!(inbox.take().unwrap().is_empty());
        inbox.expect_none().unwrap();
    }
}
