//! How rings of io_uring are made, for whatever device.

use std::io;

use io_uring::IoUring;
use thiserror::Error;

/// IORING_REGISTER_ENABLE_RINGS: what a restricted ring is still told by the thread that uses it.
pub(crate) const ENABLE_RINGS: u8 = 12;

/// No ring could be made.
#[derive(Debug, Error)]
#[error("{what}: {error}")]
pub(crate) struct UringError {
    /// What was done.
    pub what: &'static str,
    /// The kernel's answer.
    pub error: io::Error,
}

/// A disabled ring with as much of what is cheap as the kernel knows. Made before filters go on, and enabled by the thread that
/// uses it.
///
/// # Errors
/// The kernel has no io_uring, or an older one than Linux 5.11.
pub(crate) fn disabled_ring(entries: u32) -> Result<IoUring, UringError> {
    let deferred = IoUring::builder()
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_clamp()
        .build(entries);
    let ring = deferred.or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => IoUring::builder().setup_r_disabled().setup_clamp().build(entries),
        _ => Err(error),
    });
    let ring = ring.map_err(|error| UringError { what: "making a ring", error })?;
    if !ring.params().is_feature_nodrop() || !ring.params().is_feature_ext_arg() {
        return Err(UringError { what: "features of the ring", error: io::ErrorKind::Unsupported.into() });
    }
    Ok(ring)
}
