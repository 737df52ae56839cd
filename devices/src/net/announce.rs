//! Telling the network where the guest is, after it moved: RARP through the tap, and a word to the driver (virtio 1.2
//! §5.1.6.5.5). OVN lets a port that was moved with `activation-strategy=rarp` work only once it has seen one.

use std::time::{Duration, Instant};

use super::filter::Mac;

/// How often it is told.
const ROUNDS: u32 = 5;
const FIRST: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_millis(100);
/// The shortest Ethernet frame, without its checksum.
const SHORTEST: usize = 60;

/// The rounds that are left of an announcement.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounds {
    done: u32,
    next: Instant,
}

impl Rounds {
    /// The first is due at once.
    pub(super) fn begin(now: Instant) -> Self {
        Self { done: 0, next: now }
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// One was done; `None` if it was the last.
    pub(super) fn after(self, now: Instant) -> Option<Self> {
        let pause = FIRST + STEP * self.done;
        let done = self.done + 1;
        (done < ROUNDS).then(|| Self { done, next: now + pause })
    }
}

/// A reverse-ARP request (RFC 903) of `mac` for itself, to everybody, behind a virtio header of `header` bytes.
pub(super) fn rarp(mac: Mac, header: usize) -> Vec<u8> {
    let mut frame = vec![0; header + SHORTEST];
    let parts: [&[u8]; 7] = [
        &[0xff; 6],
        &mac,
        &[0x80, 0x35],                // RARP
        &[0, 1, 0x08, 0, 6, 4, 0, 3], // Ethernet, IPv4, lengths, "request reverse"
        &mac,
        &[0; 4],
        &mac,
    ];
    for (place, byte) in frame.iter_mut().skip(header).zip(parts.into_iter().flatten()) {
        *place = *byte;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_five_rounds_ever_further_apart() {
        let start = Instant::now();
        let mut rounds = Some(Rounds::begin(start));
        let mut times = Vec::new();
        while let Some(due) = rounds {
            times.push(due.next().duration_since(start).as_millis());
            rounds = due.after(due.next());
        }
        assert_eq!(times, [0, 50, 200, 450, 800]);
    }

    #[test]
    fn the_frame_asks_everybody_for_the_address_of_the_guest_itself() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let frame = rarp(mac, 12);
        let (header, frame) = frame.split_at(12);
        assert_eq!(header, [0; 12]);
        assert_eq!(frame.len(), 60);
        assert_eq!((&frame[..6], &frame[6..12], &frame[12..14]), (&[0xff; 6][..], &mac[..], &[0x80, 0x35][..]));
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
        assert_eq!((&frame[28..32], &frame[38..]), (&[0; 4][..], &[0; 22][..]));
    }
}
