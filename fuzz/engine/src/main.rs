//! libFuzzer in front of the target that RACKVISOR_FUZZ names: one program, so that all of it is built once.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rackvisor_fuzz::{Target, target};

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let run = TARGET.get_or_init(|| {
        let name = std::env::var("RACKVISOR_FUZZ").unwrap_or_default();
        target(&name).unwrap_or_else(|| panic!("RACKVISOR_FUZZ={name}: there is no such target"))
    });
    run(data);
});
