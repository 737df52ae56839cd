//! What the VM is: how its definition comes, changes and goes.
//!
//! Descriptors of taps belong to the definition: they are checked before it is accepted, serve one boot after the other, and
//! are closed when it goes. Both may wait for the locks of the kernel's network, and so are jobs.

use rackvisor_api::config::{NicConfig, NicPatch, VmConfig};
use rackvisor_api::control::{Outcome, Reply, Response};
use rackvisor_api::descriptors::Descriptors;
use rackvisor_api::problem::{Code, Pointer, Problem};
use rackvisor_api::state::{RequestKind, VmState};

use super::controller::Controller;
use super::jobs::caught;
use super::mailbox::Message;
use super::operation::Operation;
use crate::assembly::{Claim, Taps};

/// A definition that is to take the place of the one there is.
pub struct Definition {
    config: Box<VmConfig>,
    subject: Subject,
    /// Descriptors that it has already.
    kept: Taps,
    /// Those that it wants besides.
    claims: Vec<Claim>,
}

/// What a definition is asked for.
pub enum Subject {
    /// All of it.
    Vm,
    /// The NIC with this id.
    Nic(String),
}

impl Controller {
    /// The definition by `config`, with what was passed for its NICs.
    pub(super) fn definition(config: Box<VmConfig>, passed: Descriptors) -> Result<Definition, Problem> {
        config.validate()?;
        let nics = Pointer::root().key("nics");
        let shares = config.nics.iter().zip(passed.share_out(&config.nics)?).enumerate();
        let claims = shares.filter_map(|(i, (nic, share))| Claim::of(nic, &nics.index(i), share)).collect();
        Ok(Definition { config, subject: Subject::Vm, kept: Taps::default(), claims })
    }

    /// The definition with this NIC, new or in the place of the one with its id, and what was passed for it.
    pub(super) fn with_nic(&self, nic: NicConfig, passed: Descriptors) -> Result<Definition, Problem> {
        let shares = passed.share_out(std::slice::from_ref(&nic))?;
        let claims = shares.into_iter().filter_map(|share| Claim::of(&nic, &Pointer::root(), share)).collect();
        let (kept, subject) = (self.taps.without(&nic.id), Subject::Nic(nic.id.clone()));
        Ok(Definition { config: Box::new(self.config()?.with_nic(nic)?.0), subject, kept, claims })
    }

    /// The definition with a change of a NIC, which keeps its descriptors unless the change is about them.
    pub(super) fn with_patched_nic(&self, id: String, patch: &NicPatch) -> Result<Definition, Problem> {
        let old = self.nic_config(&id)?;
        let nic = patch.apply(old)?;
        if nic.tap_fds != old.tap_fds {
            return self.with_nic(nic, Descriptors::default());
        }
        let config = Box::new(self.config()?.with_nic(nic)?.0);
        Ok(Definition { config, subject: Subject::Nic(id), kept: self.taps.clone(), claims: Vec::new() })
    }

    /// Takes a definition over, as soon as the descriptors that it wants were checked.
    pub(super) fn redefine(&mut self, definition: Result<Definition, Problem>, reply: Reply) {
        let Definition { config, subject, kept, claims } = match definition {
            Ok(definition) => definition,
            Err(problem) => {
                self.fails_to_start(&problem);
                return reply.send(Err(problem));
            }
        };
        if claims.is_empty() {
            return self.take_over(config, subject, kept, reply);
        }
        self.operation = Some(Operation::Define { config, subject, reply });
        let (mailbox, inherited) = (self.mailbox.clone(), self.options.inherited_taps.clone());
        let job = move || {
            let taps = caught("the check of the descriptors", || kept.with(claims, &inherited));
            let taps = taps.unwrap_or_else(|told| Err(Problem::new(Code::Internal, told, "report this")));
            mailbox.send(Message::Claimed(taps));
        };
        self.jobs.run(Box::new(job));
    }

    /// The descriptors that a definition wants were checked.
    pub(super) fn claimed(&mut self, taps: Result<Taps, Problem>) {
        let Some(Operation::Define { config, subject, reply }) = self.operation.take() else { return };
        match taps {
            Ok(taps) => self.take_over(config, subject, taps, reply),
            Err(problem) => {
                self.fails_to_start(&problem);
                reply.send(Err(problem));
            }
        }
    }

    fn take_over(&mut self, config: Box<VmConfig>, subject: Subject, taps: Taps, reply: Reply) {
        let (old, unused) = (self.config.replace(*config), std::mem::replace(&mut self.taps, taps));
        let outcome = match subject {
            Subject::Vm => {
                (self.clock_shift, self.last_clock_offset) = (0, None);
                self.passed(RequestKind::Define);
                self.move_to(VmState::Defined, None);
                let answer = if old.is_none() { Response::VmCreated } else { Response::Vm };
                self.describe().map(|info| answer(Box::new(info)))
            }
            Subject::Nic(id) => {
                let replaced = old.is_some_and(|old| old.nic(&id).is_some());
                let answer = if replaced { Response::Nic } else { Response::NicCreated };
                self.nic_info(&id).map(|info| answer(Box::new(info)))
            }
        };
        self.close(unused, outcome, reply);
    }

    /// Drops the definition.
    pub(super) fn forget(&mut self, reply: Reply) {
        self.config = None;
        self.move_to(VmState::Undefined, None);
        let unused = std::mem::take(&mut self.taps);
        self.close(unused, Ok(Response::Deleted), reply);
    }

    /// Removes a NIC from the definition.
    pub(super) fn delete_nic(&mut self, id: &str, reply: Reply) {
        match self.config().and_then(|config| config.without_nic(id)) {
            Ok(config) => {
                self.config = Some(config);
                let others = self.taps.without(id);
                let unused = std::mem::replace(&mut self.taps, others);
                self.close(unused, Ok(Response::Deleted), reply);
            }
            Err(problem) => reply.send(Err(problem)),
        }
    }

    /// Closes descriptors that no definition has any more, and answers when they are.
    fn close(&self, unused: Taps, outcome: Outcome, reply: Reply) {
        if unused.is_empty() {
            return reply.send(outcome);
        }
        self.jobs.run(Box::new(move || {
            drop(unused);
            reply.send(outcome);
        }));
    }
}
