//! Rules that several parts of the configuration share.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::problem::{Pointer, Problem};

/// PATH_MAX without the terminator.
const MAX_PATH: usize = 4095;
/// The most bytes of a Unix socket's path (`sun_path` without the terminator).
const MAX_SOCKET_PATH: usize = 107;
/// Devices are at 01.0 to 1E.0 of bus 0.
const MAX_SLOT: u8 = 30;

/// A path that the host could open.
pub(super) fn check_path(path: &Path, at: &Pointer) -> Result<(), Problem> {
    check_path_len(path, MAX_PATH, at)
}

/// A path that a Unix socket could have.
pub(super) fn check_socket_path(path: &Path, at: &Pointer) -> Result<(), Problem> {
    check_path_len(path, MAX_SOCKET_PATH, at)
}

fn check_path_len(path: &Path, max: usize, at: &Pointer) -> Result<(), Problem> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > max || bytes.contains(&0) {
        return Err(Problem::invalid(
            at,
            format!("a path of {} bytes, or with a NUL in it, is not possible here", bytes.len()),
            format!("give a path of 1 to {max} bytes"),
        ));
    }
    Ok(())
}

/// A device id: 1 to 32 of `A-Z a-z 0-9 _ -`.
pub(super) fn check_id(id: &str, at: &Pointer) -> Result<(), Problem> {
    let fits = (1..=32).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if fits {
        return Ok(());
    }
    Err(Problem::invalid(at, "this id is not possible", "use 1 to 32 letters, digits, '_' and '-'"))
}

/// A number of queues, 1 to `max`.
pub(super) fn check_queues(queues: u16, max: u16, at: &Pointer) -> Result<(), Problem> {
    if (1..=max).contains(&queues) {
        return Ok(());
    }
    Err(Problem::invalid(at, format!("{queues} queues are not possible"), format!("choose 1 to {max}")))
}

/// A ring size: a power of two, 16 to 1024.
pub(super) fn check_queue_size(size: u16, at: &Pointer) -> Result<(), Problem> {
    if size.is_power_of_two() && (16..=1024).contains(&size) {
        return Ok(());
    }
    Err(Problem::invalid(
        at,
        format!("a queue of {size} entries is not possible"),
        "choose 16, 32, 64, 128, 256, 512 or 1024",
    ))
}

/// A PCI slot that a device may have.
pub(super) fn check_slot(slot: Option<u8>, at: &Pointer) -> Result<(), Problem> {
    match slot {
        None | Some(1..=MAX_SLOT) => Ok(()),
        Some(slot) => Err(Problem::invalid(
            at,
            format!("slot {slot} is not for devices: 0 is the host bridge, 31 the chipset"),
            format!("choose 1 to {MAX_SLOT}, or leave it out"),
        )),
    }
}
