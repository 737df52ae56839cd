//! Which host CPUs a thread runs on, and its place among those who want to run there.

// The set of CPUs and the system calls are the C library's.
#![allow(unsafe_code)]

use std::cell::Cell;
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

/// A thread's place among those who want to run where it does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stance {
    /// Like others (`SCHED_OTHER`, sched(7)), as threads begin.
    #[default]
    Even,
    /// It waits until others have finished (`SCHED_BATCH`).
    Last,
    /// It waits until others have finished, and then goes on until it has: whom it wakes does not preempt it (nice(2) is 10 less
    /// than otherwise). Needs CAP_SYS_NICE, or RLIMIT_NICE of at least 30 where the process has the common nice value of 0.
    Steady,
}

/// What a thread that is [steady](Stance::Steady) has less.
const PRECEDENCE: libc::c_int = 10;

thread_local! {
    /// The nice value that a thread had before it became steady.
    static BEFORE: Cell<Option<libc::c_int>> = const { Cell::new(None) };
}

/// Gives this thread another place. One that was given another policy than those above keeps it.
///
/// # Errors
/// What the system call returns: `EACCES` or `EPERM` where the privilege to be steady is not there, which leaves the thread
/// [last](Stance::Last), or a filter forbids it.
pub fn take(stance: Stance) -> io::Result<()> {
    set_waiting(0, stance != Stance::Even)?;
    match (stance, BEFORE.get()) {
        (Stance::Steady, None) => {
            // SAFETY: no memory is passed; 0 is the calling thread.
            let before = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
            set_nice(before - PRECEDENCE)?;
            BEFORE.set(Some(before));
        }
        (Stance::Even | Stance::Last, Some(before)) => {
            set_nice(before)?;
            BEFORE.set(None);
        }
        _ => {}
    }
    Ok(())
}

/// The calling thread's number in its PID namespace.
pub fn thread_id() -> libc::pid_t {
    // SAFETY: no memory is passed.
    unsafe { libc::gettid() }
}

/// Has another thread wait until others have finished ([`Stance::Last`]).
///
/// # Errors
/// `EPERM` without the privilege (CAP_SYS_NICE for one of the kernel), `ESRCH` if there is none.
pub fn let_others_finish(thread: libc::pid_t) -> io::Result<()> {
    set_waiting(thread, true)
}

fn set_nice(nice: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is passed; 0 is the calling thread.
    let status = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether a thread (0: the calling one) waits for others.
fn set_waiting(thread: libc::pid_t, wait: bool) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let present = unsafe { libc::sched_getscheduler(thread) };
    let (from, to) = if wait { (libc::SCHED_OTHER, libc::SCHED_BATCH) } else { (libc::SCHED_BATCH, libc::SCHED_OTHER) };
    if present != from {
        return if present < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    }
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters outlive the call.
    let status = unsafe { libc::sched_setscheduler(thread, to, &raw const priority) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The policy of a thread (0: the calling one).
#[cfg(test)]
pub fn policy(thread: libc::pid_t) -> libc::c_int {
    // SAFETY: no memory is passed.
    unsafe { libc::sched_getscheduler(thread) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_takes_the_place_that_it_is_told_and_has_its_former_nice_value_again() {
        let nice = 5;
        set_nice(nice).unwrap();
        // SAFETY: no memory is passed.
        let present = || (policy(0), unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) });
        use Stance::{Even, Last, Steady};
        let (plain, polite) = ((libc::SCHED_OTHER, nice), (libc::SCHED_BATCH, nice));
        let steady = (libc::SCHED_BATCH, nice - PRECEDENCE);
        for (stance, then) in [(Last, polite), (Last, polite), (Even, plain)] {
            take(stance).unwrap();
            assert_eq!(present(), then);
        }
        let_others_finish(thread_id()).unwrap();
        assert_eq!(present(), polite);
        for (stance, then) in [(Steady, steady), (Steady, steady), (Last, polite), (Steady, steady), (Even, plain)] {
            if take(stance).is_err() {
                println!("SKIPPED: to be preempted less than others needs CAP_SYS_NICE");
                assert_eq!((stance, present()), (Steady, polite));
            } else {
                assert_eq!(present(), then);
            }
        }
        let idle = libc::sched_param { sched_priority: 0 };
        // SAFETY: the parameters outlive the call.
        assert_eq!(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const idle) }, 0);
        for stance in [Last, Even] {
            take(stance).unwrap();
            assert_eq!(present(), (libc::SCHED_IDLE, nice));
        }
    }
}
