use super::*;

pub(super) const CONTROL_1: usize = 2;

/// Runs a command and gives the answer; `0xaa` where the device wrote none.
pub(super) fn command(card: &mut Card, ring: usize, data: &[u8]) -> u8 {
    let address = card.driver.allocate(512, 1);
    card.driver.write(address, data);
    let answer = address + 511;
    card.driver.write(answer, &[0xaa]);
    let mut buffers = vec![Buffer::readable(address, 2.min(data.len() as u32))];
    if data.len() > 2 {
        buffers.push(Buffer::readable(address + 2, data.len() as u32 - 2));
    }
    buffers.push(Buffer::writable(answer, 1));
    let head = card.driver.ring(ring).add(&buffers);
    card.driver.ring(ring).kick();
    assert_eq!(card.used(ring), Used { head, length: 1 });
    card.driver.read(answer, 1)[0]
}

pub(super) fn offloads(value: u64) -> Vec<u8> {
    [&[5, 0][..], &value.to_le_bytes()].concat()
}

#[test]
fn guest_offloads_are_set_within_what_was_negotiated_and_obeyed_at_once() {
    let negotiated = bit(features::GUEST_CSUM) | bit(features::GUEST_TSO4);
    let control = bit(features::CTRL_VQ) | bit(features::CTRL_GUEST_OFFLOADS);
    let mut card = Card::running(1, 16, negotiated | control);
    assert_eq!(command(&mut card, CONTROL_1, &offloads(bit(features::GUEST_TSO6))), 1);
    assert_eq!(command(&mut card, CONTROL_1, &offloads(bit(features::GUEST_CSUM))), 0);
    let mut header = [0; HEADER_SIZE];
    header[..2].copy_from_slice(&[1, 1]);
    let (head, _) = card.give(BUFFER);
    card.arrive_with(&header, &frame(100, 1));
    card.wait_count("net_rx_drops", "offload", 1);
    assert_eq!(command(&mut card, CONTROL_1, &offloads(negotiated)), 0);
    card.arrive_with(&header, &frame(100, 1));
    assert_eq!(card.used(RX).head, head);
}

#[test]
fn unknown_and_malformed_commands_are_answered_with_an_error() {
    let mut card = Card::running(1, 16, bit(features::CTRL_VQ));
    for bad in [vec![0, 0, 1], vec![4, 0, 1, 0], vec![0xff, 0xff], vec![5], vec![5, 0, 1], vec![1; 90], offloads(0)] {
        assert_eq!(command(&mut card, CONTROL_1, &bad), 1, "{bad:?}");
    }
    // Without room for an answer the chain comes back all the same.
    let address = card.driver.allocate(16, 1);
    let head = card.driver.ring(CONTROL_1).add(&[Buffer::readable(address, 4)]);
    card.driver.ring(CONTROL_1).kick();
    assert_eq!(card.used(CONTROL_1), Used { head, length: 0 });
}

#[test]
fn queue_pairs_are_used_when_the_driver_says_so_and_not_otherwise() {
    let mut card = Card::running(4, 16, bit(features::CTRL_VQ) | bit(features::MQ));
    let control = 8;
    assert_eq!(card.device.handle().state().active_pairs, 1);
    let address = card.driver.allocate(100, 1);
    let send = |card: &mut Card, pair: usize| {
        card.driver.ring(2 * pair + 1).add(&[Buffer::readable(address, 100)]);
        card.driver.ring(2 * pair + 1).kick_always();
    };
    let mut data = [0; 200];
    assert_eq!(command(&mut card, control, &[4, 0, 5, 0]), 1);
    assert_eq!(command(&mut card, control, &[4, 0, 0, 0]), 1);
    assert_eq!(command(&mut card, control, &[4, 0, 2, 0]), 0);
    send(&mut card, 1);
    assert_eq!(take(&card.host[1], &mut data).unwrap(), 100);
    for pairs in [4, 3, 1, 2, 4, 1, 3, 3] {
        assert_eq!(command(&mut card, control, &[4, 0, pairs, 0]), 0);
        assert_eq!(card.device.handle().state().active_pairs, u16::from(pairs));
    }
    send(&mut card, 2);
    assert_eq!(take(&card.host[2], &mut data).unwrap(), 100);
    assert_eq!(card.used(5).length, 0);
    let (head, _) = {
        let address = card.driver.allocate(BUFFER.into(), 1);
        let head = card.driver.ring(4).add(&[Buffer::writable(address, BUFFER)]);
        card.driver.ring(4).kick();
        (head, address)
    };
    card.host[2].send(&[0; 80]).unwrap();
    assert_eq!(card.used(4), Used { head, length: 80 });
}

#[test]
fn what_the_driver_sends_by_a_pair_that_goes_out_of_use_is_sent_by_the_first_queue_of_the_tap() {
    let mut card = Card::running(4, 16, bit(features::CTRL_VQ) | bit(features::MQ));
    let address = card.driver.allocate(100, 1);
    let mut data = [0; 200];
    for _ in 0..20 {
        assert_eq!(command(&mut card, 8, &[4, 0, 4, 0]), 0);
        // Linux goes on until its command is answered, and TCP does not send again what the card still has.
        card.driver.ring(7).add(&[Buffer::readable(address, 100)]);
        assert_eq!(command(&mut card, 8, &[4, 0, 1, 0]), 0);
        card.driver.ring(7).add(&[Buffer::readable(address, 100)]);
        card.driver.ring(7).kick_always();
        card.used(7);
        card.used(7);
        card.host[3].set_nonblocking(true).unwrap();
        let by_its_own = usize::from(take(&card.host[3], &mut data).is_ok());
        for _ in by_its_own..2 {
            assert_eq!(take(&card.host[0], &mut data).unwrap(), 100);
        }
    }
}

#[test]
fn the_control_queue_is_the_third_for_a_driver_that_does_not_take_several_pairs() {
    let mut card = Card::parked(4, 16, bit(features::CTRL_VQ));
    let activation = card.driver.activation_of(card.features, &[0, 1, 2]);
    card.device.start(activation).unwrap();
    assert_eq!(command(&mut card, 2, &[4, 0, 1, 0]), 1, "without MQ this is unknown, but it is answered");
}

#[test]
fn a_driver_may_enable_fewer_queues_than_there_are() {
    let mut card = Card::parked(4, 16, bit(features::CTRL_VQ) | bit(features::MQ));
    let activation = card.driver.activation_of(card.features, &[0, 1, 2, 8]);
    card.device.start(activation).unwrap();
    assert_eq!(command(&mut card, 8, &[4, 0, 2, 0]), 0);
    let indexes: Vec<u16> = card.stop().iter().map(|queue| queue.index).collect();
    assert_eq!(indexes, [0, 1, 2, 8]);
}

#[test]
fn settings_survive_a_stop_and_end_with_a_reset() {
    let mut card = Card::running(2, 16, bit(features::CTRL_VQ) | bit(features::MQ));
    assert_eq!(command(&mut card, 4, &[4, 0, 2, 0]), 0);
    let stopped = card.stop();
    card.resume(&stopped);
    assert_eq!(command(&mut card, 4, &[9, 9, 9]), 1);
    assert_eq!(card.device.handle().state().active_pairs, 2);
    card.stop();
    card.device.reset();
    card.start();
    assert_eq!(card.device.handle().state().active_pairs, 1);
}
