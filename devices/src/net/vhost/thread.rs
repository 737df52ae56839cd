//! The kernel's threads that move the frames of cards. They wait until others have finished ([`Stance::Last`]): to preempt who
//! sends or receives, for each frame, costs more than the frame does.
//!
//! [`Stance::Last`]: crate::scheduling::Stance::Last

use std::fs;
use std::io;
use std::path::Path;

use crate::scheduling;

/// What the kernel names its threads: this, and the number of the thread that opened the device.
const PREFIX: &str = "vhost-";

/// Gives those of cards that this thread has opened their place.
///
/// # Errors
/// `EPERM` without CAP_SYS_NICE before Linux 6.4, `NotFound` where /proc does not show them: they stay as they are.
pub(in crate::net) fn make_polite() -> io::Result<()> {
    threads()?.into_iter().try_for_each(scheduling::let_others_finish)
}

/// Threads of this process since Linux 6.4, and the kernel's own before; some of other cards may be among them.
pub(in crate::net) fn threads() -> io::Result<Vec<libc::pid_t>> {
    // Workers are named by devices, which may be called so, but end in the number of a queue.
    let is_number = |rest: &str| rest.bytes().all(|byte| byte.is_ascii_digit());
    let of_process = find("/proc/self/task".as_ref(), |name| name.strip_prefix(PREFIX).is_some_and(is_number))?;
    if !of_process.is_empty() {
        return Ok(of_process);
    }
    let ours = format!("{PREFIX}{}", scheduling::thread_id());
    let of_kernel = find("/proc".as_ref(), |name| name == ours)?;
    if of_kernel.is_empty() { Err(io::ErrorKind::NotFound.into()) } else { Ok(of_kernel) }
}

/// The threads that a folder of /proc shows under such names.
fn find(folder: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<libc::pid_t>> {
    let entries = fs::read_dir(folder)?.filter_map(Result::ok);
    let threads = entries.filter_map(|entry| {
        let thread = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        wanted(name.trim_end()).then_some(thread)
    });
    Ok(threads.collect())
}
