//! `rackvisor-jailer`: starts one rackvisor where it can do no harm, and waits for its end.
//!
//! What it takes from the host it opens as root and hands over; what it starts is a user without any capability in a root, with namespaces,
//! that has this and nothing else. The order of steps, each before anything that depends on it:
//!
//! 1. The numbers of descriptors are taken ([`descriptors`]), paths are walked ([`trusted`]: nobody but root can change where they
//!    lead), the VM is locked and what an earlier run left is removed ([`instance`]).
//! 2. Files, devices and taps are opened, the parts of sysfs and the libraries found ([`sysfs`], [`libraries`]), the API socket is made.
//! 3. The cgroup is made ([`cgroup`]). The process that becomes the VMM is started in a new PID namespace, noted and put into it, and let go,
//!    while it goes into the jail.
//! 4. In it ([`launch`]): namespaces, resource limits, the root ([`root`]), last a namespace for users ([`userns`]), user and capabilities
//!    ([`privileges`]), exec.
//! 5. The jailer passes signals on until the VMM ends, then removes all that it has made.
//!
//! The VMM runs from a read-only mount of the host's file, as do the libraries of a dynamic one. That costs no memory, and an update of the package
//! changes nothing under a running VM. A static one (`make static`) needs no library in its root and no loader at its start: take
//! that for production. To run it from a descriptor alone (fexecve) would save the mount, but a dynamic program needs its loader by a
//! path, and the process would be called by the number of the descriptor.
//!
//! Why the jailer stays: somebody has to remove cgroup, socket and folder at the end, which the VMM cannot, and to keep its exit code. It is
//! a process that sleeps, with some 3 MiB, most of which all jailers share.

mod cgroup;
mod cli;
mod daemon;
mod descriptors;
mod error;
mod instance;
mod launch;
mod libraries;
mod plan;
mod privileges;
mod root;
mod sys;
mod sysfs;
mod trusted;
mod userns;

use std::process::ExitCode;

use clap::Parser;

use crate::cgroup::Cgroups;
use crate::cli::Cli;
use crate::daemon::Background;
use crate::descriptors::{Handed, OwnFile};
use crate::error::{JailError, refused};
use crate::instance::Instance;
use crate::launch::{Child, Plan, Waiting};
use crate::sys::Signals;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("rackvisor-jailer: {error}");
            ExitCode::from(error.code())
        }
    }
}

/// Builds the jail, and waits for the end of the VMM in it; gives its exit code. What was made is removed by dropping, last
/// made first.
fn run(cli: &Cli) -> Result<u8, JailError> {
    if !rustix::process::geteuid().is_root() {
        return Err(JailError::Unusable("only root can build a jail".into()));
    }
    let mut handed = Handed::reserve(&cli.keep_fd, &cli.tap)?;
    // From here on a signal waits until it can be passed on, so that nothing is left behind.
    let signals = Signals::block().map_err(refused("block signals"))?;
    let cgroups = Cgroups::plan(&cli.cgroup, &cli.cgroup_parent.0, cli.id.as_str())?;
    let log = cli.log_file.as_deref().map(daemon::open_log).transpose()?;
    let instance = Instance::claim(&cli.base, &cli.id)?;
    handed.open_taps()?;
    let (listener, _socket) = cli.api_socket.as_deref().map(descriptors::listen).transpose()?.unzip();
    let plan = plan::plan(cli, &instance, &mut handed, listener)?;
    let background = match (&log, cli.daemon) {
        (Some(log), true) => Some(Background::enter(log)?),
        _ => None,
    };
    let started = start(cli, &plan, &instance, &cgroups, &signals);
    if let Some(background) = background {
        background.tell(started.as_ref().map(drop));
    }
    // What the VMM has is its own from now on.
    drop((plan, handed));
    let (child, _pid_file) = started?;
    child.attend(&signals)
}

/// Starts the VMM in its jail.
fn start(
    cli: &Cli,
    plan: &Plan,
    instance: &Instance,
    cgroups: &Cgroups,
    signals: &Signals,
) -> Result<(Child, Option<OwnFile>), JailError> {
    let pid_file = cli.pid_file.as_deref().map(daemon::write_pid).transpose()?;
    instance.note_cgroups(&cgroups.folders())?;
    cgroups.make()?;
    let waiting = Waiting::start(plan, signals)?;
    instance.note_vmm(waiting.pid())?;
    cgroups.take(waiting.pid())?;
    Ok((waiting.go()?, pid_file))
}
