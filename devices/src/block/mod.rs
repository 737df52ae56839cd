//! virtio-blk: disks on block devices and files (virtio 1.2 §5.2).
//!
//! [`VirtioBlock`] is the device. Each of its queues has a thread (`worker`), which takes requests off a strict
//! [ring](crate::virtio::ring), checks them (`request`), and hands them to a [`BlockBackend`]: one io_uring
//! ([`UringBackend`]) that is also all that the thread ever waits for. [`BlockFile`] opens, locks and measures the disk.
//!
//! What is promised: a request completes only with what happened to it, never short and never without its error; a stop
//! is over when nothing is in flight, and gives back where the rings stand; memory of the guest outlives the requests that
//! name it; nothing that a guest sends makes the thread panic, spin or allocate.

mod backend;
mod config;
mod device;
mod error;
mod file;
mod identity;
mod metrics;
mod request;
mod reservation;
mod shared;
mod sysfs;
mod uring;
mod vpd;
mod worker;

#[cfg(test)]
mod tests;

pub use self::backend::{
    BlockBackend, BlockSource, Completion, Event, Geometry, Operation, RangeLimits, Request, Signal,
};
pub use self::config::feature;
pub use self::device::{BlockHandle, BlockOptions, MakeBackend, VirtioBlock};
pub use self::error::{BlockError, RescanError};
pub use self::file::{BlockFile, LockedFile, OpenMode};
pub use self::metrics::{BlockMetrics, OperationMetrics, QueueMetrics};
pub use self::reservation::{HelperError, Kind, Refusal, Reservation, ReservationError, ReservationOptions, Standing};
pub use self::shared::ErrorPolicy;
pub use self::uring::UringBackend;
