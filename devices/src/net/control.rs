//! The control queue (virtio 1.3 §5.1.6.5). What is accepted is obeyed; everything else is answered with an error.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::coalescing::{Coalescing, Queues};
use super::features::{self, GUEST_OFFLOADS};
use super::filter::{Change, Mac, Mode};
use super::lane::Lane;
use super::steering::config::{HashConfig, RssConfig};
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
const MQ_RSS_CONFIG: u8 = 1;
const MQ_HASH_CONFIG: u8 = 2;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;
const CLASS_NOTF_COAL: u8 = 6;
const NOTF_COAL_TX_SET: u8 = 0;
const NOTF_COAL_RX_SET: u8 = 1;
const NOTF_COAL_VQ_SET: u8 = 2;
const NOTF_COAL_VQ_GET: u8 = 3;
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
    /// Steer frames like this, with hashes like this.
    Steer(RssConfig),
    /// Tell hashes like this, and leave steering to the kernel.
    Hash(HashConfig),
    /// Hold interrupts of these queues back.
    Coalesce(Queues, Coalescing),
    /// Tell how interrupts of this queue are held back.
    TellCoalescing(u16),
}

impl Command {
    /// Whether the queues that it speaks of are among those `enabled`.
    fn fits(&self, enabled: &[u16]) -> bool {
        match self {
            Self::Steer(config) => config.receivers().all(|pair| enabled.contains(&pair.saturating_mul(2))),
            Self::Coalesce(Queues::One(queue), _) | Self::TellCoalescing(queue) => enabled.contains(queue),
            _ => true,
        }
    }
}

/// What became of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Refused,
    /// Done, and this is what the driver asked for.
    Told(Coalescing),
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
        [CLASS_MQ, MQ_RSS_CONFIG, config @ ..] if has(features::RSS) => {
            RssConfig::parse(config, max_pairs).map(Command::Steer)
        }
        [CLASS_MQ, MQ_HASH_CONFIG, config @ ..] if has(features::HASH_REPORT) => {
            HashConfig::parse(config).map(Command::Hash)
        }
        [CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET, rest @ ..] if has(features::CTRL_GUEST_OFFLOADS) => {
            let offloads = u64::from_le_bytes(rest.try_into().ok()?);
            (offloads & !(features & GUEST_OFFLOADS) == 0).then_some(Command::Offloads(offloads))
        }
        [CLASS_NOTF_COAL, command, rest @ ..] => coalescing(*command, rest, features),
        _ => None,
    }
}

/// A command about interrupts that are held back (§5.1.6.5.9). Reserved fields are ignored, as they have to be.
fn coalescing(command: u8, data: &[u8], features: u64) -> Option<Command> {
    let of_all = features & features::bit(features::NOTF_COAL) != 0;
    let of_one = features & features::bit(features::VQ_NOTF_COAL) != 0;
    let parameters = |data: &[u8]| data.try_into().ok().map(Coalescing::from_bytes);
    match (command, data) {
        (NOTF_COAL_TX_SET, data) if of_all => Some(Command::Coalesce(Queues::Transmit, parameters(data)?)),
        (NOTF_COAL_RX_SET, data) if of_all => Some(Command::Coalesce(Queues::Receive, parameters(data)?)),
        (NOTF_COAL_VQ_SET, [low, high, _, _, data @ ..]) if of_one => {
            Some(Command::Coalesce(Queues::One(u16::from_le_bytes([*low, *high])), parameters(data)?))
        }
        (NOTF_COAL_VQ_GET, [low, high, _, _]) if of_one => {
            Some(Command::TellCoalescing(u16::from_le_bytes([*low, *high])))
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

/// The control queue.
pub(super) struct Control {
    pub(super) lane: Lane,
    /// The command that is being read or waits.
    chain: Chain,
    /// The command that is being read.
    data: Vec<u8>,
    features: u64,
    max_pairs: u16,
    /// Receive and transmit queues that the driver has enabled.
    enabled: Vec<u16>,
    interrupts: Counter,
    /// The head of the command that waits.
    waiting: Option<u16>,
    pub(super) pending: bool,
    broken: bool,
}

impl Control {
    pub(super) fn new(lane: Lane, features: u64, max_pairs: u16, enabled: Vec<u16>) -> Self {
        Self {
            chain: Chain::with_capacity(lane.ring.chain_limit().into()),
            lane,
            data: Vec::new(),
            features,
            max_pairs,
            enabled,
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
            let command = self.read(memory, head)?.filter(|command| command.fits(&self.enabled));
            match command.map_or(Outcome::Refused, &mut *obey) {
                Outcome::Done => self.answer(memory, head, &[OK])?,
                Outcome::Refused => self.answer(memory, head, &[ERR])?,
                Outcome::Told(coalescing) => self.tell(memory, head, coalescing)?,
                Outcome::Waiting => {
                    self.waiting = Some(head);
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
        let Some(head) = self.waiting.take() else { return Ok(()) };
        let result = self.answer(memory, head, &[OK]);
        self.broken |= result.is_err();
        result
    }

    /// Answers with the parameters, if there is room for them.
    fn tell(&mut self, memory: &GuestMemoryMmap, head: u16, coalescing: Coalescing) -> Result<(), RingError> {
        let answer = [&[OK][..], &coalescing.to_bytes()].concat();
        let room = self.chain.writable().iter().fold(0, |room: u32, piece| room.saturating_add(piece.length));
        let fits = usize::try_from(room).is_ok_and(|room| room >= answer.len());
        self.answer(memory, head, if fits { &answer } else { &[ERR] })
    }

    /// Writes `answer` into the chain at `head`, which was walked last: the status, and what follows it.
    fn answer(&mut self, memory: &GuestMemoryMmap, head: u16, answer: &[u8]) -> Result<(), RingError> {
        let (mut written, mut left) = (0, answer);
        for piece in self.chain.writable() {
            let length = left.len().min(usize::try_from(piece.length).unwrap_or(usize::MAX));
            let (now, later) = left.split_at(length);
            let unmapped = RingError::Unmapped { head, address: piece.address };
            memory.write_slice(now, GuestAddress(piece.address)).map_err(|_| unmapped)?;
            written += u32::try_from(length).unwrap_or(0);
            left = later;
            if left.is_empty() {
                break;
            }
        }
        self.lane.ring.put_used(memory, head, written)?;
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
