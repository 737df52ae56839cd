//! Finds the escape sequence in what a user types: Ctrl-A X leaves, Ctrl-A Ctrl-A is one Ctrl-A.

const CTRL_A: u8 = 0x01;

/// The state between two bytes.
#[derive(Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    /// Appends to `output` what goes to the guest; says whether the user wants to leave. What follows Ctrl-A and is neither
    /// `x` nor Ctrl-A goes to the guest with it.
    pub(super) fn filter(&mut self, input: &[u8], output: &mut Vec<u8>) -> bool {
        let mut leave = false;
        for &byte in input {
            match (std::mem::take(&mut self.pending), byte) {
                (false, CTRL_A) => self.pending = true,
                (true, CTRL_A) => output.push(CTRL_A),
                (true, b'x' | b'X') => leave = true,
                (true, _) => output.extend([CTRL_A, byte]),
                (false, _) => output.push(byte),
            }
        }
        leave
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut escape, mut output) = (Escape::default(), Vec::new());
        let leaves = parts.iter().filter(|part| escape.filter(part, &mut output)).count();
        (output, leaves > 0)
    }

    #[test]
    fn control_a_x_leaves_also_when_typed_in_two_reads() {
        assert_eq!(filtered(&[b"ls\x01x"]), (b"ls".to_vec(), true));
        assert_eq!(filtered(&[b"ls\x01", b"X\r"]), (b"ls\r".to_vec(), true));
    }

    #[test]
    fn control_a_twice_is_one_control_a_and_other_keys_pass_with_it() {
        assert_eq!(filtered(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filtered(&[b"\x01", b"d"]), (b"\x01d".to_vec(), false));
        assert_eq!(filtered(&[b"plain x"]), (b"plain x".to_vec(), false));
    }
}
