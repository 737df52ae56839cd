//! Limits on what disks and NICs may do (token buckets); disks may share them in groups.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::check_id;
use super::patch::{Patch, apply};
use crate::problem::{Pointer, Problem};
use crate::size::ByteSize;

/// Far beyond any device, and small enough that no sum of them overflows.
const MAX_NUMBER: u64 = 1_000_000_000;
const MAX_BYTES: ByteSize = ByteSize::gib(1 << 20);

/// Limits per second under the names that fit what is limited, and their merge patch.
macro_rules! limits {
    ($(#[$doc:meta])* $limits:ident, $patch:ident, $(#[$rate_doc:meta])* $rate:ident, $burst:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $limits {
            $(#[$rate_doc])*
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(minimum = 1, maximum = 1_000_000_000)]
            pub $rate: Option<u64>,
            /// As many may come at once after a pause. Default: a tenth of a second's.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(minimum = 1, maximum = 1_000_000_000)]
            pub $burst: Option<u64>,
            /// Bytes per second, up to 1 PiB.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub bytes_per_second: Option<ByteSize>,
            /// Bytes that may come at once after a pause. Default: a tenth of a second's.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub bytes_burst: Option<ByteSize>,
        }

        impl $limits {
            /// Whether nothing is limited.
            pub fn is_unlimited(&self) -> bool {
                *self == Self::default()
            }

            pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
                check_numbers((stringify!($rate), self.$rate), (stringify!($burst), self.$burst), at)?;
                check_bytes(self.bytes_per_second, self.bytes_burst, at)
            }
        }

        #[doc = concat!("Changes to [`", stringify!($limits), "`] as a JSON merge patch: a field that is absent stays, `null` takes the limit away.")]
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $patch {
            #[doc = concat!("Another `", stringify!($rate), "`.")]
            #[serde(default, skip_serializing_if = "Patch::is_keep")]
            #[schema(value_type = Option<u64>)]
            pub $rate: Patch<u64>,
            #[doc = concat!("Another `", stringify!($burst), "`.")]
            #[serde(default, skip_serializing_if = "Patch::is_keep")]
            #[schema(value_type = Option<u64>)]
            pub $burst: Patch<u64>,
            /// Another `bytes_per_second`.
            #[serde(default, skip_serializing_if = "Patch::is_keep")]
            #[schema(value_type = Option<ByteSize>)]
            pub bytes_per_second: Patch<ByteSize>,
            /// Another `bytes_burst`.
            #[serde(default, skip_serializing_if = "Patch::is_keep")]
            #[schema(value_type = Option<ByteSize>)]
            pub bytes_burst: Patch<ByteSize>,
        }

        impl $patch {
            /// The limits after the patch, not yet checked.
            pub fn apply(&self, old: &$limits) -> $limits {
                $limits {
                    $rate: apply(&self.$rate, &old.$rate),
                    $burst: apply(&self.$burst, &old.$burst),
                    bytes_per_second: apply(&self.bytes_per_second, &old.bytes_per_second),
                    bytes_burst: apply(&self.bytes_burst, &old.bytes_burst),
                }
            }

            /// The limits after a patch of the field that holds them; null takes all of them away.
            pub(super) fn apply_to(patch: &Patch<Self>, old: &$limits) -> $limits {
                match patch {
                    Patch::Keep => *old,
                    Patch::Clear => $limits::default(),
                    Patch::Set(patch) => patch.apply(old),
                }
            }
        }
    };
}

limits! {
    /// How much a disk, or a group of disks together, may do per second. What is absent is unlimited.
    Limits, LimitsPatch,
    /// Requests per second, 1 to 10⁹: reads, writes, discards and write-zeroes; flushes are free.
    ops_per_second, ops_burst
}

limits! {
    /// How much may go one way through a NIC per second. What is absent is unlimited.
    NicLimits, NicLimitsPatch,
    /// Frames per second, 1 to 10⁹. One that is to be segmented counts once.
    packets_per_second, packets_burst
}

type Named = (&'static str, Option<u64>);

fn check_numbers(rate: Named, burst: Named, at: &Pointer) -> Result<(), Problem> {
    for (name, value) in [rate, burst] {
        if value.is_some_and(|value| !(1..=MAX_NUMBER).contains(&value)) {
            return Err(out_of_range(&at.key(name), "1 to 1000000000"));
        }
    }
    check_burst(burst.0, burst.1.is_some(), rate.1.is_some(), at)
}

fn check_bytes(rate: Option<ByteSize>, burst: Option<ByteSize>, at: &Pointer) -> Result<(), Problem> {
    for (name, value) in [("bytes_per_second", rate), ("bytes_burst", burst)] {
        if value.is_some_and(|value| value == ByteSize(0) || value > MAX_BYTES) {
            return Err(out_of_range(&at.key(name), "1B to 1PiB"));
        }
    }
    check_burst("bytes_burst", burst.is_some(), rate.is_some(), at)
}

fn check_burst(name: &str, burst: bool, rate: bool, at: &Pointer) -> Result<(), Problem> {
    if burst && !rate {
        let detail = "a burst means nothing without a rate";
        return Err(Problem::invalid(&at.key(name), detail, "give the rate per second too, or leave it out"));
    }
    Ok(())
}

fn out_of_range(at: &Pointer, range: &str) -> Problem {
    Problem::invalid(at, "this limit is not possible", format!("choose {range}, or leave it out for no limit"))
}

/// Disks that share limits: what one of them does, the others cannot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskGroup {
    /// The name that disks give in `group`: 1 to 32 letters, digits, `_` and `-`.
    #[schema(pattern = "^[A-Za-z0-9_-]{1,32}$")]
    pub id: String,
    /// What its disks may do together.
    #[serde(default)]
    pub limits: Limits,
}

impl DiskGroup {
    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        check_id(&self.id, &at.key("id"))?;
        self.limits.check(&at.key("limits"))
    }
}

/// Changes to a group, as a JSON merge patch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskGroupPatch {
    /// Changes to its limits; null takes all of them away.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<LimitsPatch>)]
    pub limits: Patch<LimitsPatch>,
}

impl DiskGroupPatch {
    /// The group after the patch, not yet checked.
    pub fn apply(&self, group: &DiskGroup) -> DiskGroup {
        DiskGroup { id: group.id.clone(), limits: LimitsPatch::apply_to(&self.limits, &group.limits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::json;

    #[test]
    fn limits_are_merged_field_by_field() {
        let old = Limits { ops_per_second: Some(100), ops_burst: Some(7), ..Limits::default() };
        let patch: DiskGroupPatch = json(br#"{"limits":{"ops_burst":null,"bytes_per_second":"1MiB"}}"#).unwrap();
        let new = patch.apply(&DiskGroup { id: "g".into(), limits: old });
        let expected =
            Limits { ops_per_second: Some(100), bytes_per_second: Some(ByteSize::mib(1)), ..Limits::default() };
        assert_eq!(new.limits, expected);
        let none: DiskGroupPatch = json(br#"{"limits":null}"#).unwrap();
        assert!(none.apply(&new).limits.is_unlimited());
    }

    #[test]
    fn a_limit_is_neither_zero_nor_endless_and_a_burst_needs_its_rate() {
        for (text, at) in [
            (r#"{"ops_per_second":0}"#, "/ops_per_second"),
            (r#"{"ops_per_second":1000000001}"#, "/ops_per_second"),
            (r#"{"ops_per_second":1,"ops_burst":0}"#, "/ops_burst"),
            (r#"{"bytes_per_second":0}"#, "/bytes_per_second"),
            (r#"{"bytes_per_second":"2PiB"}"#, "/bytes_per_second"),
            (r#"{"bytes_burst":"1MiB"}"#, "/bytes_burst"),
            (r#"{"ops_burst":1}"#, "/ops_burst"),
        ] {
            let limits: Limits = json(text.as_bytes()).unwrap();
            assert_eq!(limits.check(&Pointer::root()).unwrap_err().pointer.as_deref(), Some(at), "{text}");
        }
        let limits: Limits = json(br#"{"ops_per_second":1,"bytes_per_second":1}"#).unwrap();
        limits.check(&Pointer::root()).unwrap();
    }
}
