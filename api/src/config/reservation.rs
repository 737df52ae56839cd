//! Reservations of LUNs.

use std::fmt;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::check_socket_path;
use crate::problem::{Pointer, Problem};
use crate::text::text_type;

/// Keeps other hosts from writing a LUN while the VM runs, by a SCSI-3 persistent reservation (*write exclusive, registrants
/// only*). The VM does not boot while another host has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReservationConfig {
    /// The key of this host. No other host that reaches the LUN may have the same; with dm-multipath, multipathd's
    /// `reservation_key` has to be the same.
    pub key: ReservationKey,
    /// Take the LUN away from the host that has it, for a fail-over: what that host runs on it ends.
    #[serde(default)]
    #[schema(default = false)]
    pub preempt: bool,
    /// The socket of a `qemu-pr-helper`, which does it for a VMM without the privileges that it takes, such as one in a jail.
    /// SCSI and dm-multipath only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub helper: Option<PathBuf>,
}

impl ReservationConfig {
    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        self.helper.as_deref().map_or(Ok(()), |socket| check_socket_path(socket, &at.key("helper")))
    }
}

/// A key of persistent reservations: 64 bits, not zero. Reads and prints `0x1a2b`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReservationKey(pub NonZeroU64);

/// A text that is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadKey;

impl fmt::Display for BadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a reservation key: write 0x and 1 to 16 hexadecimal digits, not all of them 0")
    }
}

impl std::error::Error for BadKey {}

impl FromStr for ReservationKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).ok_or(BadKey)?;
        if !(1..=16).contains(&digits.len()) || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(BadKey);
        }
        u64::from_str_radix(digits, 16).ok().and_then(NonZeroU64::new).map(Self).ok_or(BadKey)
    }
}

impl fmt::Display for ReservationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:#x}", self.0))
    }
}

impl fmt::Debug for ReservationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReservationKey({self})")
    }
}

text_type! {
    ReservationKey,
    example: "0x1a2b",
    pattern: "^0[xX][0-9A-Fa-f]{1,16}$",
    description: "A key of persistent reservations: 64 bits, not zero."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_back_what_it_prints() {
        for (text, key) in [("0x1", 1), ("0X00AbC", 0xabc), ("0xffffffffffffffff", u64::MAX)] {
            let read: ReservationKey = text.parse().unwrap();
            assert_eq!(read.0.get(), key);
            assert_eq!(read.to_string().parse(), Ok(read));
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for text in
            ["", "0x", "1a2b", "0x0", "0x0000000000000000", "0x10000000000000000", "0x+1", "0xg", "-0x1", "0x1 ", "0xé"]
        {
            assert_eq!(text.parse::<ReservationKey>(), Err(BadKey), "{text:?}");
        }
    }
}
