//! What a LUN answers when it is asked who may write it. All of it comes from the SAN: nothing in it is believed unchecked.

use std::fmt;

use thiserror::Error;

/// The most registrations that are read of a LUN: what the 8 KiB that a helper passes on hold.
pub(super) const MAX_KEYS: usize = 1023;
/// Room for the answer of READ KEYS with that many.
pub(super) const KEYS_BYTES: usize = 8 + 8 * MAX_KEYS;
/// Room for the answer of READ RESERVATION.
pub(super) const RESERVATION_BYTES: usize = 24;
/// Room for a Reservation Report with that many registrants.
pub(super) const REPORT_BYTES: usize = EXTENDED.header + EXTENDED.entry * MAX_KEYS;

/// The type of a reservation, numbered as in Linux's `pr.h` and in NVMe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind(u32);

impl Kind {
    /// Write Exclusive – Registrants Only: whoever is registered may write, all others may only read.
    pub const OURS: Self = Self(3);

    /// As Linux and NVMe number it; what they do not know stays unknown.
    pub(super) fn from_linux(kind: u32) -> Self {
        Self(kind)
    }

    /// As SPC-4 table 213 numbers it.
    pub(super) fn from_scsi(kind: u8) -> Self {
        Self(match kind & 0xf {
            1 => 1,
            3 => 2,
            5 => 3,
            6 => 4,
            7 => 5,
            8 => 6,
            _ => 0,
        })
    }

    /// As SPC-4 numbers ours.
    pub(super) const OURS_IN_SCSI: u8 = 5;

    /// Whether all registrants hold it together.
    pub(super) fn is_held_by_all(self) -> bool {
        matches!(self.0, 5 | 6)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            1 => "write exclusive",
            2 => "exclusive access",
            3 => "write exclusive, registrants only",
            4 => "exclusive access, registrants only",
            5 => "write exclusive, all registrants",
            6 => "exclusive access, all registrants",
            _ => "of an unknown type",
        })
    }
}

/// A reservation that somebody holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Holder {
    pub key: u64,
    pub kind: Kind,
}

/// Who is registered with a LUN, and who holds its reservation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// One for each registered path, so the same may come several times.
    pub keys: Vec<u64>,
    pub holder: Option<Holder>,
}

impl Table {
    pub fn has(&self, key: u64) -> bool {
        self.keys.contains(&key)
    }

    /// The keys of others than `own`, each once.
    pub fn foreign(&self, own: u64) -> Vec<u64> {
        let mut keys: Vec<u64> = self.keys.iter().copied().filter(|&key| key != own).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// The key of another than `own` that holds the reservation.
    pub fn foreign_holder(&self, own: u64) -> Option<u64> {
        let holder = self.holder?;
        // One that all hold together names nobody.
        let key = if holder.kind.is_held_by_all() { *self.foreign(own).first()? } else { holder.key };
        (key != own).then_some(key)
    }

    /// Whether `own` is registered and holds a reservation of our type.
    pub fn is_held_by(&self, own: u64) -> bool {
        self.has(own) && self.holder == Some(Holder { key: own, kind: Kind::OURS })
    }
}

/// An answer that is none.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Malformed {
    #[error("its answer ends after {0} bytes")]
    Short(usize),
    #[error("its answer contradicts itself: a list of {0} bytes")]
    Length(u32),
    #[error("more than {MAX_KEYS} registrations")]
    TooMany,
}

/// The answer of PERSISTENT RESERVE IN, READ KEYS (SPC-4 §6.15.2).
pub(super) fn parse_keys(answer: &[u8]) -> Result<Vec<u64>, Malformed> {
    let short = || Malformed::Short(answer.len());
    let length = be32(answer, 4).ok_or_else(short)?;
    if length % 8 != 0 {
        return Err(Malformed::Length(length));
    }
    let bytes = usize::try_from(length).unwrap_or(usize::MAX);
    if bytes > 8 * MAX_KEYS {
        return Err(Malformed::TooMany);
    }
    let list = answer.get(8..8 + bytes).ok_or_else(short)?;
    Ok(list.as_chunks::<8>().0.iter().map(|key| u64::from_be_bytes(*key)).collect())
}

/// The answer of PERSISTENT RESERVE IN, READ RESERVATION (SPC-4 §6.15.3).
pub(super) fn parse_reservation(answer: &[u8]) -> Result<Option<Holder>, Malformed> {
    let short = || Malformed::Short(answer.len());
    match be32(answer, 4).ok_or_else(short)? {
        0 => Ok(None),
        // Key and type are in the first 14 bytes.
        length @ 1..14 => Err(Malformed::Length(length)),
        _ => {
            let key = be64(answer, 8).ok_or_else(short)?;
            let kind = answer.get(21).ok_or_else(short)?;
            Ok(Some(Holder { key, kind: Kind::from_scsi(*kind) }))
        }
    }
}

struct Layout {
    header: usize,
    entry: usize,
    key: usize,
}

const PLAIN: Layout = Layout { header: 24, entry: 24, key: 16 };
const EXTENDED: Layout = Layout { header: 64, entry: 64, key: 8 };

/// A Reservation Report (NVM Command Set §3.2.4), with or without 128-bit host identifiers.
pub(super) fn parse_report(answer: &[u8], extended: bool) -> Result<Table, Malformed> {
    let layout = if extended { EXTENDED } else { PLAIN };
    let short = || Malformed::Short(answer.len());
    let kind = *answer.get(4).ok_or_else(short)?;
    let count = answer.get(5..7).and_then(|raw| raw.first_chunk()).ok_or_else(short)?;
    let count = usize::from(u16::from_le_bytes(*count));
    if count > MAX_KEYS {
        return Err(Malformed::TooMany);
    }
    let list = answer.get(layout.header..layout.header + count * layout.entry).ok_or_else(short)?;
    let mut table = Table::default();
    for entry in list.chunks_exact(layout.entry) {
        let key = entry.get(layout.key..).and_then(|raw| raw.first_chunk()).ok_or_else(short)?;
        let key = u64::from_le_bytes(*key);
        table.keys.push(key);
        let holds = entry.get(2).is_some_and(|status| status & 1 == 1);
        if kind != 0 && holds && table.holder.is_none() {
            table.holder = Some(Holder { key, kind: Kind::from_linux(u32::from(kind)) });
        }
    }
    Ok(table)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|raw| u32::from_be_bytes(*raw))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|raw| u64::from_be_bytes(*raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(length: u32, keys: &[u64]) -> Vec<u8> {
        let mut answer = [7_u32.to_be_bytes(), length.to_be_bytes()].concat();
        answer.extend(keys.iter().flat_map(|key| key.to_be_bytes()));
        answer
    }

    #[test]
    fn the_keys_of_a_lun_are_read_and_one_that_is_cut_off_is_no_answer() {
        assert_eq!(parse_keys(&keys(0, &[])), Ok(vec![]));
        assert_eq!(parse_keys(&keys(24, &[0xabc, 0xabc, u64::MAX])), Ok(vec![0xabc, 0xabc, u64::MAX]));
        assert_eq!(parse_keys(&keys(8, &[1, 2, 3])), Ok(vec![1]), "what is beyond the list is none");
        assert_eq!(parse_keys(&keys(16, &[1])), Err(Malformed::Short(16)));
        assert_eq!(parse_keys(&keys(12, &[1, 2])), Err(Malformed::Length(12)));
        assert_eq!(parse_keys(&keys(u32::MAX - 7, &[1])), Err(Malformed::TooMany));
        assert_eq!(parse_keys(&keys(8 * (MAX_KEYS as u32 + 1), &[1; MAX_KEYS + 1])), Err(Malformed::TooMany));
        assert_eq!(parse_keys(&keys(8 * MAX_KEYS as u32, &[1; MAX_KEYS])).unwrap().len(), MAX_KEYS);
        for length in 0..8 {
            assert_eq!(parse_keys(&keys(0, &[])[..length]), Err(Malformed::Short(length)));
        }
    }

    fn reservation(length: u32, key: u64, kind: u8) -> Vec<u8> {
        let mut answer = [7_u32.to_be_bytes(), length.to_be_bytes()].concat();
        answer.extend(key.to_be_bytes());
        answer.extend([0, 0, 0, 0, 0, kind, 0, 0]);
        answer
    }

    #[test]
    fn the_holder_of_a_lun_is_read_and_one_that_is_cut_off_is_no_answer() {
        let held = |key, kind| Ok(Some(Holder { key, kind: Kind(kind) }));
        assert_eq!(parse_reservation(&reservation(16, 0xabc, 5)), held(0xabc, 3));
        assert_eq!(parse_reservation(&reservation(16, 0xabc, 0x08)), held(0xabc, 6));
        assert_eq!(parse_reservation(&reservation(16, 0xabc, 4)), held(0xabc, 0), "an obsolete type");
        assert_eq!(parse_reservation(&reservation(u32::MAX, 1, 1)), held(1, 1));
        assert_eq!(parse_reservation(&reservation(0, 0, 0)[..8]), Ok(None));
        assert_eq!(parse_reservation(&reservation(13, 1, 5)), Err(Malformed::Length(13)));
        for length in (0..8).chain(8..22) {
            assert_eq!(parse_reservation(&reservation(16, 1, 5)[..length]), Err(Malformed::Short(length)));
        }
    }

    #[test]
    fn a_holder_that_is_not_registered_holds_nothing() {
        let holder = Some(Holder { key: 0xa, kind: Kind::OURS });
        assert!(Table { keys: vec![0xb, 0xa], holder }.is_held_by(0xa));
        assert!(!Table { keys: vec![0xb], holder }.is_held_by(0xa));
        assert!(!Table { keys: vec![0xb, 0xa], holder: None }.is_held_by(0xa));
        assert!(!Table { keys: vec![0xb, 0xa], holder }.is_held_by(0xb));
        let other = Some(Holder { key: 0xa, kind: Kind(1) });
        assert!(!Table { keys: vec![0xa], holder: other }.is_held_by(0xa));
    }

    fn report(kind: u8, count: u16, extended: bool, entries: &[(u64, u8)]) -> Vec<u8> {
        let layout = if extended { EXTENDED } else { PLAIN };
        let mut answer = vec![7, 0, 0, 0, kind];
        answer.extend(count.to_le_bytes());
        answer.resize(layout.header, 0);
        for (key, status) in entries {
            let start = answer.len();
            answer.resize(start + layout.entry, 0xee);
            answer[start + 2] = *status;
            answer[start + layout.key..start + layout.key + 8].copy_from_slice(&key.to_le_bytes());
        }
        answer
    }

    #[test]
    fn a_reservation_report_of_either_form_is_read_and_a_false_count_is_none() {
        for extended in [false, true] {
            let table = parse_report(&report(3, 2, extended, &[(0xa, 0), (0xb, 1)]), extended).unwrap();
            assert_eq!(table, Table { keys: vec![0xa, 0xb], holder: Some(Holder { key: 0xb, kind: Kind::OURS }) });
            let free = parse_report(&report(0, 1, extended, &[(0xa, 1)]), extended).unwrap();
            assert_eq!(free, Table { keys: vec![0xa], holder: None });
            let lie = report(3, 3, extended, &[(0xa, 0), (0xb, 1)]);
            assert_eq!(parse_report(&lie, extended), Err(Malformed::Short(lie.len())));
            let many = report(3, u16::MAX, extended, &[]);
            assert_eq!(parse_report(&many, extended), Err(Malformed::TooMany));
            for length in 0..7 {
                assert!(parse_report(&lie[..length], extended).is_err());
            }
        }
    }
}
