//! The states of a VM and what is legal in each: one table, one pure function.
//!
//! | request          | undefined    | defined   | running   | paused    | stopped   | crashed   |
//! |------------------|--------------|-----------|-----------|-----------|-----------|-----------|
//! | define (PUT)     | → defined    | → defined | 409       | 409       | → defined | → defined |
//! | forget (DELETE)  | 404          | → undefined | 409     | 409       | → undefined | → undefined |
//! | query (GET)      | 404          | stays     | stays     | stays     | stays     | stays     |
//! | edit devices     | 404          | stays     | 409 *     | 409 *     | stays     | stays     |
//! | patch a device   | 404          | stays     | stays **  | stays **  | stays     | stays     |
//! | boot             | 404          | → running | 409       | 409       | → running | → running |
//! | pause            | 404          | 409       | → paused  | 409       | 409       | 409       |
//! | resume           | 404          | 409       | 409       | → running | 409       | 409       |
//! | reset            | 404          | 409       | → running | → paused  | 409       | 409       |
//! | power-button     | 404          | 409       | → running | 409       | 409       | 409       |
//! | sleep-button     | 404          | 409       | → running | 409       | 409       | 409       |
//! | shutdown         | 404          | 409       | → stopped | → stopped | 409       | 409       |
//! | nmi              | 404          | 409       | → running | 409       | 409       | 409       |
//!
//! 404 is `vm-undefined`, 409 is `wrong-state`, but `*` is `hotplug-unsupported`. `**`: what of a device may change
//! while the guest exists is for the controller to say. A reset in `paused` leaves the VM paused, with the vCPUs at
//! the reset vector: `resume` then starts the guest anew.
//!
//! What the guest does by itself moves the state by [`guest_event`].

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::{Code, Problem};

/// The state of the VM of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// There is no VM: nothing has a configuration.
    #[default]
    Undefined,
    /// The configuration is there and valid; no memory, no vCPU, nothing opened.
    Defined,
    /// The guest runs.
    Running,
    /// The guest exists and its vCPUs and devices stand still.
    Paused,
    /// The guest powered off or was shut down; it may be booted again.
    Stopped,
    /// The guest or the VMM failed; the cause is in the description. It may be booted again.
    Crashed,
}

impl VmState {
    /// All states.
    pub const ALL: [VmState; 6] =
        [Self::Undefined, Self::Defined, Self::Running, Self::Paused, Self::Stopped, Self::Crashed];

    /// The kebab-case name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Defined => "defined",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// An action on the VM: `POST /v1/vm/{action}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Build the machine and start the guest.
    Boot,
    /// Stop vCPUs and devices where they are; answers when nothing is in flight.
    Pause,
    /// Let a paused guest go on.
    Resume,
    /// Restart the guest as its reset line would.
    Reset,
    /// Press the ACPI power button: the guest decides what to do.
    PowerButton,
    /// Press the ACPI sleep button: the guest decides what to do. There is no state to sleep in but S5.
    SleepButton,
    /// End the guest now, whatever it thinks; completed writes are flushed to the disks.
    Shutdown,
    /// Inject a non-maskable interrupt into every vCPU.
    Nmi,
}

impl Action {
    /// All actions.
    pub const ALL: [Action; 8] = [
        Self::Boot,
        Self::Pause,
        Self::Resume,
        Self::Reset,
        Self::PowerButton,
        Self::SleepButton,
        Self::Shutdown,
        Self::Nmi,
    ];

    /// The kebab-case name, which is also the last part of its path.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reset => "reset",
            Self::PowerButton => "power-button",
            Self::SleepButton => "sleep-button",
            Self::Shutdown => "shutdown",
            Self::Nmi => "nmi",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a request wants, as far as the state machine cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// Give the VM a configuration, or another one.
    Define,
    /// Drop the configuration.
    Forget,
    /// Read something.
    Query,
    /// Add, replace or remove a device.
    EditDevices,
    /// Change properties of a device.
    PatchDevice,
    /// Act on the guest.
    Act(Action),
}

impl RequestKind {
    /// All kinds of request.
    pub const ALL: [RequestKind; 13] = [
        Self::Define,
        Self::Forget,
        Self::Query,
        Self::EditDevices,
        Self::PatchDevice,
        Self::Act(Action::Boot),
        Self::Act(Action::Pause),
        Self::Act(Action::Resume),
        Self::Act(Action::Reset),
        Self::Act(Action::PowerButton),
        Self::Act(Action::SleepButton),
        Self::Act(Action::Shutdown),
        Self::Act(Action::Nmi),
    ];

    /// The name used in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Define => "define",
            Self::Forget => "forget",
            Self::Query => "query",
            Self::EditDevices => "add, replace or remove a device",
            Self::PatchDevice => "change a device",
            Self::Act(action) => action.as_str(),
        }
    }

    /// The states in which the request is legal.
    pub fn legal_states(self) -> impl Iterator<Item = VmState> {
        VmState::ALL.into_iter().filter(move |state| decide(*state, self).is_ok())
    }
}

/// A legal request: where the VM is when it has succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The state before.
    pub from: VmState,
    /// The state after success. A failed request leaves the VM in `from`, or in `crashed` where the guest is lost.
    pub to: VmState,
}

impl Transition {
    /// Whether the request changes the state.
    pub fn changes(self) -> bool {
        self.from != self.to
    }
}

/// A request that is not legal in the state the VM is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Illegal {
    /// The state the VM is in.
    pub state: VmState,
    /// What was asked.
    pub request: RequestKind,
}

impl fmt::Display for Illegal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the VM is {}: {} is not possible", self.state, self.request.as_str())
    }
}

impl std::error::Error for Illegal {}

impl From<Illegal> for Problem {
    fn from(illegal: Illegal) -> Self {
        if illegal.state == VmState::Undefined {
            return Problem::vm_undefined();
        }
        let states: Vec<&str> = illegal.request.legal_states().map(VmState::as_str).collect();
        let remedy = format!("legal in: {}{}", states.join(", "), way_out(illegal.state, illegal.request));
        let code = match illegal.request {
            RequestKind::EditDevices => Code::HotplugUnsupported,
            _ => Code::WrongState,
        };
        Problem::new(code, illegal.to_string(), remedy)
    }
}

/// The next step that makes an illegal request legal, where there is a plain one.
fn way_out(state: VmState, request: RequestKind) -> &'static str {
    use VmState::{Crashed, Defined, Paused, Running, Stopped};
    match (state, request) {
        (Running | Paused, RequestKind::Define | RequestKind::Forget | RequestKind::EditDevices) => {
            "; shut the VM down first"
        }
        (Running | Paused, RequestKind::Act(Action::Boot)) => "; reset restarts the guest",
        (Paused, RequestKind::Act(_)) => "; resume the VM first",
        (Defined | Stopped | Crashed, RequestKind::Act(_)) => "; boot the VM first",
        _ => "",
    }
}

/// Decides a request in a state. Pure: the table above is this function.
///
/// # Errors
/// [`Illegal`] where the table says 404 or 409; as a [`Problem`] it names the states in which the request is legal.
pub fn decide(state: VmState, request: RequestKind) -> Result<Transition, Illegal> {
    use VmState::{Crashed, Defined, Paused, Running, Stopped, Undefined};
    let to = match (request, state) {
        (RequestKind::Define, Undefined | Defined | Stopped | Crashed) => Defined,
        (RequestKind::Forget, Defined | Stopped | Crashed) => Undefined,
        (RequestKind::Query | RequestKind::PatchDevice, Defined | Running | Paused | Stopped | Crashed) => state,
        (RequestKind::EditDevices, Defined | Stopped | Crashed) => state,
        (RequestKind::Act(Action::Boot), Defined | Stopped | Crashed) => Running,
        (RequestKind::Act(Action::Pause), Running) => Paused,
        (RequestKind::Act(Action::Resume), Paused) => Running,
        (RequestKind::Act(Action::Reset), Running | Paused) => state,
        (RequestKind::Act(Action::PowerButton | Action::SleepButton | Action::Nmi), Running) => Running,
        (RequestKind::Act(Action::Shutdown), Running | Paused) => Stopped,
        _ => return Err(Illegal { state, request }),
    };
    Ok(Transition { from: state, to })
}

/// What the guest, or its failure, does to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestEvent {
    /// The guest powered off.
    Shutdown,
    /// The guest asked for a reset (and the configuration says `restart`).
    Reset,
    /// Triple fault with no way on, an internal KVM error, a vCPU or device worker that died.
    Crash,
}

/// The state after a guest event, or `None` if there is no guest any more that it could come from.
///
/// An event may have been on its way when a pause took effect; so in `paused` it counts as it does in `running`,
/// except that a reset leaves the VM paused.
pub fn guest_event(state: VmState, event: GuestEvent) -> Option<VmState> {
    match (state, event) {
        (VmState::Running | VmState::Paused, GuestEvent::Shutdown) => Some(VmState::Stopped),
        (VmState::Running | VmState::Paused, GuestEvent::Reset) => Some(state),
        (VmState::Running | VmState::Paused, GuestEvent::Crash) => Some(VmState::Crashed),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the module docs, parsed: (request, state) → cell.
    fn table() -> Vec<(RequestKind, VmState, String)> {
        let names = [
            ("define (PUT)", RequestKind::Define),
            ("forget (DELETE)", RequestKind::Forget),
            ("query (GET)", RequestKind::Query),
            ("edit devices", RequestKind::EditDevices),
            ("patch a device", RequestKind::PatchDevice),
        ];
        let rows = include_str!("state.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! | "))
            .filter(|row| !row.starts_with("request"));
        let mut cells = Vec::new();
        for row in rows {
            let mut columns = row.trim_end_matches('|').split('|').map(str::trim);
            let name = columns.next().unwrap();
            let request = names
                .iter()
                .find(|(text, _)| *text == name)
                .map(|(_, kind)| *kind)
                .or_else(|| Action::ALL.into_iter().find(|action| action.as_str() == name).map(RequestKind::Act))
                .unwrap_or_else(|| panic!("unknown row {name}"));
            let columns: Vec<&str> = columns.collect();
            assert_eq!(columns.len(), VmState::ALL.len(), "{name}");
            cells.extend(VmState::ALL.into_iter().zip(columns).map(|(state, cell)| (request, state, cell.to_owned())));
        }
        cells
    }

    #[test]
    fn every_request_in_every_state_does_what_the_table_says() {
        let table = table();
        assert_eq!(table.len(), RequestKind::ALL.len() * VmState::ALL.len());
        for (request, state, cell) in table {
            let answer = decide(state, request);
            let word = cell.trim_end_matches([' ', '*']);
            match word.strip_prefix("→ ") {
                Some(to) => assert_eq!(answer.map(|t| t.to.as_str()), Ok(to), "{request:?} in {state}"),
                None if word == "stays" => {
                    assert_eq!(answer.map(|t| t.to), Ok(state), "{request:?} in {state}")
                }
                None => {
                    let problem = Problem::from(answer.expect_err(&format!("{request:?} in {state}")));
                    assert_eq!(problem.status.to_string(), word, "{request:?} in {state}");
                    let code = match word {
                        "404" => Code::VmUndefined,
                        _ if cell.ends_with('*') => Code::HotplugUnsupported,
                        _ => Code::WrongState,
                    };
                    assert_eq!(problem.code, code, "{request:?} in {state}");
                    if code == Code::WrongState {
                        assert!(problem.detail.contains(state.as_str()) && problem.detail.contains(request.as_str()));
                        for legal in request.legal_states() {
                            assert!(problem.remedy.contains(legal.as_str()), "{}", problem.remedy);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_guest_event_counts_only_while_there_is_a_guest() {
        for state in VmState::ALL {
            let alive = matches!(state, VmState::Running | VmState::Paused);
            for event in [GuestEvent::Shutdown, GuestEvent::Reset, GuestEvent::Crash] {
                assert_eq!(guest_event(state, event).is_some(), alive, "{event:?} in {state}");
            }
        }
        assert_eq!(guest_event(VmState::Running, GuestEvent::Shutdown), Some(VmState::Stopped));
        assert_eq!(guest_event(VmState::Paused, GuestEvent::Reset), Some(VmState::Paused));
        assert_eq!(guest_event(VmState::Running, GuestEvent::Crash), Some(VmState::Crashed));
    }

    #[test]
    fn names_are_the_same_in_json_and_in_messages() {
        for state in VmState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        for action in Action::ALL {
            assert_eq!(serde_json::to_value(action).unwrap(), action.as_str());
        }
    }
}
