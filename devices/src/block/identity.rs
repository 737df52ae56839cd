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

/// Whether `wanted` is one of the identifiers of a LUN, however it is written: `naa.6001…`, `0x6001…`, `6001…`, and with
/// the leading digit of `scsi_id` and multipath, `36001…`.
#[must_use]
pub fn names(wanted: &str, found: &[String]) -> bool {
    let typed = wanted.trim().split_at_checked(1).and_then(|(kind, rest)| {
        let plain = normal(rest)?;
        // A digit before 8, 12 or 16 bytes in hexadecimal, or before a text.
        let extra = !is_hex(&plain) || matches!(plain.len(), 16 | 24 | 32);
        (matches!(kind, "1" | "2" | "3" | "8") && extra).then_some(plain)
    });
    let candidates: Vec<String> = normal(wanted).into_iter().chain(typed).map(|plain| comparable(&plain)).collect();
    found.iter().any(|found| candidates.contains(&comparable(found)))
}

/// An identifier without the prefix that says where it was read: "naa.6001", and "mpath-36001" of the multipath device
/// above it, are both "6001".
#[must_use]
pub fn normal(raw: &str) -> Option<String> {
    let raw = raw.trim();
    let plain = match raw.strip_prefix("mpath-") {
        // The first digit is the type of the designator.
        Some(rest) => rest.get(1..).unwrap_or_default(),
        None => ["naa.", "eui.", "t10.", "uuid.", "nguid.", "0x", "0X"]
            .iter()
            .find_map(|prefix| raw.strip_prefix(prefix))
            .unwrap_or(raw),
    };
    let plain: String = plain.split_whitespace().collect::<Vec<_>>().join("_").to_lowercase();
    (!plain.is_empty()).then_some(plain)
}

/// The same identifier may be written with separators, "00 25 38" or as a UUID.
fn comparable(plain: &str) -> String {
    let joined: String = plain.chars().filter(|letter| !matches!(letter, '-' | '_')).collect();
    if joined.len() >= 16 && is_hex(&joined) { joined } else { plain.to_owned() }
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
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
    fn a_lun_is_known_by_its_identifier_however_it_is_written() {
        let found = ["6001405a1b2c3d4e5f60718293a4b5c6".to_owned(), "lio-org_lun:5a1b".to_owned()];
        for wanted in [
            "6001405a1b2c3d4e5f60718293a4b5c6",
            "naa.6001405A1B2C3D4E5F60718293A4B5C6",
            "0x6001405a1b2c3d4e5f60718293a4b5c6",
            "36001405a1b2c3d4e5f60718293a4b5c6",
            " mpath-36001405a1b2c3d4e5f60718293a4b5c6\n",
            "t10.LIO-ORG lun:5a1b",
            "1LIO-ORG_lun:5a1b",
        ] {
            assert!(names(wanted, &found), "{wanted}");
        }
        for wanted in [
            "",
            "6",
            "6001405a1b2c3d4e5f60718293a4b5c7",
            "001405a1b2c3d4e5f60718293a4b5c6",
            "66001405a1b2c3d4e5f60718293a4b5c6",
            "336001405a1b2c3d4e5f60718293a4b5c6",
            "lun:5a1b",
            "\u{e4}6001405a1b2c3d4e5f60718293a4b5c6",
        ] {
            assert!(!names(wanted, &found), "{wanted}");
        }
        assert!(!names("6001", &[]));
    }

    #[test]
    fn separators_in_an_identifier_do_not_matter() {
        let found = ["0025385b71b00001".to_owned(), "6b8a9d1c-3f5e-4a7b-8c9d-0e1f2a3b4c5d".to_owned()];
        for wanted in ["eui.0025385b71b00001", "00 25 38 5b 71 b0 00 01", "uuid.6B8A9D1C-3F5E-4A7B-8C9D-0E1F2A3B4C5D"] {
            assert!(names(wanted, &found), "{wanted}");
        }
        assert!(names("6b8a9d1c3f5e4a7b8c9d0e1f2a3b4c5d", &found));
    }

    #[test]
    fn a_lun_has_the_same_identifier_through_its_paths_and_through_multipath() {
        let expected = Some("600140512ab34cd".to_owned());
        assert_eq!(normal("naa.600140512AB34CD\n"), expected);
        assert_eq!(normal("mpath-3600140512ab34cd"), expected);
        assert_eq!(normal("t10.ATA     DISK  7\n"), Some("ata_disk_7".to_owned()));
        assert_eq!(normal("\n"), None);
        assert_eq!(normal("mpath-"), None);
    }

    #[test]
    fn a_serial_is_short_and_printable() {
        for bad in ["", "123456789012345678901", "a\n", "\u{e4}"] {
            assert!(!is_valid(bad), "{bad:?}");
        }
        assert!(is_valid("12345678901234567890"));
    }
}
