//! The real-time clock.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::{Pointer, Problem};

/// A hundred years.
const MAX_OFFSET: i64 = 36_525 * 86_400;

/// What the guest's real-time clock shows at boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ClockConfig {
    /// UTC, which all systems but Windows expect.
    #[default]
    Utc,
    /// The time of the host's time zone, which Windows expects.
    Localtime,
    /// So many seconds beyond UTC, at most a hundred years either way: `clock_offset` of `GET /v1/vm` from an earlier run.
    Offset(i64),
}

impl ClockConfig {
    pub(super) fn check(self, at: &Pointer) -> Result<(), Problem> {
        match self {
            Self::Offset(seconds) if !(-MAX_OFFSET..=MAX_OFFSET).contains(&seconds) => Err(Problem::invalid(
                &at.key("offset"),
                format!("a clock that is {seconds} seconds off is not possible"),
                format!("choose -{MAX_OFFSET} to {MAX_OFFSET}"),
            )),
            _ => Ok(()),
        }
    }
}
