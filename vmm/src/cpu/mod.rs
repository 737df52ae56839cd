//! vCPUs: what they are (CPUID, MSRs, registers) and the threads that run them.

pub mod cpuid;
pub mod features;
pub mod hyperv;
pub mod metrics;
pub mod model;
pub mod state;
pub mod stop;
#[cfg(test)]
mod tests;
pub mod topology;
pub mod vcpu;

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rackvisor_api::config::{CpuModelName, CpusConfig};
use rackvisor_devices::{ThreadKind, ThreadSpawner};
use thiserror::Error;
use vmm_sys_util::signal::Killable;

use self::cpuid::CpuModel;
use self::metrics::VcpuMetrics;
use self::state::PowerOnState;
use self::stop::{Stopping, VcpusBusy};
use self::topology::ApicIds;
use self::vcpu::{Command, EventSink, Platform, VcpuThread, kick_signal};
use crate::boot::Entry;
use crate::kvm::chipset::Irqchip;
use crate::kvm::{KvmError, refused};

/// A vCPU that stands still answers within microseconds; when it does not within this time, the host is in deep trouble.
const ANSWER: Duration = Duration::from_secs(5);

/// How long after one thread the next one may take to end. Hundreds of vCPUs on few CPUs need seconds.
const END: Duration = Duration::from_secs(30);

/// Why vCPUs could not be made or commanded.
#[derive(Debug, Error)]
pub enum CpuError {
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// More vCPUs, or higher APIC IDs, than KVM has on this host.
    #[error(
        "{wanted} is more than this host's KVM has ({limit}): give the VM fewer `cpus.count`, or a flatter topology"
    )]
    TooMany {
        /// What was asked for.
        wanted: String,
        /// What there is.
        limit: usize,
    },
    /// KVM lacks Hyper-V enlightenments that the guest is to see.
    #[error(
        "this host's KVM lacks Hyper-V enlightenments: {}; turn them off in `cpus.hyperv` on every host, or use a newer \
         kernel here", .0.join(", ")
    )]
    Hyperv(Vec<&'static str>),
    /// The host's CPU or KVM lacks what the model has.
    #[error(
        "this host lacks features of CPU model {name}: {}; choose an older `cpus.model` for the VM on all hosts, or a newer host",
        missing.join(", ")
    )]
    Model {
        /// The model.
        name: CpuModelName,
        /// The features.
        missing: Vec<&'static str>,
    },
    /// No nested virtualisation.
    #[error(
        "this host's KVM offers no nested virtualisation: set the parameter `nested` of kvm_intel or kvm_amd to 1, or \
         `cpus.nested` to false"
    )]
    Nested,
    /// Fewer bits of physical addresses than asked for.
    #[error("this host's CPU has {there} bits of physical addresses, not {wanted}: choose fewer in `cpus.phys_bits`")]
    PhysBits {
        /// What was asked for.
        wanted: u8,
        /// What there is.
        there: u32,
    },
    /// No descriptor could be had.
    #[error("no descriptor is left for vCPU {index}: raise the limit of open files (ulimit -n, LimitNOFILE=)")]
    Descriptors {
        /// Index of the vCPU.
        index: usize,
    },
    /// No thread could be had.
    #[error("cannot start the thread of vCPU {index}: {source}; raise the limit of processes (pids.max, ulimit -u)")]
    Thread {
        /// Index of the vCPU.
        index: u16,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// A vCPU does not answer.
    #[error("vCPU {index} did not answer within {} s", ANSWER.as_secs())]
    NoAnswer {
        /// Index of the vCPU.
        index: u16,
    },
    /// The thread of a vCPU does not end.
    #[error(
        "the thread of vCPU {index} does not end, as KVM or a device does not answer it: look at the host's kernel log"
    )]
    NoEnd {
        /// Index of the vCPU.
        index: u16,
    },
    /// The thread of a vCPU has ended.
    #[error("the thread of vCPU {index} has ended: the log says why")]
    Gone {
        /// Index of the vCPU.
        index: u16,
    },
}

/// The local APIC IDs of the vCPUs that `config` asks for, in order of index.
#[must_use]
pub fn apic_ids(config: &CpusConfig) -> Vec<u32> {
    let ids = ApicIds::new(config.topology());
    (0..config.count).map(|index| ids.of(index)).collect()
}

/// KVM's vCPUs, made and given their CPUID, not running yet.
pub struct NewVcpus {
    fds: Vec<(VcpuFd, PowerOnState)>,
}

impl NewVcpus {
    /// Makes the vCPUs that `config` asks for. `by_firmware` leaves to the firmware what it sets on every CPU.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn create(kvm: &Kvm, vm: &VmFd, config: &CpusConfig, by_firmware: bool) -> Result<Self, CpuError> {
        let apic_ids = apic_ids(config);
        check_limits(kvm, &apic_ids)?;
        let hyperv = config.hyperv.features();
        let mut model = None;
        let fds = apic_ids.iter().enumerate().map(|(index, id)| -> Result<_, CpuError> {
            let fd = vm.create_vcpu(u64::from(*id)).map_err(|error| match error.errno() {
                libc::EMFILE | libc::ENFILE => CpuError::Descriptors { index },
                _ => refused("a new vCPU")(error).into(),
            })?;
            let model = match &model {
                Some(model) => model,
                None => {
                    let tsc_khz = fd.get_tsc_khz().map_err(refused("the frequency of the TSC"))?;
                    model.insert(CpuModel::of(kvm, config, tsc_khz)?)
                }
            };
            fd.set_cpuid2(&model.for_vcpu(*id)?).map_err(refused("the CPUID of a vCPU"))?;
            state::lock_features(&fd, config.nested)?;
            if !by_firmware {
                state::set_firmware_state(&fd, Irqchip::reaching(&apic_ids))?;
            }
            if let Some(features) = &hyperv {
                hyperv::prepare(kvm, &fd, features)?;
            }
            let more = hyperv.iter().flat_map(|_| hyperv::unlisted_msrs());
            let power_on = PowerOnState::save(kvm, &fd, more)?;
            Ok((fd, power_on))
        });
        Ok(Self { fds: fds.collect::<Result<_, _>>()? })
    }

    /// Starts a parked thread for each vCPU.
    ///
    /// # Errors
    /// [`CpuError::Thread`]; threads that started have ended again then.
    pub fn start(
        self,
        platform: &Platform,
        events: &EventSink,
        spawner: &dyn ThreadSpawner,
    ) -> Result<VcpuSet, CpuError> {
        let vcpus = Vec::with_capacity(self.fds.len());
        let mut set = VcpuSet { vcpus, events: Arc::clone(events), stopping: None };
        for (index, (fd, power_on)) in (0u16..).zip(self.fds) {
            let (sender, commands) = mpsc::channel();
            let metrics = Arc::<VcpuMetrics>::default();
            let thread = VcpuThread {
                index,
                fd,
                power_on,
                platform: platform.clone(),
                commands,
                events: Arc::clone(events),
                metrics: Arc::clone(&metrics),
                panic_told: false,
            };
            let handle = spawner
                .spawn(ThreadKind::Vcpu, &format!("vcpu{index}"), Box::new(move || thread.run()))
                .map_err(|source| CpuError::Thread { index, source })?;
            set.vcpus.push(Vcpu { index, sender, handle: Some(handle), metrics });
        }
        Ok(set)
    }
}

fn check_limits(kvm: &Kvm, apic_ids: &[u32]) -> Result<(), CpuError> {
    let limit = kvm.get_max_vcpus();
    if apic_ids.len() > limit {
        return Err(CpuError::TooMany { wanted: format!("{} vCPUs", apic_ids.len()), limit });
    }
    let limit = kvm.get_max_vcpu_id();
    match apic_ids.iter().find(|id| **id as usize >= limit) {
        Some(id) => Err(CpuError::TooMany { wanted: format!("APIC ID {id}"), limit }),
        None => Ok(()),
    }
}

struct Vcpu {
    index: u16,
    sender: Sender<Command>,
    handle: Option<JoinHandle<()>>,
    metrics: Arc<VcpuMetrics>,
}

impl Vcpu {
    fn command(&self, command: Command) {
        // A thread that has ended takes no command: the answer that does not come tells.
        let _ = self.sender.send(command);
        if let Some(handle) = &self.handle {
            let _ = handle.kill(kick_signal());
        }
    }
}

/// The vCPUs of a VM: one part with the lifecycle of a device.
pub struct VcpuSet {
    vcpus: Vec<Vcpu>,
    events: EventSink,
    /// Set while they stand still or are about to.
    stopping: Option<Arc<Stopping>>,
}

impl VcpuSet {
    /// Lets the guest run.
    pub fn start(&mut self) {
        self.stopping = None;
        self.vcpus.iter().for_each(|vcpu| vcpu.command(Command::Run));
    }

    /// Tells the guest to stop, unless that has been done, and says whether it has. Never waits: [`vcpu::VcpuEvent::Stopped`]
    /// comes when it has; call it again then.
    ///
    /// # Errors
    /// [`VcpusBusy`].
    pub fn stop(&mut self) -> Result<(), VcpusBusy> {
        let stopping = self.stopping.get_or_insert_with(|| {
            let stopping = Stopping::new(self.vcpus.len(), &self.events);
            let moving = (0..).map(|index| stopping.moving(index));
            self.vcpus.iter().zip(moving).for_each(|(vcpu, moving)| vcpu.command(Command::Park(moving)));
            stopping
        });
        stopping.outcome()
    }

    /// Ends the threads. One that does not end is left to itself: it never runs the guest again. Waits; not for the control thread.
    ///
    /// # Errors
    /// [`CpuError::NoEnd`] for the first one that does not.
    pub fn end(mut self) -> Result<(), CpuError> {
        self.end_within(END)
    }

    fn end_within(&mut self, patience: Duration) -> Result<(), CpuError> {
        self.vcpus.iter().for_each(|vcpu| vcpu.command(Command::Exit));
        let mut outcome = Ok(());
        let mut last = Instant::now();
        for vcpu in &mut self.vcpus {
            let Some(handle) = vcpu.handle.take() else { continue };
            while !handle.is_finished() && last.elapsed() < patience {
                thread::sleep(Duration::from_millis(1));
            }
            if !handle.is_finished() {
                outcome = outcome.and(Err(CpuError::NoEnd { index: vcpu.index }));
                continue;
            }
            last = Instant::now();
            if handle.join().is_err() {
                tracing::error!(vcpu = vcpu.index, "the thread of a vCPU panicked");
            }
        }
        outcome
    }

    /// Brings all vCPUs to power-on and the first to `entry`: without one it starts where the processor does, below 4 GiB (Intel
    /// SDM vol. 3 §10.1.4). They must be stopped.
    ///
    /// # Errors
    /// [`CpuError`]; the guest must not be started then.
    pub fn reset(&self, entry: Option<&Entry>) -> Result<(), CpuError> {
        let answers = self.vcpus.iter().map(|vcpu| {
            let (done, answer) = mpsc::sync_channel(1);
            vcpu.command(Command::Reset(entry.filter(|_| vcpu.index == 0).copied(), done));
            (vcpu.index, answer)
        });
        for (index, answer) in answers.collect::<Vec<_>>() {
            match answer.recv_timeout(ANSWER) {
                Ok(answer) => answer?,
                Err(RecvTimeoutError::Timeout) => return Err(CpuError::NoAnswer { index }),
                Err(RecvTimeoutError::Disconnected) => return Err(CpuError::Gone { index }),
            }
        }
        Ok(())
    }

    /// Sends a non-maskable interrupt to every vCPU, as the button on a server does.
    pub fn nmi(&self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.command(Command::Nmi));
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.vcpus.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.vcpus.is_empty()
    }

    /// The counters of each vCPU.
    #[must_use]
    pub fn metrics(&self) -> Vec<Arc<VcpuMetrics>> {
        self.vcpus.iter().map(|vcpu| Arc::clone(&vcpu.metrics)).collect()
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        if let Err(error) = self.end_within(END) {
            tracing::error!(%error);
        }
    }
}
