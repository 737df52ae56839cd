//! What the operator sees: metrics of every part, and the process itself.

mod process;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use rackvisor_devices::metrics::{LatencySnapshot, MetricSource, Sample, Value};

pub use self::process::ProcessMetrics;

/// Everything that can be asked for metrics, read by the API thread while the owner changes it on boot and stop.
#[derive(Clone, Default)]
pub struct Sources(Arc<RwLock<Vec<Arc<dyn MetricSource>>>>);

impl Sources {
    /// Asks these from now on, instead of the former ones.
    pub fn replace(&self, sources: Vec<Arc<dyn MetricSource>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = sources;
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
        let sources = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        sources.iter().for_each(|source| source.collect(&mut visit));
        by_name
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}

impl Collector for Sources {
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
        let sources = Sources::default();
        sources.replace(vec![Arc::new(Double)]);
        let text = sources.render();
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
