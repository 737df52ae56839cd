//! Sockets, cores and threads, and the APIC IDs that follow from them.

use rackvisor_api::config::Topology;

/// Bits that number `count` things.
fn width(count: u16) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// How APIC IDs are made of thread, core and socket numbers: each number has its own bits (Intel SDM vol. 3 §9.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApicIds {
    topology: Topology,
}

impl ApicIds {
    /// The scheme for `topology`, whose numbers are 1..=1024 each.
    #[must_use]
    pub fn new(topology: Topology) -> Self {
        Self { topology }
    }

    /// The APIC ID of the vCPU with this index: threads count fastest, sockets slowest.
    #[must_use]
    pub fn of(self, index: u16) -> u32 {
        let (threads, cores) = (self.topology.threads.max(1), self.topology.cores.max(1));
        let thread = u32::from(index % threads);
        let core = u32::from((index / threads) % cores);
        let socket = u32::from(index) / (u32::from(threads) * u32::from(cores));
        socket << self.socket_shift() | core << self.core_shift() | thread
    }

    /// Bits of an APIC ID below the core number.
    #[must_use]
    pub fn core_shift(self) -> u32 {
        width(self.topology.threads.max(1))
    }

    /// Bits of an APIC ID below the socket number.
    #[must_use]
    pub fn socket_shift(self) -> u32 {
        self.core_shift() + width(self.topology.cores.max(1))
    }

    /// Threads in one core.
    #[must_use]
    pub fn threads_per_core(self) -> u32 {
        u32::from(self.topology.threads.max(1))
    }

    /// Threads in one socket.
    #[must_use]
    pub fn threads_per_socket(self) -> u32 {
        self.threads_per_core() * u32::from(self.topology.cores.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_are_unique_for_every_shape_and_plain_where_the_counts_are_powers_of_two() {
        for (sockets, cores, threads) in [
            (1, 1, 1),
            (1, 254, 1),
            (2, 127, 1),
            (127, 1, 2),
            (3, 5, 2),
            (254, 1, 1),
            (1024, 1, 1),
            (5, 5, 5),
            (11, 93, 1),
        ] {
            let ids = ApicIds::new(Topology { sockets, cores, threads });
            let count = sockets * cores * threads;
            let mut seen: Vec<_> = (0..count).map(|i| ids.of(i)).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), usize::from(count));
            assert!(seen.iter().all(|id| *id < 1 << 12), "KVM has 4096 IDs");
        }
        assert_eq!(ApicIds::new(Topology { sockets: 5, cores: 5, threads: 5 }).of(124), 292);
        let ids = ApicIds::new(Topology { sockets: 2, cores: 4, threads: 2 });
        assert_eq!((0..16).map(|i| ids.of(i)).collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
        let ids = ApicIds::new(Topology { sockets: 2, cores: 3, threads: 1 });
        assert_eq!((0..6).map(|i| ids.of(i)).collect::<Vec<_>>(), [0, 1, 2, 4, 5, 6]);
    }
}
