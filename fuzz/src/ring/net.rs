//! virtio-net on a pair of sockets. With RSS where this process may load BPF programs.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use rackvisor_devices::limiter::Limits;
use rackvisor_devices::net::{NetError, NetOptions, Tap, VirtioNet};
use rackvisor_devices::{NoNotifier, PlainThreads};

use super::{Bench, SLOW};
use crate::input::Input;

/// In the byte that says what the card is like.
const RSS: u8 = 1 << 4;

/// A card, and the other ends of its queues.
fn card(shape: u8) -> Result<(VirtioNet, Vec<UnixDatagram>), NetError> {
    let bit = |bit: u8| shape & (1 << bit) != 0;
    let pairs = 1 + u16::from(bit(0));
    let (ours, network): (Vec<OwnedFd>, Vec<UnixDatagram>) = (0..pairs)
        .map(|_| {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            (OwnedFd::from(ours), theirs)
        })
        .unzip();
    let limits = if bit(5) { SLOW } else { Limits::default() };
    let options = NetOptions {
        id: "nic".to_owned(),
        tap: Tap::double(ours),
        mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
        queue_pairs: pairs,
        queue_size: 16,
        mtu: bit(1).then_some(1500),
        link_up: !bit(2),
        antispoof: bit(3),
        rss: shape & RSS != 0 && pairs > 1,
        vhost: false,
        rx_limits: limits,
        tx_limits: limits,
    };
    Ok((VirtioNet::new(options, &PlainThreads, Arc::new(NoNotifier))?, network))
}

/// Plays a driver of a network card, and the network.
pub fn play(data: &[u8]) {
    let input = &mut Input::new(data);
    let shape = input.byte();
    let (device, network) = match card(shape) {
        Err(NetError::Steering { .. }) => card(shape & !RSS),
        made => made,
    }
    .unwrap();
    let handle = device.handle();
    let mut frame = vec![0; 1 << 17];
    Bench::new(device, input).play(input, |input, _| {
        let wire = &network[usize::from(input.byte()) % network.len()];
        while wire.recv(&mut frame).is_ok() {}
        match input.below(8) {
            0 => handle.set_link(input.byte() & 1 != 0),
            1 => handle.announce(),
            _ => {
                let bytes = input.bytes();
                let padding = usize::from(input.u16());
                frame[..bytes.len()].copy_from_slice(bytes);
                frame[bytes.len()..][..padding].fill(0x5a);
                // A card that has no room leaves it in the network.
                let _ = wire.send(&frame[..bytes.len() + padding]);
            }
        }
    });
}
