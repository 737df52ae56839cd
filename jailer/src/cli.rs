//! The command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, ValueEnum};

use crate::privileges::Limit;

/// Starts one rackvisor in a jail of its own: privileges in, none out.
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER)]
pub struct Cli {
    /// Name of the VM: letters, digits, `-`, `_` and `.`; also the host name in the jail.
    #[arg(long)]
    pub id: Id,
    /// User that the VMM runs as; not root. Each VM should have one of its own.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=0xffff_fffe))]
    pub uid: u32,
    /// Group that the VMM runs as; not root's.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=0xffff_fffe))]
    pub gid: u32,
    /// Folder for what the jails of this host have on it.
    #[arg(long, value_name = "FOLDER", default_value = "/run/rackvisor")]
    pub base: PathBuf,
    /// The program to jail; by default the rackvisor beside this one.
    #[arg(long, value_name = "PROGRAM")]
    pub vmm: Option<PathBuf>,
    /// Listen on this Unix socket, which becomes root's, mode 0600, and hand it to the VMM as `--api-fd`.
    #[arg(long, value_name = "SOCKET")]
    pub api_socket: Option<PathBuf>,
    /// Give the jail this device (LUN, /dev/vhost-net …) at the same path. /dev/kvm it always has.
    #[arg(long, value_name = "DEVICE")]
    pub device: Vec<PathBuf>,
    /// As --device, for reading only.
    #[arg(long, value_name = "DEVICE")]
    pub device_ro: Vec<PathBuf>,
    /// Give the jail this folder or file at the same path, to read and to write.
    #[arg(long, value_name = "PATH")]
    pub share: Vec<PathBuf>,
    /// As --share, for reading only: kernel, initrd, firmware.
    #[arg(long, value_name = "PATH")]
    pub share_ro: Vec<PathBuf>,
    /// Open this existing tap and hand it over as these descriptors (3 to 1023), one for each pair of queues: a NIC has it
    /// with `tap_fds = { inherited = [FD, …] }`.
    #[arg(long, value_name = "NAME=FD[,FD…]")]
    pub tap: Vec<TapOption>,
    /// Hand over this descriptor that the jailer was started with. All others are closed.
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(u32).range(3..=1023))]
    pub keep_fd: Vec<u32>,
    /// Limit by a file of cgroup v2, e.g. `memory.max=5G`, `cpu.max="200000 100000"`, `pids.max=64`,
    /// `io.max="8:16 rbps=1048576"`. On a host with cgroup v1 these four are translated. Without any no cgroup is made.
    #[arg(long, value_name = "FILE=VALUE")]
    pub cgroup: Vec<CgroupOption>,
    /// The cgroup, below the root of the hierarchy, in which that of the VM is made.
    #[arg(long, value_name = "PATH", default_value = "rackvisor")]
    pub cgroup_parent: CgroupPath,
    /// Resource limit (setrlimit), e.g. `nofile=1024`; `core` is 0 unless it is given.
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub rlimit: Vec<Limit>,
    /// The user namespace of the VMM: `private`, one of its own that has only its user and group, so that a capability that it
    /// should never get is none on the host; or `host`, for --api-allow-uid and --api-allow-gid of rackvisor, as the kernel does
    /// not tell a process who asks from outside of its user namespace, and for kernels without.
    #[arg(long, value_name = "NAMESPACE", value_enum, default_value_t = UserNamespace::Private)]
    pub userns: UserNamespace,
    /// Go to the background once the VMM has started, and write to --log-file.
    #[arg(long, requires = "pid_file", requires = "log_file")]
    pub daemon: bool,
    /// Write the process id of the jailer, which passes signals on to the VMM, here.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Append what the VMM and the jailer say to this file; it is root's.
    #[arg(long, value_name = "FILE", requires = "daemon")]
    pub log_file: Option<PathBuf>,
    /// Arguments for rackvisor.
    #[arg(last = true)]
    pub arguments: Vec<String>,
}

const AFTER: &str = "\
The jail is a root of its own in memory, with namespaces for mounts, processes, IPC, host name, cgroups, network and users. The VMM
has no capability and cannot get any. Its working directory is /run, which is BASE/ID/run on the host. BASE/ID/vmm has its process id.
If the jailer dies, so does the VM. What that leaves behind the next run with the same id removes.

Exit codes:
  0-4, 101, 159  those of rackvisor
  2              the command line is wrong, or rackvisor's is
  121            somebody but root could change what a path leads to; nothing was done
  122            the VM runs already
  125            the jail cannot be built; the last line on standard error says why
  126            the VMM cannot be started in it
  128+N          signal N ended the VMM

Example:
  rackvisor-jailer --id db01 --uid 2001 --gid 2001 --device /dev/mapper/mpatha --tap tap0=3 --share-ro /boot \\
    --api-socket /run/rackvisor/db01.sock --cgroup memory.max=5G --cgroup pids.max=64 -- --config /boot/db01.toml --boot";

/// Which user namespace the VMM is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UserNamespace {
    /// One of its own.
    Private,
    /// The jailer's.
    Host,
}

/// The name of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id(String);

impl Id {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=64).contains(&text.len()) && !text.starts_with(['-', '.']) && text.bytes().all(plain)
}

impl FromStr for Id {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let why = "1 to 64 letters, digits, `-`, `_` and `.`, the first a letter, a digit or `_`";
        if is_name(text) { Ok(Self(text.to_owned())) } else { Err(why) }
    }
}

/// A path below the root of the cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupPath(pub Vec<String>);

impl FromStr for CgroupPath {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<_> = text.split('/').map(str::to_owned).collect();
        let good = parts.iter().all(|part| is_name(part));
        if good { Ok(Self(parts)) } else { Err("names with `/` between them, such as rackvisor/batch") }
    }
}

/// A setting of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupOption {
    /// The file, which begins with its controller.
    pub file: String,
    /// What is written to it.
    pub value: String,
}

impl FromStr for CgroupOption {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let why = "FILE=VALUE, where FILE begins with its controller: memory.max=5G";
        let (file, value) = text.split_once('=').ok_or(why)?;
        let controlled =
            file.split_once('.').is_some_and(|(controller, rest)| !controller.is_empty() && !rest.is_empty());
        let good =
            is_name(file) && controlled && !value.is_empty() && !value.contains('\n') && !file.starts_with("cgroup.");
        if good { Ok(Self { file: file.to_owned(), value: value.to_owned() }) } else { Err(why) }
    }
}

/// A tap, and the descriptors that its queues become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapOption {
    /// The interface.
    pub name: String,
    /// The numbers.
    pub fds: Vec<u32>,
}

impl FromStr for TapOption {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let why = "NAME=FD[,FD…] with an interface's name and descriptors from 3 to 1023: tap0=3";
        let (name, fds) = text.rsplit_once('=').ok_or(why)?;
        let fds: Result<Vec<u32>, _> = fds.split(',').map(str::parse).collect();
        let fds = fds.map_err(|_| why)?;
        let good = (1..=15).contains(&name.len()) && !name.contains('/') && name != "." && name != "..";
        if good && fds.iter().all(|fd| (3..=1023).contains(fd)) {
            Ok(Self { name: name.to_owned(), fds })
        } else {
            Err(why)
        }
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
        manual::check(Cli::command());
    }

    #[test]
    fn an_id_cannot_lead_out_of_its_folder() {
        for bad in ["", ".", "..", "a/b", "../a", "-a", ".a", "a b", "a\n", "ä", &"a".repeat(65)] {
            assert!(Id::from_str(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "db01", "A_b-c.d", &"a".repeat(64)] {
            assert_eq!(Id::from_str(good).unwrap().as_str(), good);
        }
        for bad in ["", "/", "/a", "a/", "a//b", "a/../b"] {
            assert!(CgroupPath::from_str(bad).is_err(), "{bad:?}");
        }
        assert_eq!(CgroupPath::from_str("a/b").unwrap().0, ["a", "b"]);
    }

    #[test]
    fn nobody_is_jailed_as_root_or_as_nobody() {
        let with = |uid: &str, gid: &str| Cli::try_parse_from(["x", "--id", "a", "--uid", uid, "--gid", gid]);
        assert!(with("1", "1").is_ok());
        for bad in ["0", "4294967295", "-1", "root"] {
            assert!(with(bad, "1").is_err() && with("1", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn taps_and_settings_of_cgroups_are_taken_apart() {
        let tap = TapOption::from_str("tap0=3,4").unwrap();
        assert_eq!((tap.name.as_str(), tap.fds.as_slice()), ("tap0", [3, 4].as_slice()));
        for bad in ["tap0", "tap0=", "tap0=2", "tap0=1024", "=3", "a/b=3", "..=3", "sixteen-letters-=3"] {
            assert!(TapOption::from_str(bad).is_err(), "{bad}");
        }
        let option = CgroupOption::from_str("io.max=8:0 rbps=5").unwrap();
        assert_eq!((option.file.as_str(), option.value.as_str()), ("io.max", "8:0 rbps=5"));
        for bad in [
            "memory.max",
            "memory=1",
            "memory.max=",
            "../x.y=1",
            "cgroup.procs=1",
            ".max=1",
            "a/b.c=1",
            "memory.max=1\n2",
        ] {
            assert!(CgroupOption::from_str(bad).is_err(), "{bad}");
        }
    }
}
