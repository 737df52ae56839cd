//! The identity that a guest reads of its disk (virtio 1.2 §5.2.6, VIRTIO_BLK_T_GET_ID).

use super::request::ID_BYTES;

/// Whether this can be a serial number: 1 to 20 printable ASCII characters.
#[must_use]
pub fn is_valid(serial: &str) -> bool {
    (1..=ID_BYTES).contains(&serial.len()) && serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
}

/// The answer to GET_ID, padded with NUL: the serial that was asked for, or else what follows from the world-wide
/// identifier of the LUN, or else from the id of the disk. The same on each host, as Windows knows its disks by it.
#[must_use]
pub fn of(serial: Option<&str>, wwid: Option<&str>, id: &str) -> [u8; ID_BYTES] {
    let source = serial.or(wwid).unwrap_or(id);
    let text = if is_valid(source) { source.to_owned() } else { digest(source) };
    let mut identity = [0; ID_BYTES];
    for (place, byte) in identity.iter_mut().zip(text.bytes()) {
        *place = byte;
    }
    identity
}

/// The identity without its padding.
#[must_use]
pub fn text(identity: &[u8; ID_BYTES]) -> String {
    identity.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte)).collect()
}

/// 80 bits of FNV-1a in hexadecimal, for what is too long: short enough, and never changed.
fn digest(source: &str) -> String {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash = source.bytes().fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    let folded = (hash ^ hash >> 80) & ((1 << 80) - 1);
    format!("{folded:020x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serial_comes_first_then_the_wwid_then_the_id() {
        assert_eq!(text(&of(Some("S1"), Some("w"), "root")), "S1");
        assert_eq!(text(&of(None, Some("600140512ab34cd"), "root")), "600140512ab34cd");
        assert_eq!(text(&of(None, None, "root")), "root");
        assert_eq!(&of(None, None, "root")[4..], [0; 16]);
    }

    #[test]
    fn an_identifier_that_is_too_long_becomes_a_digest_that_never_changes() {
        let naa = "6001405a1b2c3d4e5f60718293a4b5c6";
        assert_eq!(text(&of(None, Some(naa), "root")), digest(naa));
        assert_eq!(digest(naa), "297b3d8bbe73832c8da0");
        assert_ne!(digest(naa), digest("6001405a1b2c3d4e5f60718293a4b5c7"));
    }

    #[test]
    fn a_serial_is_short_and_printable() {
        for bad in ["", "123456789012345678901", "a\n", "\u{e4}"] {
            assert!(!is_valid(bad), "{bad:?}");
        }
        assert!(is_valid("12345678901234567890"));
    }
}
