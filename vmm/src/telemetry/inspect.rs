//! `GET /v1/inspect`: what every part of the VM is doing, as a tree of JSON.
//!
//! All of it is read from atomics and from copies that the parts leave behind ([`super::Telemetry`]): whoever asks waits for
//! nobody, and nobody waits for who asks. Nothing here holds guest RAM.

use std::fs;

use rackvisor_api::config::{VmConfig, slot_assignment};
use rackvisor_devices::metrics::{MetricSource, Value as Metric};
use rackvisor_devices::pci::msix::{MsixView, VectorView};
use rackvisor_devices::virtio::Position;
use rackvisor_devices::virtio::pci::{QueueView, TransportView};
use serde_json::{Map, Value, json};

use super::{Live, ProcessMetrics, Telemetry, process};
use crate::memory::Slot;

/// The parts of the tree.
const SECTIONS: [&str; 7] = ["control", "vcpus", "memory", "devices", "tpm", "threads", "process"];

impl Telemetry {
    /// The part of the tree at `path`, names joined by `/`; empty: all of it. `None` where there is nothing.
    #[must_use]
    pub fn inspect(&self, path: &str) -> Option<Value> {
        let live = self.live();
        let mut names = path.split('/').filter(|name| !name.is_empty());
        let Some(first) = names.next() else {
            let sections = SECTIONS.iter().filter_map(|name| Some(((*name).to_owned(), section(&live, name)?)));
            return Some(Value::Object(sections.collect()));
        };
        names.try_fold(section(&live, first)?, |value, name| match value {
            Value::Object(mut members) => members.remove(name),
            Value::Array(items) => items.into_iter().nth(name.parse().ok()?),
            _ => None,
        })
    }
}

fn section(live: &Live, name: &str) -> Option<Value> {
    Some(match name {
        "control" => control(live),
        "vcpus" => vcpus(live),
        "memory" => memory(live),
        "devices" => devices(live),
        "tpm" => counters(live.tpm.as_deref()?),
        "threads" => threads(),
        "process" => counters(&ProcessMetrics),
        _ => return None,
    })
}

fn control(live: &Live) -> Value {
    let facts = &live.facts;
    json!({
        "state": facts.state,
        "cause": facts.cause,
        "operation": facts.operation,
        "pending": facts.pending,
        "waiting_requests": facts.waiting,
        "messages": facts.messages,
        "resets": facts.resets,
    })
}

pub(super) fn vcpus(live: &Live) -> Value {
    let vcpu = |vcpu: &std::sync::Arc<crate::cpu::metrics::VcpuMetrics>| {
        let exits: Map<String, Value> = vcpu.exits().map(|(reason, count)| (reason.to_owned(), count.into())).collect();
        let last: Vec<String> = vcpu.last_exits().map(|(reason, at)| format!("{reason} {at:#x}")).collect();
        json!({ "running": vcpu.is_running(), "exits": exits, "last_exits": last })
    };
    live.vcpus.iter().map(vcpu).collect()
}

fn memory(live: &Live) -> Value {
    // Not where they are on the host: that is for nobody to know.
    let slot = |slot: &Slot| json!({ "address": format!("{:#x}", slot.start), "bytes": slot.length });
    live.memory.iter().map(slot).collect()
}

fn interrupts(msix: &MsixView) -> Value {
    let vector = |vector: &VectorView| {
        json!({
            "address": format!("{:#x}", vector.message.address),
            "data": format!("{:#x}", vector.message.data),
            "masked": vector.masked,
            "pending": vector.pending,
        })
    };
    let vectors: Vec<Value> = msix.vectors.iter().map(vector).collect();
    json!({ "enabled": msix.enabled, "masked": msix.function_masked, "vectors": vectors })
}

fn queue(queue: &QueueView) -> Value {
    let at = queue.positions.get();
    json!({
        "size": queue.size,
        "enabled": queue.enabled,
        "next_avail": at.map(|at| at.next_avail),
        "next_used": at.map(|at| at.next_used),
        "in_flight": at.map(Position::in_flight),
    })
}

fn devices(live: &Live) -> Value {
    let slots = live.config.as_deref().and_then(|config: &VmConfig| slot_assignment(config).ok()).unwrap_or_default();
    let device = |view: &TransportView| {
        let slot = slots.iter().find(|(id, _)| id == view.id()).map(|(_, slot)| format!("0000:00:{slot:02x}.0"));
        let state = view.state();
        let shown = json!({
            "pci": slot,
            "command": format!("{:#x}", view.command()),
            "bar": view.bar().map(|address| format!("{address:#x}")),
            "phase": state.phase,
            "broken": view.is_broken(),
            "status": format!("{:#x}", state.status),
            "features": format!("{:#x}", state.features),
            "queues": state.queues.iter().map(queue).collect::<Vec<_>>(),
            "interrupts": interrupts(&view.interrupts()),
            "counters": counters(&*view.metrics()),
        });
        (view.id().to_owned(), shown)
    };
    Value::Object(live.transports.iter().map(device).collect())
}

/// What a part counts: a number, or where a name has several a number for each set of labels (without those that are the
/// same for the whole part).
fn counters(source: &dyn MetricSource) -> Value {
    let mut counters = Map::new();
    source.collect(&mut |sample| {
        let value = match sample.value {
            Metric::Counter(count) => json!(count),
            Metric::Gauge(value) => json!(value),
            Metric::Latency(latency) => {
                let count = latency.buckets.iter().sum::<u64>() + latency.above;
                json!({ "count": count, "sum_seconds": latency.sum.as_secs_f64() })
            }
        };
        let own = |(label, _): &&(&'static str, String)| !matches!(*label, "disk" | "nic" | "device" | "tpm");
        let labels: Vec<String> = sample.labels.iter().filter(own).map(|(label, v)| format!("{label}={v}")).collect();
        if labels.is_empty() {
            counters.insert(sample.name.to_owned(), value);
        } else {
            let family = counters.entry(sample.name).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(family) = family {
                family.insert(labels.join(","), value);
            }
        }
    });
    Value::Object(counters)
}

/// The threads of the process, from /proc.
fn threads() -> Value {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Value::Array(Vec::new()) };
    let thread = |entry: std::io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        let (head, tail) = stat.rsplit_once(") ")?;
        let (tid, name) = head.split_once(" (")?;
        let tid: u32 = tid.parse().ok()?;
        Some(json!({
            "tid": tid,
            "name": name,
            "state": tail.get(..1),
            "cpu_ms": process::cpu_milliseconds(&stat),
        }))
    };
    tasks.filter_map(thread).collect()
}
