//! What the operator sees: metrics and state of every part, the process itself, and what is left of a panic.

pub mod crash;
mod inspect;
mod process;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use rackvisor_api::config::VmConfig;
use rackvisor_api::state::VmState;
use rackvisor_devices::metrics::{LatencySnapshot, MetricSource, Sample, Value};
use rackvisor_devices::virtio::pci::TransportView;

pub use self::process::ProcessMetrics;
use crate::cpu::metrics::VcpuMetrics;
use crate::memory::Slot;

/// What the control thread says of itself.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The state of the VM.
    pub state: VmState,
    /// Why it is in this state.
    pub cause: Option<String>,
    /// What is under way.
    pub operation: Option<&'static str>,
    /// What an operation that takes longer waits for.
    pub pending: Option<String>,
    /// Requests that wait for its end.
    pub waiting: usize,
    /// Messages taken so far.
    pub messages: u64,
    /// Resets of the guest since it was booted.
    pub resets: u64,
}

/// The parts of a machine that can be looked at. None of them holds guest RAM.
#[derive(Clone, Default)]
pub struct Parts {
    /// Everything that counts.
    pub metrics: Vec<Arc<dyn MetricSource>>,
    /// The virtio devices.
    pub transports: Vec<TransportView>,
    /// The vCPUs.
    pub vcpus: Vec<Arc<VcpuMetrics>>,
    /// The slots that RAM consists of.
    pub memory: Vec<Slot>,
    /// The TPM.
    pub tpm: Option<Arc<dyn MetricSource>>,
}

/// A copy of what is known, to be read without holding up anybody.
#[derive(Clone, Default)]
pub(crate) struct Live {
    pub facts: Facts,
    pub config: Option<Arc<VmConfig>>,
    parts: Parts,
}

impl std::ops::Deref for Live {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

/// Everything that can be looked at, read by the API thread while the control thread changes it. Locked only to copy it.
#[derive(Clone, Default)]
pub struct Telemetry(Arc<RwLock<Live>>);

impl Telemetry {
    fn write(&self) -> RwLockWriteGuard<'_, Live> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn live(&self) -> Live {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks at these parts from now on, instead of the former ones.
    pub fn replace(&self, parts: Parts) {
        let former = std::mem::replace(&mut self.write().parts, parts);
        drop(former);
    }

    /// What the control thread says of itself now.
    pub fn tell(&self, facts: Facts) {
        self.write().facts = facts;
    }

    /// What the VM is now.
    pub fn define(&self, config: Option<&VmConfig>) {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).config.clone();
        if known.as_deref() != config {
            let config = config.cloned().map(Arc::new);
            self.write().config = config;
        }
    }

    /// All metrics as OpenMetrics text.
    #[must_use]
    pub fn render(&self) -> String {
        let mut registry = Registry::with_prefix("rackvisor");
        registry.register_collector(Box::new(self.clone()));
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &registry) {
            Ok(()) => text,
            // Writing to a string fails only where a source hands out nonsense.
            Err(error) => {
                tracing::error!(%error, "metrics cannot be encoded");
                "# EOF\n".to_owned()
            }
        }
    }

    fn samples(&self) -> BTreeMap<&'static str, Vec<Sample>> {
        let mut by_name: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut visit = |sample: Sample| by_name.entry(sample.name).or_default().push(sample);
        ProcessMetrics.collect(&mut visit);
        let live = self.live();
        live.facts.collect(&mut visit);
        live.metrics.iter().for_each(|source| source.collect(&mut visit));
        by_name
    }
}

impl MetricSource for Facts {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        for state in VmState::ALL {
            let labels = vec![("state", state.as_str().to_owned())];
            let value = Value::Gauge(if state == self.state { 1.0 } else { 0.0 });
            visit(Sample { name: "vm_state", help: "1 for the state that the VM is in.", labels, value });
        }
        let mut give = |name, help, value| visit(Sample { name, help, labels: Vec::new(), value });
        give("vm_resets", "Resets of the guest since it was booted.", Value::Gauge(self.resets as f64));
        give("control_messages", "Messages that the control thread has taken.", Value::Counter(self.messages));
        let waiting = Value::Gauge(self.waiting as f64);
        give("control_waiting_requests", "Requests that wait for an operation to end.", waiting);
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Telemetry")
    }
}

impl Collector for Telemetry {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for (name, samples) in self.samples() {
            let Some(first) = samples.first() else { continue };
            let kind = match first.value {
                Value::Counter(_) => MetricType::Counter,
                Value::Gauge(_) => MetricType::Gauge,
                Value::Latency(_) => MetricType::Histogram,
            };
            let mut family = encoder.encode_descriptor(name, first.help, None, kind)?;
            for sample in &samples {
                if sample.labels.is_empty() {
                    encode_value(&sample.value, &mut family)?;
                } else {
                    encode_value(&sample.value, &mut family.encode_family(&sample.labels)?)?;
                }
            }
        }
        Ok(())
    }
}

fn encode_value(value: &Value, encoder: &mut MetricEncoder) -> fmt::Result {
    use prometheus_client::encoding::NoLabelSet;
    match value {
        Value::Counter(value) => encoder.encode_counter::<NoLabelSet, _, u64>(value, None),
        Value::Gauge(value) => encoder.encode_gauge(value),
        Value::Latency(snapshot) => encode_latency(snapshot, encoder),
    }
}

fn encode_latency(snapshot: &LatencySnapshot, encoder: &mut MetricEncoder) -> fmt::Result {
    use prometheus_client::encoding::NoLabelSet;
    let finite = snapshot.buckets.iter().zip(0i32..).map(|(count, power)| (2f64.powi(power) * 1e-6, *count));
    let buckets: Vec<_> = finite.chain([(f64::INFINITY, snapshot.above)]).collect();
    let count = buckets.iter().map(|(_, count)| count).sum();
    encoder.encode_histogram::<NoLabelSet>(snapshot.sum.as_secs_f64(), count, &buckets, None)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rackvisor_devices::metrics::Latency;

    use super::*;

    struct Double;

    impl MetricSource for Double {
        fn collect(&self, visit: &mut dyn FnMut(Sample)) {
            let latency = Latency::default();
            latency.record(Duration::from_micros(3));
            let labels = || vec![("disk", "a\"b".to_owned())];
            visit(Sample { name: "disk_reads", help: "Reads", labels: labels(), value: Value::Counter(3) });
            let value = Value::Latency(Box::new(latency.snapshot()));
            visit(Sample { name: "disk_request_seconds", help: "Durations", labels: labels(), value });
        }
    }

    #[test]
    fn samples_appear_as_openmetrics_with_escaped_labels_and_cumulative_buckets() {
        let telemetry = Telemetry::default();
        telemetry.replace(Parts { metrics: vec![Arc::new(Double)], ..Parts::default() });
        let text = telemetry.render();
        for line in [
            "rackvisor_disk_reads_total{disk=\"a\\\"b\"} 3",
            "rackvisor_disk_request_seconds_count{disk=\"a\\\"b\"} 1",
            "rackvisor_disk_request_seconds_bucket{le=\"+Inf\",disk=\"a\\\"b\"} 1",
            "# TYPE rackvisor_process_threads gauge",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
