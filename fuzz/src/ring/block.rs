//! virtio-blk on a small file, by io_uring as in production.

use std::sync::Arc;

use rackvisor_devices::block::{BlockOptions, ErrorPolicy, VirtioBlock};
use rackvisor_devices::limiter::Limits;
use rackvisor_devices::{NoNotifier, PlainThreads};
use tempfile::NamedTempFile;

use super::{Bench, SLOW};
use crate::input::Input;

const BYTES: u64 = 64 << 10;

thread_local! {
    // In memory: no disk is to be worn out.
    static DISK: NamedTempFile = tempfile::Builder::new().tempfile_in("/dev/shm").unwrap();
}

/// Plays a driver of a disk.
pub fn play(data: &[u8]) {
    let input = &mut Input::new(data);
    let shape = input.byte();
    let bit = |bit: u8| shape & (1 << bit) != 0;
    let path = DISK.with(|disk| {
        disk.as_file().set_len(BYTES).unwrap();
        disk.path().to_owned()
    });
    let options = BlockOptions {
        queues: 1 + u16::from(bit(0)),
        queue_size: 16,
        read_only: bit(1),
        block_size: bit(2).then_some(4096),
        writeback: !bit(3),
        limits: if bit(5) { SLOW } else { Limits::default() },
        on_error: if bit(4) { ErrorPolicy::Stop } else { ErrorPolicy::Report },
        ..BlockOptions::new("disk", path)
    };
    let device = VirtioBlock::new(options, &PlainThreads, Arc::new(NoNotifier)).unwrap();
    let handle = device.handle();
    Bench::new(device, input).play(input, |input, _| {
        // The disk grows or shrinks.
        let bytes = BYTES * u64::from(input.below(3));
        DISK.with(|disk| disk.as_file().set_len(bytes).unwrap());
        let _ = handle.rescan();
    });
}
