//! Sizes in bytes, written as people write them: `"2GiB"`, `"512MiB"`, or a plain number of bytes.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::openapi::{RefOr, schema::SchemaFormat};
use utoipa::{PartialSchema, ToSchema};

/// Binary units, largest first, with the power of two they stand for.
const UNITS: [(&str, u32); 6] = [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

/// A number of bytes, 0 to 2⁶⁴−1.
///
/// Reads a plain integer, or a string of a whole number and a binary unit (`B`, `KiB` … `EiB`, or the one-letter
/// short forms `K` … `E`, which mean the same powers of 1024). Decimal units (`GB`) are refused, because half of
/// their users mean the binary ones. Prints the largest unit that divides it exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// `n` KiB (n · 2¹⁰ bytes). For constants: saturates at 2⁶⁴−1.
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// `n` MiB (n · 2²⁰ bytes). For constants: saturates at 2⁶⁴−1.
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` GiB (n · 2³⁰ bytes). For constants: saturates at 2⁶⁴−1.
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match UNITS.iter().find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift) {
            Some((unit, shift)) => format!("{}{unit}", self.0 >> shift),
            None => format!("{}B", self.0),
        };
        f.pad(&text)
    }
}

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSize(String);

impl fmt::Display for BadSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadSize {}

impl FromStr for ByteSize {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "" | "B" => 0,
            _ => UNITS
                .iter()
                .find(|(name, _)| unit == *name || (unit.len() == 1 && name.starts_with(unit)))
                .map(|(_, shift)| *shift)
                .ok_or_else(|| BadSize(format!("\"{}\" is no size: write a whole number and B, KiB, MiB, GiB, TiB, PiB or EiB, such as \"2GiB\"", clip(text))))?,
        };
        let number: u64 = number.parse().map_err(|_| {
            BadSize(format!(
                "\"{}\" is no size: a whole number below 2^64 must come first, such as \"2GiB\"",
                clip(text)
            ))
        })?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| BadSize(format!("\"{}\" is more than 2^64-1 bytes", clip(text))))
    }
}

/// At most 32 characters of a text that a client sent, for use in a message.
fn clip(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(32) {
        Some((end, _)) => Cow::Owned(format!("{}…", text.get(..end).unwrap_or_default())),
        None => Cow::Borrowed(text),
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"2GiB\", or a whole number of bytes")
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(value))
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<ByteSize, E> {
                u64::try_from(value).map(ByteSize).map_err(|_| E::custom(format!("a size cannot be negative: {value}")))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(|error: BadSize| E::custom(error))
            }
        }
        if !deserializer.is_human_readable() {
            return Err(D::Error::custom("sizes are read from text formats only"));
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

impl PartialSchema for ByteSize {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some("^[0-9]+(B|K|M|G|T|P|E|KiB|MiB|GiB|TiB|PiB|EiB)?$"))
            .examples(["2GiB"])
            .build();
        let number = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .format(Some(SchemaFormat::Custom("uint64".into())))
            .minimum(Some(0))
            .build();
        OneOfBuilder::new()
            .item(text)
            .item(number)
            .description(Some("A number of bytes: a whole number with a binary unit (\"2GiB\"), or a plain integer. Answers use the unit form."))
            .into()
    }
}

impl ToSchema for ByteSize {
    fn name() -> Cow<'static, str> {
        "ByteSize".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_prints_the_largest_unit_that_divides_it_and_reads_back() {
        for (bytes, text) in [
            (0, "0B"),
            (1, "1B"),
            (1023, "1023B"),
            (1024, "1KiB"),
            (1536, "1536B"),
            (2 << 30, "2GiB"),
            (3 << 29, "1536MiB"),
            (u64::MAX, "18446744073709551615B"),
            (1 << 63, "8EiB"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
    }

    #[test]
    fn short_units_are_binary_and_plain_numbers_are_bytes() {
        assert_eq!("1G".parse(), Ok(ByteSize::gib(1)));
        assert_eq!("4096".parse(), Ok(ByteSize(4096)));
        assert_eq!(serde_json::from_str::<ByteSize>("4096").unwrap(), ByteSize(4096));
        assert_eq!(serde_json::from_str::<ByteSize>("\"2GiB\"").unwrap(), ByteSize::gib(2));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in
            ["", "GiB", "2GB", "2 GiB", "-1", "+1", "1.5GiB", "2gib", "16EiB", "18446744073709551616", "1GiBx", "é"]
        {
            assert!(text.parse::<ByteSize>().is_err(), "{text:?} was read as a size");
        }
        for json in ["-1", "1.5", "null", "[1]", "1e3"] {
            assert!(serde_json::from_str::<ByteSize>(json).is_err(), "{json} was read as a size");
        }
    }
}
