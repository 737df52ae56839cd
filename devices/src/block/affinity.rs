//! Which host CPUs a thread runs on.

// The set of CPUs is the C library's.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

/// Lets `thread` run on these CPUs only; those past 1023 are left out.
///
/// # Errors
/// `EINVAL` if none of them is online and allowed to this process.
pub fn pin(thread: &JoinHandle<()>, cpus: &[u16]) -> io::Result<()> {
    // SAFETY: a cpu_set_t is a bit mask, for which zero is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|&&cpu| u32::from(cpu) < libc::CPU_SETSIZE.cast_unsigned()) {
        // SAFETY: the CPU is less than the size of the set.
        unsafe { libc::CPU_SET(usize::from(cpu), &mut set) };
    }
    // SAFETY: the handle keeps the thread's identity valid, and the set has the size that is given.
    let error = unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of_val(&set), &raw const set) };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_runs_where_it_is_pinned_and_nowhere_that_does_not_exist() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _ = wait.recv();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.lines().any(|line| line == "Cpus_allowed_list:\t0"), "{status}");
        });
        assert_eq!(pin(&thread, &[1023]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(pin(&thread, &[]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(pin(&thread, &[5000]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        pin(&thread, &[0]).unwrap();
        drop(go);
        thread.join().unwrap();
    }
}
