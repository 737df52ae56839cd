//! Lists of CPUs as the kernel writes them: `"0-3,8"`.

use std::fmt;
use std::str::FromStr;

use crate::text::text_type;

/// What fits the C library's `cpu_set_t`.
const MAX_CPU: u16 = 1023;

/// A set of CPUs, of the host or of the guest, 0 to 1023, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<u16>);

impl CpuList {
    /// The CPUs, in rising order.
    pub fn cpus(&self) -> &[u16] {
        &self.0
    }
}

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!("this is no list of CPUs: write numbers from 0 to {MAX_CPU} and ranges of them, as in \"0-3,8\"")
        };
        let number = |text: &str| match text.parse::<u16>() {
            Ok(cpu) if cpu <= MAX_CPU && text.bytes().all(|b| b.is_ascii_digit()) => Ok(cpu),
            _ => Err(bad()),
        };
        let mut cpus = Vec::new();
        // A list with each CPU once is short; so is what may be read of a longer one.
        for part in text.split(',').take(usize::from(MAX_CPU) + 2) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last || cpus.len() > usize::from(MAX_CPU) {
                return Err(bad());
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        let before = cpus.len();
        cpus.dedup();
        if cpus.len() == before { Ok(Self(cpus)) } else { Err("a CPU is named twice: name each once".to_owned()) }
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0.chunk_by(|a, b| a + 1 == *b);
        for (index, run) in runs.enumerate() {
            let comma = if index > 0 { "," } else { "" };
            match run {
                [only] => write!(f, "{comma}{only}")?,
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

text_type! {
    CpuList,
    example: "0-3,8",
    pattern: "^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$",
    description: "A set of CPUs, 0 to 1023: numbers and ranges."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_reads_back_what_it_prints_in_order() {
        for (text, printed, cpus) in [
            ("0", "0", &[0][..]),
            ("0-3,8", "0-3,8", &[0, 1, 2, 3, 8]),
            ("8,1,0", "0-1,8", &[0, 1, 8]),
            ("1023", "1023", &[1023]),
        ] {
            let list: CpuList = text.parse().unwrap();
            assert_eq!((list.to_string().as_str(), list.cpus()), (printed, cpus));
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let long = "0,".repeat(5000);
        for text in ["", ",", "1,", "a", "3-1", "1024", "-1", "+1", "1-", "0,0", "0-1,1", "0-1-2", long.as_str()] {
            assert!(text.parse::<CpuList>().is_err(), "{text:.20} was read as a list");
        }
    }
}
