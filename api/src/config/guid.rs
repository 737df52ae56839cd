//! Globally unique identifiers.

use std::fmt;
use std::str::FromStr;

use crate::text::text_type;

/// Where the text has a hyphen.
const HYPHENS: [usize; 4] = [8, 13, 18, 23];

/// A globally unique identifier (RFC 9562): reads and prints `324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Guid([u8; 16]);

/// A text that is no identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadGuid;

impl fmt::Display for BadGuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "not a GUID: write 32 hexadecimal digits with hyphens, such as \"324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87\"",
        )
    }
}

impl std::error::Error for BadGuid {}

impl Guid {
    /// The bytes, in the order in which they are written.
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }

    /// The bytes as Microsoft's systems keep them in memory: the first three groups are little-endian numbers.
    pub const fn memory(self) -> [u8; 16] {
        let [a, b, c, d, e, f, g, h, rest @ ..] = self.0;
        let [i, j, k, l, m, n, o, p] = rest;
        [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
    }
}

impl FromStr for Guid {
    type Err = BadGuid;

    fn from_str(text: &str) -> Result<Self, BadGuid> {
        let well_formed = text.len() == 36
            && text.bytes().enumerate().all(|(at, byte)| match byte {
                b'-' => HYPHENS.contains(&at),
                _ => byte.is_ascii_hexdigit() && !HYPHENS.contains(&at),
            });
        let digits = text.replace('-', "");
        let number = u128::from_str_radix(&digits, 16).ok().filter(|_| well_formed);
        number.map(|number| Self(number.to_be_bytes())).ok_or(BadGuid)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let hyphen = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{hyphen}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guid({self})")
    }
}

text_type! {
    Guid,
    example: "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
    pattern: "^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
    description: "A globally unique identifier."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_reads_back_what_it_prints_and_lies_in_memory_as_windows_expects() {
        let guid: Guid = "324E6EAF-d1d2-4bf6-bf41-b9bb6c91fb87".parse().unwrap();
        assert_eq!(guid.to_string(), "324e6eaf-d1d2-4bf6-bf41-b9bb6c91fb87");
        let memory = guid.memory();
        assert_eq!(memory[..8], [0xaf, 0x6e, 0x4e, 0x32, 0xd2, 0xd1, 0xf6, 0x4b]);
        assert_eq!(memory[8..], [0xbf, 0x41, 0xb9, 0xbb, 0x6c, 0x91, 0xfb, 0x87]);
    }

    #[test]
    fn what_is_no_guid_is_refused() {
        for text in [
            "",
            "324e6eafd1d14bf6bf41b9bb6c91fb87",
            "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb8",
            "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb877",
            "324e6eaf-d1d1-4bf6-bf4-1b9bb6c91fb87",
            "+24e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
            "{24e6eaf-d1d1-4bf6-bf41-b9bb6c91fb8}",
            "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fbé",
        ] {
            assert_eq!(text.parse::<Guid>(), Err(BadGuid), "{text:?}");
        }
    }
}
