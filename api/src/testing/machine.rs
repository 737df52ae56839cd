//! A controller that keeps the state machine and the configuration, and has no guest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::VERSION;
use crate::config::{DiskConfig, NicConfig, RNG_ID, VmConfig, slot_assignment};
use crate::control::{
    Control, DeviceState, DiskCounters, DiskInfo, NicCounters, NicInfo, Outcome, Reply, Request, Response, VmInfo,
};
use crate::events::{EventKind, EventLog};
use crate::problem::{Code, Problem};
use crate::state::{GuestEvent, VmState, decide, guest_event};

/// See the module docs. Answers at once, on the caller's thread.
#[derive(Debug)]
pub struct Machine {
    inner: Mutex<Inner>,
    events: Arc<EventLog>,
}

#[derive(Debug)]
struct Inner {
    state: VmState,
    cause: Option<String>,
    config: Option<VmConfig>,
    resets: u64,
}

impl Default for Machine {
    fn default() -> Self {
        let inner = Inner { state: VmState::Undefined, cause: None, config: None, resets: 0 };
        Self { inner: Mutex::new(inner), events: EventLog::new() }
    }
}

impl Machine {
    /// A machine without a VM.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// The state and the configuration.
    pub fn snapshot(&self) -> (VmState, Option<VmConfig>) {
        let inner = self.lock();
        (inner.state, inner.config.clone())
    }

    /// Plays a guest that does something.
    pub fn guest(&self, event: GuestEvent) {
        let mut inner = self.lock();
        if let Some(to) = guest_event(inner.state, event) {
            self.go(&mut inner, to, Some(format!("{event:?}").to_lowercase()));
        }
    }

    /// Puts the machine into a state as it is after the requests that lead there, with this configuration.
    pub fn force(&self, state: VmState, config: Option<VmConfig>) {
        let mut inner = self.lock();
        inner.config = config;
        self.go(&mut inner, state, None);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn go(&self, inner: &mut Inner, to: VmState, cause: Option<String>) {
        let from = std::mem::replace(&mut inner.state, to);
        inner.cause = cause.clone();
        if from != to {
            let vm = inner.config.as_ref().map(|config| config.name.clone()).unwrap_or_default();
            self.events.publish(&vm, EventKind::StateChanged { from, to, cause });
        }
    }

    fn answer(&self, request: Request) -> Outcome {
        let mut inner = self.lock();
        let to = decide(inner.state, request.kind())?.to;
        match request {
            Request::Describe => inner.describe().map(|vm| Response::Vm(Box::new(vm))),
            Request::Define(config, passed) => {
                config.validate()?;
                passed.share_out(&config.nics)?;
                let new = inner.config.replace(*config).is_none();
                self.go(&mut inner, to, None);
                let vm = Box::new(inner.describe()?);
                Ok(if new { Response::VmCreated(vm) } else { Response::Vm(vm) })
            }
            Request::Forget => {
                self.go(&mut inner, to, None);
                inner.config = None;
                Ok(Response::Deleted)
            }
            Request::Act(action) => {
                inner.resets += u64::from(action == crate::state::Action::Reset);
                self.go(&mut inner, to, Some(action.as_str().to_owned()));
                inner.describe().map(|vm| Response::Vm(Box::new(vm)))
            }
            Request::PatchVm(patch) => {
                inner.config = Some(patch.apply(inner.config()?, inner.alive())?);
                inner.describe().map(|vm| Response::Vm(Box::new(vm)))
            }
            request => inner.device(request),
        }
    }
}

impl Control for Machine {
    fn submit(&self, request: Request, reply: Reply) {
        reply.send(self.answer(request));
    }

    fn metrics(&self) -> String {
        "# EOF\n".into()
    }

    fn inspect(&self, path: &str) -> Option<serde_json::Value> {
        let state = self.lock().state;
        match path {
            "" => Some(serde_json::json!({ "control": { "state": state } })),
            "control" => Some(serde_json::json!({ "state": state })),
            "control/state" => Some(serde_json::json!(state)),
            _ => None,
        }
    }

    fn events(&self) -> Arc<EventLog> {
        Arc::clone(&self.events)
    }
}

impl Inner {
    fn config(&self) -> Result<&VmConfig, Problem> {
        self.config.as_ref().ok_or_else(Problem::vm_undefined)
    }

    fn alive(&self) -> bool {
        matches!(self.state, VmState::Running | VmState::Paused)
    }

    fn describe(&self) -> Result<VmInfo, Problem> {
        let config = self.config()?.clone();
        Ok(VmInfo {
            state: self.state,
            cause: self.cause.clone(),
            pending: None,
            uptime_ms: self.alive().then_some(1000),
            resets: self.resets,
            guest_panic: None,
            clock_offset: None,
            balloon: config.balloon.as_ref().filter(|_| self.alive()).map(|balloon| balloon.size.bytes()),
            vcpus: if self.alive() { config.cpus.count } else { 0 },
            serial_path: None,
            pid: std::process::id(),
            version: VERSION.into(),
            config,
        })
    }

    fn device(&mut self, request: Request) -> Outcome {
        let config = self.config()?.clone();
        match request {
            Request::ListDisks => {
                config.disks.iter().map(|disk| self.disk(&disk.id)).collect::<Result<_, _>>().map(Response::Disks)
            }
            Request::GetDisk(id) => self.disk(&id).map(|disk| Response::Disk(Box::new(disk))),
            Request::PutDisk(disk) => self.put_disk(*disk),
            Request::PatchDisk(id, patch) => {
                let disk = config.disk(&id).ok_or_else(|| Problem::no_such_disk(&id))?;
                if self.alive() && !patch.is_live() {
                    return Err(not_while_running(&id));
                }
                self.put_disk(patch.apply(disk)?)
            }
            Request::DeleteDisk(id) => {
                self.config = Some(config.without_disk(&id)?);
                Ok(Response::Deleted)
            }
            Request::ListDiskGroups => Ok(Response::DiskGroups(config.disk_groups)),
            Request::GetDiskGroup(id) => {
                let group = config.disk_group(&id).ok_or_else(|| Problem::no_such_disk_group(&id))?;
                Ok(Response::DiskGroup(Box::new(group.clone())))
            }
            Request::PatchDiskGroup(id, patch) => {
                let group = config.disk_group(&id).ok_or_else(|| Problem::no_such_disk_group(&id))?;
                let group = patch.apply(group);
                self.config = Some(config.with_disk_group(group.clone())?);
                Ok(Response::DiskGroup(Box::new(group)))
            }
            Request::ListNics => {
                config.nics.iter().map(|nic| self.nic(&nic.id)).collect::<Result<_, _>>().map(Response::Nics)
            }
            Request::GetNic(id) => self.nic(&id).map(|nic| Response::Nic(Box::new(nic))),
            Request::PutNic(nic, passed) => {
                passed.share_out(std::slice::from_ref(&nic))?;
                self.put_nic(*nic)
            }
            Request::PatchNic(id, patch) => {
                let nic = config.nic(&id).ok_or_else(|| Problem::no_such_nic(&id))?;
                if self.alive() && !patch.is_live() {
                    return Err(not_while_running(&id));
                }
                self.put_nic(patch.apply(nic)?)
            }
            Request::AnnounceNic(id) => {
                let nic = self.nic(&id)?;
                if self.alive() { Ok(Response::Nic(Box::new(nic))) } else { Err(Problem::no_guest("announce")) }
            }
            Request::DeleteNic(id) => {
                self.config = Some(config.without_nic(&id)?);
                Ok(Response::Deleted)
            }
            request => Err(Problem::new(Code::Internal, format!("{request:?} concerns no device"), "")),
        }
    }

    fn put_disk(&mut self, disk: DiskConfig) -> Outcome {
        let id = disk.id.clone();
        let (config, new) = self.config()?.with_disk(disk)?;
        self.config = Some(config);
        let info = Box::new(self.disk(&id)?);
        Ok(if new { Response::DiskCreated(info) } else { Response::Disk(info) })
    }

    fn put_nic(&mut self, nic: NicConfig) -> Outcome {
        let id = nic.id.clone();
        let (config, new) = self.config()?.with_nic(nic)?;
        self.config = Some(config);
        let info = Box::new(self.nic(&id)?);
        Ok(if new { Response::NicCreated(info) } else { Response::Nic(info) })
    }

    fn pci(&self, id: &str) -> Result<String, Problem> {
        debug_assert_ne!(id, RNG_ID);
        let slot = slot_assignment(self.config()?)?.into_iter().find(|(device, _)| device == id);
        Ok(slot.map(|(_, slot)| format!("0000:00:{slot:02x}.0")).unwrap_or_default())
    }

    fn device_state(&self) -> DeviceState {
        match self.state {
            VmState::Running => DeviceState::Active,
            VmState::Paused => DeviceState::Paused,
            _ => DeviceState::Configured,
        }
    }

    fn disk(&self, id: &str) -> Result<DiskInfo, Problem> {
        let config = self.config()?.disk(id).ok_or_else(|| Problem::no_such_disk(id))?.clone();
        Ok(DiskInfo {
            state: self.device_state(),
            pci: self.pci(id)?,
            capacity: self.alive().then_some(1 << 30),
            logical_block_size: self.alive().then_some(512),
            physical_block_size: self.alive().then_some(4096),
            alignment_offset: self.alive().then_some(0),
            min_io: self.alive().then_some(0),
            opt_io: self.alive().then_some(0),
            rotational: self.alive().then_some(false),
            discard_max: self.alive().then_some(0),
            write_zeroes_max: self.alive().then_some(0),
            wwid: None,
            serial: None,
            in_flight: 0,
            oldest_request_ms: 0,
            stalled: false,
            held: 0,
            counters: DiskCounters::default(),
            config,
        })
    }

    fn nic(&self, id: &str) -> Result<NicInfo, Problem> {
        let config = self.config()?.nic(id).ok_or_else(|| Problem::no_such_nic(id))?.clone();
        Ok(NicInfo {
            state: self.device_state(),
            pci: self.pci(id)?,
            link: config.link,
            tap: config.tap.clone(),
            counters: NicCounters::default(),
            config,
        })
    }
}

fn not_while_running(id: &str) -> Problem {
    Problem::new(
        Code::HotplugUnsupported,
        format!("this property of \"{id}\" cannot change while the guest runs"),
        "shut the VM down first",
    )
}
