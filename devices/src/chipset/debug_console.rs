//! The firmware debug console at port 0x402: what OVMF's debug builds write, line by line, into the log.

use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::{BusDevice, VmRequest};

/// What a read answers: firmware takes it as "there is a debug console".
const PRESENT: u8 = 0xe9;
/// Longer lines are split.
const LINE_LIMIT: usize = 256;

/// Takes lines of firmware output. Called on a vCPU thread: must not block.
pub trait DebugSink: Send + Sync {
    /// One line of at most 256 characters without its end; control characters are replaced by `.`.
    fn line(&self, line: &str);
}

/// The debug console. Holds at most one line; limiting the rate of lines is up to the sink.
pub struct DebugConsole {
    line: Mutex<String>,
    sink: Arc<dyn DebugSink>,
}

impl DebugConsole {
    /// A debug console that hands its lines to `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn DebugSink>) -> Self {
        Self { line: Mutex::new(String::new()), sink }
    }

    fn put(&self, byte: u8) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        match byte {
            b'\n' => self.emit(&mut line),
            b'\r' => {}
            _ => {
                let printable = byte == b'\t' || (b' '..=b'~').contains(&byte);
                line.push(if printable { char::from(byte) } else { '.' });
                if line.len() >= LINE_LIMIT {
                    self.emit(&mut line);
                }
            }
        }
    }

    fn emit(&self, line: &mut String) {
        if !line.is_empty() {
            self.sink.line(line);
            line.clear();
        }
    }
}

impl BusDevice for DebugConsole {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<VmRequest> {
        for &byte in data {
            self.put(byte);
        }
        None
    }
}
