//! Vital product data of SCSI devices: the page of identifiers (SPC-4 §7.8.6, page 0x83). It comes from the SAN: nothing in it
//! is believed unchecked.

use super::identity;

const PAGE: u8 = 0x83;
/// Associated with the logical unit; others name the port or the array, which many LUNs share.
const LOGICAL_UNIT: u8 = 0;
const BINARY: u8 = 1;

/// The identifiers of the LUN in this page; none if it is no such page. What is cut off is left out.
#[must_use]
pub fn designators(page: &[u8]) -> Vec<String> {
    let Some(([_, PAGE, high, low], list)) = page.split_first_chunk() else { return Vec::new() };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    let mut list = list.get(..length).unwrap_or(list);
    let mut found = Vec::new();
    while let Some(([set, kind, _, length], rest)) = list.split_first_chunk() {
        let Some((value, rest)) = rest.split_at_checked(usize::from(*length)) else { break };
        list = rest;
        if kind >> 4 & 3 == LOGICAL_UNIT {
            found.extend(designator(set & 0xf, kind & 0xf, value));
        }
    }
    found
}

fn designator(set: u8, kind: u8, value: &[u8]) -> Option<String> {
    match (kind, set) {
        // EUI-64 based, NAA
        (2 | 3, BINARY) if matches!(value.len(), 8 | 12 | 16) => Some(hexadecimal(value)),
        // T10 vendor identification, SCSI name string
        (1 | 8, _) => identity::normal(text(value)?),
        // UUID, behind two bytes that say so
        (0xa, BINARY) => value.strip_prefix(&[0x10, 0]).filter(|uuid| uuid.len() == 16).map(hexadecimal),
        _ => None,
    }
}

/// Text without the padding behind it, if it is printable.
fn text(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value).ok()?.trim_end_matches('\0');
    (!text.chars().any(char::is_control)).then_some(text)
}

fn hexadecimal(value: &[u8]) -> String {
    value.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(designators: &[(u8, u8, &[u8])]) -> Vec<u8> {
        let list = designators.iter().flat_map(|(set, kind, value)| {
            let header = [*set, *kind, 0, u8::try_from(value.len()).unwrap()];
            [&header, *value].concat()
        });
        let list: Vec<u8> = list.collect();
        let length = u16::try_from(list.len()).unwrap().to_be_bytes();
        [vec![0, PAGE], length.to_vec(), list].concat()
    }

    const NAA: [u8; 16] = [0x60, 1, 0x40, 5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

    #[test]
    fn each_kind_of_identifier_of_the_lun_is_read() {
        let uuid = [&[0x10, 0][..], &[0xab; 16]].concat();
        let page = page(&[
            (1, 0x03, &NAA),
            (2, 0x01, b"LIO-ORG lun:5a1b   \0"),
            (1, 0x02, &[0, 0x25, 0x38, 0x5b, 0x71, 0xb0, 0, 1]),
            (3, 0x08, b"naa.60014050102030405060708090A0B0C\0\0\0"),
            (1, 0x0a, &uuid),
        ]);
        let expected = [
            "600140050102030405060708090a0b0c".to_owned(),
            "lio-org_lun:5a1b".to_owned(),
            "0025385b71b00001".to_owned(),
            "60014050102030405060708090a0b0c".to_owned(),
            "ab".repeat(16),
        ];
        assert_eq!(designators(&page), expected);
    }

    #[test]
    fn what_names_a_port_or_the_array_does_not_name_the_lun() {
        assert_eq!(designators(&page(&[(1, 0x13, &NAA), (1, 0x23, &NAA), (1, 0x93, &NAA)])), [""; 0]);
        assert_eq!(designators(&page(&[(1, 0x14, &[0, 0, 0, 1]), (1, 0x03, &NAA)])).len(), 1);
    }

    #[test]
    fn a_page_that_lies_gives_what_is_whole_and_nothing_else() {
        let whole = page(&[(2, 0x01, b"ACME 1"), (1, 0x03, &NAA)]);
        assert_eq!(designators(&whole).len(), 2);
        for length in 0..whole.len() {
            let found = designators(&whole[..length]);
            assert_eq!(found.len(), usize::from(length >= 4 + 4 + 6), "{length}");
        }
        let mut long = whole.clone();
        long[2..4].copy_from_slice(&[0xff, 0xff]);
        assert_eq!(designators(&long).len(), 2, "the length of the page");
        let mut short = whole.clone();
        short[2..4].copy_from_slice(&[0, 10]);
        assert_eq!(designators(&short), ["acme_1"]);
        let mut overlong = whole.clone();
        overlong[4 + 3] = 0xff;
        assert_eq!(designators(&overlong), [""; 0], "the length of an identifier");
        let mut other = whole;
        other[1] = 0x80;
        assert_eq!(designators(&other), [""; 0], "another page");
        assert_eq!(designators(&page(&[(2, 0x01, b"bell\x07"), (2, 0x01, &[0xff, 0xfe]), (2, 0x01, b"")])), [""; 0]);
        assert_eq!(designators(&page(&[(1, 0x03, &NAA[..7]), (2, 0x03, &NAA), (1, 0x0a, &NAA)])), [""; 0]);
        assert_eq!(designators(&[0, PAGE, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]), [""; 0], "empty ones end");
    }
}
