//! Kernels and initrds: files whose content somebody else made.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use rackvisor::boot::BootImages;
use rackvisor_api::config::BootConfig;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::input::Input;

const RAM: usize = 32 << 20;

thread_local! {
    static MEMORY: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
}

/// Plays whoever made the files.
pub fn play(data: &[u8]) {
    let mut input = Input::new(data);
    let initrd = file(input.bytes());
    let kernel = file(input.rest());
    let path = |file: &File| format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut config = BootConfig::with_kernel(path(&kernel));
    config.initrd = Some(path(&initrd).into());
    config.cmdline = "console=ttyS0".to_owned();
    let Ok(Some(mut images)) = BootImages::open(&config) else { return };
    MEMORY.with(|memory| {
        let Ok(loaded) = images.load(memory, RAM as u64) else { return };
        images.describe(&loaded, memory, RAM as u64, 0xe_0000).expect("what is loaded can be described");
    });
}

fn file(content: &[u8]) -> File {
    let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file
}
