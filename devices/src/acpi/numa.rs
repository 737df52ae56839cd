//! NUMA: which processors and memory are near each other (SRAT), and how far nodes are apart (SLIT).

use super::{LAST_XAPIC_ID, Window};

/// A node of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The local APIC IDs of its processors.
    pub apic_ids: Vec<u32>,
    /// Its RAM.
    pub memory: Vec<Window>,
    /// The distance to each node, in order; 10 is the one to itself.
    pub distances: Vec<u8>,
}

impl Node {
    /// Whether it can be described beside `count - 1` others.
    pub(super) fn is_complete(&self, count: usize) -> bool {
        self.distances.len() == count && self.memory.iter().all(|window| window.first <= window.last)
    }
}

const ENABLED: u32 = 1;

/// The body of the SRAT (ACPI 6.5 §5.2.16).
pub(super) fn srat(nodes: &[Node]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(1u32.to_le_bytes());
    body.extend([0; 8]);
    for (domain, node) in (0u32..).zip(nodes) {
        node.apic_ids.iter().for_each(|&id| processor(&mut body, domain, id));
    }
    for (domain, node) in (0u32..).zip(nodes) {
        node.memory.iter().for_each(|window| memory(&mut body, domain, window));
    }
    body
}

/// §5.2.16.1 where the ID fits, as in the MADT; else §5.2.16.3.
fn processor(body: &mut Vec<u8>, domain: u32, apic_id: u32) {
    match u8::try_from(apic_id) {
        Ok(id) if apic_id <= LAST_XAPIC_ID => {
            let [low, high @ ..] = domain.to_le_bytes();
            body.extend([0, 16, low, id]);
            body.extend(ENABLED.to_le_bytes());
            body.push(0);
            body.extend(high);
            body.extend(0u32.to_le_bytes());
        }
        _ => {
            body.extend([2, 24, 0, 0]);
            body.extend(domain.to_le_bytes());
            body.extend(apic_id.to_le_bytes());
            body.extend(ENABLED.to_le_bytes());
            body.extend([0; 8]);
        }
    }
}

/// §5.2.16.2.
fn memory(body: &mut Vec<u8>, domain: u32, window: &Window) {
    body.extend([1, 40]);
    body.extend(domain.to_le_bytes());
    body.extend([0; 2]);
    body.extend(window.first.to_le_bytes());
    body.extend((window.last - window.first).saturating_add(1).to_le_bytes());
    body.extend([0; 4]);
    body.extend(ENABLED.to_le_bytes());
    body.extend([0; 8]);
}

/// The body of the SLIT (§5.2.17).
pub(super) fn slit(nodes: &[Node]) -> Vec<u8> {
    let mut body = (nodes.len() as u64).to_le_bytes().to_vec();
    for node in nodes {
        body.extend(&node.distances);
    }
    body
}
