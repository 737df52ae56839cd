//! Spans of time, written as people write them: `"30s"`, `"1m 30s"`, `"500ms"`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::text::text_type;

/// A span of time.
///
/// Reads whole numbers with units (`ms`, `s`, `m`, `h`, `days`), added up; prints the same way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

impl Span {
    /// `n` seconds.
    pub const fn seconds(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }

    /// The span as the standard library has it.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = humantime::parse_duration(text);
        parsed
            .map(Self)
            .map_err(|error| format!("this is no span of time ({error}): write it as \"30s\" or \"1m 30s\""))
    }
}

text_type! {
    Span,
    example: "30s",
    description: "A span of time: whole numbers with the units ms, s, m, h, added up."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_reads_what_it_prints_and_nothing_without_a_unit() {
        for (text, seconds) in [("30s", 30), ("1m 30s", 90), ("2h", 7200)] {
            assert_eq!(text.parse(), Ok(Span::seconds(seconds)));
            assert_eq!(Span::seconds(seconds).to_string(), text);
        }
        for bad in ["", "30", "-1s", "s", "1y 1e9", "99999999999999999999s"] {
            assert!(bad.parse::<Span>().is_err(), "{bad:?} was read as a span");
        }
        assert!(serde_json::from_str::<Span>("30").is_err());
    }
}
