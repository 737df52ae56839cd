//! virtio-blk devices.

use std::sync::Arc;

use rackvisor_api::config::{CacheMode, DiskConfig, OnError};
use rackvisor_devices::block::{BlockOptions, BlockSource, ErrorPolicy, MakeBackend, ReservationOptions, VirtioBlock};
use rackvisor_devices::limiter::Limiter;

use super::{AssemblyError, Host, LiveDisk, limits};

/// Disks that the program which embeds the VM stores itself, instead of the LUNs and files that the configuration names.
pub trait DiskStore: Send + Sync {
    /// The disk of this configuration; `None` for one that is to be opened by its path.
    fn open(&self, config: &DiskConfig) -> Option<StoredDisk>;
}

/// A disk of a [`DiskStore`].
pub struct StoredDisk {
    /// The disk as a whole.
    pub source: Arc<dyn BlockSource>,
    /// Makes what executes the requests of a queue, once for each.
    pub backend: Box<MakeBackend<'static>>,
}

/// Opens the disk and makes its device, which shares the limits of `group` if there is one.
///
/// # Errors
/// [`AssemblyError::Disk`].
pub fn open(
    config: &DiskConfig,
    group: Option<Arc<Limiter>>,
    host: &Host,
) -> Result<(VirtioBlock, LiveDisk), AssemblyError> {
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
        reservation: config.reservation.as_ref().map(|wanted| ReservationOptions {
            key: wanted.key.0,
            preempt: wanted.preempt,
            helper: wanted.helper.clone(),
        }),
        on_error: error_policy(config.on_error),
        limits: limits::of_disks(&config.limits),
        group,
        affinity: config.affinity.iter().map(|list| list.cpus().to_vec()).collect(),
    };
    let (spawner, notifier) = (&*host.spawner, host.notifier.clone());
    let stored = host.options.disks.as_ref().and_then(|store| store.open(config));
    let device = match stored {
        Some(StoredDisk { source, backend }) => {
            VirtioBlock::with_backends(&options, source, &*backend, spawner, notifier)
        }
        None => VirtioBlock::new(options, spawner, notifier),
    };
    let device = device.map_err(|source| AssemblyError::Disk { id: config.id.clone(), source })?;
    let live = LiveDisk::new(device.handle());
    Ok((device, live))
}

/// The policy as the device has it.
pub fn error_policy(on_error: OnError) -> ErrorPolicy {
    match on_error {
        OnError::Report => ErrorPolicy::Report,
        OnError::Stop => ErrorPolicy::Stop,
        OnError::Enospc => ErrorPolicy::Enospc,
    }
}
