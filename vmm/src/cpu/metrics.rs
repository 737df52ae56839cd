//! What each vCPU counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

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
    /// The guest has served an interrupt that our I/O APIC waits for.
    EndOfInterrupt,
    /// The VMM wanted the vCPU.
    Signal,
    /// Anything else.
    Other,
}

const REASONS: [&str; 8] =
    ["port-read", "port-write", "mmio-read", "mmio-write", "hyperv", "end-of-interrupt", "signal", "other"];

/// Exits that are remembered.
const LAST: usize = 16;
/// Where the reason stands in what is remembered of an exit, plus one; below it is the address, which has fewer bits.
const REASON_SHIFT: u32 = 60;

/// Exits of one vCPU by reason, and the last of them. Only its thread counts.
#[derive(Debug, Default)]
pub struct VcpuMetrics {
    exits: [Counter; REASONS.len()],
    last: [AtomicU64; LAST],
    next: AtomicUsize,
    running: AtomicBool,
}

impl VcpuMetrics {
    /// Counts an exit.
    pub fn count(&self, exit: Exit) {
        self.count_at(exit, 0);
    }

    /// Counts an exit for an access to `address`, a port or in memory.
    pub fn count_at(&self, exit: Exit, address: u64) {
        if let Some(counter) = self.exits.get(exit as usize) {
            counter.increment();
        }
        let next = self.next.load(Ordering::Relaxed);
        if let Some(last) = self.last.get(next % LAST) {
            let reason = (exit as u64 + 1) << REASON_SHIFT;
            last.store(reason | (address & ((1 << REASON_SHIFT) - 1)), Ordering::Relaxed);
        }
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
    }

    /// Notes whether the vCPU runs the guest, or is parked.
    pub fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::Relaxed);
    }

    /// Whether the vCPU runs the guest.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// How many exits there were for each reason.
    pub fn exits(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.into_iter().zip(&self.exits).map(|(reason, counter)| (reason, counter.value()))
    }

    /// The last exits, the newest first: why, and what was accessed.
    pub fn last_exits(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let next = self.next.load(Ordering::Relaxed);
        (1..=LAST).filter_map(move |back| {
            let word = self.last.get(next.wrapping_sub(back) % LAST)?.load(Ordering::Relaxed);
            let reason = usize::try_from((word >> REASON_SHIFT).checked_sub(1)?).ok()?;
            Some((*REASONS.get(reason)?, word & ((1 << REASON_SHIFT) - 1)))
        })
    }
}

/// The counters of all vCPUs of a VM.
pub struct VcpuSetMetrics(pub Vec<Arc<VcpuMetrics>>);

impl MetricSource for VcpuSetMetrics {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        for (index, vcpu) in self.0.iter().enumerate() {
            for (reason, count) in vcpu.exits() {
                visit(Sample {
                    name: "vcpu_exits",
                    help: "Exits of the vCPU to the VMM.",
                    labels: vec![("vcpu", index.to_string()), ("reason", reason.to_owned())],
                    value: Value::Counter(count),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_exits_are_told_the_newest_first() {
        let metrics = VcpuMetrics::default();
        assert_eq!(metrics.last_exits().count(), 0);
        for address in 0..40 {
            metrics.count_at(Exit::MmioWrite, address);
        }
        metrics.count(Exit::Signal);
        let last: Vec<_> = metrics.last_exits().collect();
        assert_eq!(last.len(), LAST);
        assert_eq!(last[..3], [("signal", 0), ("mmio-write", 39), ("mmio-write", 38)]);
        assert_eq!(metrics.exits().find(|(reason, _)| *reason == "mmio-write"), Some(("mmio-write", 40)));
    }
}
