//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args, Parser, Subcommand};
use clap_complete::Shell;
use rackvisor_api::config::{CacheMode, CpuList, Guid, Link, MacAddr, OnError, ReservationKey};
use rackvisor_api::size::ByteSize;
use rackvisor_api::span::Span;
use rackvisor_api::state::VmState;
use serde::de::DeserializeOwned;
use serde_json::Value;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused: the message says why and what to do
  2  wrong usage
  3  nobody answers on the socket, or the answer cannot be understood
  4  not within the time given";

/// Drive a Rackvisor virtual machine.
///
/// Each rackvisor process runs one VM and listens on one Unix socket. Say which with --socket, or once for all with
/// the environment variable RACKVISOR_SOCKET.
#[derive(Debug, Parser)]
#[command(name = "rackctl", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub struct Cli {
    /// The API socket of the VM
    #[arg(short, long, env = "RACKVISOR_SOCKET", value_name = "PATH", global = true, hide_env_values = true)]
    pub socket: Option<PathBuf>,

    /// Print JSON, as the API gives it; events one to a line
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the versions of rackctl and of the VMM
    Version,
    /// Define the VM from a JSON or TOML file, or replace its definition
    Define {
        /// The file (*.toml is TOML, everything else JSON); - reads JSON from standard input. Relative paths in it
        /// start at the working directory of the VMM
        file: PathBuf,
        /// A descriptor of a tap that rackctl was started with, which is passed to the VMM. Once for each that the file
        /// wants (tap_fds = { passed = … }), in the order of the NICs
        #[arg(long, value_name = "NUMBER")]
        tap_fd: Vec<u32>,
    },
    /// Describe the VM: state, configuration, devices
    Show,
    /// Change the VM, also while the guest runs
    #[command(group(ArgGroup::new("change").required(true).multiple(true)))]
    Patch {
        /// Another generation ID, such as 324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87: the guest is told that it is a copy
        #[arg(long, value_name = "GUID", group = "change")]
        generation_id: Option<Guid>,
        /// How much memory the balloon is to take from the guest, such as 512MiB
        #[arg(long, value_name = "SIZE", group = "change")]
        balloon: Option<ByteSize>,
    },
    /// Build the machine and start the guest
    Boot,
    /// Stop the guest where it is
    Pause,
    /// Let a paused guest go on
    Resume,
    /// Restart the guest as its reset line would
    Reset,
    /// Press the power button: the guest shuts itself down, if it wants to
    PowerButton {
        /// Wait until the VM has stopped
        #[arg(long)]
        wait: bool,
        /// Give up waiting after this many seconds
        #[arg(long, value_name = "SECONDS", value_parser = seconds, requires = "wait")]
        timeout: Option<Duration>,
    },
    /// Press the sleep button
    SleepButton,
    /// End the guest now; what it wrote is flushed to its disks
    Shutdown,
    /// Inject a non-maskable interrupt: most guests answer with a crash dump
    Nmi,
    /// Drop the definition of the VM; its disks and files stay
    Forget,
    /// List, show and change disks
    #[command(subcommand)]
    Disk(DiskCommand),
    /// List groups of disks that share limits, and change their limits
    #[command(subcommand)]
    Group(GroupCommand),
    /// List, show and change network interfaces
    #[command(subcommand)]
    Nic(NicCommand),
    /// Print what happened to the VM (the last 1024 events are kept)
    Events {
        /// Go on with new events as they come
        #[arg(short, long)]
        follow: bool,
        /// Begin after the event with this number
        #[arg(long, value_name = "ID")]
        after: Option<u64>,
    },
    /// Print the metrics of the VM and of its process (OpenMetrics)
    Metrics,
    /// Print what every part of the VM is doing, as JSON
    Inspect {
        /// A part, such as devices/root or vcpus/0; default: all of them
        #[arg(default_value = "")]
        part: String,
    },
    /// Print the OpenAPI document of the server
    Openapi,
    /// Wait until the VM is in one of these states, and print in which
    Wait {
        /// The states
        #[arg(required = true, value_parser = state())]
        states: Vec<VmState>,
        /// Give up after this many seconds
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        timeout: Option<Duration>,
    },
    /// Print the completion script of a shell, such as: source <(rackctl completion bash)
    Completion {
        /// The shell
        shell: Shell,
    },
}

/// What to do with disks.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// List the disks
    List,
    /// Describe a disk
    Show {
        /// The id of the disk
        id: String,
    },
    /// Add a disk, or replace the one with this id
    Add {
        /// The id of the disk
        id: String,
        /// The block device or raw image, as the VMM finds it
        path: PathBuf,
        /// Its properties
        #[command(flatten)]
        options: DiskOptions,
    },
    /// Change a disk; without options, read its size again
    Patch {
        /// The id of the disk
        id: String,
        /// Another block device or raw image
        #[arg(long)]
        path: Option<PathBuf>,
        /// Its properties
        #[command(flatten)]
        options: DiskOptions,
        /// Put a property back to its default (may be given several times)
        #[arg(long, value_name = "PROPERTY", value_parser = ["read_only", "queues", "queue_size", "direct", "serial", "slot", "boot_index", "cache", "wwid", "reservation", "on_error", "stall_after", "limits", "group", "affinity"])]
        unset: Vec<String>,
    },
    /// Remove a disk; what is on it stays
    Remove {
        /// The id of the disk
        id: String,
    },
}

/// Properties of a disk.
#[derive(Debug, Args)]
pub struct DiskOptions {
    /// Let the guest read only
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub read_only: Option<bool>,
    /// Request queues, 1 to 32
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,
    /// Entries of each queue: a power of two, 16 to 1024
    #[arg(long, value_name = "N")]
    pub queue_size: Option<u16>,
    /// Bypass the page cache of the host
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub direct: Option<bool>,
    /// The serial number that the guest sees, at most 20 bytes
    #[arg(long)]
    pub serial: Option<String>,
    /// The PCI slot, 1 to 30
    #[arg(long, value_name = "N")]
    pub slot: Option<u8>,
    /// The place in the boot order of firmware, the lowest first
    #[arg(long, value_name = "N")]
    pub boot_index: Option<u16>,
    /// When a write counts as done
    #[arg(long, value_parser = one_of::<CacheMode>(&["writeback", "writethrough"]))]
    pub cache: Option<CacheMode>,
    /// Refuse any LUN but the one with this world-wide identifier
    #[arg(long)]
    pub wwid: Option<String>,
    /// Keep other hosts from writing the LUN; this is the key of this host, such as 0x1a2b
    #[arg(long, value_name = "KEY")]
    pub reservation: Option<ReservationKey>,
    /// Take the LUN away from the host that has it
    #[arg(long, requires = "reservation")]
    pub preempt: bool,
    /// The socket of a qemu-pr-helper that makes the reservation, where the VMM lacks the privileges
    #[arg(long, value_name = "SOCKET", requires = "reservation")]
    pub reservation_helper: Option<PathBuf>,
    /// What happens when the host reports an I/O error
    #[arg(long, value_parser = one_of::<OnError>(&["report", "stop", "enospc"]))]
    pub on_error: Option<OnError>,
    /// How long a request may take before an event says so, such as 30s
    #[arg(long, value_name = "TIME")]
    pub stall_after: Option<Span>,
    /// Limits per second
    #[command(flatten)]
    pub limits: LimitOptions,
    /// The group whose limits the disk shares
    #[arg(long)]
    pub group: Option<String>,
    /// Host CPUs of the worker threads, such as 0-3,8: one list for all queues, or one for each
    #[arg(long, value_name = "CPUS")]
    pub affinity: Vec<CpuList>,
}

/// Limits on what a disk, or a group of disks, may do. 0 takes a limit away.
#[derive(Debug, Args)]
pub struct LimitOptions {
    /// Requests per second
    #[arg(long, value_name = "N")]
    pub ops: Option<u64>,
    /// Requests that may come at once after a pause
    #[arg(long, value_name = "N")]
    pub ops_burst: Option<u64>,
    /// Bytes per second, such as 100MiB
    #[arg(long, value_name = "SIZE")]
    pub bytes: Option<ByteSize>,
    /// Bytes that may come at once after a pause
    #[arg(long, value_name = "SIZE")]
    pub bytes_burst: Option<ByteSize>,
}

/// What to do with groups of disks that share limits. They are defined with the VM.
#[derive(Debug, Subcommand)]
pub enum GroupCommand {
    /// List the groups
    List,
    /// Describe a group
    Show {
        /// The id of the group
        id: String,
    },
    /// Change the limits of a group, also while the guest runs
    Patch {
        /// The id of the group
        id: String,
        /// Its limits
        #[command(flatten)]
        limits: LimitOptions,
    },
}

/// What to do with network interfaces.
#[derive(Debug, Subcommand)]
pub enum NicCommand {
    /// List the NICs
    List,
    /// Describe a NIC
    Show {
        /// The id of the NIC
        id: String,
    },
    /// Add a NIC, or replace the one with this id
    Add {
        /// The id of the NIC
        id: String,
        /// The tap interface of the host
        tap: String,
        /// The Ethernet address, such as 52:54:00:12:34:56
        mac: MacAddr,
        /// Its properties
        #[command(flatten)]
        options: NicOptions,
    },
    /// Tell the network where a NIC is, as after a move
    Announce {
        /// The id of the NIC
        id: String,
    },
    /// Change a NIC; while the guest runs, only its link and its limits
    Patch {
        /// The id of the NIC
        id: String,
        /// Another tap interface
        #[arg(long)]
        tap: Option<String>,
        /// Another Ethernet address
        #[arg(long)]
        mac: Option<MacAddr>,
        /// Its properties
        #[command(flatten)]
        options: NicOptions,
        /// Put a property back to its default (may be given several times)
        #[arg(long, value_name = "PROPERTY", value_parser = ["queues", "queue_size", "mtu", "link", "slot", "boot_index", "antispoof", "vhost", "rss", "rx_limits", "tx_limits"])]
        unset: Vec<String>,
    },
    /// Remove a NIC; its tap stays
    Remove {
        /// The id of the NIC
        id: String,
    },
}

/// Properties of a NIC.
#[derive(Debug, Args)]
pub struct NicOptions {
    /// Drop what the guest sends under another address
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub antispoof: Option<bool>,
    /// Let the guest choose the queue of each frame it receives (RSS)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub rss: Option<bool>,
    /// Have the host's kernel move the frames (vhost-net)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub vhost: Option<bool>,
    /// Frames per second that the guest may receive; 0: no limit
    #[arg(long, value_name = "N")]
    pub rx_packets: Option<u64>,
    /// Bytes per second that the guest may receive, such as 100MiB; 0: no limit
    #[arg(long, value_name = "SIZE")]
    pub rx_bytes: Option<ByteSize>,
    /// Frames per second that the guest may send; 0: no limit
    #[arg(long, value_name = "N")]
    pub tx_packets: Option<u64>,
    /// Bytes per second that the guest may send; 0: no limit
    #[arg(long, value_name = "SIZE")]
    pub tx_bytes: Option<ByteSize>,
    /// Pairs of queues, 1 to 16
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,
    /// Entries of each queue: a power of two, 16 to 1024
    #[arg(long, value_name = "N")]
    pub queue_size: Option<u16>,
    /// The MTU that the guest is told, 68 to 65535
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,
    /// Plug the cable in or out
    #[arg(long, value_parser = one_of::<Link>(&["up", "down"]))]
    pub link: Option<Link>,
    /// The PCI slot, 1 to 30
    #[arg(long, value_name = "N")]
    pub slot: Option<u8>,
    /// The place in the boot order of firmware, the lowest first
    #[arg(long, value_name = "N")]
    pub boot_index: Option<u16>,
}

/// One of these words, which are also what the API calls them.
fn one_of<T: DeserializeOwned + Clone + Send + Sync + 'static>(
    words: &'static [&'static str],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(words).try_map(|word| serde_json::from_value(Value::String(word)))
}

fn state() -> impl TypedValueParser<Value = VmState> {
    PossibleValuesParser::new(VmState::ALL.map(VmState::as_str))
        .try_map(|word| serde_json::from_value(Value::String(word)))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
#[path = "../../../resources/man/pages.rs"]
mod manual;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_manual_pages_are_those_of_the_command_line() {
        manual::check(Cli::command());
    }

    #[test]
    fn words_and_numbers_of_the_command_line_become_the_types_of_the_api() {
        let cli = Cli::parse_from(["rackctl", "-s", "x", "wait", "stopped", "crashed", "--timeout", "1.5"]);
        let Command::Wait { states, timeout } = cli.command else { panic!("{cli:?}") };
        assert_eq!(states, [VmState::Stopped, VmState::Crashed]);
        assert_eq!(timeout, Some(Duration::from_millis(1500)));
        for bad in ["-1", "1e30", "NaN", "soon"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
        assert!(Cli::try_parse_from(["rackctl", "wait", "flying"]).is_err());
        assert!(Cli::try_parse_from(["rackctl", "nic", "patch", "net0", "--link", "sideways"]).is_err());
    }
}
