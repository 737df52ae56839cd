//! Who the card is, what it is sent, and what it may say.

use super::*;
use crate::net::features::{CTRL_MAC_ADDR, CTRL_RX, CTRL_VLAN, CTRL_VQ, GUEST_ANNOUNCE, MRG_RXBUF};

const FEATURES: u64 =
    bit(MRG_RXBUF) | bit(CTRL_VQ) | bit(CTRL_RX) | bit(CTRL_VLAN) | bit(CTRL_MAC_ADDR) | bit(GUEST_ANNOUNCE);
const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x99];

fn ethernet(to: [u8; 6], from: [u8; 6], rest: &[u8]) -> Vec<u8> {
    [&to[..], &from, &[0x08, 0], rest, &[0; 46]].concat()
}

/// Gives a command to the control queue, and its answer.
fn command(card: &mut Card, data: &[u8]) -> u8 {
    let (place, answer) = (card.driver.allocate(data.len() as u64, 1), card.driver.allocate(1, 1));
    card.driver.write(place, data);
    card.driver.write(answer, &[0xaa]);
    let ring = 2 * card.host.len();
    let chain = [Buffer::readable(place, data.len() as u32), Buffer::writable(answer, 1)];
    card.driver.ring(ring).add(&chain);
    card.driver.ring(ring).kick();
    card.used(ring);
    card.driver.read(answer, 1)[0]
}

/// Frames of the host in this order; gives the numbers of those that reach the driver.
fn delivered(card: &mut Card, frames: &[Vec<u8>]) -> Vec<usize> {
    // The last is for everybody: what was not there before it is not there.
    let all = frames.iter().cloned().chain([ethernet([0xff; 6], OTHER, b"the end")]);
    all.for_each(|frame| card.arrive(&frame));
    let mut found = Vec::new();
    loop {
        let (_, address) = card.give(BUFFER);
        let used = card.used(RX);
        let data = card.driver.read(address, used.length as usize);
        match frames.iter().position(|frame| data[HEADER_SIZE..] == frame[..]) {
            Some(number) => found.push(number),
            None => return found,
        }
    }
}

#[test]
fn the_driver_receives_what_it_asked_for_and_nothing_else() {
    for mut card in cards(64, FEATURES) {
        let tagged = |vlan: u8| [&MAC[..], &OTHER, &[0x81, 0, 0, vlan], &[0; 60]].concat();
        let group = [1, 0, 0x5e, 0, 0, 7];
        let frames = [
            ethernet(MAC, OTHER, b"own"),
            ethernet(OTHER, MAC, b"for another"),
            ethernet(group, OTHER, b"group"),
            tagged(7),
            tagged(8),
        ];
        assert_eq!(delivered(&mut card, &frames), [0, 1, 2, 3, 4], "a card begins promiscuous");
        assert_eq!(command(&mut card, &[0, 0, 0]), 0);
        assert_eq!(delivered(&mut card, &frames), [0]);
        assert_eq!(command(&mut card, &[2, 0, 8, 0]), 0);
        let tables = [&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0][..], &group].concat();
        assert_eq!(command(&mut card, &tables), 0);
        assert_eq!(delivered(&mut card, &frames), [0, 2, 4]);
        assert_eq!(command(&mut card, &[2, 1, 8, 0]), 0);
        assert_eq!(command(&mut card, &[&[1, 1][..], &OTHER].concat()), 0);
        assert_eq!(delivered(&mut card, &frames), [1, 2]);
        let mut mac = [0; 6];
        card.device.read_config(0, &mut mac);
        assert_eq!(mac, OTHER);
        assert_eq!(card.count("net_rx_drops", "filtered"), 4 + 2 + 3);

        let refused = [&[0, 2, 1][..], &[0, 9, 1], &[2, 0, 0, 0x10], &[1, 0, 9, 0, 0, 0], &[9, 9]];
        for data in refused {
            assert_eq!(command(&mut card, data), 1, "{data:?}");
        }
        assert_eq!(delivered(&mut card, &frames), [1, 2], "what was refused changed nothing");

        // A pause keeps the filter, a reset forgets it.
        let stopped = card.stop();
        card.resume(&stopped);
        assert_eq!(delivered(&mut card, &frames), [1, 2]);
        card.stop();
        card.device.reset();
        card.device.read_config(0, &mut mac);
        assert_eq!(mac, MAC);
        card.start();
        assert_eq!(delivered(&mut card, &frames), [0, 1, 2, 3, 4]);
    }
}

#[test]
fn a_forged_address_does_not_leave_a_card_that_may_not_forge() {
    let (tap, host) = double(1);
    let mut card = Card::with_options(NetOptions { antispoof: true, ..options(tap, 1) }, host, 64, FEATURES);
    let activation = card.driver.activation(FEATURES);
    card.device.start(activation).unwrap();
    let own = ethernet(OTHER, MAC, b"honest");
    card.send(&ethernet(OTHER, OTHER, b"forged"));
    card.send(&[&OTHER[..], &MAC[..5]].concat());
    card.send(&own);
    let mut data = [0; 256];
    let length = take(&card.host[0], &mut data).unwrap();
    assert_eq!(data[HEADER_SIZE..length], own);
    for _ in 0..3 {
        card.used(TX);
    }
    assert_eq!((card.count("net_tx_drops", "spoofed"), card.count("net_tx_drops", "malformed")), (1, 1));

    // In pieces, cut anywhere in the header and the addresses.
    let whole = [&[0; HEADER_SIZE][..], &own].concat();
    for cut in 1..=HEADER_SIZE + 14 {
        let address = card.driver.allocate(whole.len() as u64, 1);
        card.driver.write(address, &whole);
        let rest = Buffer::readable(address + cut as u64, (whole.len() - cut) as u32);
        card.driver.ring(TX).add(&[Buffer::readable(address, cut as u32), rest]);
        card.driver.ring(TX).kick();
        let length = take(&card.host[0], &mut data).unwrap();
        assert_eq!(data[..length], whole, "cut after {cut} bytes");
        card.used(TX);
    }

    // An address that the guest gave itself is forged as well.
    assert_eq!(command(&mut card, &[&[1, 1][..], &OTHER].concat()), 0);
    card.send(&ethernet(MAC, OTHER, b"forged"));
    card.used(TX);
    card.wait_count("net_tx_drops", "spoofed", 2);
}

#[test]
fn an_announcement_is_five_reverse_arps_and_as_many_requests_to_the_driver() {
    let mut card = Card::running(1, 64, FEATURES);
    let changes = card.driver.signals().config_changes();
    card.device.handle().announce();
    let mut data = [0; 256];
    for _ in 0..5 {
        let length = take(&card.host[0], &mut data).unwrap();
        let frame = &data[HEADER_SIZE..length];
        assert_eq!((&frame[..6], &frame[6..12], &frame[12..14]), (&[0xff; 6][..], &MAC[..], &[0x80, 0x35][..]));
    }
    wait(|| card.driver.signals().config_changes() == changes + 5, "the driver is asked");
    let mut status = [0; 2];
    card.device.read_config(6, &mut status);
    assert_eq!(status, [3, 0], "link up, announce");
    assert_eq!(command(&mut card, &[3, 0]), 0);
    card.device.read_config(6, &mut status);
    assert_eq!(status, [1, 0]);
}

#[test]
fn a_card_without_a_driver_announces_itself_and_one_without_a_link_does_not() {
    let card = Card::parked(1, 64, FEATURES);
    card.device.handle().announce();
    let mut data = [0; 256];
    for _ in 0..5 {
        assert_eq!(take(&card.host[0], &mut data).unwrap(), HEADER_SIZE + 60);
    }
    card.device.handle().set_link(false);
    card.device.handle().announce();
    card.host[0].set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(take(&card.host[0], &mut data).is_err());
}
