//! virtio-net devices.

use rackvisor_api::config::{Link, NicConfig, NicLimits};
use rackvisor_devices::limiter::{Limits, Rate};
use rackvisor_devices::net::{NetOptions, Tap, VirtioNet};

use super::{AssemblyError, Host, LiveNic};

/// Opens the tap and makes its device.
///
/// # Errors
/// [`AssemblyError::Tap`] or [`AssemblyError::Nic`].
pub fn open(config: &NicConfig, host: &Host) -> Result<(VirtioNet, LiveNic), AssemblyError> {
    let id = || config.id.clone();
    let options = NetOptions {
        id: id(),
        tap: Tap::open(&config.tap, config.queues).map_err(|source| AssemblyError::Tap { id: id(), source })?,
        mac: config.mac.bytes(),
        queue_pairs: config.queues,
        queue_size: config.queue_size,
        mtu: config.mtu,
        link_up: config.link == Link::Up,
        antispoof: config.antispoof,
        rx_limits: limits(&config.rx_limits),
        tx_limits: limits(&config.tx_limits),
    };
    let device = VirtioNet::new(options, &*host.spawner, host.notifier.clone())
        .map_err(|source| AssemblyError::Nic { id: id(), source })?;
    let live = LiveNic::new(device.handle());
    Ok((device, live))
}

/// The limits as the device has them.
pub fn limits(limits: &NicLimits) -> Limits {
    let ops = limits.packets_per_second.map(|per_second| Rate { per_second, burst: limits.packets_burst });
    let burst = limits.bytes_burst.map(|burst| burst.bytes());
    let bytes = limits.bytes_per_second.map(|rate| Rate { per_second: rate.bytes(), burst });
    Limits { ops, bytes }
}
