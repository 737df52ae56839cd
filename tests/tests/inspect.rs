//! The live tree, held against what the guest sees of itself.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use rackvisor_api::config::{BalloonConfig, BalloonPatch, Patch, VmPatch};
use rackvisor_api::size::ByteSize;
use rackvisor_tests::{Rackvisor, Tap, eventually, linux, needs_kvm};
use serde_json::Value;

fn number(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

fn hexadecimal(value: &Value) -> u64 {
    number(value.as_str().unwrap())
}

#[test]
fn the_tree_shows_memory_devices_and_interrupts_as_the_guest_has_them() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.memory.size = ByteSize::gib(3);
    config.disks = vec![vmm.image("data", &[0; 1 << 20])];
    let mut guest = vmm.boot_linux(&config);
    guest.ok("dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null");
    let part = |path: &str| vmm.client.inspect(path).unwrap();

    let slots = part("memory");
    let slots: Vec<_> = slots.as_array().unwrap().iter().map(|slot| hexadecimal(&slot["address"])).collect();
    assert_eq!(slots, [0, 4 << 30], "below the hole and above it");
    let bytes = [0, 1].map(|slot| part(&format!("memory/{slot}/bytes")).as_u64().unwrap());
    assert_eq!(bytes, [2 << 30, 1 << 30]);

    let disk = part("devices/data");
    let place = "/sys/bus/pci/devices/0000:00:01.0";
    let resource = guest.ok(&format!("head -n 1 {place}/resource"));
    assert_eq!(disk["pci"], "0000:00:01.0");
    assert_eq!(hexadecimal(&disk["bar"]), number(resource.split(' ').next().unwrap()));
    assert_eq!(hexadecimal(&disk["command"]) & 6, 6, "memory and bus master");
    let features = guest.ok(&format!("cat {place}/virtio*/features"));
    for (bit, taken) in features.chars().enumerate() {
        assert_eq!(hexadecimal(&disk["features"]) >> bit & 1 == 1, taken == '1', "feature {bit}");
    }
    assert_eq!(disk["queues"][0]["enabled"], true);

    // One for the configuration and one for the queue, where the guest's kernel has put them.
    assert_eq!((&disk["interrupts"]["enabled"], &disk["interrupts"]["masked"]), (&true.into(), &false.into()));
    let vectors = disk["interrupts"]["vectors"].as_array().unwrap();
    let used = vectors.iter().filter(|vector| vector["masked"] == false);
    assert_eq!(used.map(|vector| hexadecimal(&vector["address"]) >> 20).collect::<Vec<_>>(), [0xfee, 0xfee]);
    assert_eq!(guest.ok(&format!("ls {place}/msi_irqs | wc -l")), "2");
    assert!(vectors.iter().all(|vector| vector["pending"] == false), "{vectors:?}");

    assert_eq!(part("vcpus/0/running"), true);
    assert_eq!(part("control/state"), "running");
}

#[test]
fn the_tree_shows_how_far_every_queue_is_while_the_guest_works() {
    needs_kvm!();
    let tap = Tap::new();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.boot.as_mut().unwrap().cmdline += &tap.cmdline();
    config.disks = vec![vmm.image("data", &[0; 1 << 20])];
    config.nics = vec![tap.nic()];
    config.balloon = Some(BalloonConfig::default());
    let mut guest = vmm.boot_linux(&config);

    let queue = |place: &str| vmm.client.inspect(&format!("devices/{place}")).unwrap();
    let index = |queue: &Value, name: &str| u16::try_from(queue[name].as_u64().unwrap()).unwrap();
    let used = |place: &str| index(&queue(place), "next_used");
    let disk = queue("data/queues/0");
    let [sent, received] = ["net0/queues/1", "net0/queues/0"].map(used);
    let random = used("rng/queues/0");
    let balloon = used("balloon/queues/0");

    guest.ok("dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null");
    // The guest has its answer when the index is in its memory, and the worker says so after that.
    let now = eventually("the disk is at rest", || {
        let now = queue("data/queues/0");
        (now["in_flight"] == 0 && index(&now, "next_used") == index(&disk, "next_used").wrapping_add(16)).then_some(now)
    });
    assert_eq!(index(&now, "next_avail"), index(&disk, "next_avail").wrapping_add(16));

    guest.ok(&format!("ping -c 3 {}", tap.host()));
    eventually("frames are counted", || {
        let [now_sent, now_received] = ["net0/queues/1", "net0/queues/0"].map(used);
        (now_sent.wrapping_sub(sent) >= 3 && now_received.wrapping_sub(received) >= 3).then_some(())
    });
    guest.ok("dd if=/dev/hwrng of=/dev/null bs=64 count=16 2>/dev/null");
    assert_ne!(used("rng/queues/0"), random);
    let patch = VmPatch { balloon: Patch::Set(BalloonPatch::size(ByteSize::mib(64))), ..VmPatch::default() };
    vmm.client.patch(&patch).unwrap();
    eventually("the guest inflates", || (used("balloon/queues/0") != balloon).then_some(()));
    assert_eq!(vmm.client.inspect("control/state").unwrap(), "running", "no device has stopped for that");
}
