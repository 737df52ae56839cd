//! NUMA nodes as the ACPI tables tell of them.

use rackvisor_api::config::{CpuList, VmConfig};
use rackvisor_devices::acpi::{Node, Window};

use crate::memory::layout::{self, RamRange};

/// The nodes of `config`, whose vCPUs have these APIC IDs.
pub fn nodes(config: &VmConfig, apic_ids: &[u32]) -> Vec<Node> {
    let sizes: Vec<_> = config.numa.iter().map(|node| node.memory.bytes()).collect();
    let window = |range: RamRange| Window { first: range.start.0, last: range.start.0 + (range.length - 1) };
    let ranges = layout::node_ranges(&sizes);
    let nodes = config.numa.iter().zip(ranges).enumerate().map(|(index, (node, ranges))| Node {
        apic_ids: node
            .cpus
            .iter()
            .flat_map(CpuList::cpus)
            .filter_map(|cpu| apic_ids.get(usize::from(*cpu)).copied())
            .collect(),
        memory: layout::usable(&ranges, config.memory.size.bytes()).into_iter().map(window).collect(),
        distances: node.distances(index, config.numa.len()),
    });
    nodes.collect()
}
