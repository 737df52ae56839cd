//! virtio-blk devices.

use rackvisor_api::config::{CacheMode, DiskConfig};
use rackvisor_devices::block::{BlockOptions, ReservationOptions, VirtioBlock};

use super::{AssemblyError, Host, LiveDisk};

/// Opens the disk and makes its device.
///
/// # Errors
/// [`AssemblyError::Disk`].
pub fn open(config: &DiskConfig, host: &Host) -> Result<(VirtioBlock, LiveDisk), AssemblyError> {
    let options = BlockOptions {
        id: config.id.clone(),
        path: config.path.clone(),
        read_only: config.read_only,
        queues: config.queues,
        queue_size: config.queue_size,
        direct: config.direct,
        block_size: None,
        serial: config.serial.clone(),
        writeback: config.cache == CacheMode::Writeback,
        wwid: config.wwid.clone(),
        reservation: config.reservation.map(|wanted| ReservationOptions { key: wanted.key.0, preempt: wanted.preempt }),
    };
    let device = VirtioBlock::new(options, &*host.spawner, host.notifier.clone())
        .map_err(|source| AssemblyError::Disk { id: config.id.clone(), source })?;
    let live = LiveDisk::new(device.handle());
    Ok((device, live))
}
