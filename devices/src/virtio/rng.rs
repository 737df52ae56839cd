//! Random numbers for the guest: virtio-rng (virtio 1.2 §5.4), from the host kernel's generator.
//!
//! One queue, one worker thread `<id>.q0`. A chain is filled with at most [`MAX_BYTES`]; the driver is told how many came
//! (§5.4.6: at least one byte, not necessarily all), so that no chain keeps the worker for long.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::attendant::{Activity, Attendant, Outcome, Service, WorkerError};
use super::ring::{Chain, RingError};
use super::{Activation, DeviceType, StartError, StillBusy, StoppedQueue, VirtioDevice};
use crate::metrics::{Counter, MetricSource, Sample, Value};
use crate::{DeviceNotifier, ThreadKind, ThreadSpawner};

/// Most bytes that one chain gets.
pub const MAX_BYTES: usize = 64 << 10;
const QUEUE_SIZES: [u16; 1] = [256];

struct Shared {
    id: String,
    activity: Arc<Activity>,
    requests: Counter,
    bytes: Counter,
    errors: Counter,
}

impl MetricSource for Shared {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        let counters: [(&'static str, &'static str, &Counter); 5] = [
            ("rng_requests", "Requests for random bytes.", &self.requests),
            ("rng_bytes", "Random bytes that the guest got.", &self.bytes),
            ("rng_errors", "Times that the host gave no random bytes.", &self.errors),
            ("rng_kicks", "Kicks of the queue.", &self.activity.kicks),
            ("rng_interrupts", "Interrupts of the queue.", &self.activity.interrupts),
        ];
        for (name, help, counter) in counters {
            let labels = vec![("rng", self.id.clone())];
            visit(Sample { name, help, labels, value: Value::Counter(counter.value()) });
        }
    }
}

/// virtio-rng.
pub struct VirtioRng {
    shared: Arc<Shared>,
    attendant: Attendant,
}

impl VirtioRng {
    /// Makes the device `id` and its thread.
    ///
    /// # Errors
    /// [`WorkerError`] if the host has no thread or descriptor left.
    pub fn new(id: &str, spawner: &dyn ThreadSpawner, notifier: Arc<dyn DeviceNotifier>) -> Result<Self, WorkerError> {
        let activity = Arc::new(Activity::default());
        let shared = Arc::new(Shared {
            id: id.to_owned(),
            activity: Arc::clone(&activity),
            requests: Counter::default(),
            bytes: Counter::default(),
            errors: Counter::default(),
        });
        let buffer = vec![0; MAX_BYTES].into_boxed_slice();
        let service = Box::new(Generator { shared: Arc::clone(&shared), buffer });
        let attendant = Attendant::new(id, ThreadKind::Rng, service, activity, spawner, notifier)?;
        Ok(Self { shared, attendant })
    }
}

impl VirtioDevice for VirtioRng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), StartError> {
        self.attendant.start(activation)
    }

    fn stop(&mut self) -> Result<Vec<StoppedQueue>, StillBusy> {
        self.attendant.stop()
    }

    fn reset(&mut self) {}

    fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::<Shared>::clone(&self.shared)
    }
}

/// Fills chains.
struct Generator {
    shared: Arc<Shared>,
    buffer: Box<[u8]>,
}

impl Service for Generator {
    fn begin(&mut self, _features: u64) {}

    fn serve(&mut self, _queue: u16, memory: &GuestMemoryMmap, head: u16, chain: &Chain) -> Result<Outcome, RingError> {
        self.shared.requests.increment();
        let wanted = chain.writable().iter().fold(0u64, |sum, piece| sum + u64::from(piece.length));
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(self.buffer.len());
        let Some(buffer) = self.buffer.get_mut(..wanted) else { return Ok(Outcome::Done(0)) };
        if let Err(error) = entropy::fill(buffer) {
            if self.shared.errors.value() == 0 {
                let rng = &self.shared.id;
                tracing::error!(rng, %error, "the host gives no random bytes: the guest's requests fail");
            }
            self.shared.errors.increment();
            return Ok(Outcome::Done(0));
        }
        let mut rest: &[u8] = buffer;
        for piece in chain.writable() {
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at(length);
            let unmapped = RingError::Unmapped { head, address: piece.address };
            memory.write_slice(part, GuestAddress(piece.address)).map_err(|_| unmapped)?;
            rest = after;
        }
        self.shared.bytes.add(u64::try_from(wanted).unwrap_or(0));
        Ok(Outcome::Done(u32::try_from(wanted).unwrap_or(u32::MAX)))
    }
}

mod entropy {
    #![allow(unsafe_code)] // getrandom(2) has no safe wrapper among our dependencies.

    use std::io;

    /// Fills `buffer` from the kernel's generator.
    pub(super) fn fill(mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            // SAFETY: the pointer and the length are those of a slice that is borrowed mutably.
            let done = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            match usize::try_from(done) {
                Ok(done) => buffer = buffer.get_mut(done..).unwrap_or_default(),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::virtio::double::{
        Buffer, EVENT_IDX, INDIRECT_DESC, RecordedNotifier, TestDriver, UNMAPPED, Used, stop_within,
    };
    use crate::{DeviceEvent, PlainThreads};

    const SOON: Duration = Duration::from_secs(20);

    fn running(features: u64) -> (VirtioRng, TestDriver, Arc<RecordedNotifier>) {
        let notifier = Arc::new(RecordedNotifier::default());
        let mut device = VirtioRng::new("rng", &PlainThreads, notifier.clone()).unwrap();
        let mut driver = TestDriver::new(device.queue_sizes());
        device.start(driver.activation(features)).unwrap();
        (device, driver, notifier)
    }

    fn stop(device: &mut VirtioRng, notifier: &RecordedNotifier) -> Vec<StoppedQueue> {
        device.stop().unwrap_or_else(|_| {
            // `Drained` of an earlier stop may be seen again: ask until it is true.
            notifier.wait(SOON, |event| *event == DeviceEvent::Drained).expect("the device says when it has drained");
            stop_within(device, SOON)
        })
    }

    #[test]
    fn every_byte_of_a_request_is_filled_with_what_differs_each_time() {
        let (_device, mut driver, _) = running(EVENT_IDX | INDIRECT_DESC);
        let address = driver.allocate(4096, 1);
        let mut seen = Vec::new();
        for indirect in [false, true] {
            let buffers = [Buffer::writable(address, 100), Buffer::writable(address + 200, 33)];
            let ring = driver.ring(0);
            let head = if indirect { ring.add_indirect(&buffers) } else { ring.add(&buffers) };
            ring.kick();
            assert_eq!(ring.wait_used(SOON), Some(Used { head, length: 133 }));
            assert!(ring.wait_interrupt(SOON));
            ring.want_interrupts(true);
            seen.push(driver.read(address, 100));
            seen.push(driver.read(address + 200, 33));
            assert_eq!(driver.read(address + 100, 100), [0; 100], "what was not asked for is left alone");
        }
        for (i, bytes) in seen.iter().enumerate() {
            assert!(bytes.iter().filter(|byte| **byte == 0).count() < bytes.len() / 4);
            assert!(seen[i + 1..].iter().all(|other| other[..33] != bytes[..33]));
        }
    }

    #[test]
    fn a_request_gets_no_more_than_its_limit_and_is_told_so() {
        let (device, mut driver, _) = running(0);
        let address = driver.allocate(1 << 20, 4096);
        let head = driver.ring(0).add(&[Buffer::writable(address, 60_000), Buffer::writable(address + 60_000, 60_000)]);
        driver.ring(0).kick();
        assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head, length: 65_536 }));
        assert_ne!(driver.read(address + 65_500, 36), [0; 36]);
        assert_eq!(driver.read(address + 65_536, 100), [0; 100]);
        let mut bytes = 0;
        device.metrics().collect(&mut |sample| {
            if let ("rng_bytes", Value::Counter(value)) = (sample.name, sample.value) {
                bytes = value;
            }
        });
        assert_eq!(bytes, 65_536);
    }

    #[test]
    fn a_request_without_room_comes_back_empty() {
        let (_device, mut driver, _) = running(0);
        let address = driver.allocate(64, 1);
        for buffer in [Buffer::readable(address, 64), Buffer::writable(address, 0)] {
            let head = driver.ring(0).add(&[buffer]);
            driver.ring(0).kick();
            assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head, length: 0 }));
        }
    }

    #[test]
    fn a_stop_gives_positions_from_which_a_start_goes_on() {
        let (mut device, mut driver, notifier) = running(0);
        let address = driver.allocate(64, 1);
        for _ in 0..300 {
            let head = driver.ring(0).add(&[Buffer::writable(address, 8)]);
            driver.ring(0).kick();
            let stopped = stop(&mut device, &notifier);
            assert_eq!(stopped.len(), 1);
            assert_eq!(stopped[0].state.next_avail, stopped[0].state.next_used);
            device.start(driver.resume(0, &stopped)).unwrap();
            assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head, length: 8 }));
        }
        assert!(matches!(device.start(driver.activation(0)), Err(StartError::Running)));
    }

    #[test]
    fn broken_chains_end_in_a_reset_after_which_the_device_works() {
        let (mut device, mut driver, notifier) = running(0);
        let address = driver.allocate(64, 1);
        let good = driver.ring(0).add(&[Buffer::writable(address, 8)]);
        driver.ring(0).add(&[Buffer::writable(UNMAPPED, 8)]);
        driver.ring(0).kick();
        driver.signals().wait_needs_reset(SOON).expect("the device asks for a reset");
        assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head: good, length: 8 }));
        driver.ring(0).kick_always();
        stop(&mut device, &notifier);
        device.reset();
        device.start(driver.activation(0)).unwrap();
        let table = driver.ring(0).addresses().0;
        driver.ring(0).write_descriptor(table, 0, address, 8, 3, 0);
        driver.ring(0).push_available(0);
        driver.ring(0).publish();
        driver.ring(0).kick();
        // A chain that is its own next ends, too.
        let end = Instant::now() + SOON;
        while driver.signals().reset_reasons().len() < 2 {
            assert!(Instant::now() < end, "the device asks for a reset");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_hundred_thousand_chains_of_garbage_neither_stop_nor_break_the_device() {
        let (mut device, mut driver, notifier) = running(INDIRECT_DESC);
        let base = driver.allocate(1 << 20, 4096);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move |limit: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % limit
        };
        let mut resets = 0;
        for _ in 0..100_000 / 64 {
            let ring = driver.ring(0);
            let table = ring.addresses().0;
            for index in 0..ring.size() {
                let address = if random(300) == 0 { random(u64::MAX) } else { base + random(1 << 19) };
                let flags = if random(20) == 0 { random(8) } else { 2 + u64::from(random(3) == 0) };
                let size = u64::from(ring.size());
                ring.write_descriptor(table, index, address, random(200) as u32, flags as u16, random(size) as u16);
            }
            for _ in 0..64 {
                ring.push_available(random(256) as u16);
            }
            ring.publish();
            ring.kick_always();
            // All of it is done, or something was found to be broken.
            let end = Instant::now() + SOON;
            while driver.ring(0).used_index() != 64 && driver.signals().reset_reasons().len() == resets {
                assert!(Instant::now() < end, "the device is stuck");
                std::thread::yield_now();
            }
            resets = driver.signals().reset_reasons().len();
            stop(&mut device, &notifier);
            device.reset();
            device.start(driver.activation(INDIRECT_DESC)).unwrap();
        }
        assert!(resets > 100);
        let head = driver.ring(0).add(&[Buffer::writable(base, 8)]);
        driver.ring(0).kick();
        assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head, length: 8 }));
    }
}
