//! What firmware and boot loaders measured (TCG PC Client Platform Firmware Profile 1.05 §10).

use std::collections::BTreeMap;

use crate::sha256;

/// TPM_ALG_SHA256.
const SHA256: u16 = 0x000b;
/// EV_NO_ACTION: it was not extended.
const NO_ACTION: u32 = 3;

/// One event.
pub struct LogEvent {
    /// The register that was extended.
    pub pcr: u32,
    /// What kind of event it is.
    pub kind: u32,
    /// What the register was extended with, in the bank of SHA-256.
    pub digest: Vec<u8>,
    /// What it is about.
    pub data: Vec<u8>,
}

/// An event log in the crypto agile format.
pub struct EventLog(pub Vec<LogEvent>);

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take(&mut self, length: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken.to_vec()
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }
}

impl EventLog {
    /// Reads a log.
    ///
    /// # Panics
    /// If it is none.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut log = Reader(bytes);
        // The first event has the older form, and says how long the digests of the others are.
        log.take(4 + 4 + 20);
        let length = log.u32() as usize;
        let header = log.take(length);
        assert!(header.starts_with(b"Spec ID Event03\0"), "{header:x?}");
        let mut header = Reader(&header);
        header.take(24);
        let sizes: BTreeMap<u16, usize> =
            (0..header.u32()).map(|_| (header.u16(), usize::from(header.u16()))).collect();
        let mut events = Vec::new();
        while !log.0.is_empty() {
            let (pcr, kind) = (log.u32(), log.u32());
            let digests: BTreeMap<u16, Vec<u8>> = (0..log.u32())
                .map(|_| {
                    let algorithm = log.u16();
                    (algorithm, log.take(sizes[&algorithm]))
                })
                .collect();
            let length = log.u32() as usize;
            events.push(LogEvent { pcr, kind, digest: digests[&SHA256].clone(), data: log.take(length) });
        }
        Self(events)
    }

    /// What a register must contain after all of it, in hexadecimal.
    pub fn replay(&self, pcr: u32) -> String {
        let extended = self.0.iter().filter(|event| event.pcr == pcr && event.kind != NO_ACTION);
        extended.fold("0".repeat(64), |value, event| {
            let former = (0..64).step_by(2).map(|at| u8::from_str_radix(&value[at..at + 2], 16).unwrap());
            sha256(&former.chain(event.digest.iter().copied()).collect::<Vec<_>>())
        })
    }

    /// Whether a register was extended because of something that begins with, or contains, `text`.
    pub fn tells(&self, pcr: u32, text: &str) -> bool {
        let contains = |data: &[u8]| data.windows(text.len()).any(|window| window == text.as_bytes());
        self.0.iter().any(|event| event.pcr == pcr && contains(&event.data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_and_replayed() {
        let mut bytes = [&0u32.to_le_bytes()[..], &NO_ACTION.to_le_bytes(), &[0; 20], &37u32.to_le_bytes()].concat();
        bytes.extend(b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02");
        bytes.extend(2u32.to_le_bytes());
        bytes.extend([4, 0, 20, 0, 0x0b, 0, 32, 0, 0]);
        for (pcr, kind) in [(4u32, 0x8000_0003u32), (4, NO_ACTION), (5, 1)] {
            bytes.extend([pcr, kind, 2].map(u32::to_le_bytes).as_flattened());
            bytes.extend([[4, 0].as_slice(), &[1; 20], &[0x0b, 0], &[7; 32]].concat());
            bytes.extend(5u32.to_le_bytes());
            bytes.extend(b"event");
        }
        let log = EventLog::parse(&bytes);
        assert_eq!(log.0.len(), 3);
        assert_eq!(log.replay(4), sha256(&[[0; 32], [7; 32]].concat()));
        assert_eq!(log.replay(3), "0".repeat(64));
        assert!(log.tells(5, "vent") && !log.tells(3, "vent") && !log.tells(5, "vents"));
    }
}
