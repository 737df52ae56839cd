//! Rackvisor's virtual machine monitor, as a library.
//!
//! [`Vm`] is the way in. Data flows one way: requests, device events and vCPU events are messages to the control thread
//! ([`control`]), the one owner of the VM, which has machines put together ([`assembly`]) from RAM ([`memory`]), vCPUs
//! ([`cpu`]), a guest to load ([`boot`]) and the devices of `rackvisor-devices`. Only [`kvm`] and [`cpu`] speak to KVM.

pub mod assembly;
pub mod boot;
pub mod confinement;
pub mod control;
pub mod cpu;
pub mod doctor;
pub mod kvm;
pub mod memory;
pub mod seccomp;
pub mod telemetry;
mod vm;

pub use rackvisor_api::config::VmConfig;
pub use rackvisor_api::problem::Problem;
pub use rackvisor_api::state::{Action, VmState};

pub use self::vm::Vm;
