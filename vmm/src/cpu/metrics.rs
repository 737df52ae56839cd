//! What each vCPU counts.

use std::sync::Arc;

use rackvisor_devices::metrics::{Counter, MetricSource, Sample, Value};

/// Why a vCPU came back to the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Exit {
    /// The guest read a port.
    PortRead,
    /// The guest wrote a port.
    PortWrite,
    /// The guest read a device register in memory.
    MmioRead,
    /// The guest wrote a device register in memory.
    MmioWrite,
    /// KVM passed on something of the Hyper-V interface.
    Hyperv,
    /// The VMM wanted the vCPU.
    Signal,
    /// Anything else.
    Other,
}

const REASONS: [&str; 7] = ["port-read", "port-write", "mmio-read", "mmio-write", "hyperv", "signal", "other"];

/// Exits of one vCPU by reason.
#[derive(Debug, Default)]
pub struct VcpuMetrics {
    exits: [Counter; REASONS.len()],
}

impl VcpuMetrics {
    /// Counts an exit.
    pub fn count(&self, exit: Exit) {
        if let Some(counter) = self.exits.get(exit as usize) {
            counter.increment();
        }
    }
}

/// The counters of all vCPUs of a VM.
pub struct VcpuSetMetrics(pub Vec<Arc<VcpuMetrics>>);

impl MetricSource for VcpuSetMetrics {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        for (index, vcpu) in self.0.iter().enumerate() {
            for (reason, counter) in REASONS.iter().zip(&vcpu.exits) {
                visit(Sample {
                    name: "vcpu_exits",
                    help: "Exits of the vCPU to the VMM",
                    labels: vec![("vcpu", index.to_string()), ("reason", (*reason).to_owned())],
                    value: Value::Counter(counter.value()),
                });
            }
        }
    }
}
