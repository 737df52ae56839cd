//! How the VM comes to a standstill: first the vCPUs, then the devices when nothing is in flight any more. Nobody waits: whoever
//! has stopped leaves a message.
//!
//! A disk that hangs (all paths down, `queue_if_no_path`) holds that up for as long as it hangs. Whoever waits is told at
//! the deadline, with what is outstanding; the drain goes on and ends by itself. Until then another request may change
//! what it is for: `resume` instead of `pause`, `shutdown` instead of both.

use std::time::Instant;

use rackvisor_api::control::{Reply, Request};
use rackvisor_api::problem::{Code, Problem};
use rackvisor_api::state::{Action, RequestKind, VmState, decide};

use super::controller::{Controller, shutting_down};
use super::operation::{DRAIN_DEADLINE, Ending, Operation, Purpose};

impl Controller {
    /// Begins to bring the machine to a standstill.
    pub(super) fn begin(&mut self, purpose: Purpose, reply: Option<Reply>) {
        if self.machine.is_none() {
            return;
        }
        let deadline = Some(Instant::now() + DRAIN_DEADLINE);
        self.operation = Some(Operation::drain(purpose, reply, deadline, String::new()));
        self.drain();
    }

    /// Goes on with an operation once nothing runs or is in flight; at its deadline, tells what is.
    pub(super) fn drain(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        let Some(Operation::Drain { purpose, reply, deadline, .. }) = self.operation.take_if(is_drain) else { return };
        match machine.stop() {
            Ok(()) => self.drained(purpose, reply),
            Err(busy) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                self.late(purpose, reply, busy.to_string());
            }
            Err(busy) => self.operation = Some(Operation::drain(purpose, reply, deadline, busy.to_string())),
        }
    }

    fn late(&mut self, purpose: Purpose, reply: Option<Reply>, busy: String) {
        tracing::error!(vm = self.name(), busy, "the machine did not stop in time: the operation ends when it has");
        if let Purpose::End(ending) = &purpose
            && (ending.to == VmState::Crashed || self.terminating)
        {
            // There is no guest to go on with: take the machine apart around the hung request.
            return self.dismantle(ending.clone(), reply);
        }
        if let Some(reply) = reply {
            reply.send(Err(still_busy(&busy)));
        }
        self.operation = Some(Operation::drain(purpose, None, None, busy));
        // Those that wait in line may want something else.
        for (request, reply) in std::mem::take(&mut self.waiting) {
            self.request(request, reply);
        }
    }

    fn drained(&mut self, purpose: Purpose, reply: Option<Reply>) {
        match purpose {
            Purpose::Pause { cause } => {
                self.move_to(VmState::Paused, cause);
                if let Some(reply) = reply {
                    reply.send(self.described());
                }
            }
            Purpose::GoOn => {
                let outcome = self.run_machine();
                if let Err(problem) = &outcome {
                    tracing::error!(vm = self.name(), %problem, "the VM cannot go on");
                }
                if let Some(reply) = reply {
                    reply.send(outcome.and_then(|()| self.described()));
                }
            }
            Purpose::Reset { run, by_guest } => self.restart(run, by_guest, reply),
            Purpose::End(ending) => self.dismantle(ending, reply),
        }
    }

    /// Whether a drain goes on for longer than its asker was ready to wait.
    pub(super) fn is_overdue(&self) -> bool {
        matches!(self.operation, Some(Operation::Drain { deadline: None, .. }))
    }

    /// What the VM waits for, if it takes longer.
    pub(super) fn pending(&self) -> Option<String> {
        let Some(Operation::Drain { purpose, deadline: None, busy, .. }) = &self.operation else { return None };
        let what = match purpose {
            Purpose::Pause { .. } => "pause",
            Purpose::GoOn => "resume",
            Purpose::Reset { .. } => "reset",
            Purpose::End(_) => "end",
        };
        Some(format!("{what}: {busy}"))
    }

    /// A request during a drain that takes longer: it may be about the same thing, or change what the drain is for.
    pub(super) fn change_of_mind(&mut self, request: Request, reply: Reply) {
        let Some(Operation::Drain { purpose, busy, .. }) = &self.operation else { return };
        let going_on = matches!(purpose, Purpose::Pause { .. } | Purpose::GoOn);
        let ending = matches!(purpose, Purpose::End(_));
        let cancels = going_on && matches!(request, Request::Act(Action::Resume));
        if let Err(illegal) = decide(self.state, request.kind())
            && !cancels
        {
            return reply.send(Err(illegal.into()));
        }
        let run = self.state == VmState::Running;
        let purpose = match request {
            Request::Act(Action::Resume) => Purpose::GoOn,
            Request::Act(Action::Pause) if going_on => Purpose::Pause { cause: None },
            Request::Act(Action::Reset) if !ending => Purpose::Reset { run, by_guest: false },
            Request::Act(Action::Shutdown) => Purpose::End(Ending { to: VmState::Stopped, cause: None }),
            request if request.kind() == RequestKind::PatchDevice => {
                let outcome = self.device_request(request);
                return reply.send(outcome);
            }
            _ => return reply.send(Err(still_busy(busy))),
        };
        self.begin(purpose, Some(reply));
    }

    /// The VM is to end, whatever it is doing.
    pub(super) fn terminate(&mut self) {
        self.terminating = true;
        let cause = Some("the VMM was told to end".into());
        self.drain_to_end(Ending { to: VmState::Stopped, cause }, &shutting_down());
    }

    /// A drain that is under way is from now on for the end of the guest, and not without a deadline. Says whether there is one.
    pub(super) fn drain_to_end(&mut self, ending: Ending, why: &Problem) -> bool {
        let Some(Operation::Drain { purpose, reply, deadline, busy, .. }) = self.operation.take_if(is_drain) else {
            return false;
        };
        let (purpose, reply) = match purpose {
            Purpose::End(asked) if ending.to == VmState::Stopped => (Purpose::End(asked), reply),
            _ => {
                if let Some(reply) = reply {
                    reply.send(Err(why.clone()));
                }
                (Purpose::End(ending), None)
            }
        };
        let deadline = deadline.unwrap_or_else(|| Instant::now() + DRAIN_DEADLINE);
        self.operation = Some(Operation::drain(purpose, reply, Some(deadline), busy));
        true
    }
}

fn is_drain(operation: &mut Operation) -> bool {
    matches!(operation, Operation::Drain { .. })
}

fn still_busy(busy: &str) -> Problem {
    let remedy = "look at what the device waits for (a LUN, also the one of firmware's variables: multipath -ll; a TPM: its swtpm); the \
         operation ends by itself";
    Problem::new(Code::StillBusy, busy, remedy)
}
