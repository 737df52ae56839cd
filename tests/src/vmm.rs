//! The real binary in a folder of its own.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rackvisor_api::client::Client;
use rackvisor_api::config::{DiskConfig, SerialConfig, SerialMode, TapFds, VmConfig};
use rackvisor_api::control::VmInfo;
use rackvisor_api::state::{Action, VmState};
use rackvisor_devices::net::open_queues;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Census, Guest, Jail, PATIENCE, all_are_jailed, eventually, filtered_threads, guest_folder};

/// The `rackvisor` under test: RACKVISOR_BIN, or the one that was built with this test.
pub fn rackvisor_binary() -> PathBuf {
    std::env::var_os("RACKVISOR_BIN").map_or_else(|| sibling("rackvisor"), PathBuf::from)
}

/// The `rackctl` next to it.
pub fn rackctl_binary() -> PathBuf {
    rackvisor_binary().with_file_name("rackctl")
}

/// A program next to the folder of this test binary.
fn sibling(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().parent().unwrap().with_file_name(name);
    assert!(path.exists(), "{} is missing: build the workspace, or set RACKVISOR_BIN", path.display());
    path
}

const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_NET_RAW: u64 = 1 << 13;

/// `rackvisor` without privileges in the network, with its standard input as descriptor 3.
fn without_net_admin() -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec setpriv --bounding-set=-net_admin,-net_raw \"$0\" \"$@\" 3<&0 0</dev/null"]);
    shell.arg(rackvisor_binary());
    shell
}

/// A running `rackvisor`. Dropping it kills it; after a failure its log is shown.
pub struct Rackvisor {
    /// The VMM, or the jailer that it is started by.
    process: Child,
    folder: TempDir,
    jail: Option<Jail>,
    /// Talks to it.
    pub client: Client,
}

impl Rackvisor {
    /// Starts it and waits until it answers.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts it with more arguments; in a jail if RACKVISOR_JAIL is set.
    pub fn start_with(arguments: &[&str]) -> Self {
        Self::start_with_devices(&[], arguments)
    }

    /// Starts it for a VM that has these devices of the host, which a jail is given at its start.
    pub fn start_for(devices: &[&Path]) -> Self {
        Self::start_with_devices(devices, &[])
    }

    fn start_with_devices(devices: &[&Path], arguments: &[&str]) -> Self {
        if !all_are_jailed() {
            return Self::start_by(Command::new(rackvisor_binary()).stdin(Stdio::null()), arguments);
        }
        let (guest, vhost) = (guest_folder(), Path::new("/dev/vhost-net"));
        let mut options = vec!["--share-ro", guest.to_str().unwrap()];
        for device in devices.iter().chain(vhost.exists().then_some(&vhost)) {
            options.extend(["--device", device.to_str().unwrap()]);
        }
        Self::start_jailed(Jail::new(), &options, arguments)
    }

    /// Starts it without privileges in the network; it inherits `tap` as descriptor 3.
    pub fn start_unprivileged(tap: OwnedFd, arguments: &[&str]) -> Self {
        let vmm = Self::start_by(without_net_admin().stdin(tap), arguments);
        let status = fs::read_to_string(format!("/proc/{}/status", vmm.pid())).unwrap();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim().to_owned();
        let bits = u64::from_str_radix(&effective, 16).unwrap();
        assert_eq!(bits & (CAP_NET_ADMIN | CAP_NET_RAW), 0, "it has privileges: {effective}");
        vmm
    }

    /// Starts it in a jail that has its folder and what `options` of the jailer say.
    pub fn start_jailed(jail: Jail, options: &[&str], arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        jail.give(folder.path());
        let share = ["--share", folder.path().to_str().unwrap()];
        let mut command = jail.command(&[&share, options].concat());
        Self::start_in(folder, Some(jail), &mut command, arguments)
    }

    fn start_by(command: &mut Command, arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), None, command, arguments)
    }

    fn start_in(folder: TempDir, jail: Option<Jail>, command: &mut Command, arguments: &[&str]) -> Self {
        let socket = folder.path().join("api.sock");
        let log = File::create(folder.path().join("log")).unwrap();
        let process = command
            .arg("--api-socket")
            .arg(&socket)
            .args(arguments)
            .current_dir(folder.path())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let client = Client::new(&socket).with_timeout(PATIENCE);
        let mut vmm = Self { process, folder, jail, client };
        eventually("rackvisor answers", || {
            assert_eq!(vmm.process.try_wait().unwrap(), None, "rackvisor ended at once: {}", vmm.log());
            vmm.client.version().ok()
        });
        vmm
    }

    /// A path in its folder, which is its working directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A disk image with this content.
    pub fn image(&self, name: &str, content: &[u8]) -> DiskConfig {
        fs::write(self.path(name), content).unwrap();
        self.give(name);
        DiskConfig::new(name, self.path(name))
    }

    /// Lets it write to a file in its folder, whoever its user is.
    pub fn give(&self, name: &str) {
        if let Some(jail) = &self.jail {
            jail.give(&self.path(name));
        }
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Its threads and descriptors.
    pub fn census(&self) -> Census {
        Census::of(self.pid())
    }

    /// The process id of the VMM.
    pub fn pid(&self) -> u32 {
        self.jail.as_ref().map_or_else(|| self.process.id(), |jail| jail.vmm().unwrap())
    }

    /// The process id that the VMM has for itself: 1 in a jail.
    pub fn own_pid(&self) -> u32 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let ids = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
        ids.split_whitespace().next_back().unwrap().parse().unwrap()
    }

    /// Its jail.
    ///
    /// # Panics
    /// If it has none.
    pub fn jail(&self) -> &Jail {
        self.jail.as_ref().unwrap()
    }

    /// The process that was started: the jailer's, if there is one.
    pub fn process(&mut self) -> &mut Child {
        &mut self.process
    }

    /// Defines and boots; describes the running VM.
    ///
    /// # Panics
    /// If it is not run, or a thread is not under a filter of system calls.
    pub fn boot(&self, config: &VmConfig) -> VmInfo {
        self.define(config);
        let info = self.client.act(Action::Boot).unwrap();
        if std::env::var("RACKVISOR_SECCOMP").is_ok_and(|mode| mode == "off") {
            return info;
        }
        // A thread is there a moment before it is under its filter.
        eventually("all threads are under filters", || {
            filtered_threads(self.pid()).iter().all(|(_, filtered)| *filtered).then_some(())
        });
        info
    }

    /// Defines. A jail has no network: taps are opened here and go with the request.
    fn define(&self, config: &VmConfig) {
        let (mut config, mut queues) = (config.clone(), Vec::new());
        for nic in config.nics.iter_mut().filter(|_| self.jail.is_some()) {
            let Some(tap) = nic.tap.take() else { continue };
            nic.tap_fds = Some(TapFds::Passed(nic.queues));
            queues.extend(open_queues(&tap, nic.queues).unwrap());
        }
        self.client.define_with_fds(&config, queues).unwrap();
    }

    /// Defines and boots with the console on a socket; gives the console.
    pub fn boot_with_console(&self, config: &VmConfig) -> Guest {
        let path = self.path("console.sock");
        let mut config = config.clone();
        config.serial = SerialConfig { mode: SerialMode::Socket, path: Some(path.clone()) };
        self.boot(&config);
        Guest::connect(&path)
    }

    /// Boots a Linux whose agent listens on the console.
    pub fn boot_linux(&self, config: &VmConfig) -> Guest {
        let mut guest = self.boot_with_console(config);
        guest.wait_ready();
        guest
    }

    /// Waits for a state and describes the VM in it.
    pub fn wait_for(&self, state: VmState) -> VmInfo {
        self.client.wait_for(&[state], Some(PATIENCE)).unwrap();
        self.client.describe().unwrap()
    }

    /// The state now.
    pub fn state(&self) -> VmState {
        self.client.state().unwrap()
    }

    /// Waits for an event of this kind (as the API names it) whose data is `wanted`; gives the data.
    ///
    /// # Panics
    /// With the events that came instead, after [`PATIENCE`].
    pub fn wait_for_event(&self, kind: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut events = self.client.events(Some(0), true).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut others = Vec::new();
        loop {
            match events.next_before(Some(deadline)) {
                Ok(Some(event)) => {
                    let event = serde_json::to_value(&event.what).unwrap();
                    if event["kind"] == kind && wanted(&event["data"]) {
                        return event["data"].clone();
                    }
                    others.push(event.to_string());
                }
                end => panic!("no such {kind}: {end:?} after\n{}", others.join("\n")),
            }
        }
    }

    /// The data of all events of this kind so far.
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let events = self.client.events(Some(0), false).unwrap();
        let events = events.map(|event| serde_json::to_value(event.unwrap().what).unwrap());
        events.filter(|event| event["kind"] == kind).map(|event| event["data"].clone()).collect()
    }

    /// What was counted, over all metrics whose line has each of these parts.
    ///
    /// # Panics
    /// If there is no such line.
    pub fn counted(&self, parts: &[&str]) -> u64 {
        let metrics = self.client.metrics().unwrap();
        let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64;
        let mine = |line: &&str| !line.starts_with('#') && parts.iter().all(|part| line.contains(part));
        let values: Vec<_> = metrics.lines().filter(mine).map(value).collect();
        assert!(!values.is_empty(), "no {parts:?} in {metrics}");
        values.iter().sum()
    }

    /// Kills it with SIGKILL and waits until the kernel has taken it apart.
    pub fn kill(mut self) -> TempDir {
        let vmm = Pid::from_raw(self.pid().cast_signed()).unwrap();
        kill_process(vmm, Signal::KILL).unwrap();
        self.process.wait().unwrap();
        let empty = tempfile::tempdir().unwrap();
        std::mem::replace(&mut self.folder, empty)
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(mut self) -> (ExitStatus, TempDir) {
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
        let status = eventually("rackvisor ends after SIGTERM", || self.process.try_wait().unwrap());
        let empty = tempfile::tempdir().unwrap();
        (status, std::mem::replace(&mut self.folder, empty))
    }

    /// What was counted, for a look at what hangs.
    fn show_metrics(&self) {
        let client = Client::new(self.client.socket()).with_timeout(Duration::from_secs(5));
        let Ok(metrics) = client.metrics() else { return };
        let counted = metrics.lines().filter(|line| !line.starts_with('#') && !line.ends_with(" 0"));
        eprintln!("--- metrics of rackvisor\n{}", counted.collect::<Vec<_>>().join("\n"));
    }

    fn show_log(&self) {
        eprintln!("--- log of rackvisor\n{}", fs::read_to_string(self.path("log")).unwrap_or_default());
    }
}

impl Drop for Rackvisor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_log();
            self.show_metrics();
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
