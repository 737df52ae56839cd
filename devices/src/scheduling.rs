//! Which host CPUs a thread runs on, and whether it preempts others there.

// The set of CPUs and the system calls are the C library's.
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

/// Whether this thread waits until others have finished where it is woken (`SCHED_BATCH`, sched(7)), or preempts them
/// (`SCHED_OTHER`). Needs no privilege. A thread that was given another policy keeps it.
///
/// # Errors
/// What the system call returns: `EPERM` where a filter forbids it.
pub fn wait_for_others(wait: bool) -> io::Result<()> {
    // SAFETY: no memory is passed; 0 is the calling thread.
    let present = unsafe { libc::sched_getscheduler(0) };
    let (from, to) = if wait { (libc::SCHED_OTHER, libc::SCHED_BATCH) } else { (libc::SCHED_BATCH, libc::SCHED_OTHER) };
    if present != from {
        return if present < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    }
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters outlive the call.
    let status = unsafe { libc::sched_setscheduler(0, to, &raw const priority) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_waits_for_others_until_it_is_told_not_to() {
        // SAFETY: no memory is passed.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        for (wait, then) in [(true, libc::SCHED_BATCH), (true, libc::SCHED_BATCH), (false, libc::SCHED_OTHER)] {
            wait_for_others(wait).unwrap();
            assert_eq!(policy(), then);
        }
        let idle = libc::sched_param { sched_priority: 0 };
        // SAFETY: the parameters outlive the call.
        assert_eq!(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const idle) }, 0);
        for wait in [true, false] {
            wait_for_others(wait).unwrap();
            assert_eq!(policy(), libc::SCHED_IDLE, "that was somebody's choice");
        }
    }

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
