//! How far a request is, and what comes next: pure bookkeeping, without a kernel.

use super::super::backend::Operation;

/// After so many interruptions in a row the errno is believed.
const MAX_RETRIES: u8 = 64;

/// What the kernel is asked to do next for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Read or write the buffers from where they are now.
    Transfer,
    /// Make everything stable.
    Sync,
    /// Give the space back; it reads as zeroes then.
    PunchHole,
    /// Make the space read as zeroes.
    ZeroRange,
    /// Write zeroes.
    WriteZeroes,
}

/// What follows from a completion of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Ask the kernel again: the rest, the next way, or the same once more.
    Again,
    /// The request has ended.
    Done(Result<u64, i32>),
}

/// The state of one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub operation: Operation,
    pub action: Action,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes in all.
    pub length: u64,
    /// Bytes that are done.
    pub done: u64,
    /// Bytes that the kernel was last asked for.
    pub issued: u64,
    /// The last attempt was interrupted: have a thread of the kernel do it, which may wait.
    pub retries: u8,
    /// Lengths of partial transfers must be multiples of this.
    pub unit: u64,
}

impl Transfer {
    pub fn new(operation: Operation, offset: u64, length: u64, unit: u32) -> Self {
        let action = match operation {
            Operation::Read | Operation::Write { .. } => Action::Transfer,
            Operation::Flush => Action::Sync,
            Operation::Discard | Operation::WriteZeroes { unmap: true, .. } => Action::PunchHole,
            Operation::WriteZeroes { unmap: false, .. } => Action::ZeroRange,
        };
        Self { operation, action, offset, length, done: 0, issued: 0, retries: 0, unit: u64::from(unit.max(1)) }
    }

    /// Where on the disk the rest begins.
    pub fn position(&self) -> u64 {
        self.offset.saturating_add(self.done)
    }

    pub fn remaining(&self) -> u64 {
        self.length.saturating_sub(self.done)
    }

    /// Takes the result of the kernel: bytes, or a negative errno.
    pub fn complete(&mut self, result: i32) -> Step {
        match u64::try_from(result) {
            Ok(bytes) => {
                self.retries = 0;
                self.progressed(bytes)
            }
            Err(_) => self.failed(result.saturating_neg()),
        }
    }

    fn progressed(&mut self, bytes: u64) -> Step {
        let bytes = match self.action {
            Action::Sync => return Step::Done(Ok(self.length)),
            // These answer 0 and are done as a whole.
            Action::PunchHole | Action::ZeroRange => self.issued,
            Action::Transfer | Action::WriteZeroes => bytes,
        };
        let partial = bytes < self.remaining();
        // No progress is the end of the file; a piece of a block cannot be continued from. Neither is success.
        if bytes == 0 || bytes > self.issued || (partial && !bytes.is_multiple_of(self.unit)) {
            return Step::Done(Err(libc::EIO));
        }
        self.done += bytes;
        if partial {
            return Step::Again;
        }
        if matches!(self.operation, Operation::WriteZeroes { stable: true, .. }) {
            self.action = Action::Sync;
            return Step::Again;
        }
        Step::Done(Ok(self.length))
    }

    fn failed(&mut self, errno: i32) -> Step {
        if matches!(errno, libc::EAGAIN | libc::EINTR) && self.retries < MAX_RETRIES {
            self.retries += 1;
            return Step::Again;
        }
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL);
        if unsupported && matches!(self.operation, Operation::WriteZeroes { .. }) {
            // Zeroes are zeroes: what a device cannot do for itself is written.
            match self.action {
                Action::PunchHole => self.action = Action::ZeroRange,
                Action::ZeroRange => self.action = Action::WriteZeroes,
                _ => return Step::Done(Err(errno)),
            }
            return Step::Again;
        }
        Step::Done(Err(errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(length: u64) -> Transfer {
        let mut transfer = Transfer::new(Operation::Write { stable: false }, 4096, length, 512);
        transfer.issued = length;
        transfer
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let mut transfer = write(4096);
        assert_eq!(transfer.complete(512), Step::Again);
        assert_eq!((transfer.position(), transfer.remaining()), (4608, 3584));
        transfer.issued = 3584;
        assert_eq!(transfer.complete(3584), Step::Done(Ok(4096)));
    }

    #[test]
    fn no_progress_or_a_piece_of_a_block_is_an_error_and_never_success() {
        for bytes in [0, 100, 4095, 8192] {
            assert_eq!(write(4096).complete(bytes), Step::Done(Err(libc::EIO)), "{bytes} of 4096 bytes");
        }
    }

    #[test]
    fn an_interruption_is_tried_again_but_not_for_ever() {
        let mut transfer = write(4096);
        for errno in [libc::EAGAIN, libc::EINTR].into_iter().cycle().take(usize::from(MAX_RETRIES)) {
            assert_eq!(transfer.complete(-errno), Step::Again);
        }
        assert_eq!(transfer.complete(-libc::EAGAIN), Step::Done(Err(libc::EAGAIN)));
    }

    #[test]
    fn every_other_error_ends_the_request() {
        for errno in [libc::EIO, libc::ENOSPC, libc::EBADE, libc::EOPNOTSUPP, libc::ECANCELED, i32::MAX] {
            assert_eq!(write(4096).complete(-errno), Step::Done(Err(errno)));
        }
        assert_eq!(write(4096).complete(i32::MIN), Step::Done(Err(i32::MAX)));
    }

    #[test]
    fn zeroes_are_made_in_the_best_way_that_works_and_synced_when_they_must_be_stable() {
        let operation = Operation::WriteZeroes { unmap: true, stable: true };
        let mut transfer = Transfer::new(operation, 0, 8192, 512);
        assert_eq!(transfer.action, Action::PunchHole);
        for next in [Action::ZeroRange, Action::WriteZeroes] {
            assert_eq!(transfer.complete(-libc::EOPNOTSUPP), Step::Again);
            assert_eq!(transfer.action, next);
        }
        transfer.issued = 4096;
        assert_eq!(transfer.complete(4096), Step::Again);
        assert_eq!(transfer.complete(4096), Step::Again);
        assert_eq!(transfer.action, Action::Sync);
        assert_eq!(transfer.complete(0), Step::Done(Ok(8192)));
        assert_eq!(transfer.complete(-libc::EIO), Step::Done(Err(libc::EIO)), "a failed sync is a failed request");
    }

    #[test]
    fn a_discard_that_is_not_supported_says_so() {
        let mut transfer = Transfer::new(Operation::Discard, 0, 8192, 512);
        transfer.issued = 4096;
        assert_eq!(transfer.complete(0), Step::Again);
        assert_eq!((transfer.position(), transfer.remaining()), (4096, 4096));
        assert_eq!(transfer.complete(-libc::EOPNOTSUPP), Step::Done(Err(libc::EOPNOTSUPP)));
    }
}
