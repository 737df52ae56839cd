//! virtio-net devices.

use std::fmt::Display;

use rackvisor_api::config::{Link, NicConfig};
use rackvisor_devices::net::{NetOptions, Tap, VirtioNet};

use super::{AssemblyError, Host, LiveNic};

/// Opens the tap and makes its device.
///
/// # Errors
/// [`AssemblyError::Nic`].
pub fn open(config: &NicConfig, host: &Host) -> Result<(VirtioNet, LiveNic), AssemblyError> {
    let failed = |source: &dyn Display| AssemblyError::Nic { id: config.id.clone(), reason: source.to_string() };
    let options = NetOptions {
        id: config.id.clone(),
        tap: Tap::open(&config.tap, config.queues).map_err(|e| failed(&e))?,
        mac: config.mac.bytes(),
        queue_pairs: config.queues,
        queue_size: config.queue_size,
        mtu: config.mtu,
        link_up: config.link == Link::Up,
    };
    let device = VirtioNet::new(options, &*host.spawner, host.notifier.clone()).map_err(|e| failed(&e))?;
    let live = LiveNic::new(device.handle());
    Ok((device, live))
}
