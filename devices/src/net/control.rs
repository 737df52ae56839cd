//! The control queue (virtio 1.2 §5.1.6.5). What is accepted is obeyed; everything else is answered with an error.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::features::{self, GUEST_OFFLOADS};
use super::lane::Lane;
use crate::metrics::Counter;
use crate::virtio::StoppedQueue;
use crate::virtio::ring::{Chain, RingError};

const OK: u8 = 0;
const ERR: u8 = 1;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;
/// The longest command that is known here is 10 bytes: what does not fit is refused unread.
const LONGEST: usize = 64;
/// Commands per turn.
const TURN_COMMANDS: u32 = 16;

/// What the driver may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Take these offloads, as feature bits, and no others.
    Offloads(u64),
    /// Use the first so many queue pairs.
    Pairs(u16),
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
    fn read(&self, memory: &GuestMemoryMmap, head: u16) -> Result<Option<Command>, RingError> {
        let mut data = [0; LONGEST];
        let mut length = 0;
        for piece in self.chain.readable() {
            let end = usize::try_from(piece.length).unwrap_or(usize::MAX).saturating_add(length);
            let Some(part) = data.get_mut(length..end) else { return Ok(None) };
            let unmapped = RingError::Unmapped { head, address: piece.address };
            memory.read_slice(part, GuestAddress(piece.address)).map_err(|_| unmapped)?;
            length = end;
        }
        Ok(data.get(..length).and_then(|data| parse(data, self.features, self.max_pairs)))
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
}
