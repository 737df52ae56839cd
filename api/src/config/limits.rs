//! Limits on what disks may do (token buckets), of one disk or of a group together.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::check_id;
use super::patch::{Patch, apply};
use crate::problem::{Pointer, Problem};
use crate::size::ByteSize;

/// Far beyond any disk, and small enough that no sum of them overflows.
const MAX_OPS: u64 = 1_000_000_000;
const MAX_BYTES: ByteSize = ByteSize::gib(1 << 20);

/// How much a disk, or a group of disks together, may do per second. What is absent is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests per second, 1 to 10⁹: reads, writes, discards and write-zeroes; flushes are free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000_000)]
    pub ops_per_second: Option<u64>,
    /// Requests that may come at once after a pause. Default: a tenth of a second's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000_000)]
    pub ops_burst: Option<u64>,
    /// Bytes read and written per second, up to 1 PiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<ByteSize>,
    /// Bytes that may come at once after a pause. Default: a tenth of a second's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<ByteSize>,
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        let ops = [("ops_per_second", self.ops_per_second), ("ops_burst", self.ops_burst)];
        for (name, value) in ops {
            if value.is_some_and(|value| !(1..=MAX_OPS).contains(&value)) {
                return Err(out_of_range(&at.key(name), "1 to 1000000000"));
            }
        }
        let bytes = [("bytes_per_second", self.bytes_per_second), ("bytes_burst", self.bytes_burst)];
        for (name, value) in bytes {
            if value.is_some_and(|value| value == ByteSize(0) || value > MAX_BYTES) {
                return Err(out_of_range(&at.key(name), "1B to 1PiB"));
            }
        }
        for (name, burst, rate) in [
            ("ops_burst", self.ops_burst.is_some(), self.ops_per_second.is_some()),
            ("bytes_burst", self.bytes_burst.is_some(), self.bytes_per_second.is_some()),
        ] {
            if burst && !rate {
                let detail = "a burst means nothing without a rate";
                return Err(Problem::invalid(&at.key(name), detail, "give the rate per second too, or leave it out"));
            }
        }
        Ok(())
    }
}

fn out_of_range(at: &Pointer, range: &str) -> Problem {
    Problem::invalid(at, "this limit is not possible", format!("choose {range}, or leave it out for no limit"))
}

/// Changes to [`Limits`] as a JSON merge patch: a field that is absent stays, `null` takes the limit away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsPatch {
    /// Another `ops_per_second`.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u64>)]
    pub ops_per_second: Patch<u64>,
    /// Another `ops_burst`.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u64>)]
    pub ops_burst: Patch<u64>,
    /// Another `bytes_per_second`.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<ByteSize>)]
    pub bytes_per_second: Patch<ByteSize>,
    /// Another `bytes_burst`.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<ByteSize>)]
    pub bytes_burst: Patch<ByteSize>,
}

impl LimitsPatch {
    /// The limits after the patch, not yet checked.
    pub fn apply(&self, old: &Limits) -> Limits {
        Limits {
            ops_per_second: apply(&self.ops_per_second, &old.ops_per_second),
            ops_burst: apply(&self.ops_burst, &old.ops_burst),
            bytes_per_second: apply(&self.bytes_per_second, &old.bytes_per_second),
            bytes_burst: apply(&self.bytes_burst, &old.bytes_burst),
        }
    }
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
        DiskGroup { id: group.id.clone(), limits: limits(&self.limits, &group.limits) }
    }
}

/// The limits after a patch of the field that holds them.
pub(super) fn limits(patch: &Patch<LimitsPatch>, old: &Limits) -> Limits {
    match patch {
        Patch::Keep => *old,
        Patch::Clear => Limits::default(),
        Patch::Set(patch) => patch.apply(old),
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
