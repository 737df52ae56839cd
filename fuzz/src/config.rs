//! Documents: configurations in JSON and TOML, and what changes them.

use rackvisor_api::VmConfig;
use rackvisor_api::config::{
    DiskConfig, DiskGroupPatch, DiskPatch, NicConfig, NicPatch, VmPatch, json, slot_assignment,
};
use rackvisor_api::size::ByteSize;
use rackvisor_api::testing::{full_config, small_config};

use crate::input::Input;

/// Plays a client, or whoever wrote the file.
pub fn play(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.below(8);
    let document = input.rest();
    let full = || VmConfig::from_json(full_config().to_string().as_bytes()).unwrap();
    match kind {
        0..2 => drop(VmConfig::from_json(document).map(|config| accepted(&config))),
        2 => drop(VmConfig::from_toml(&String::from_utf8_lossy(document)).map(|config| accepted(&config))),
        3 => {
            if let Ok(patch) = json::<DiskPatch>(document)
                && let Ok(disk) = patch.apply(&full().disks[0])
            {
                changed(full().with_disk(disk).map(|(config, _)| config));
            }
        }
        4 => {
            if let Ok(patch) = json::<NicPatch>(document)
                && let Ok(nic) = patch.apply(&full().nics[0])
            {
                changed(full().with_nic(nic).map(|(config, _)| config));
            }
        }
        5 => {
            if let Ok(patch) = json::<VmPatch>(document) {
                changed(patch.apply(&full(), true));
                changed(patch.apply(&full(), false));
            }
            if let Ok(patch) = json::<DiskGroupPatch>(document) {
                changed(full().with_disk_group(patch.apply(&full().disk_groups[0])));
            }
        }
        6 => {
            if let Ok(disk) = json::<DiskConfig>(document) {
                changed(small_config().with_disk(disk).map(|(config, _)| config));
            }
            if let Ok(nic) = json::<NicConfig>(document) {
                changed(small_config().with_nic(nic).map(|(config, _)| config));
            }
        }
        _ => {
            if let Ok(size) = String::from_utf8_lossy(document).parse::<ByteSize>() {
                assert_eq!(size.to_string().parse(), Ok(size), "a size that reads back as another");
            }
        }
    }
}

/// A change that was accepted leaves a configuration that is.
fn changed<E>(config: Result<VmConfig, E>) {
    if let Ok(config) = config {
        accepted(&config);
    }
}

/// What was accepted is valid, has a place for every device, and reads back as itself.
fn accepted(config: &VmConfig) {
    config.validate().expect("what was accepted is valid");
    slot_assignment(config).expect("every device has a place");
    let text = serde_json::to_vec(config).unwrap();
    let again = VmConfig::from_json(&text).expect("what was accepted is accepted again");
    assert_eq!(&again, config, "it reads back as another");
}
