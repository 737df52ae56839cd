//! From the host into the jail: the process that becomes the VMM.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};
use rustix::thread::UnshareFlags;

use crate::error::{JailError, refused};
use crate::privileges::{self, Limit};
use crate::root::{self, Contents};
use crate::sys::{self, Signals};
use crate::userns;

/// What the child says when it is in its user namespace, of which the jailer has to write the map. No error begins with it.
const MAP: u8 = b'@';
/// The longest that the words of a child are.
const MAX_WORDS: u64 = 16 << 10;
/// Where the VMM is in its jail.
pub const VMM: &str = "/rackvisor";

/// All that is needed to become the VMM.
#[derive(Debug)]
pub struct Plan {
    /// The host name.
    pub name: String,
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// What the root has.
    pub contents: Contents,
    /// A folder of the host that only root can change, on which the root is mounted where nobody else sees it.
    pub place: PathBuf,
    /// Whether the process gets a user namespace of its own.
    pub user_namespace: bool,
    /// Resource limits.
    pub limits: Vec<Limit>,
    /// Descriptors that the VMM gets by these numbers.
    pub keep: Vec<u32>,
    /// Arguments, with the program's name.
    pub arguments: Vec<String>,
}

/// The process of a VMM that has been started.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    process: OwnedFd,
}

/// A process that goes into its jail, and waits there for the word to become the VMM. It ends if that never comes.
#[derive(Debug)]
pub struct Waiting {
    child: Child,
    go: File,
    words: File,
    user: (u32, u32),
}

impl Waiting {
    /// Starts the process that becomes the VMM, in which `signals` are not blocked.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn start(plan: &Plan, signals: &Signals) -> Result<Self, JailError> {
        let (wait, go) = pipe_with(PipeFlags::CLOEXEC).map_err(refused("make a pipe"))?;
        let (words, speak) = pipe_with(PipeFlags::CLOEXEC).map_err(refused("make a pipe"))?;
        // This process stays where it is: only those that it starts are in the new one.
        new_namespaces(UnshareFlags::NEWPID)?;
        let Some(pid) = sys::fork().map_err(refused("start a process"))? else {
            drop((go, words));
            let error = become_vmm(plan, signals, wait, &speak);
            let _ = File::from(speak).write_all(format!("{}\n{error}", error.code()).as_bytes());
            std::process::exit(i32::from(error.code()));
        };
        let process = pidfd_open(pid, PidfdFlags::empty()).map_err(refused("open the VMM's process"))?;
        Ok(Self { child: Child { pid, process }, go: go.into(), words: words.into(), user: (plan.uid, plan.gid) })
    }

    /// Its process id on the host.
    pub fn pid(&self) -> Pid {
        self.child.pid
    }

    /// Lets it become the VMM.
    ///
    /// # Errors
    /// Why it could not.
    pub fn go(self) -> Result<Child, JailError> {
        let Self { child, mut go, mut words, user } = self;
        let mut let_go = || go.write_all(b"!").map_err(refused("start the VMM"));
        let_go()?;
        let hears = || refused("hear from the VMM's process");
        let mut said = vec![0];
        let length = words.read(&mut said).map_err(hears())?;
        said.truncate(length);
        if said == [MAP] {
            said.clear();
            userns::map(child.pid, user)?;
            let_go()?;
        }
        // The other end is closed by exec, or at the process's end.
        words.take(MAX_WORDS).read_to_end(&mut said).map_err(hears())?;
        match String::from_utf8_lossy(&said).split_once('\n') {
            None => Ok(child),
            Some((code, text)) => {
                let _ = waitpid(Some(child.pid), WaitOptions::empty());
                Err(JailError::Told { text: text.to_owned(), code: code.parse().unwrap_or(125) })
            }
        }
    }
}

impl Child {
    /// Passes signals on to it until it ends; gives its exit code, or 128 and the number of the signal that ended it.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn attend(&self, signals: &Signals) -> Result<u8, JailError> {
        loop {
            if let Some((_, status)) =
                waitpid(Some(self.pid), WaitOptions::NOHANG).map_err(refused("wait for the VMM"))?
            {
                let code =
                    status.exit_status().or(status.terminating_signal().map(|signal| signal.saturating_add(128)));
                return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(125));
            }
            let signal = signals.wait().map_err(refused("wait for signals"))?;
            if signal != libc::SIGCHLD
                && let Some(signal) = Signal::from_named_raw(signal)
            {
                self.pass_on(signal);
            }
        }
    }

    /// As the first process of its namespace it is spared by signals that it has no handler for. Before it has one, they end it as they
    /// would end any other.
    fn pass_on(&self, signal: Signal) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid.as_raw_nonzero())).unwrap_or_default();
        let signal = if is_handled(&status, signal) { signal } else { Signal::KILL };
        // It fails if the process has ended, of which we hear next.
        let _ = pidfd_send_signal(&self.process, signal);
    }
}

/// Whether the process with this /proc/PID/status handles or ignores the signal.
fn is_handled(status: &str, signal: Signal) -> bool {
    let bit = signal.as_raw().checked_sub(1).and_then(|n| 1_u64.checked_shl(n.cast_unsigned())).unwrap_or(0);
    let mask = |name| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let has = |name| mask(name).and_then(|mask| u64::from_str_radix(mask, 16).ok()).is_some_and(|mask| mask & bit != 0);
    has("SigCgt:") || has("SigIgn:")
}

/// Goes into the jail and becomes the VMM. Only returns if that failed.
fn become_vmm(plan: &Plan, signals: &Signals, wait: OwnedFd, speak: &OwnedFd) -> JailError {
    match prepare(plan, wait, speak) {
        Ok((program, arguments)) => {
            signals.restore();
            JailError::Start { vmm: PathBuf::from(VMM), source: sys::exec(&program, &arguments) }
        }
        Err(error) => error,
    }
}

fn prepare(plan: &Plan, wait: OwnedFd, speak: &OwnedFd) -> Result<(CString, Vec<CString>), JailError> {
    // A session of its own has no terminal that it could write to as if it were typed.
    rustix::process::setsid().map_err(refused("make a session"))?;
    new_namespaces(UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET)?;
    rustix::system::sethostname(plan.name.as_bytes()).map_err(refused("set the host name"))?;
    privileges::set_limits(&plan.limits)?;
    root::enter(&plan.contents, &plan.place, plan.uid, plan.gid)?;
    rustix::process::chdir("/run").map_err(refused("change to the jail's /run"))?;
    // All this while the jailer moves the process into its cgroup, which takes the kernel as long.
    let mut wait = File::from(wait);
    await_word(&mut wait)?;
    new_namespaces(UnshareFlags::NEWCGROUP)?;
    close_others(&plan.keep)?;
    privileges::give_up_groups()?;
    if plan.user_namespace {
        // All other namespaces are the host's: whoever gets capabilities in this one has none in those.
        userns::enter()?;
        rustix::io::write(speak, &[MAP]).map_err(refused("speak to the jailer"))?;
        await_word(&mut wait)?;
    }
    privileges::give_up(plan.uid, plan.gid)?;
    // A change of the user undoes it, so it comes last.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(refused("follow the jailer's end"))?;
    if is_deserted(speak) {
        return Err(JailError::Unusable("the jailer has ended".into()));
    }
    let text = |text: &String| {
        CString::new(text.as_bytes()).map_err(|_| JailError::Unusable("an argument has a zero byte".into()))
    };
    let arguments: Result<_, _> = plan.arguments.iter().map(text).collect();
    Ok((text(&VMM.to_owned())?, arguments?))
}

/// Waits until the jailer says that this process may go on.
fn await_word(wait: &mut File) -> Result<(), JailError> {
    wait.read_exact(&mut [0]).map_err(refused("go on: the jailer has ended"))
}

/// Whether nobody has the other end of this pipe.
fn is_deserted(pipe: &OwnedFd) -> bool {
    let mut pipe = [PollFd::new(pipe, PollFlags::empty())];
    let polled = poll(&mut pipe, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_err() || pipe.iter().any(|pipe| pipe.revents().contains(PollFlags::ERR))
}

fn new_namespaces(flags: UnshareFlags) -> Result<(), JailError> {
    sys::unshare(flags).map_err(refused("make namespaces"))
}

/// Lets exec close all descriptors but the standard ones and those to keep.
fn close_others(keep: &[u32]) -> Result<(), JailError> {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let mut first = 3;
    for kept in keep {
        if let Some(last) = kept.checked_sub(1).filter(|last| *last >= first) {
            sys::close_at_exec(first, last).map_err(refused("close descriptors"))?;
        }
        first = kept.saturating_add(1);
    }
    sys::close_at_exec(first, u32::MAX).map_err(refused("close descriptors"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_without_a_handler_is_known() {
        let status = "Name:\tx\nSigIgn:\t0000000000001000\nSigCgt:\t0000000000004002\n";
        assert!(
            is_handled(status, Signal::TERM) && is_handled(status, Signal::INT) && is_handled(status, Signal::PIPE)
        );
        assert!(!is_handled(status, Signal::HUP) && !is_handled("", Signal::TERM));
    }
}
