//! Bad documents for the API.

use hyper::Method;
use rackvisor_api::control::VmInfo;
use rackvisor_api::problem::MEDIA_TYPE;
use rackvisor_api::testing::{Mutations, full_config};
use serde_json::json;

use crate::Rackvisor;

/// All that a client can see of the VM but the time.
fn picture(vmm: &Rackvisor) -> (VmInfo, Vec<u64>) {
    let mut vm = vmm.client.describe().unwrap();
    vm.uptime_ms = None;
    (vm, vmm.client.events(Some(0), false).unwrap().map(|event| event.unwrap().id).collect())
}

/// Sends `count` bad documents in place of each of four good ones, and sees that they are refused and change nothing.
///
/// # Panics
/// When they do not or do.
pub fn spoil_everything(vmm: &Rackvisor, count: usize) {
    let targets = [
        (Method::PUT, "/v1/vm", full_config()),
        (Method::PUT, "/v1/vm/disks/root", full_config()["disks"][0].clone()),
        (Method::PUT, "/v1/vm/nics/net0", full_config()["nics"][0].clone()),
        (Method::PATCH, "/v1/vm/disks/data", json!({"queues": 3, "serial": "S2", "read_only": true})),
    ];
    let before = picture(vmm);
    for (seed, (method, path, good)) in (0..).zip(targets) {
        for (number, mutation) in Mutations::new(good, seed).take(count).enumerate() {
            let answer = vmm.client.exchange(method.clone(), path, Some(mutation.body.clone())).unwrap();
            let told = format!("{method} {path}, {}: {}", mutation.what, String::from_utf8_lossy(&mutation.body));
            assert!((400..500).contains(&answer.status), "{}: {told}", answer.status);
            assert_eq!(answer.content_type, MEDIA_TYPE, "{told}");
            if number % 50 == 0 {
                assert_eq!(picture(vmm), before, "{told}");
            }
        }
    }
    assert_eq!(picture(vmm), before);
}
