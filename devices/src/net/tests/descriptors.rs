//! Taps that came as descriptors, in a network namespace of the test's own thread. Skipped, aloud, where the machine has none.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use super::real::{Wire, ethernet, in_namespace, ip, leave_namespace, set_up};
use super::*;
use crate::DeviceEvent;

fn copies(fds: &[OwnedFd]) -> Vec<OwnedFd> {
    fds.iter().map(|fd| fd.try_clone().unwrap()).collect()
}

/// Waits until the kernel says so of the carrier, which Linux 6.1 does some time after it changed.
fn await_carrier(name: &str, up: bool) {
    let end = Instant::now() + SOON;
    loop {
        let output = Command::new("ip").args(["link", "show", name]).output().unwrap();
        if String::from_utf8(output.stdout).unwrap().contains("NO-CARRIER") != up {
            return;
        }
        assert!(Instant::now() < end, "the carrier of {name} is not as it should be (up: {up})");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A running card with all pairs in use.
fn card(fds: &TapFds, pairs: u16) -> Card {
    let negotiated = bit(features::MQ) | bit(features::CTRL_VQ);
    let mut card = Card::with_tap(fds.open().unwrap(), Vec::new(), pairs, 128, negotiated);
    card.start();
    let control = usize::from(2 * pairs);
    let command = card.driver.allocate(8, 1);
    card.driver.write(command, &[4, 0, pairs.to_le_bytes()[0], 0, 0xaa]);
    card.driver.ring(control).add(&[Buffer::readable(command, 4), Buffer::writable(command + 4, 1)]);
    card.driver.ring(control).kick();
    card.used(control);
    assert_eq!(card.driver.read(command + 4, 1), [0], "all pairs are in use");
    card
}

#[test]
fn one_card_after_the_other_uses_the_same_descriptors_which_stay_open() {
    in_namespace(|| {
        let fds = TapFds::new(open_queues("rvtest0", 2).unwrap()).unwrap();
        set_up("rvtest0", true);
        let wire = Wire::new("rvtest0", false);
        assert_eq!(fds.name(), "rvtest0");
        for seed in 0..3 {
            let mut card = card(&fds, 2);
            let out = ethernet(true, 100, seed);
            card.send(&out);
            assert_eq!(wire.receive(), out);
        }
        assert!(ip("link show rvtest0"), "the tap lives as long as its descriptors");
        drop(fds);
        assert!(!ip("link show rvtest0"));
    });
}

#[test]
fn what_a_vmm_that_was_killed_left_out_of_service_serves_again() {
    in_namespace(|| {
        let queues = open_queues("rvtest0", 2).unwrap();
        set_up("rvtest0", true);
        // The agent may give them in another order than the VMM that was killed had them in.
        for index in [0, 1] {
            sys::set_queue(queues[index].as_fd(), false).unwrap();
            sys::set_carrier(queues[1 - index].as_fd(), false).unwrap();
            await_carrier("rvtest0", false);
            let card = card(&TapFds::new(copies(&queues)).unwrap(), 2);
            await_carrier("rvtest0", true);
            drop(card);
            sys::set_queue(queues[index].as_fd(), false).expect("it is in service");
            sys::set_queue(queues[index].as_fd(), true).unwrap();
        }
    });
}

#[test]
fn descriptors_that_are_not_different_queues_of_one_tap_are_refused() {
    in_namespace(|| {
        let refused = |fds: Vec<OwnedFd>| TapFds::new(fds).unwrap_err();
        let (first, second) = (open_queues("rvtest1", 2).unwrap(), open_queues("rvtest2", 2).unwrap());
        let mixed = vec![first[0].try_clone().unwrap(), second[0].try_clone().unwrap()];
        assert!(matches!(refused(mixed), TapError::Mixed { .. }));
        let repeated =
            vec![first[0].try_clone().unwrap(), first[1].try_clone().unwrap(), first[0].try_clone().unwrap()];
        let error = refused(repeated);
        assert!(matches!(error, TapError::Repeated { first: 0, second: 2, .. }), "{error}");
        let (a, b) = (TapFds::new(first).unwrap(), TapFds::new(second).unwrap());
        assert!(a.is_same_tap(&a) && !a.is_same_tap(&b));
    });
}

#[test]
fn the_mtu_of_another_interface_with_the_name_is_not_believed() {
    in_namespace(|| {
        let fds = TapFds::new(open_queues("rvtest0", 1).unwrap()).unwrap();
        assert_eq!(fds.open().unwrap().mtu(), Some(1500));
        leave_namespace();
        assert_eq!(fds.open().unwrap().mtu(), None);
        assert!(ip("tuntap add dev rvtest0 mode tap vnet_hdr") && ip("link set rvtest0 mtu 600"));
        let options = NetOptions { mtu: Some(1500), ..options(fds.open().unwrap(), 1) };
        VirtioNet::new(options, &PlainThreads, Arc::new(crate::NoNotifier)).unwrap();
        let other = TapFds::new(open_queues("rvtest0", 1).unwrap()).unwrap();
        assert_eq!(other.open().unwrap().mtu(), Some(600));
        assert!(!other.is_same_tap(&fds), "they have one name, in two namespaces");
    });
}

#[test]
fn a_deleted_tap_is_told_of_once_and_another_one_of_its_name_is_not_taken_up() {
    in_namespace(|| {
        let fds = TapFds::new(open_queues("rvtest0", 1).unwrap()).unwrap();
        set_up("rvtest0", true);
        let mut card = card(&fds, 1);
        card.give(600);
        assert!(ip("link delete rvtest0"));
        let lost = |card: &Card| -> Vec<String> {
            let reason = |(_, event)| match event {
                DeviceEvent::BackendLost { reason } => Some(reason),
                DeviceEvent::BackendRestored { .. } => Some("restored".to_owned()),
                _ => None,
            };
            card.notifier.events().into_iter().filter_map(reason).collect()
        };
        wait(|| !lost(&card).is_empty(), "the loss is noticed");
        assert!(lost(&card)[0].contains("descriptors of a new one"), "{:?}", lost(&card));
        assert!(ip("tuntap add dev rvtest0 mode tap vnet_hdr"));
        set_up("rvtest0", true);
        // Longer than the card takes to take up a tap that it opened by name.
        std::thread::sleep(Duration::from_millis(2500));
        for seed in 0..3 {
            card.send(&ethernet(true, 100, seed));
            card.used(TX);
        }
        card.wait_count("net_tx_drops", "tap_error", 3);
        assert_eq!(lost(&card).len(), 1, "{:?}", lost(&card));
        card.stop();
        assert!(matches!(fds.open(), Err(TapError::NotATap { index: 0, .. })));
    });
}
