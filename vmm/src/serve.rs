//! The two ways to run a VM: served over a socket, or on this terminal.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use rackvisor::VmConfig;
use rackvisor::assembly::{HostOptions, StdioHooks};
use rackvisor::control::{ControlLoop, LastWord, Lifetime, Mailbox, Message};
use rackvisor::seccomp::{Filters, Policy};
use rackvisor::telemetry::crash::report_panics;
use rackvisor_api::config::{SerialConfig, SerialMode};
use rackvisor_api::server::{Allowed, Limits, Server, SocketOptions};
use rackvisor_api::state::VmState;
use rackvisor_devices::console::RawTerminal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::cli::Serve;
use crate::swtpm::{Swtpm, SwtpmError};

/// The guest crashed.
const EXIT_CRASHED: u8 = 3;
/// The host cannot run stock kernels.
pub const EXIT_UNFIT: u8 = 4;

type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;

/// Serves the API until a signal ends the process. SIGHUP sets `reopen_log`.
pub fn serve(options: &Serve, filters: &Filters, host: HostOptions, reopen_log: Arc<AtomicBool>) -> Outcome {
    let config = options.config.as_deref().map(VmConfig::from_file).transpose()?;
    let mut control = ControlLoop::new(Arc::new(filters.clone()), Lifetime::Served, host)?;
    if let Some(file) = &options.crash_report {
        report_panics(file, control.handle().telemetry, filters)?;
    }
    // Before anybody can connect, who then sends one: it would end the process as if it had crashed.
    control.end_on(signals(&[SIGTERM, SIGINT])?);
    // Also for the sake of a terminal that goes away, which must not take the VM along.
    signal_hook::flag::register(SIGHUP, reopen_log)?;
    let server = listen(options)?;
    if let Some(config) = config {
        control.start_with(config, options.boot);
    }
    let for_api = filters.clone();
    let server = server.start(Arc::new(control.handle()), move || Ok(for_api.enter(Policy::Api, "api")?))?;
    filters.enter(Policy::Control, "main")?;
    let last = control.run()?;
    server.stop();
    match last.failure {
        Some(problem) => Err(problem.into()),
        None => Ok(ExitCode::SUCCESS),
    }
}

fn listen(options: &Serve) -> Result<Server, Box<dyn std::error::Error>> {
    let owner = options.api_socket_owner;
    let file = SocketOptions {
        mode: options.api_socket_mode,
        uid: owner.and_then(|owner| owner.uid),
        gid: owner.and_then(|owner| owner.gid),
    };
    let server = match (options.api_fd, options.api_socket.as_deref()) {
        (Some(number), _) => Server::inherit(number)?,
        (None, Some(socket)) => Server::bind_with(socket, file)?,
        (None, None) => return Err("--api-socket is missing".into()),
    };
    let limits = Limits { connections: options.api_connections.into(), ..Limits::default() };
    let server = server.with_limits(limits);
    let allowed = Allowed { uids: options.api_allow_uid.clone(), gids: options.api_allow_gid.clone() };
    Ok(if allowed == Allowed::default() { server } else { server.allow(allowed)? })
}

/// Boots the VM of `file` with its console on this terminal, and ends with it. `tpm` is where the state of a TPM is that it gets besides.
pub fn run(file: &Path, tpm: Option<&Path>, filters: &Filters, host: HostOptions) -> Outcome {
    let mut config = VmConfig::from_file(file)?;
    if tpm.is_some() && config.tpm.is_some() {
        return Err(SwtpmError::Twice.into());
    }
    let swtpm = tpm.map(Swtpm::start).transpose()?;
    config.tpm = swtpm.as_ref().map(Swtpm::config).or(config.tpm);
    config.serial = SerialConfig { mode: SerialMode::Stdio, path: None };
    // The loop makes the mailbox that the hook, which the loop is made with, writes to.
    let mailbox = Arc::new(OnceLock::<Mailbox>::new());
    let theirs = Arc::clone(&mailbox);
    let leave = move || {
        if let Some(mailbox) = theirs.get() {
            mailbox.send(Message::Terminate);
        }
    };
    let stdio = StdioHooks { escape: Some(Arc::new(leave)) };
    let options = HostOptions { stdio, ..host };
    let mut control = ControlLoop::new(Arc::new(filters.clone()), Lifetime::WithGuest, options)?;
    let _ = mailbox.set(control.handle().mailbox);
    control.end_on(signals(&[SIGTERM, SIGINT, SIGHUP])?);
    control.start_with(config, true);
    let terminal = RawTerminal::new()?;
    filters.enter(Policy::Control, "main")?;
    let last = control.run();
    drop(terminal);
    match last? {
        LastWord { failure: Some(problem), .. } => Err(problem.into()),
        LastWord { state: VmState::Crashed, cause, .. } => {
            eprintln!("rackvisor: the guest crashed: {}", cause.unwrap_or_default());
            Ok(ExitCode::from(EXIT_CRASHED))
        }
        LastWord { .. } => Ok(ExitCode::SUCCESS),
    }
}

/// A stream that becomes readable when one of these signals arrives.
fn signals(which: &[i32]) -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    for signal in which {
        signal_hook::low_level::pipe::register(*signal, writer.try_clone()?)?;
    }
    Ok(reader)
}
