//! NUMA nodes of the guest.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{CpuList, CpusConfig, MemoryConfig};
use crate::problem::{Pointer, Problem};
use crate::size::ByteSize;

/// The most NUMA nodes.
const MAX_NODES: usize = 64;
/// What the kernel numbers its nodes with (MAX_NUMNODES).
const MAX_HOST_NODE: u16 = 1023;
/// The distance of a node to itself, and to others where the configuration says none (ACPI 6.5 §5.2.17).
const LOCAL: u8 = 10;
const REMOTE: u8 = 20;

/// A NUMA node of the guest: vCPUs and memory that are near each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NumaNode {
    /// Its vCPUs, numbered from 0. Each vCPU is in one node. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<CpuList>,
    /// Its memory, a multiple of 2 MiB (of 1 GiB with `hugepages` `1G`); that of all nodes is `memory.size`. Nodes follow each other in
    /// the guest's address space.
    pub memory: ByteSize,
    /// How far away each node is, in order: 10 for this one, 11 to 255 for others. Default: 20.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub distances: Vec<u8>,
    /// The nodes of the host, 0 to 1023, that its memory is taken from, and no other. Default: as the host likes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub host_nodes: Vec<u16>,
}

impl NumaNode {
    /// The distances to all of `count` nodes, where this one is number `index`.
    pub fn distances(&self, index: usize, count: usize) -> Vec<u8> {
        if !self.distances.is_empty() {
            return self.distances.clone();
        }
        (0..count).map(|other| if other == index { LOCAL } else { REMOTE }).collect()
    }

    fn check(&self, index: usize, count: usize, memory: &MemoryConfig, at: &Pointer) -> Result<(), Problem> {
        let page = memory.page();
        if self.memory.bytes() == 0 || !self.memory.bytes().is_multiple_of(page.bytes()) {
            return Err(Problem::invalid(
                &at.key("memory"),
                format!("{} is no memory for a node", self.memory),
                format!("choose a multiple of {page}"),
            ));
        }
        let distance = |(other, distance): (usize, &u8)| match other == index {
            true => *distance == LOCAL,
            false => *distance > LOCAL,
        };
        let complete = self.distances.is_empty() || self.distances.len() == count;
        if !complete || !self.distances.iter().enumerate().all(distance) {
            return Err(Problem::invalid(
                &at.key("distances"),
                "these are not the distances to all nodes",
                format!("give {count}: {LOCAL} at place {index}, for the node itself, and 11 to 255 elsewhere"),
            ));
        }
        let mut hosts = self.host_nodes.clone();
        hosts.sort_unstable();
        hosts.dedup();
        if hosts.len() != self.host_nodes.len() || hosts.len() > MAX_NODES || hosts.last() > Some(&MAX_HOST_NODE) {
            return Err(Problem::invalid(
                &at.key("host_nodes"),
                "these nodes of the host are not possible",
                format!("name at most {MAX_NODES}, each once, from 0 to {MAX_HOST_NODE}"),
            ));
        }
        Ok(())
    }
}

/// The nodes hold each vCPU and all of the memory once.
pub(super) fn check(nodes: &[NumaNode], cpus: &CpusConfig, memory: &MemoryConfig, at: &Pointer) -> Result<(), Problem> {
    if nodes.is_empty() {
        return Ok(());
    }
    if nodes.len() > MAX_NODES {
        let detail = format!("{} NUMA nodes are too many", nodes.len());
        return Err(Problem::invalid(at, detail, format!("define at most {MAX_NODES}")));
    }
    let mut missing: Vec<u16> = (0..cpus.count).collect();
    for (index, node) in nodes.iter().enumerate() {
        let at = at.index(index);
        node.check(index, nodes.len(), memory, &at)?;
        for cpu in node.cpus.iter().flat_map(CpuList::cpus) {
            let Some(place) = missing.iter().position(|other| other == cpu) else {
                let detail = format!("vCPU {cpu} does not exist, or is in another node already");
                let remedy = format!("put each of the vCPUs 0 to {} in one node", cpus.count.saturating_sub(1));
                return Err(Problem::invalid(&at.key("cpus"), detail, remedy));
            };
            missing.remove(place);
        }
    }
    if let Some(cpu) = missing.first() {
        let detail = format!("vCPU {cpu} is in no NUMA node");
        return Err(Problem::invalid(at, detail, "put each vCPU in one node"));
    }
    let total = nodes.iter().fold(0u64, |sum, node| sum.saturating_add(node.memory.bytes()));
    if total != memory.size.bytes() {
        let detail = format!("the NUMA nodes have {} of memory, the VM has {}", ByteSize(total), memory.size);
        return Err(Problem::invalid(at, detail, "make them the same"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(cpus: &str, mib: u64) -> NumaNode {
        let cpus = (!cpus.is_empty()).then(|| cpus.parse().unwrap());
        NumaNode { cpus, memory: ByteSize::mib(mib), distances: Vec::new(), host_nodes: Vec::new() }
    }

    /// Where a problem points, of four vCPUs and 512 MiB in `nodes`.
    fn problem(nodes: &[NumaNode]) -> Option<String> {
        let cpus = CpusConfig { count: 4, ..CpusConfig::default() };
        let outcome = check(nodes, &cpus, &MemoryConfig::new(ByteSize::mib(512)), &Pointer::root().key("numa"));
        outcome.err().map(|problem| problem.pointer.unwrap())
    }

    #[test]
    fn nodes_hold_every_vcpu_and_all_memory_exactly_once() {
        for good in [vec![], vec![node("0-3", 512)], vec![node("0,2", 256), node("1,3", 128), node("", 128)]] {
            assert_eq!(problem(&good), None, "{good:?}");
        }
        for (bad, at) in [
            (vec![node("0-2", 512)], "/numa"),
            (vec![node("0-4", 512)], "/numa/0/cpus"),
            (vec![node("0-3", 256), node("3", 256)], "/numa/1/cpus"),
            (vec![node("0-3", 510)], "/numa"),
            (vec![node("0-3", 511)], "/numa/0/memory"),
            (vec![node("0-3", 512), node("", 0)], "/numa/1/memory"),
            (vec![node("0-3", 512), node("", (u64::MAX >> 20) & !1)], "/numa"),
            (vec![node("0-3", 8); 65], "/numa"),
        ] {
            assert_eq!(problem(&bad).as_deref(), Some(at), "{bad:?}");
        }
    }

    #[test]
    fn distances_are_10_to_the_node_itself_and_more_to_others() {
        let with = |distances: &[u8]| {
            let far = NumaNode { distances: distances.to_vec(), ..node("2-3", 256) };
            problem(&[node("0-1", 256), far])
        };
        assert_eq!(with(&[11, 10]), None);
        assert_eq!(with(&[255, 10]), None);
        for bad in [&[10, 10][..], &[20, 11], &[10, 20], &[20], &[20, 10, 20], &[0, 10]] {
            assert_eq!(with(bad).as_deref(), Some("/numa/1/distances"), "{bad:?}");
        }
        assert_eq!(node("0", 2).distances(1, 3), [20, 10, 20]);
    }

    #[test]
    fn nodes_of_the_host_are_named_once_each() {
        let with = |host_nodes: &[u16]| problem(&[NumaNode { host_nodes: host_nodes.to_vec(), ..node("0-3", 512) }]);
        assert_eq!(with(&[0, 3, 1023]), None);
        for bad in [&[0, 0][..], &[1024]] {
            assert_eq!(with(bad).as_deref(), Some("/numa/0/host_nodes"), "{bad:?}");
        }
    }
}
