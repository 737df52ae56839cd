//! Limits as devices have them.

use rackvisor_api::config;
use rackvisor_api::size::ByteSize;
use rackvisor_devices::limiter::{Limits, Rate};

/// Of a disk or a group of disks.
pub fn of_disks(limits: &config::Limits) -> Limits {
    let config::Limits { ops_per_second, ops_burst, bytes_per_second, bytes_burst } = *limits;
    both(ops_per_second, ops_burst, bytes_per_second, bytes_burst)
}

/// Of one way through a NIC.
pub fn of_nic(limits: &config::NicLimits) -> Limits {
    let config::NicLimits { packets_per_second, packets_burst, bytes_per_second, bytes_burst } = *limits;
    both(packets_per_second, packets_burst, bytes_per_second, bytes_burst)
}

fn both(ops: Option<u64>, ops_burst: Option<u64>, bytes: Option<ByteSize>, bytes_burst: Option<ByteSize>) -> Limits {
    let rate = |rate: Option<u64>, burst| rate.map(|per_second| Rate { per_second, burst });
    let bytes = rate(bytes.map(ByteSize::bytes), bytes_burst.map(ByteSize::bytes));
    Limits { ops: rate(ops, ops_burst), bytes }
}
