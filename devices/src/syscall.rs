//! What the C library's functions return, as results.

use std::io;

/// What the call returned, unless that is -1: then its errno.
///
/// # Errors
/// The errno.
pub(crate) fn value(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// As [`value`], where nothing but the error matters.
///
/// # Errors
/// The errno.
pub(crate) fn check(result: libc::c_int) -> io::Result<()> {
    value(result).map(drop)
}
