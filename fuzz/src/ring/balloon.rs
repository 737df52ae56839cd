//! virtio-balloon.

use std::sync::Arc;

use rackvisor_devices::virtio::VirtioDevice;
use rackvisor_devices::virtio::balloon::{BalloonOptions, VirtioBalloon};
use rackvisor_devices::{NoNotifier, PlainThreads};

use super::Bench;
use crate::input::Input;

/// Plays a driver of the memory balloon.
pub fn play(data: &[u8]) {
    let input = &mut Input::new(data);
    let options = BalloonOptions { id: "balloon".into(), size: 0, deflate_on_oom: true, free_page_reporting: true };
    let device = VirtioBalloon::new(options, &PlainThreads, Arc::new(NoNotifier)).unwrap();
    let (handle, metrics) = (device.handle(), device.metrics());
    Bench::new(device, input).play(input, |input, _| {
        handle.set_size(input.u64());
        assert!(handle.held() <= u64::from(u32::MAX) * 4096);
        metrics.collect(&mut |_| ());
    });
}
