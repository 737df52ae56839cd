//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use crate::text::text_type;

/// The Ethernet address of an interface: unicast and not zero. Reads and prints `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr([u8; 6]);

/// Why a text or an array is no address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadMac {
    /// Not six pairs of hexadecimal digits with colons between.
    Syntax,
    /// The group bit is set: no interface has this address.
    Multicast,
    /// All zero.
    Zero,
}

impl fmt::Display for BadMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Syntax => "not a MAC address: write six pairs of hexadecimal digits, such as \"52:54:00:12:34:56\"",
            Self::Multicast => {
                "a multicast address cannot be the address of a NIC: clear the lowest bit of the first byte"
            }
            Self::Zero => "the zero address cannot be the address of a NIC",
        })
    }
}

impl std::error::Error for BadMac {}

impl MacAddr {
    /// The address of these bytes, in the order of transmission.
    ///
    /// # Errors
    /// [`BadMac`] if it is multicast or zero.
    pub fn new(bytes: [u8; 6]) -> Result<Self, BadMac> {
        match bytes {
            [0, 0, 0, 0, 0, 0] => Err(BadMac::Zero),
            [first, ..] if first & 1 == 1 => Err(BadMac::Multicast),
            _ => Ok(Self(bytes)),
        }
    }

    /// The bytes, in the order of transmission.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let mut bytes = [0u8; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or(BadMac::Syntax)?;
        }
        match pairs.next() {
            Some(_) => Err(BadMac::Syntax),
            None => Self::new(bytes),
        }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        f.pad(&format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}"))
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MacAddr({self})")
    }
}

text_type! {
    MacAddr,
    example: "52:54:00:12:34:56",
    pattern: "^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$",
    description: "The Ethernet address of an interface: unicast and not zero."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_reads_back_what_it_prints() {
        let mac: MacAddr = "52:54:00:aB:0f:01".parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0x0f, 1]);
        assert_eq!(mac.to_string(), "52:54:00:ab:0f:01");
    }

    #[test]
    fn what_no_interface_can_have_is_refused() {
        assert_eq!("01:00:5e:00:00:01".parse::<MacAddr>(), Err(BadMac::Multicast));
        assert_eq!("ff:ff:ff:ff:ff:ff".parse::<MacAddr>(), Err(BadMac::Multicast));
        assert_eq!("00:00:00:00:00:00".parse::<MacAddr>(), Err(BadMac::Zero));
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "525400123456",
            "52-54-00-12-34-56",
            "52:54:00:12:34:5g",
            "+2:54:00:12:34:56",
            "52:54:00:12:34:é",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(BadMac::Syntax), "{text:?}");
        }
    }
}
