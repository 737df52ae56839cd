//! Taps that come as descriptors.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::{Pointer, Problem};

/// The numbers that inherited descriptors may have: after standard error, and few enough to look at each when a program starts.
pub const INHERITED_FDS: std::ops::RangeInclusive<u32> = 3..=1023;

/// Where the descriptors of a tap come from, one for each pair of queues. With them the VMM needs no privilege in the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TapFds {
    /// The numbers that they had when the VMM was started with them, 3 to 1023. They stay open for as long as it runs.
    Inherited(Vec<u32>),
    /// How many, 1 to 16, of the descriptors that come with the request (SCM_RIGHTS) belong to this NIC, which are taken in the order
    /// of the NICs. They stay open until the NIC is defined anew or removed.
    Passed(u16),
}

impl TapFds {
    /// The numbers of inherited ones.
    pub fn inherited(&self) -> &[u32] {
        match self {
            Self::Inherited(numbers) => numbers,
            Self::Passed(_) => &[],
        }
    }

    /// How many are to come with the request.
    pub fn passed(&self) -> usize {
        match self {
            Self::Inherited(_) => 0,
            Self::Passed(count) => usize::from(*count),
        }
    }

    /// One for each pair of queues, and none that is something else.
    pub(super) fn check(&self, queues: u16, at: &Pointer) -> Result<(), Problem> {
        let count = self.passed() + self.inherited().len();
        if count != usize::from(queues) {
            let detail = format!("the number of descriptors is {count}, that of pairs of queues {queues}");
            return Err(Problem::invalid(at, detail, "make them the same: each pair has a descriptor of its own"));
        }
        match self.inherited().iter().position(|number| !INHERITED_FDS.contains(number)) {
            None => Ok(()),
            Some(index) => Err(Problem::invalid(
                &at.key("inherited").index(index),
                "a tap cannot be inherited as this descriptor",
                format!("start the VMM with it as {} to {}", INHERITED_FDS.start(), INHERITED_FDS.end()),
            )),
        }
    }
}

impl std::fmt::Display for TapFds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inherited(numbers) => {
                let numbers: Vec<_> = numbers.iter().map(ToString::to_string).collect();
                write!(f, "inherited as {}", numbers.join(", "))
            }
            Self::Passed(count) => write!(f, "{count} passed"),
        }
    }
}
