//! RSS and hashes in headers. The program that steers needs root; without, these tests are skipped, aloud.

use super::control::command;
use super::*;
use crate::net::steering::hash::{Hasher, KEY_LENGTH};

const RSS: u64 = bit(features::CTRL_VQ) | bit(features::MQ) | bit(features::RSS) | bit(features::HASH_REPORT);
const ALL_TYPES: u32 = 0x3f;
const RSS_CONFIG: u8 = 1;
const HASH_CONFIG: u8 = 2;

pub(super) fn key() -> [u8; KEY_LENGTH] {
    std::array::from_fn(|index| (index as u8).wrapping_mul(89).wrapping_add(17))
}

/// The command for a table, with the highest transmit queue.
pub(super) fn rss(types: u32, unclassified: u16, table: &[u16], transmit: u16) -> Vec<u8> {
    let mask = (table.len() as u16 - 1).to_le_bytes();
    let table: Vec<u8> = table.iter().flat_map(|queue| queue.to_le_bytes()).collect();
    let (types, unclassified, transmit) = (types.to_le_bytes(), unclassified.to_le_bytes(), transmit.to_le_bytes());
    [&[4, RSS_CONFIG][..], &types, &mask, &unclassified, &table, &transmit, &[KEY_LENGTH as u8], &key()].concat()
}

fn hash(types: u32) -> Vec<u8> {
    [&[4, HASH_CONFIG][..], &types.to_le_bytes(), &[0; 8], &[KEY_LENGTH as u8], &key()].concat()
}

/// A datagram to the guest from this port.
pub(super) fn datagram(port: u16) -> Vec<u8> {
    let mut data = [&MAC[..], &[2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0, 48, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
    data.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    data.extend(port.to_be_bytes());
    data.extend([0, 9, 0, 28, 0, 0]);
    data.extend([7; 20]);
    data
}

/// Options of a card with RSS.
pub(super) fn rss_options(tap: Tap, queue_pairs: u16) -> NetOptions {
    NetOptions { rss: true, ..options(tap, queue_pairs) }
}

/// Whether this machine lets us have a card with RSS.
pub(super) fn is_possible() -> bool {
    let (tap, _host) = double(2);
    match VirtioNet::new(rss_options(tap, 2), &PlainThreads, Arc::new(crate::NoNotifier)) {
        Ok(_) => true,
        Err(NetError::Steering { error, .. }) if error.raw_os_error() == Some(libc::EPERM) => {
            eprintln!("SKIPPED: this test needs root (CAP_BPF and CAP_PERFMON)");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// A card with RSS that runs, over a tap that is none.
fn card(pairs: u16, features: u64) -> Option<Card> {
    is_possible().then(|| {
        let (tap, host) = double(pairs);
        let mut card = Card::with_options(rss_options(tap, pairs), host, 16, features);
        card.start();
        card
    })
}

#[test]
fn a_card_with_rss_says_so_whatever_was_negotiated() {
    if !is_possible() {
        return;
    }
    let (tap, _host) = double(2);
    let device = VirtioNet::new(rss_options(tap, 2), &PlainThreads, Arc::new(crate::NoNotifier)).unwrap();
    let mut config = [0xff; 8];
    device.read_config(16, &mut config);
    assert_eq!(config, [1, 40, 128, 0, 0x3f, 0, 0, 0], "duplex, key, table, types");
    assert_eq!(device.features() & RSS, RSS);
}

#[test]
fn malformed_commands_of_rss_are_answered_with_an_error_and_change_nothing() {
    let Some(mut card) = card(4, RSS) else { return };
    let control = 8;
    let good = rss(ALL_TYPES, 0, &[0, 1, 2, 3], 4);
    for length in 2..good.len() {
        assert_eq!(command(&mut card, control, &good[..length]), 1, "cut after {length} bytes");
    }
    for (bad, why) in [
        (rss(ALL_TYPES | 1 << 6, 0, &[0], 1), "a type that is not offered"),
        (rss(ALL_TYPES, 0, &[0, 1, 2], 4), "no power of two"),
        (rss(ALL_TYPES, 0, &[0; 256], 4), "more entries than there may be"),
        (rss(ALL_TYPES, 0, &[0, 4], 4), "queue out of range"),
        (rss(ALL_TYPES, 4, &[0, 1], 4), "unclassified queue out of range"),
        (rss(ALL_TYPES, 0, &[0, 1], 5), "transmit queues out of range"),
        (rss(ALL_TYPES, 0, &[0, 1], 0), "no transmit queue"),
        (hash(1 << 6), "a type that is not offered"),
        (hash(1)[..20].to_vec(), "cut"),
    ] {
        assert_eq!(command(&mut card, control, &bad), 1, "{why}");
    }
    assert_eq!(card.device.handle().state().active_pairs, 1);
    assert_eq!(command(&mut card, control, &good), 0);
    assert_eq!(card.device.handle().state().active_pairs, 4);
    assert_eq!(command(&mut card, control, &rss(ALL_TYPES, 0, &[0; 128], 2)), 0);
    assert_eq!(card.device.handle().state().active_pairs, 2);
    assert_eq!(command(&mut card, control, &rss(ALL_TYPES, 2, &[0; 128], 2)), 0, "more receivers than transmitters");
    assert_eq!(card.device.handle().state().active_pairs, 3);
    card.stop();
    card.device.reset();
    card.features &= !(bit(features::RSS) | bit(features::HASH_REPORT));
    card.start();
    for not_negotiated in [good, hash(1)] {
        assert_eq!(command(&mut card, control, &not_negotiated), 1);
    }
}

#[test]
fn frames_are_steered_to_queues_that_the_driver_has_enabled_only() {
    if !is_possible() {
        return;
    }
    let (tap, host) = double(4);
    // With RSS alone the control queue comes after all pairs, too.
    let mut card = Card::with_options(rss_options(tap, 4), host, 16, RSS & !bit(features::MQ));
    let activation = card.driver.activation_of(card.features, &[0, 1, 2, 3, 8]);
    card.device.start(activation).unwrap();
    assert_eq!(command(&mut card, 8, &rss(ALL_TYPES, 0, &[0, 1], 2)), 0);
    assert_eq!(command(&mut card, 8, &rss(ALL_TYPES, 0, &[0, 2], 2)), 1);
    assert_eq!(command(&mut card, 8, &rss(ALL_TYPES, 3, &[0, 1], 2)), 1);
}

#[test]
fn the_header_holds_the_hash_and_its_type_once_the_driver_has_configured_them() {
    for small in [false, true] {
        let Some(mut card) = card(2, RSS | bit(features::MRG_RXBUF)) else { return };
        if small {
            card.have_small_frames();
        }
        let received = |card: &mut Card, frame: &[u8]| {
            let (head, address) = card.give(BUFFER);
            // The tap leaves what it does not know as it was.
            card.arrive_with(&[[0; 10], [0xee; 10]].concat(), frame);
            let length = HASH_HEADER_SIZE + frame.len();
            assert_eq!(card.used(RX), Used { head, length: length as u32 });
            let data = card.driver.read(address, length);
            assert_eq!(data[HASH_HEADER_SIZE..], *frame);
            assert_eq!((num_buffers(&data), &data[18..20]), (1, &[0, 0][..]));
            (u32::from_le_bytes(data[12..16].try_into().unwrap()), u16::from_le_bytes([data[16], data[17]]))
        };
        let data = datagram(77);
        let all = Hasher::new(ALL_TYPES, &key());
        let (value, kind) = all.report(&data);
        assert_eq!(kind, 3);
        assert_eq!(received(&mut card, &data), (0, 0), "there is no hash before there is a key");
        assert_eq!(command(&mut card, 4, &rss(ALL_TYPES, 0, &[0], 2)), 0);
        assert_eq!(received(&mut card, &data), (value, 3));
        assert_eq!(received(&mut card, &frame(60, 1)), (0, 0), "it is no packet of IP");
        assert_eq!(command(&mut card, 4, &[4, 0, 2, 0]), 0);
        assert_eq!(received(&mut card, &data), (value, 3), "the hash is told, whoever steers");
        assert_eq!(command(&mut card, 4, &hash(1)), 0);
        assert_eq!(received(&mut card, &data), Hasher::new(1, &key()).report(&data));
        let stopped = card.stop();
        card.resume(&stopped);
        assert_eq!(received(&mut card, &data), Hasher::new(1, &key()).report(&data), "also after a pause");
        card.stop();
        card.device.reset();
        card.start();
        assert_eq!(received(&mut card, &data), (0, 0), "the next driver has said nothing");
    }
}

#[test]
fn the_longer_header_is_skipped_in_what_the_driver_sends_and_counts_as_no_byte_of_the_frame() {
    if !is_possible() {
        return;
    }
    let (tap, host) = double(2);
    let options = NetOptions { antispoof: true, ..rss_options(tap, 2) };
    let mut card = Card::with_options(options, host, 16, RSS);
    let activation = card.driver.activation(card.features);
    card.device.start(activation).unwrap();
    let mut own = frame(60, 1);
    own[6..12].copy_from_slice(&MAC);
    card.send(&frame(60, 2));
    card.send(&own);
    let mut seen = [0; 200];
    assert_eq!(take(&card.host[0], &mut seen).unwrap(), HASH_HEADER_SIZE + 60);
    assert_eq!(seen[HASH_HEADER_SIZE..][..60], own);
    card.wait_count("net_tx_drops", "spoofed", 1);
    card.wait_count("net_tx_bytes", "", 60);
}
