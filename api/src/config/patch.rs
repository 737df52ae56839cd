//! One field of a JSON merge patch (RFC 7396).

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::problem::{Pointer, Problem};

/// What a merge patch does to one field.
///
/// In a struct it needs `#[serde(default, skip_serializing_if = "Patch::is_keep")]`: absence is `Keep`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patch<T> {
    /// The field is absent: it stays as it is.
    #[default]
    Keep,
    /// The field is null: it goes back to its default.
    Clear,
    /// The field gets this value.
    Set(T),
}

impl<T> Patch<T> {
    /// Whether the field stays as it is.
    pub fn is_keep(&self) -> bool {
        matches!(self, Self::Keep)
    }
}

impl<T: Clone> Patch<T> {
    /// The new value of a field that has no default.
    pub(super) fn required(&self, old: &T, name: &str) -> Result<T, Problem> {
        match self {
            Self::Keep => Ok(old.clone()),
            Self::Set(value) => Ok(value.clone()),
            Self::Clear => Err(Problem::invalid(
                &Pointer::root().key(name),
                format!("{name} has no default to go back to"),
                "give a value, or leave the field out",
            )),
        }
    }
}

/// The new value of a field with a default.
pub(super) fn set<T>(patch: Patch<T>, old: T, default: T) -> T {
    match patch {
        Patch::Keep => old,
        Patch::Clear => default,
        Patch::Set(value) => value,
    }
}

/// The new value of an optional field.
pub(super) fn apply<T: Clone>(patch: &Patch<T>, old: &Option<T>) -> Option<T> {
    match patch {
        Patch::Keep => old.clone(),
        Patch::Clear => None,
        Patch::Set(value) => Some(value.clone()),
    }
}

impl<T: Serialize> Serialize for Patch<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Set(value) => serializer.serialize_some(value),
            Self::Keep | Self::Clear => serializer.serialize_none(),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patch<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::<T>::deserialize(deserializer)?.map_or(Self::Clear, Self::Set))
    }
}
