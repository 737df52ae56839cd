//! The control queue (virtio 1.2 §5.1.6.5). What is accepted is obeyed; everything else is answered with an error.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::features::{self, GUEST_OFFLOADS};
use super::filter::{Change, Mac, Mode};
use super::lane::Lane;
use crate::metrics::Counter;
use crate::virtio::StoppedQueue;
use crate::virtio::ring::{Chain, RingError};

const OK: u8 = 0;
const ERR: u8 = 1;
const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const CLASS_VLAN: u8 = 2;
const VLAN_ADD: u8 = 0;
const VLAN_DEL: u8 = 1;
const CLASS_ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;
/// The longest command has tables of addresses, 2700 of them here: what does not fit is refused unread.
const LONGEST: usize = 16 << 10;
/// Commands per turn.
const TURN_COMMANDS: u32 = 16;

/// What the driver may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Take these offloads, as feature bits, and no others.
    Offloads(u64),
    /// Use the first so many queue pairs.
    Pairs(u16),
    /// Receive other frames.
    Filter(Change),
    /// The request to announce the card was heard.
    Announced,
}

/// What became of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Refused,
    /// Not in force yet: [`Control::finish`] is called when it is.
    Waiting,
}

/// Reads a command of a driver that negotiated `features` on a device with `max_pairs`. `None` for what is not known or not
/// allowed.
pub(super) fn parse(data: &[u8], features: u64, max_pairs: u16) -> Option<Command> {
    let has = |feature| features & features::bit(feature) != 0;
    match data {
        [CLASS_RX, mode, on @ (0 | 1)] if has(features::CTRL_RX) => {
            let mode = *Mode::ALL.get(usize::from(*mode))?;
            let basic = matches!(mode, Mode::Promiscuous | Mode::AllMulticast);
            (basic || has(features::CTRL_RX_EXTRA)).then_some(Command::Filter(Change::Mode(mode, *on == 1)))
        }
        [CLASS_MAC, MAC_TABLE_SET, tables @ ..] if has(features::CTRL_RX) => {
            let (unicast, rest) = table(tables)?;
            let (multicast, rest) = table(rest)?;
            rest.is_empty().then_some(Command::Filter(Change::Tables { unicast, multicast }))
        }
        [CLASS_MAC, MAC_ADDR_SET, mac @ ..] if has(features::CTRL_MAC_ADDR) => {
            let mac: Mac = mac.try_into().ok()?;
            let [first, ..] = mac;
            (first & 1 == 0 && mac != [0; 6]).then_some(Command::Filter(Change::Mac(mac)))
        }
        [CLASS_VLAN, action @ (VLAN_ADD | VLAN_DEL), low, high] if has(features::CTRL_VLAN) => {
            let id = u16::from_le_bytes([*low, *high]);
            (id < 4096).then_some(Command::Filter(Change::Vlan { id, wanted: *action == VLAN_ADD }))
        }
        [CLASS_ANNOUNCE, ANNOUNCE_ACK] if has(features::GUEST_ANNOUNCE) => Some(Command::Announced),
        [CLASS_MQ, MQ_VQ_PAIRS_SET, low, high] if has(features::MQ) => {
            let pairs = u16::from_le_bytes([*low, *high]);
            (1..=max_pairs).contains(&pairs).then_some(Command::Pairs(pairs))
        }
        [CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET, rest @ ..] if has(features::CTRL_GUEST_OFFLOADS) => {
            let offloads = u64::from_le_bytes(rest.try_into().ok()?);
            (offloads & !(features & GUEST_OFFLOADS) == 0).then_some(Command::Offloads(offloads))
        }
        _ => None,
    }
}

/// A table of addresses behind their number, and what follows it (§5.1.6.5.2).
fn table(data: &[u8]) -> Option<(Vec<Mac>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let bytes = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(size_of::<Mac>())?;
    let (addresses, rest) = rest.split_at_checked(bytes)?;
    let addresses = addresses.chunks_exact(size_of::<Mac>()).filter_map(|address| address.try_into().ok());
    Some((addresses.collect(), rest))
}

/// Where the answer to a command goes.
#[derive(Clone, Copy)]
struct Answer {
    head: u16,
    place: Option<u64>,
}

/// The control queue.
pub(super) struct Control {
    pub(super) lane: Lane,
    chain: Chain,
    /// The command that is being read.
    data: Vec<u8>,
    features: u64,
    max_pairs: u16,
    interrupts: Counter,
    waiting: Option<Answer>,
    pub(super) pending: bool,
    broken: bool,
}

impl Control {
    pub(super) fn new(lane: Lane, features: u64, max_pairs: u16) -> Self {
        Self {
            chain: Chain::with_capacity(lane.ring.chain_limit().into()),
            lane,
            data: Vec::new(),
            features,
            max_pairs,
            interrupts: Counter::default(),
            waiting: None,
            pending: true,
            broken: false,
        }
    }

    /// Hands the driver's commands to `obey`, up to the limits of a turn; says whether there is more to do at once.
    pub(super) fn service(
        &mut self,
        memory: &GuestMemoryMmap,
        mut obey: impl FnMut(Command) -> Outcome,
    ) -> Result<bool, RingError> {
        if !self.pending || self.broken || self.waiting.is_some() {
            return Ok(false);
        }
        let result = self.turn(memory, &mut obey);
        self.broken = result.is_err();
        result
    }

    fn turn(&mut self, memory: &GuestMemoryMmap, obey: &mut impl FnMut(Command) -> Outcome) -> Result<bool, RingError> {
        for _ in 0..TURN_COMMANDS {
            let Some(head) = self.lane.ring.next_head(memory)? else {
                if self.lane.ring.enable_kicks(memory)? {
                    continue;
                }
                self.pending = false;
                return Ok(false);
            };
            self.lane.ring.walk(memory, head, &mut self.chain)?;
            let answer = Answer { head, place: self.chain.writable().first().map(|piece| piece.address) };
            let outcome = self.read(memory, head)?.map_or(Outcome::Refused, &mut *obey);
            match outcome {
                Outcome::Done => self.answer(memory, answer, OK)?,
                Outcome::Refused => self.answer(memory, answer, ERR)?,
                Outcome::Waiting => {
                    self.waiting = Some(answer);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Reads the command in the chain at `head`.
    fn read(&mut self, memory: &GuestMemoryMmap, head: u16) -> Result<Option<Command>, RingError> {
        self.data.clear();
        for piece in self.chain.readable() {
            let start = self.data.len();
            let end = usize::try_from(piece.length).unwrap_or(usize::MAX).saturating_add(start);
            if end > LONGEST {
                return Ok(None);
            }
            self.data.resize(end, 0);
            let unmapped = RingError::Unmapped { head, address: piece.address };
            let part = self.data.get_mut(start..).unwrap_or_default();
            memory.read_slice(part, GuestAddress(piece.address)).map_err(|_| unmapped)?;
        }
        Ok(parse(&self.data, self.features, self.max_pairs))
    }

    /// Answers the command that waited.
    pub(super) fn finish(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        let Some(answer) = self.waiting.take() else { return Ok(()) };
        let result = self.answer(memory, answer, OK);
        self.broken |= result.is_err();
        result
    }

    fn answer(&mut self, memory: &GuestMemoryMmap, answer: Answer, status: u8) -> Result<(), RingError> {
        let mut written = 0;
        if let Some(address) = answer.place {
            let unmapped = RingError::Unmapped { head: answer.head, address };
            memory.write_slice(&[status], GuestAddress(address)).map_err(|_| unmapped)?;
            written = 1;
        }
        self.lane.ring.put_used(memory, answer.head, written)?;
        self.lane.flush(memory, &self.interrupts)
    }

    /// The queue's positions, to go on from later. A command that waits is taken again then.
    pub(super) fn stop(mut self) -> StoppedQueue {
        if self.waiting.take().is_some() {
            self.lane.ring.rewind(1);
        }
        self.lane.stop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::features::{CTRL_GUEST_OFFLOADS, GUEST_CSUM, GUEST_TSO4, MQ, bit};

    #[test]
    fn only_known_and_negotiated_commands_with_values_in_range_are_accepted() {
        let features = bit(MQ) | bit(CTRL_GUEST_OFFLOADS) | bit(GUEST_CSUM) | bit(GUEST_TSO4);
        let offloads = |value: u64| [&[5, 0][..], &value.to_le_bytes()].concat();
        assert_eq!(parse(&[4, 0, 2, 0], features, 4), Some(Command::Pairs(2)));
        assert_eq!(parse(&offloads(bit(GUEST_CSUM)), features, 4), Some(Command::Offloads(2)));
        assert_eq!(parse(&offloads(0), features, 4), Some(Command::Offloads(0)));
        for refused in [
            vec![],
            vec![4],
            vec![4, 0, 0, 0],
            vec![4, 0, 5, 0],
            vec![4, 0, 1],
            vec![4, 0, 1, 0, 0],
            vec![4, 1, 1, 0],
            vec![0, 0, 1],
            vec![2, 0, 1, 0],
            vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            vec![1, 1, 2, 0, 0, 0, 0, 1],
            vec![3, 0],
            vec![255, 255, 1, 0],
            offloads(bit(features::GUEST_TSO6)),
            offloads(bit(features::CSUM)),
            offloads(0)[..9].to_vec(),
        ] {
            assert_eq!(parse(&refused, features, 4), None, "{refused:?}");
        }
        assert_eq!(parse(&[4, 0, 1, 0], 0, 4), None);
        assert_eq!(parse(&offloads(0), 0, 4), None);
    }

    #[test]
    fn filter_commands_are_read_whole_or_not_at_all() {
        use crate::net::features::{CTRL_MAC_ADDR, CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, GUEST_ANNOUNCE};
        let all = [CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, CTRL_MAC_ADDR, GUEST_ANNOUNCE];
        let features = all.into_iter().fold(0, |all, feature| all | bit(feature));
        let parse = |data: &[u8]| super::parse(data, features, 1);
        assert_eq!(parse(&[0, 0, 1]), Some(Command::Filter(Change::Mode(Mode::Promiscuous, true))));
        assert_eq!(parse(&[0, 5, 0]), Some(Command::Filter(Change::Mode(Mode::NoBroadcast, false))));
        assert_eq!(super::parse(&[0, 2, 1], bit(CTRL_RX), 1), None, "needs CTRL_RX_EXTRA");
        assert_eq!(
            super::parse(&[0, 1, 1], bit(CTRL_RX), 1),
            Some(Command::Filter(Change::Mode(Mode::AllMulticast, true)))
        );
        assert_eq!(parse(&[2, 0, 0xff, 0x0f]), Some(Command::Filter(Change::Vlan { id: 4095, wanted: true })));
        assert_eq!(parse(&[2, 1, 1, 0]), Some(Command::Filter(Change::Vlan { id: 1, wanted: false })));
        assert_eq!(parse(&[1, 1, 2, 0, 0, 0, 0, 1]), Some(Command::Filter(Change::Mac([2, 0, 0, 0, 0, 1]))));
        assert_eq!(parse(&[3, 0]), Some(Command::Announced));
        let tables = [&[1, 0][..], &[1, 0, 0, 0], &[2, 0, 0, 0, 0, 9], &[2, 0, 0, 0], &[1; 12]].concat();
        let expected =
            Command::Filter(Change::Tables { unicast: vec![[2, 0, 0, 0, 0, 9]], multicast: vec![[1; 6], [1; 6]] });
        assert_eq!(parse(&tables), Some(expected));
        for length in 2..tables.len() {
            assert_eq!(parse(&tables[..length]), None, "cut after {length} bytes");
        }
        for refused in [
            &[0, 6, 1][..],
            &[0, 0, 2],
            &[0, 0],
            &[0, 0, 1, 0],
            &[2, 0, 0, 0x10],
            &[2, 2, 1, 0],
            &[1, 1, 1, 0, 0, 0, 0, 1],
            &[1, 1, 0, 0, 0, 0, 0, 0],
            &[1, 1, 2, 0, 0, 0, 0],
            &[1, 2],
            &[3, 1],
            &[3, 0, 0],
            &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(parse(refused), None, "{refused:?}");
        }
    }
}
