//! The owner of the VM: takes messages one at a time and never waits for a disk, a network or a guest.
//!
//! ```text
//!  boot      assemble (job) ──► start vCPUs ──► running
//!  pause     stop vCPUs ──► drain devices ──► paused
//!  reset     stop vCPUs ──► drain devices ──► back to power-on (job) ──► start vCPUs
//!  end       stop vCPUs ──► drain devices ──► flush and dismantle (job) ──► stopped | crashed
//! ```
//! While an operation is under way, requests that would change the VM wait in line; descriptions are answered at once.
//! A drain that a hung disk holds up past its deadline answers so and goes on (`draining`).

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Instant;

use rackvisor_api::config::{OnReboot, ReservationKey, VmConfig};
use rackvisor_api::control::{Reply, Request, Response};
use rackvisor_api::descriptors::Descriptors;
use rackvisor_api::events::{EventKind, EventLog, GuestPanic, PanicSource};
use rackvisor_api::problem::{Code, Problem};
use rackvisor_api::state::{Action, GuestEvent, RequestKind, VmState, decide, guest_event};
use rackvisor_devices::bus::VmRequest;
use rackvisor_devices::throttle::Throttle;
use rackvisor_devices::{DeviceEvent, ThreadSpawner};

use super::disks::{DiskWatch, IoFailure};
use super::jobs::{Jobs, caught};
use super::mailbox::{Generation, Handle, Mailbox, Message};
use super::operation::{Ending, Operation, Purpose};
use super::threads::WatchedThreads;
use super::{LastWord, Lifetime};
use crate::assembly::{AssemblyError, Host, HostOptions, Inventory, Machine, Taps};
use crate::cpu::vcpu::VcpuEvent;
use crate::telemetry::{Facts, Parts, Telemetry};

/// Requests that may wait for an operation to end.
const MAX_WAITING: usize = 256;

/// The owner of the VM.
pub struct Controller {
    pub(super) state: VmState,
    pub(super) cause: Option<String>,
    pub(super) config: Option<VmConfig>,
    /// The taps of its NICs that came as descriptors.
    pub(super) taps: Taps,
    /// The machine, unless a job has it.
    pub(super) machine: Option<Box<Machine>>,
    /// What describes the machine, also while a job has it.
    pub(super) inventory: Option<Inventory>,
    pub(super) operation: Option<Operation>,
    pub(super) waiting: VecDeque<(Request, Reply)>,
    /// What the guest asked for while an operation was under way.
    guest_wants: Option<VcpuEvent>,
    /// Why the guest has to end, as soon as the operation under way is over.
    condemned: Option<String>,
    /// What was last seen of the disks.
    pub(super) disk_watch: DiskWatch,
    generation: Generation,
    pub(super) booted: Option<Instant>,
    pub(super) resets: u64,
    /// What the guest said first when it panicked.
    pub(super) guest_panic: Option<GuestPanic>,
    /// Seconds that the guests of this definition have set their clock beyond what it says.
    pub(super) clock_shift: i64,
    /// Seconds that it was beyond UTC when the last guest ended.
    pub(super) last_clock_offset: Option<i64>,
    pub(super) last_look_at_watchdog: Option<Instant>,
    /// For log lines that a guest can cause.
    pub(super) guest_log: Throttle,
    pub(super) terminating: bool,
    ended: bool,
    pub(super) mailbox: Mailbox,
    events: Arc<EventLog>,
    telemetry: Telemetry,
    /// Messages taken.
    messages: u64,
    spawner: Arc<dyn ThreadSpawner>,
    pub(super) jobs: Jobs,
    pub(super) options: HostOptions,
    lifetime: Lifetime,
    /// The request that the program started with: if it, or one before it, fails, everything ends.
    trial: Option<RequestKind>,
    failure: Option<Problem>,
}

impl Controller {
    /// No VM yet.
    ///
    /// # Errors
    /// When there is no thread left for the jobs.
    pub fn new(
        handle: Handle,
        spawner: Arc<dyn ThreadSpawner>,
        lifetime: Lifetime,
        options: HostOptions,
    ) -> std::io::Result<Self> {
        let Handle { mailbox, events, telemetry } = handle;
        Ok(Self {
            jobs: Jobs::new(&*spawner)?,
            options,
            lifetime,
            trial: None,
            failure: None,
            guest_wants: None,
            condemned: None,
            disk_watch: DiskWatch::default(),
            state: VmState::Undefined,
            cause: None,
            config: None,
            taps: Taps::default(),
            machine: None,
            inventory: None,
            operation: None,
            waiting: VecDeque::new(),
            generation: 0,
            booted: None,
            resets: 0,
            guest_panic: None,
            clock_shift: 0,
            last_clock_offset: None,
            last_look_at_watchdog: None,
            guest_log: Throttle::new(),
            terminating: false,
            ended: false,
            mailbox,
            events,
            telemetry,
            messages: 0,
            spawner,
        })
    }

    /// Whether the loop has nothing more to do.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// When to call [`Controller::tick`] at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let operation = self.operation.as_ref().and_then(Operation::deadline);
        operation.into_iter().chain(self.next_look_at_disks()).chain(self.next_look_at_watchdog()).min()
    }

    /// How things stand.
    #[must_use]
    pub fn last_word(&self) -> LastWord {
        LastWord { state: self.state, cause: self.cause.clone(), failure: self.failure.clone() }
    }

    /// Defines the VM, and boots it if `boot`; ends if that fails.
    pub fn start_with(&mut self, config: VmConfig, boot: bool) {
        let define = Request::Define(Box::new(config), Descriptors::default());
        let requests: Vec<_> =
            [Some(define), boot.then_some(Request::Act(Action::Boot))].into_iter().flatten().collect();
        self.trial = requests.last().map(Request::kind);
        for request in requests {
            // Nobody waits for the answer: what matters is kept as the failure.
            let (reply, _) = Reply::to_thread();
            self.take(Message::Api(request, reply));
        }
    }

    /// Takes one message.
    pub fn take(&mut self, message: Message) {
        let query = matches!(&message, Message::Api(request, _) if request.kind() == RequestKind::Query);
        match message {
            Message::Api(request, reply) => self.request(request, reply),
            Message::Device { generation, device, event, .. } if generation == self.generation => {
                self.device_event(&device, event);
            }
            Message::Vcpu(generation, event) if generation == self.generation => self.vcpu_event(event),
            Message::Device { .. } | Message::Vcpu(..) => {}
            Message::Claimed(taps) => self.claimed(taps),
            Message::Assembled(outcome) => self.assembled(*outcome),
            Message::Restarted(machine, outcome) => self.restarted(machine, outcome),
            Message::Dismantled(outcome) => self.dismantled(outcome),
            Message::Terminate => self.terminate(),
        }
        self.work_off();
        self.messages += 1;
        if !query {
            self.telemetry.define(self.config.as_ref());
        }
        self.show();
    }

    /// Leaves a copy of how things stand for those who look.
    fn show(&self) {
        self.telemetry.tell(Facts {
            state: self.state,
            cause: self.cause.clone(),
            operation: self.operation.as_ref().map(Operation::name),
            pending: self.pending(),
            waiting: self.waiting.len(),
            messages: self.messages,
            resets: self.resets,
        });
    }

    /// Looks after deadlines.
    pub fn tick(&mut self) {
        self.drain();
        self.look_at_disks(Instant::now());
        self.look_at_watchdog(Instant::now());
        self.work_off();
        self.show();
    }

    /// Takes up what waited for an operation.
    fn work_off(&mut self) {
        while self.operation.is_none() && !self.ended {
            if self.terminating {
                self.end_everything();
                continue;
            }
            if let Some(cause) = self.condemned.take() {
                self.guest_ends(GuestEvent::Crash, &cause);
                continue;
            }
            if let Some(event) = self.guest_wants.take() {
                self.vcpu_event(event);
                continue;
            }
            let Some((request, reply)) = self.waiting.pop_front() else { return };
            self.request(request, reply);
        }
    }

    pub(super) fn request(&mut self, request: Request, reply: Reply) {
        if self.is_overdue() && request.kind() != RequestKind::Query {
            return self.change_of_mind(request, reply);
        }
        if self.operation.is_some() && request.kind() != RequestKind::Query {
            if self.waiting.len() >= MAX_WAITING {
                let detail = format!("{MAX_WAITING} requests wait for an operation of the VM to end");
                return reply.send(Err(Problem::new(Code::OutOfResources, detail, "ask again later")));
            }
            return self.waiting.push_back((request, reply));
        }
        if self.terminating && request.kind() != RequestKind::Query {
            return reply.send(Err(shutting_down()));
        }
        if let Err(illegal) = decide(self.state, request.kind()) {
            return reply.send(Err(illegal.into()));
        }
        match request {
            Request::Act(action) => self.act(action, reply),
            Request::Define(config, passed) => self.redefine(Self::definition(config, passed), reply),
            Request::PutNic(nic, passed) => self.redefine(self.with_nic(*nic, passed), reply),
            Request::PatchNic(id, patch) if self.inventory.is_none() => {
                self.redefine(self.with_patched_nic(id, &patch), reply);
            }
            Request::DeleteNic(id) => self.delete_nic(&id, reply),
            Request::Forget => self.forget(reply),
            other => reply.send(self.device_request(other)),
        }
    }

    fn act(&mut self, action: Action, reply: Reply) {
        let run = self.state == VmState::Running;
        match action {
            Action::Boot => self.boot(reply),
            Action::Pause => self.begin(Purpose::Pause { cause: None }, Some(reply)),
            Action::Resume => {
                let outcome = self.resume();
                reply.send(outcome.and_then(|()| self.described()));
            }
            Action::Reset => self.begin(Purpose::Reset { run, by_guest: false }, Some(reply)),
            Action::Shutdown => {
                self.begin(Purpose::End(Ending { to: VmState::Stopped, cause: None }), Some(reply));
            }
            Action::PowerButton | Action::SleepButton | Action::Nmi => {
                if let Some(machine) = &self.machine {
                    match action {
                        Action::Nmi => machine.nmi(),
                        Action::SleepButton => machine.press_sleep_button(),
                        _ => machine.press_power_button(),
                    }
                }
                reply.send(self.described());
            }
        }
    }

    pub(super) fn described(&self) -> Result<Response, Problem> {
        Ok(Response::Vm(Box::new(self.describe()?)))
    }

    fn boot(&mut self, reply: Reply) {
        let Some(config) = self.config.clone() else { return reply.send(Err(Problem::vm_undefined())) };
        self.generation += 1;
        self.condemned = None;
        let (generation, mailbox) = (self.generation, self.mailbox.clone());
        let host = Host {
            spawner: Arc::new(WatchedThreads {
                spawner: Arc::clone(&self.spawner),
                mailbox: self.mailbox.clone(),
                generation,
            }),
            taps: self.taps.clone(),
            clock_shift: self.clock_shift,
            options: self.options.clone(),
            notifier: self.mailbox.notifier(generation),
            vcpu_events: Arc::new(move |event| {
                mailbox.send(Message::Vcpu(generation, event));
            }),
        };
        let mailbox = self.mailbox.clone();
        let job = move || {
            let machine = caught("putting the machine together", || Machine::assemble(&config, &host));
            let machine = machine.unwrap_or_else(|panic| Err(AssemblyError::Panicked(panic)));
            mailbox.send(Message::Assembled(Box::new(machine)));
        };
        self.operation = Some(Operation::Boot { reply });
        self.jobs.run(Box::new(job));
    }

    fn assembled(&mut self, outcome: Result<Machine, AssemblyError>) {
        let Some(Operation::Boot { reply }) = self.operation.take() else { return };
        match outcome {
            Ok(mut machine) => {
                machine.start_vcpus();
                let inventory = machine.inventory();
                self.telemetry.replace(inventory.parts.clone());
                self.inventory = Some(inventory);
                self.disk_watch = DiskWatch::from_now();
                self.last_look_at_watchdog = Some(Instant::now());
                self.machine = Some(Box::new(machine));
                self.booted = Some(Instant::now());
                self.resets = 0;
                self.guest_panic = None;
                self.passed(RequestKind::Act(Action::Boot));
                self.move_to(VmState::Running, None);
                reply.send(self.described());
            }
            Err(error) => {
                tracing::error!(vm = self.name(), %error, "the VM cannot be booted");
                let problem = Problem::from(error);
                self.fails_to_start(&problem);
                reply.send(Err(problem));
            }
        }
    }

    /// What the program started with ends it if it fails.
    pub(super) fn fails_to_start(&mut self, problem: &Problem) {
        if self.trial.take().is_some() {
            self.failure = Some(problem.clone());
            self.terminating = true;
        }
    }

    /// From what the program started with on, requests may fail.
    pub(super) fn passed(&mut self, request: RequestKind) {
        self.trial.take_if(|trial| *trial == request);
    }

    pub(super) fn restart(&mut self, run: bool, by_guest: bool, reply: Option<Reply>) {
        let Some(mut machine) = self.machine.take() else { return };
        self.resets += 1;
        self.guest_panic = None;
        self.guest_wants = None;
        if by_guest {
            self.publish(EventKind::GuestReset);
        }
        self.operation = Some(Operation::Restart { run, reply });
        let mailbox = self.mailbox.clone();
        let job = move || {
            let outcome = caught("the reset of the machine", || machine.reset());
            let outcome = outcome.unwrap_or_else(|panic| Err(AssemblyError::Panicked(panic)));
            mailbox.send(Message::Restarted(machine, outcome));
        };
        self.jobs.run(Box::new(job));
    }

    fn restarted(&mut self, machine: Box<Machine>, outcome: Result<(), AssemblyError>) {
        let Some(Operation::Restart { run, reply }) = self.operation.take() else { return };
        self.machine = Some(machine);
        if let Err(error) = outcome {
            let cause = format!("the guest cannot be restarted: {error}");
            if let Some(reply) = reply {
                reply.send(Err(error.into()));
            }
            return self.begin(Purpose::End(Ending { to: VmState::Crashed, cause: Some(cause) }), None);
        }
        if run && let Err(problem) = self.run_machine() {
            tracing::error!(vm = self.name(), %problem, "the VM cannot go on");
        }
        if let Some(reply) = reply {
            reply.send(self.described());
        }
    }

    pub(super) fn dismantle(&mut self, ending: Ending, reply: Option<Reply>) {
        let Some(machine) = self.machine.take() else { return };
        // Whatever its threads still have to say is about a machine that is gone.
        self.generation += 1;
        self.guest_wants = None;
        self.condemned = None;
        if let Some(clock) = self.inventory.as_ref().and_then(|inventory| inventory.clock.as_ref()) {
            self.last_clock_offset = Some(clock.offset());
            self.clock_shift = clock.shift();
        }
        // Whoever describes devices now sees configuration only; the job must have the last hold of guest RAM.
        self.inventory = None;
        self.telemetry.replace(Parts::default());
        self.operation = Some(Operation::Dismantle { ending, reply });
        let mailbox = self.mailbox.clone();
        let job = move || {
            let flushed = caught("taking the machine apart", || machine.dismantle()).unwrap_or_else(Err);
            mailbox.send(Message::Dismantled(flushed));
        };
        self.jobs.run(Box::new(job));
    }

    fn dismantled(&mut self, flushed: Result<(), String>) {
        let Some(Operation::Dismantle { ending, reply }) = self.operation.take() else { return };
        self.booted = None;
        if let Err(detail) = &flushed {
            tracing::error!(vm = self.name(), detail, "a disk was not closed cleanly");
            self.publish(EventKind::DeviceError { device: "disks".into(), detail: detail.clone() });
        }
        if let (VmState::Crashed, Some(cause)) = (ending.to, &ending.cause) {
            tracing::error!(vm = self.name(), cause, "the guest crashed");
            self.publish(EventKind::Crashed { cause: cause.clone() });
        }
        self.move_to(ending.to, ending.cause);
        self.terminating |= self.lifetime == Lifetime::WithGuest;
        if let Some(reply) = reply {
            reply.send(match flushed {
                Ok(()) => self.described(),
                Err(detail) => Err(Problem::new(Code::Internal, detail, "check the disk before the next boot")),
            });
        }
    }

    fn resume(&mut self) -> Result<(), Problem> {
        self.run_machine()?;
        self.move_to(VmState::Running, None);
        Ok(())
    }

    /// Starts devices and vCPUs.
    pub(super) fn run_machine(&mut self) -> Result<(), Problem> {
        let Some(machine) = &mut self.machine else { return Ok(()) };
        machine.resume_devices().map_err(Problem::from)?;
        machine.start_vcpus();
        Ok(())
    }

    fn vcpu_event(&mut self, event: VcpuEvent) {
        // A panic is only to be told, and nothing waits for it; a standstill is waited for.
        if self.operation.is_some() && !matches!(event, VcpuEvent::GuestPanicked(_) | VcpuEvent::Stopped) {
            self.guest_wants.get_or_insert(event);
            return;
        }
        let run = self.state == VmState::Running;
        match event {
            VcpuEvent::Request(VmRequest::Reset) => match self.config.as_ref().map(|c| c.on_reboot) {
                Some(OnReboot::Stop) => self.guest_ends(GuestEvent::Shutdown, "guest reboot (on_reboot = stop)"),
                _ => self.begin(Purpose::Reset { run, by_guest: true }, None),
            },
            VcpuEvent::Request(VmRequest::PowerOff) => {
                self.publish(EventKind::GuestShutdown);
                self.guest_ends(GuestEvent::Shutdown, "guest power-off");
            }
            VcpuEvent::Request(request) => tracing::error!(?request, "a request that no part of the VM takes"),
            VcpuEvent::Stopped => self.drain(),
            VcpuEvent::Crashed(cause) => self.guest_ends(GuestEvent::Crash, &cause),
            VcpuEvent::GuestPanicked(parameters) => {
                let parameters = parameters.iter().map(|parameter| format!("{parameter:#x}")).collect();
                self.guest_panicked(GuestPanic { source: PanicSource::Hyperv, parameters, dumping: false });
            }
        }
    }

    /// The guest goes on: it may want to write a dump.
    fn guest_panicked(&mut self, told: GuestPanic) {
        if let Some(held_back) = self.guest_log.pass() {
            tracing::warn!(vm = self.name(), held_back, ?told, "the guest panicked");
        }
        self.guest_panic.get_or_insert_with(|| told.clone());
        self.publish(EventKind::GuestPanicked(told));
    }

    pub(super) fn guest_ends(&mut self, event: GuestEvent, cause: &str) {
        let Some(to) = guest_event(self.state, event) else { return };
        self.begin(Purpose::End(Ending { to, cause: Some(cause.to_owned()) }), None);
    }

    fn device_event(&mut self, device: &str, event: DeviceEvent) {
        let device = device.to_owned();
        match event {
            DeviceEvent::Drained => self.drain(),
            DeviceEvent::Resized { bytes } => self.publish(EventKind::DiskResized { device, capacity: bytes }),
            DeviceEvent::IoError { operation, offset, bytes, errno, held } => {
                self.io_error(device, IoFailure { operation, offset, bytes, errno }, held);
            }
            DeviceEvent::Shrunk { from, to } => {
                let detail =
                    format!("the disk shrank from {from} to {to} bytes, which the guest is not told: restore its size");
                self.publish(EventKind::DeviceError { device, detail });
            }
            DeviceEvent::NeedsReset { reason } => {
                let detail = format!("the driver broke the rules, the device waits for its reset: {reason}");
                self.publish(EventKind::DeviceError { device, detail });
            }
            DeviceEvent::BackendRestored { detail } => self.publish(EventKind::DeviceRestored { device, detail }),
            DeviceEvent::BackendLost { reason } => {
                self.publish(EventKind::DeviceError { device, detail: reason });
            }
            DeviceEvent::GuestPanicked { dumping } => {
                self.guest_panicked(GuestPanic { source: PanicSource::Pvpanic, parameters: Vec::new(), dumping });
            }
            DeviceEvent::ReservationLost { holder } => {
                let cause = taken(&device, holder);
                let ending = Ending { to: VmState::Crashed, cause: Some(cause.clone()) };
                let why = Problem::new(Code::Unusable, cause.clone(), "see that the VM runs on that host");
                if !self.drain_to_end(ending, &why) {
                    self.condemned = Some(cause);
                }
                let holder = holder.and_then(NonZeroU64::new).map(ReservationKey);
                self.publish(EventKind::ReservationLost { device, holder });
            }
            other => tracing::warn!(device, event = ?other, "an event that has no name in the API"),
        }
    }

    /// Ends the guest with everything flushed, then the loop.
    fn end_everything(&mut self) {
        for (_, reply) in self.waiting.drain(..) {
            reply.send(Err(shutting_down()));
        }
        if self.machine.is_some() {
            let ending = Ending { to: VmState::Stopped, cause: Some("the VMM was told to end".into()) };
            self.begin(Purpose::End(ending), None);
        }
        self.ended = self.operation.is_none();
    }

    pub(super) fn move_to(&mut self, to: VmState, cause: Option<String>) {
        let from = std::mem::replace(&mut self.state, to);
        self.cause.clone_from(&cause);
        // Whoever is answered after this finds it so.
        self.show();
        if from != to {
            tracing::info!(vm = self.name(), %from, %to, cause, "state changed");
            self.publish(EventKind::StateChanged { from, to, cause });
        }
    }

    pub(super) fn publish(&self, what: EventKind) {
        self.events.publish(self.name(), what);
    }

    pub(super) fn name(&self) -> &str {
        self.config.as_ref().map_or("", |config| &config.name)
    }
}

/// Why a guest whose disk `device` was taken away ends.
fn taken(device: &str, holder: Option<u64>) -> String {
    let by = holder.map(|key| format!(" (key {key:#x})")).unwrap_or_default();
    format!("disk \"{device}\": another host{by} took the reservation")
}

pub(super) fn shutting_down() -> Problem {
    Problem::new(Code::ShuttingDown, "this VMM is ending", "start another process for the VM")
}
