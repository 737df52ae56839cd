//! Frames that have to wait for a limit.

use super::*;

/// After the first frame, which `Card::start` sends, none for a long time.
const ONE: Limits = Limits { ops: Some(Rate { per_second: 1, burst: Some(1) }), bytes: None };

fn limited(rx_limits: Limits, tx_limits: Limits) -> Card {
    let (tap, host) = double(1);
    let options = NetOptions { rx_limits, tx_limits, ..options(tap, 1) };
    Card::with_options(options, host, 64, bit(crate::net::features::MRG_RXBUF))
}

#[test]
fn what_the_driver_sends_waits_for_its_limit_and_goes_on_when_that_is_lifted() {
    let mut card = limited(Limits::default(), ONE);
    card.start();
    for seed in 0..20 {
        card.send(&frame(64, seed));
    }
    wait(|| card.count("net_tx_throttled", "") > 0, "a frame waits");
    assert!(card.count("net_tx_packets", "") < 10);
    card.device.handle().set_limits(Limits::default(), Limits::default());
    let mut data = [0; 256];
    for seed in 0..20 {
        let length = take(&card.host[0], &mut data).unwrap();
        assert_eq!(data[HEADER_SIZE..length], frame(64, seed), "in order");
        card.used(TX);
    }
}

#[test]
fn what_comes_for_the_driver_waits_in_the_tap_for_its_limit() {
    let mut card = limited(ONE, Limits::default());
    card.start();
    let buffers: Vec<_> = (0..8).map(|_| card.give(BUFFER)).collect();
    for seed in 0..8 {
        card.arrive(&frame(64, seed));
    }
    wait(|| card.count("net_rx_throttled", "") > 0, "a frame waits");
    assert!(card.count("net_rx_packets", "") < 5);
    card.device.handle().set_limits(Limits::default(), Limits::default());
    for (seed, (head, address)) in buffers.into_iter().enumerate() {
        let used = card.used(RX);
        assert_eq!(used.head, head);
        let data = card.driver.read(address, used.length as usize);
        assert_eq!(data[HEADER_SIZE..], frame(64, seed as u8));
    }
}

#[test]
fn a_throttled_card_stops_at_once_and_loses_nothing_of_what_was_to_be_sent() {
    let mut card = limited(Limits::default(), ONE);
    card.start();
    for seed in 0..5 {
        card.send(&frame(64, seed));
    }
    wait(|| card.count("net_tx_throttled", "") > 0, "a frame waits");
    let stopped = card.stop();
    card.device.handle().set_limits(Limits::default(), Limits::default());
    card.resume(&stopped);
    let mut data = [0; 256];
    for seed in 0..5 {
        let length = take(&card.host[0], &mut data).unwrap();
        assert_eq!(data[HEADER_SIZE..length], frame(64, seed));
    }
}
