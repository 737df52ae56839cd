//! virtio-blk devices.

use std::num::NonZero;
use std::sync::Arc;
use std::thread::available_parallelism;

use rackvisor_api::config::{CacheMode, DiskConfig, OnError};
use rackvisor_devices::block::{BlockOptions, ErrorPolicy, ReservationOptions, VirtioBlock};
use rackvisor_devices::limiter::Limiter;

use super::{AssemblyError, Host, LiveDisk, limits};

/// Opens the disk and makes its device, which shares the limits of `group` if there is one. The VM has `vcpus`.
///
/// # Errors
/// [`AssemblyError::Disk`].
pub fn open(
    config: &DiskConfig,
    group: Option<Arc<Limiter>>,
    vcpus: u8,
    host: &Host,
) -> Result<(VirtioBlock, LiveDisk), AssemblyError> {
    let options = BlockOptions {
        id: config.id.clone(),
        path: config.path.clone(),
        read_only: config.read_only,
        queues: config.queues,
        workers: Some(workers(config, vcpus, available_parallelism().map_or(usize::MAX, NonZero::get))),
        queue_size: config.queue_size,
        direct: config.direct,
        block_size: None,
        serial: config.serial.clone(),
        writeback: config.cache == CacheMode::Writeback,
        wwid: config.wwid.clone(),
        reservation: config.reservation.map(|wanted| ReservationOptions { key: wanted.key.0, preempt: wanted.preempt }),
        on_error: error_policy(config.on_error),
        limits: limits::of_disks(&config.limits),
        group,
        affinity: config.affinity.iter().map(|list| list.cpus().to_vec()).collect(),
    };
    let device = VirtioBlock::new(options, &*host.spawner, host.notifier.clone())
        .map_err(|source| AssemblyError::Disk { id: config.id.clone(), source })?;
    let live = LiveDisk::new(device.handle());
    Ok((device, live))
}

/// How many threads serve the disk on a host that lets the VM use so many `processors`: where vCPUs and threads would have to take
/// turns, a thread less answers sooner.
fn workers(config: &DiskConfig, vcpus: u8, processors: usize) -> u16 {
    let spare = || u16::try_from(processors.saturating_sub(usize::from(vcpus))).unwrap_or(u16::MAX);
    let chosen = || if config.affinity.len() > 1 { config.queues } else { spare().clamp(1, config.queues.max(1)) };
    config.workers.unwrap_or_else(chosen)
}

/// The policy as the device has it.
pub fn error_policy(on_error: OnError) -> ErrorPolicy {
    match on_error {
        OnError::Report => ErrorPolicy::Report,
        OnError::Stop => ErrorPolicy::Stop,
        OnError::Enospc => ErrorPolicy::Enospc,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_queue_has_a_thread_as_long_as_the_host_has_a_processor_for_it() {
        let disk = |queues| DiskConfig { queues, ..DiskConfig::new("root", "/dev/sda") };
        for (queues, processors, threads) in
            [(4, 64, 4), (4, 6, 4), (4, 4, 2), (4, 3, 1), (4, 2, 1), (4, 1, 1), (1, 64, 1)]
        {
            assert_eq!(workers(&disk(queues), 2, processors), threads, "{queues} queues on {processors} processors");
        }
        assert_eq!(workers(&DiskConfig { workers: Some(3), ..disk(4) }, 2, 2), 3, "as the configuration says");
        let pinned = DiskConfig { affinity: vec!["0".parse().unwrap(), "1".parse().unwrap()], ..disk(2) };
        assert_eq!(workers(&pinned, 2, 2), 2, "a list of processors for each queue is for a thread each");
    }
}
