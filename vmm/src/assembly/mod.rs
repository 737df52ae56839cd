//! From configuration to machine: one small function per kind of device. Adding a device is one file and one line.
//!
//! Everything is opened and every thread is started (parked) here, before the first guest instruction runs.

mod balloon;
mod clock;
mod console;
mod disks;
mod firmware;
mod inventory;
mod limits;
mod machine;
mod nics;
mod numa;
mod platform;
mod tables;
mod taps;
mod tpm;

use std::sync::Arc;

use rackvisor_api::problem::{Code, Problem};
use rackvisor_devices::block::BlockError;
use rackvisor_devices::console::ConsoleError;
use rackvisor_devices::firmware::FirmwareError;
use rackvisor_devices::net::{NetError, TapError};
use rackvisor_devices::tpm::TpmError;
use rackvisor_devices::virtio::{StartError, StillBusy};
use rackvisor_devices::{DeviceNotifier, ThreadSpawner};
use thiserror::Error;

pub use self::clock::LiveClock;
pub use self::console::StdioHooks;
pub use self::disks::{DiskStore, StoredDisk};
pub use self::inventory::{Inventory, LiveDisk, LiveNic};
pub use self::machine::Machine;
pub use self::tables::{Facts, Platform as Tables};
pub use self::taps::{Claim, InheritedTaps, Taps};
use crate::boot::BootError;
use crate::boot::image::ImageError;
use crate::confinement::Confinement;
use crate::cpu::CpuError;
use crate::cpu::stop::VcpusBusy;
use crate::cpu::vcpu::EventSink;
use crate::kvm::KvmError;
use crate::memory::MemoryError;

/// What the program that holds the VM decides once for all boots.
#[derive(Clone, Default)]
pub struct HostOptions {
    /// How the console on this terminal is left.
    pub stdio: StdioHooks,
    /// What descriptors NICs may name as inherited.
    pub inherited_taps: InheritedTaps,
    /// Disks that the program itself stores.
    pub disks: Option<Arc<dyn DiskStore>>,
    /// The paths that VMs may name, if the process is confined.
    pub confinement: Option<Confinement>,
}

/// What a machine needs of the process around it.
pub struct Host {
    /// Starts threads.
    pub spawner: Arc<dyn ThreadSpawner>,
    /// Is told what devices have to tell.
    pub notifier: Arc<dyn DeviceNotifier>,
    /// Is told what vCPUs have to tell.
    pub vcpu_events: EventSink,
    /// The taps that came as descriptors.
    pub taps: Taps,
    /// Seconds that earlier guests have set the clock beyond what the configuration says.
    pub clock_shift: i64,
    /// Options of the program.
    pub options: HostOptions,
}

/// Why a machine could not be put together or restarted.
#[derive(Debug, Error)]
pub enum AssemblyError {
    /// The configuration is impossible.
    #[error("{0}")]
    Config(Problem),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// vCPUs.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// Kernel or initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Firmware and its variables.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// A disk.
    #[error("disk \"{id}\": {source}")]
    Disk {
        /// Which one.
        id: String,
        /// What is wrong with it.
        source: BlockError,
    },
    /// A NIC.
    #[error("NIC \"{id}\": {source}")]
    Nic {
        /// Which one.
        id: String,
        /// What is wrong with it.
        source: NetError,
    },
    /// The tap of a NIC.
    #[error("NIC \"{id}\": {source}")]
    Tap {
        /// The NIC.
        id: String,
        /// What is wrong with the tap.
        source: TapError,
    },
    /// The serial console.
    #[error("serial console: {0}")]
    Console(#[from] ConsoleError),
    /// The TPM.
    #[error("TPM: {0}")]
    Tpm(#[from] TpmError),
    /// A bug of the VMM.
    #[error("{0}")]
    Panicked(String),
    /// The host refused something small.
    #[error("{what}: {reason}")]
    Host {
        /// What was asked for.
        what: String,
        /// What it answered.
        reason: String,
    },
}

impl AssemblyError {
    fn host(what: impl Into<String>) -> impl FnOnce(&dyn std::fmt::Display) -> Self {
        let what = what.into();
        move |reason| Self::Host { what, reason: reason.to_string() }
    }
}

impl From<ImageError> for AssemblyError {
    fn from(error: ImageError) -> Self {
        Self::Boot(error.into())
    }
}

impl From<AssemblyError> for Problem {
    fn from(error: AssemblyError) -> Self {
        let (code, remedy) = match &error {
            AssemblyError::Config(problem) => return problem.clone(),
            AssemblyError::Memory(_) => (Code::OutOfResources, "the detail names what to change"),
            AssemblyError::Boot(_) => (Code::BadImage, "the detail names what to change"),
            AssemblyError::Disk { source: BlockError::Locked { .. }, .. }
            | AssemblyError::Firmware(FirmwareError::Open(BlockError::Locked { .. }))
            | AssemblyError::Tap { source: TapError::Busy(_), .. }
            | AssemblyError::Console(ConsoleError::InUse { .. }) => (Code::InUse, "end whoever uses it"),
            AssemblyError::Disk { source: BlockError::Reservation(taken), .. } if taken.is_by_others() => {
                (Code::InUse, "end what the other host runs on it, or set reservation.preempt of the disk")
            }
            AssemblyError::Firmware(_) => (Code::BadImage, "the detail names what to change"),
            AssemblyError::Disk { .. }
            | AssemblyError::Nic { .. }
            | AssemblyError::Tap { .. }
            | AssemblyError::Console(_)
            | AssemblyError::Tpm(_) => {
                (Code::Unusable, "the detail names what to change; GET /v1/vm shows the configuration")
            }
            AssemblyError::Kvm(_) | AssemblyError::Cpu(_) => (Code::Unusable, "`rackvisor doctor` examines the host"),
            AssemblyError::Panicked(_) => (Code::Internal, "report this with the crash report and the log"),
            AssemblyError::Host { .. } => (Code::OutOfResources, "the detail names what the host refused"),
        };
        Problem::new(code, error.to_string(), remedy)
    }
}

/// What a machine that was told to stop still waits for.
#[derive(Debug, Error)]
pub enum MachineBusy {
    /// vCPUs that run.
    #[error(transparent)]
    Vcpus(#[from] VcpusBusy),
    /// A device that has not drained.
    #[error("{busy} on {device}")]
    Device {
        /// Identifier of the device.
        device: String,
        /// What it waits for.
        busy: StillBusy,
    },
}

/// A device that does not start again.
#[derive(Debug, Error)]
#[error("device \"{device}\" does not start: {source}")]
pub struct DeviceStart {
    /// Identifier of the device.
    pub device: String,
    /// Why.
    pub source: StartError,
}

impl From<DeviceStart> for Problem {
    fn from(error: DeviceStart) -> Self {
        Problem::new(Code::Internal, error.to_string(), "reset the VM; the log of the VMM says more")
    }
}
