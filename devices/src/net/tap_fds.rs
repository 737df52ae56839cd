//! Taps that came as descriptors, between two uses.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::sys;
use super::tap::{Tap, TapError, check};

/// All queues of one tap for one NIC, opened by somebody else and checked. They stay open while cards come and go.
#[derive(Debug)]
pub struct TapFds {
    name: String,
    address: sys::Address,
    fds: Vec<OwnedFd>,
}

impl TapFds {
    /// Takes the descriptors.
    ///
    /// # Errors
    /// [`TapError`] if they are not different queues of one tap with the flags that are needed.
    pub fn new(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        let name = check(&fds)?;
        let address = fds.first().and_then(|fd| sys::address(fd.as_fd()).ok()).unwrap_or_default();
        Ok(Self { name, address, fds })
    }

    /// The name that the tap had when the descriptors were taken.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the other descriptors are of the same tap. Taps of two network namespaces may have one name, but then differ in
    /// their addresses.
    #[must_use]
    pub fn is_same_tap(&self, other: &Self) -> bool {
        (&self.name, self.address) == (&other.name, other.address)
    }

    /// The tap, for one card.
    ///
    /// # Errors
    /// [`TapError`] if the tap was deleted meanwhile, or there is no descriptor left for its copies.
    pub fn open(&self) -> Result<Tap, TapError> {
        let copies: Result<Vec<_>, _> = self.fds.iter().map(OwnedFd::try_clone).collect();
        Tap::from_fds(copies.map_err(|error| TapError::Copy { name: self.name.clone(), error })?)
    }
}

/// Whether this is a queue of a tap (or of a tun).
#[must_use]
pub fn is_tap(fd: BorrowedFd<'_>) -> bool {
    sys::interface(fd).is_ok()
}
