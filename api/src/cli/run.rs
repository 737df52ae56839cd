//! What each command does.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use clap::CommandFactory;
use clap::error::ErrorKind;
use rackvisor_api::client::Client;
use rackvisor_api::config::{BalloonPatch, Patch, VmPatch};
use rackvisor_api::descriptors::OwnDescriptors;
use rackvisor_api::problem::{Code, Problem};
use rackvisor_api::server::MAX_BODY;
use rackvisor_api::state::{Action, VmState};
use rackvisor_api::{VERSION, VmConfig};
use serde_json::json;

use crate::args::{Cli, Command};
use crate::device;
use crate::output::{Failure, Output};
use crate::progress::with_spinner;
use crate::tables;

/// Runs the command.
pub fn run(cli: &Cli, output: &Output) -> Result<(), Failure> {
    if let Command::Completion { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "rackctl", &mut script);
        return output.text(&String::from_utf8_lossy(&script));
    }
    let Some(socket) = &cli.socket else {
        let message = "which VM? Give the API socket with --socket PATH or RACKVISOR_SOCKET=PATH";
        Cli::command().error(ErrorKind::MissingRequiredArgument, message).exit()
    };
    let client = Client::new(socket);
    match &cli.command {
        Command::Version => version(&client, output),
        Command::Define { file, tap_fd } => {
            let vm = client.define_with_fds(&read_config(file)?, inherited(tap_fd)?)?;
            output.value(&vm, tables::vm_line)
        }
        Command::Patch { generation_id, balloon } => {
            let patch = VmPatch {
                generation_id: generation_id.map_or(Patch::Keep, Patch::Set),
                balloon: balloon.map_or(Patch::Keep, |size| Patch::Set(BalloonPatch::size(size))),
            };
            output.value(&client.patch(&patch)?, tables::vm_line)
        }
        Command::Show => output.value(&client.describe()?, tables::vm),
        Command::Boot => act(&client, output, Action::Boot, "booting"),
        Command::Pause => act(&client, output, Action::Pause, "pausing"),
        Command::Resume => act(&client, output, Action::Resume, "resuming"),
        Command::Reset => act(&client, output, Action::Reset, "resetting"),
        Command::PowerButton { wait: false, .. } => {
            act(&client, output, Action::PowerButton, "pressing the power button")
        }
        Command::PowerButton { wait: true, timeout } => power_off(&client, output, *timeout),
        Command::SleepButton => act(&client, output, Action::SleepButton, "pressing the sleep button"),
        Command::Shutdown => act(&client, output, Action::Shutdown, "shutting down"),
        Command::Nmi => act(&client, output, Action::Nmi, "injecting an NMI"),
        Command::Forget => {
            client.forget()?;
            output.done("the VM is forgotten")
        }
        Command::Disk(command) => device::disk(&client, output, command),
        Command::Group(command) => device::group(&client, output, command),
        Command::Nic(command) => device::nic(&client, output, command),
        Command::Events { follow, after } => {
            // Without a number, following begins with what is kept, like `tail -f` of a file.
            for event in client.events(Some(after.unwrap_or(0)), *follow)? {
                output.line(&event?, tables::event)?;
            }
            Ok(())
        }
        Command::Metrics => output.text(&client.metrics()?),
        Command::Inspect { part } => Output { json: true }.value(&client.inspect(part)?, |_| String::new()),
        Command::Openapi => Output { json: true }.value(&client.openapi()?, |_| String::new()),
        Command::Wait { states, timeout } => {
            let state = with_spinner(!output.json, "waiting", || client.wait_for(states, *timeout))?;
            output.value(&json!({ "state": state }), |_| state.to_string())
        }
        Command::Completion { .. } => Ok(()),
    }
}

fn version(client: &Client, output: &Output) -> Result<(), Failure> {
    let server = client.version()?;
    output.value(&json!({ "client": VERSION, "server": server }), |_| {
        format!("rackctl {VERSION}\n{} {} (API {})", server.name, server.version, server.api)
    })
}

fn act(client: &Client, output: &Output, action: Action, doing: &str) -> Result<(), Failure> {
    let vm = with_spinner(!output.json, doing, || client.act(action))?;
    output.value(&vm, tables::vm_line)
}

/// Presses the button and waits for what the guest does about it.
fn power_off(client: &Client, output: &Output, timeout: Option<Duration>) -> Result<(), Failure> {
    client.act(Action::PowerButton)?;
    let ended = [VmState::Stopped, VmState::Crashed];
    with_spinner(!output.json, "waiting for the guest to power off", || client.wait_for(&ended, timeout))?;
    output.value(&client.describe()?, tables::vm_line)
}

/// Descriptors that this process was started with.
fn inherited(numbers: &[u32]) -> Result<Vec<OwnedFd>, Problem> {
    let missing = |number: &u32, error: std::io::Error| {
        let detail = format!("descriptor {number} cannot be passed: {error}");
        Problem::new(Code::Unusable, detail, "start rackctl with the tap open as this descriptor")
    };
    let copy = |number: &u32| OwnDescriptors::new()?.copy(*number);
    numbers.iter().map(|number| copy(number).map_err(|error| missing(number, error))).collect()
}

/// Reads and checks a configuration here, so that a mistake is told with the name of the file.
fn read_config(file: &Path) -> Result<VmConfig, Problem> {
    if file != Path::new("-") {
        return VmConfig::from_file(file);
    }
    let mut document = Vec::new();
    let limit = u64::try_from(MAX_BODY).unwrap_or(u64::MAX).saturating_add(1);
    std::io::stdin().take(limit).read_to_end(&mut document).map_err(|error| {
        Problem::new(Code::Unusable, format!("cannot read standard input: {error}"), "give a file instead")
    })?;
    VmConfig::from_json(&document)
}
