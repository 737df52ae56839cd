//! virtio-net devices.

use rackvisor_api::config::{Link, NicConfig};
use rackvisor_devices::net::{NetOptions, Tap, VirtioNet};

use super::{AssemblyError, Host, LiveNic, limits};

/// Opens the tap and makes its device.
///
/// # Errors
/// [`AssemblyError::Tap`] or [`AssemblyError::Nic`].
pub fn open(config: &NicConfig, host: &Host) -> Result<(VirtioNet, LiveNic), AssemblyError> {
    let id = || config.id.clone();
    let tap = match &config.tap {
        Some(name) => Tap::open(name, config.queues),
        None => host.taps.open(&config.id),
    };
    let options = NetOptions {
        id: id(),
        tap: tap.map_err(|source| AssemblyError::Tap { id: id(), source })?,
        mac: config.mac.bytes(),
        queue_pairs: config.queues,
        queue_size: config.queue_size,
        mtu: config.mtu,
        link_up: config.link == Link::Up,
        antispoof: config.antispoof,
        rss: config.rss,
        vhost: config.vhost,
        rx_limits: limits::of_nic(&config.rx_limits),
        tx_limits: limits::of_nic(&config.tx_limits),
    };
    let device = VirtioNet::new(options, &*host.spawner, host.notifier.clone())
        .map_err(|source| AssemblyError::Nic { id: id(), source })?;
    let live = LiveNic::new(device.handle());
    Ok((device, live))
}
