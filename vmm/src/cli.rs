//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use rackvisor::confinement::Allowed;
use rackvisor::seccomp::Mode;
use rackvisor_devices::ThreadSpawner;
use tracing_subscriber::EnvFilter;

use crate::log::{Destination, Log};

/// Virtual machine monitor for SAN-backed, SDN-connected datacenters: one process runs one VM.
#[derive(Debug, Parser)]
#[command(version, subcommand_negates_reqs = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do instead of serving the API.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: Serve,
    /// What to log, e.g. `warn` or `info,rackvisor::control=debug`.
    #[arg(long, global = true, value_name = "FILTER", env = "RACKVISOR_LOG", default_value = "info")]
    pub log: String,
    /// How log lines look.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "human")]
    pub log_format: LogFormat,
    /// What happens to a thread that makes a system call which it is not meant to make.
    #[arg(long, global = true, value_name = "MODE", env = "RACKVISOR_SECCOMP", default_value = "on")]
    pub seccomp: Seccomp,
    /// Let the process open nothing (Landlock) but this file or folder with all beneath it, what other such options name, and what
    /// every VM needs. For disks, consoles and variables of firmware.
    #[arg(long, global = true, value_name = "PATH")]
    pub landlock: Vec<PathBuf>,
    /// As --landlock, for reading only: kernel, initrd, firmware.
    #[arg(long, global = true, value_name = "PATH")]
    pub landlock_ro: Vec<PathBuf>,
    /// Where to log: stderr, file:PATH (opened anew after SIGHUP), journald or syslog.
    #[arg(long, global = true, value_name = "WHERE", default_value = "stderr")]
    pub log_to: Destination,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  the VM ended as it was asked to
  1  something failed; the last line on standard error says what
  2  the command line is wrong
  3  the guest crashed
  4  doctor: this host cannot run stock kernels
  101  the control thread of the VMM panicked: see --crash-report and the log
  159  a thread made a system call that it is not meant to make, which standard error tells

Examples:
  rackvisor --api-socket /run/rackvisor/db01.sock
  rackvisor --api-socket /run/rackvisor/db01.sock --config db01.toml --boot
  rackvisor run db01.toml";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line for people.
    Human,
    /// One line without time stamps, for those who have their own, as journald does.
    Plain,
    /// One line of JSON, for programs.
    Json,
}

/// What filters of system calls do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Seccomp {
    /// The call is not made, and the program says which it was and ends.
    On,
    /// The call is made, and the kernel logs it: for diagnosis.
    Log,
    /// There are no filters.
    Off,
}

impl From<Seccomp> for Mode {
    fn from(choice: Seccomp) -> Self {
        match choice {
            Seccomp::On => Self::On,
            Seccomp::Log => Self::Log,
            Seccomp::Off => Self::Off,
        }
    }
}

/// What to do instead of serving the API.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot the VM that FILE describes, with its console on this terminal; Ctrl-A X leaves.
    Run {
        /// Configuration, JSON or TOML.
        file: PathBuf,
        /// Give the VM a TPM 2.0 with its state in FOLDER, a new one if there is no such folder: starts a swtpm, which ends
        /// with the VM and logs to swtpm.log there.
        #[arg(long, value_name = "FOLDER")]
        tpm: Option<PathBuf>,
    },
    /// Examine whether this host's KVM can run stock kernels, and say what to do if not.
    Doctor,
}

/// How to serve the API.
#[derive(Debug, Args)]
pub struct Serve {
    /// Unix socket to serve the API on.
    #[arg(long, value_name = "SOCKET", required_unless_present = "api_fd")]
    pub api_socket: Option<PathBuf>,
    /// Serve the API on the listening Unix socket that this process was started with as descriptor FD: by the jailer, or
    /// by systemd as 3.
    #[arg(long, value_name = "FD", conflicts_with = "api_socket")]
    pub api_fd: Option<u32>,
    /// Permissions of the API socket, in octal.
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = mode, conflicts_with = "api_fd")]
    pub api_socket_mode: u32,
    /// Owner of the API socket: user and group ids, either of which may be left out.
    #[arg(long, value_name = "UID:GID", value_parser = owner, conflicts_with = "api_fd")]
    pub api_socket_owner: Option<Owner>,
    /// Serve clients of this user id and those of other such options only, as the kernel tells them.
    #[arg(long, value_name = "UID")]
    pub api_allow_uid: Vec<u32>,
    /// Serve clients of this group id and those of other such options only.
    #[arg(long, value_name = "GID")]
    pub api_allow_gid: Vec<u32>,
    /// Connections that are served at a time.
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub api_connections: u16,
    /// At the end of this file, leave a report (a line of JSON) when a thread of the VMM panics.
    #[arg(long, value_name = "FILE")]
    pub crash_report: Option<PathBuf>,
    /// Define the VM from this file, JSON or TOML, before the first client is heard.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Boot the VM at once.
    #[arg(long, requires = "config")]
    pub boot: bool,
}

/// Whose a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user, if not this process's.
    pub uid: Option<u32>,
    /// The group, if not this process's.
    pub gid: Option<u32>,
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("000 to 777 are possible".into()),
    }
}

fn owner(text: &str) -> Result<Owner, String> {
    let id = |text: &str| match text {
        "" => Ok(None),
        number => {
            number.parse().map(Some).map_err(|_| "numbers are wanted, such as 1000:1000, 1000 or :1000".to_owned())
        }
    };
    let (uid, gid) = text.split_once(':').unwrap_or((text, ""));
    Ok(Owner { uid: id(uid)?, gid: id(gid)? })
}

impl Cli {
    /// What the process may open, if the command line says so.
    pub fn allowed(&self) -> Option<Allowed> {
        let named = !self.landlock.is_empty() || !self.landlock_ro.is_empty();
        let file = match &self.command {
            Some(Command::Run { file, .. }) => Some(file),
            _ => self.serve.config.as_ref(),
        };
        let log = match &self.log_to {
            Destination::File(path) => Some(path),
            _ => None,
        };
        named.then(|| Allowed {
            write: self.landlock.clone(),
            read: self.landlock_ro.iter().chain(file).cloned().collect(),
            logs: log.into_iter().chain(&self.serve.crash_report).cloned().collect(),
            socket: self.serve.api_socket.clone(),
        })
    }

    /// Starts logging as the command line says, in a thread of `spawner`'s.
    ///
    /// # Errors
    /// The log cannot be opened.
    pub fn start_log(&self, spawner: &dyn ThreadSpawner) -> std::io::Result<Log> {
        let filter = EnvFilter::try_new(&self.log).unwrap_or_else(|error| {
            eprintln!("rackvisor: --log {}: {error}; logging `info`", self.log);
            EnvFilter::new("info")
        });
        Log::start(&self.log_to, self.log_format, filter, spawner)
    }
}

#[cfg(test)]
#[path = "../../resources/man/pages.rs"]
mod manual;

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_manual_pages_are_those_of_the_command_line() {
        manual::check(Cli::command().name("rackvisor"));
    }

    #[test]
    fn a_socket_is_needed_to_serve_and_not_needed_otherwise() {
        assert!(Cli::try_parse_from(["rackvisor"]).is_err());
        assert!(Cli::try_parse_from(["rackvisor", "--api-socket", "s"]).is_ok());
        assert!(Cli::try_parse_from(["rackvisor", "--api-fd", "3"]).is_ok());
        assert!(Cli::try_parse_from(["rackvisor", "--api-socket", "s", "--api-fd", "3"]).is_err());
        assert!(Cli::try_parse_from(["rackvisor", "--api-socket", "s", "--boot"]).is_err());
        assert!(Cli::try_parse_from(["rackvisor", "run", "vm.toml"]).is_ok());
        assert!(Cli::try_parse_from(["rackvisor", "run", "vm.toml", "--tpm", "state"]).is_ok());
        assert!(Cli::try_parse_from(["rackvisor", "doctor"]).is_ok());
    }

    #[test]
    fn what_the_program_itself_opens_is_allowed_with_what_landlock_names() {
        let parse = |more: &[&str]| Cli::try_parse_from([&["rackvisor", "--api-socket", "s"], more].concat()).unwrap();
        assert!(parse(&["--config", "c"]).allowed().is_none());
        let options =
            ["--landlock", "a", "--landlock-ro", "b", "--config", "c", "--crash-report", "d", "--log-to", "file:e"];
        let allowed = parse(&options).allowed().unwrap();
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!((allowed.write, allowed.read), (paths(&["a"]), paths(&["b", "c"])));
        assert_eq!((allowed.logs, allowed.socket), (paths(&["e", "d"]), Some("s".into())));
    }

    #[test]
    fn modes_are_octal_and_owners_are_numbers() {
        assert_eq!(mode("660"), Ok(0o660));
        assert!(mode("1777").is_err() && mode("rw").is_err());
        assert_eq!(owner("1:2"), Ok(Owner { uid: Some(1), gid: Some(2) }));
        assert_eq!(owner(":2"), Ok(Owner { uid: None, gid: Some(2) }));
        assert_eq!(owner("1"), Ok(Owner { uid: Some(1), gid: None }));
        assert!(owner("root").is_err());
    }
}
