//! virtio-rng.

use std::sync::Arc;

use rackvisor_devices::virtio::rng::VirtioRng;
use rackvisor_devices::{NoNotifier, PlainThreads};

use super::Bench;
use crate::input::Input;

/// Plays a driver of the random number device.
pub fn play(data: &[u8]) {
    let input = &mut Input::new(data);
    let device = VirtioRng::new("rng", &PlainThreads, Arc::new(NoNotifier)).unwrap();
    Bench::new(device, input).play(input, |_, _| {});
}
