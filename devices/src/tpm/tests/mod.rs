//! The registers and the worker with a swtpm of a few lines, and with the real one where it is installed.

mod real;
mod registers;
mod trouble;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::double::{Mode, Swtpm};
use super::{Crb, Tpm, TpmOptions};
use crate::bus::BusDevice;
use crate::virtio::double::RecordedNotifier;
use crate::{DeviceEvent, PlainThreads};

/// Only guards against hangs.
const SOON: Duration = Duration::from_secs(60);

/// TPM2_GetRandom of 8 bytes.
const GET_RANDOM: [u8; 12] = [0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x7b, 0, 8];
/// What a TPM says that cannot go on.
const FAILURE: [u8; 10] = [0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x01];

fn options(socket: &std::path::Path) -> TpmOptions {
    TpmOptions { id: "tpm".into(), socket: socket.to_owned() }
}

/// A TPM in front of `swtpm`, and what it told.
fn tpm(swtpm: &Swtpm) -> (Tpm, Arc<RecordedNotifier>) {
    let notifier = Arc::new(RecordedNotifier::default());
    (Tpm::new(options(swtpm.socket()), &PlainThreads, notifier.clone()).unwrap(), notifier)
}

/// What drivers do with the registers.
struct Driver(Arc<Crb>);

impl Driver {
    fn new(tpm: &Tpm) -> Self {
        let driver = Self(tpm.registers());
        driver.set(0x08, 1);
        assert_eq!(driver.get(0x0c), 1, "locality 0 is granted");
        driver
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.0.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        assert_eq!(self.0.write(offset, &value.to_le_bytes()), None);
    }

    /// Writes a command byte by byte, as edk2, and starts it.
    fn start(&self, command: &[u8]) {
        self.set(0x40, 1);
        assert_eq!((self.get(0x40), self.get(0x44) & 2), (0, 0), "ready");
        for (offset, byte) in (0x80..).zip(command) {
            self.0.write(offset, &[*byte]);
        }
        self.set(0x4c, 1);
    }

    /// Polls for the end of the command; gives what is in the buffer.
    fn finish(&self) -> Vec<u8> {
        let end = Instant::now() + SOON;
        while self.get(0x4c) != 0 {
            assert!(Instant::now() < end, "the command does not end");
            std::thread::yield_now();
        }
        let mut response = vec![0; 0xf80];
        for (chunk, offset) in response.chunks_mut(8).zip((0x80..).step_by(8)) {
            self.0.read(offset, chunk);
        }
        let size = u32::from_be_bytes(response[2..6].try_into().unwrap());
        response.truncate(usize::try_from(size).unwrap());
        self.set(0x40, 2);
        assert_eq!((self.get(0x40), self.get(0x44) & 2), (0, 2), "idle");
        response
    }

    fn execute(&self, command: &[u8]) -> Vec<u8> {
        self.start(command);
        self.finish()
    }
}

fn lost(notifier: &RecordedNotifier) -> String {
    match notifier.wait(SOON, |event| matches!(event, DeviceEvent::BackendLost { .. })) {
        Some(DeviceEvent::BackendLost { reason }) => reason,
        other => panic!("{other:?}"),
    }
}
