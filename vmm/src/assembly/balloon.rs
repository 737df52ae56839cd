//! The memory balloon.

use std::sync::Arc;

use rackvisor_api::config::{BALLOON_ID, BalloonConfig};
use rackvisor_devices::virtio::balloon::{BalloonHandle, BalloonOptions, VirtioBalloon};

use super::{AssemblyError, Host};

/// Makes the device.
///
/// # Errors
/// [`AssemblyError::Host`] if the host has no thread or descriptor left.
pub fn open(config: &BalloonConfig, host: &Host) -> Result<(VirtioBalloon, BalloonHandle), AssemblyError> {
    let options = BalloonOptions {
        id: BALLOON_ID.into(),
        size: config.size.bytes(),
        deflate_on_oom: config.deflate_on_oom,
        free_page_reporting: config.free_page_reporting,
    };
    let device = VirtioBalloon::new(options, &*host.spawner, Arc::clone(&host.notifier))
        .map_err(|e| AssemblyError::host("balloon")(&e))?;
    let handle = device.handle();
    Ok((device, handle))
}
