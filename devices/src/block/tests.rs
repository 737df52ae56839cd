//! Tests at ring level: a driver's double in front, real workers, and a real file or a backend that can be told to fail.

mod chains;
mod memory;
mod policy;
mod reserved;
mod ring_errors;
mod viostor;
mod with_backend;
mod with_file;

use std::sync::Arc;
use std::time::Duration;

use super::config::feature;
use super::request::{STATUS_IOERR, STATUS_OK, STATUS_UNSUPP};
use super::{BlockError, BlockOptions, VirtioBlock};
use crate::PlainThreads;
use crate::virtio::double::{Buffer, INDIRECT_DESC, RecordedNotifier, TestDriver};
use crate::virtio::{StoppedQueue, VirtioDevice};

const SOON: Duration = Duration::from_secs(20);
const FLUSH: u64 = 1 << feature::FLUSH;
const IN: u32 = 0;
const OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const DATA: u64 = 256 << 10;

/// A driver with a disk, and memory for one request at a time.
struct Bench {
    driver: TestDriver,
    device: VirtioBlock,
    notifier: Arc<RecordedNotifier>,
    header: u64,
    status: u64,
    data: u64,
}

/// What the guest sees of a finished request.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u8,
    length: u32,
}

const fn ok(length: u32) -> Answer {
    Answer { status: STATUS_OK, length }
}

const REFUSED: Answer = Answer { status: STATUS_IOERR, length: 1 };
const UNSUPPORTED: Answer = Answer { status: STATUS_UNSUPP, length: 1 };

impl Bench {
    fn new(device: VirtioBlock, notifier: Arc<RecordedNotifier>) -> Self {
        let sizes = device.queue_sizes().to_vec();
        let mut driver = TestDriver::new(&sizes);
        let header = driver.allocate(16, 16);
        let status = driver.allocate(1, 1);
        let data = driver.allocate(DATA, 4096);
        Self { driver, device, notifier, header, status, data }
    }

    fn open(options: BlockOptions) -> Result<Self, BlockError> {
        let notifier = Arc::new(RecordedNotifier::default());
        let device = VirtioBlock::new(options, &PlainThreads, notifier.clone())?;
        Ok(Self::new(device, notifier))
    }

    fn started(mut self, features: u64) -> Self {
        self.start(features);
        self
    }

    fn start(&mut self, features: u64) {
        let activation = self.driver.activation(features | INDIRECT_DESC);
        self.device.start(activation).unwrap();
    }

    fn resume(&mut self, features: u64, stopped: &[StoppedQueue]) {
        let activation = self.driver.resume(features | INDIRECT_DESC, stopped);
        self.device.start(activation).unwrap();
    }

    /// Stops, however long that takes.
    fn stop(&mut self) -> Vec<StoppedQueue> {
        loop {
            if let Ok(stopped) = self.device.stop() {
                return stopped;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(self.header, &raw);
        self.driver.write(self.status, &[0xaa]);
    }

    /// Header, the given data buffers, status.
    fn chain(&self, data: &[Buffer]) -> Vec<Buffer> {
        let mut chain = vec![Buffer::readable(self.header, 16)];
        chain.extend(data);
        chain.push(Buffer::writable(self.status, 1));
        chain
    }

    fn send(&mut self, queue: usize, kind: u32, sector: u64, data: &[Buffer]) -> u16 {
        self.header(kind, sector);
        let chain = self.chain(data);
        let ring = self.driver.ring(queue);
        let head = ring.add_indirect(&chain);
        ring.kick();
        head
    }

    fn answer(&mut self, queue: usize, head: u16) -> Answer {
        let used = self.driver.ring(queue).wait_used(SOON).expect("the disk answers");
        assert_eq!(used.head, head);
        Answer { status: self.driver.read(self.status, 1)[0], length: used.length }
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> Answer {
        let head = self.send(0, kind, sector, data);
        self.answer(0, head)
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> Answer {
        self.driver.write(self.data, bytes);
        let data = Buffer::readable(self.data, bytes.len() as u32);
        self.request(OUT, sector, &[data])
    }

    fn read(&mut self, sector: u64, length: u32) -> (Answer, Vec<u8>) {
        self.driver.write(self.data, &vec![0xee; length as usize]);
        let answer = self.request(IN, sector, &[Buffer::writable(self.data, length)]);
        (answer, self.driver.read(self.data, length as usize))
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> Answer {
        let raw: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.driver.write(self.data, &raw);
        self.request(kind, 0, &[Buffer::readable(self.data, raw.len() as u32)])
    }

    fn metric(&self, name: &str, operation: Option<&str>) -> u64 {
        let mut sum = 0;
        self.device.metrics().collect(&mut |sample| {
            let labelled = |op: &str| sample.labels.contains(&("op", op.to_owned()));
            if sample.name == name && operation.is_none_or(labelled) {
                sum += match sample.value {
                    crate::metrics::Value::Counter(value) => value,
                    crate::metrics::Value::Gauge(value) => value as u64,
                    crate::metrics::Value::Latency(latency) => latency.buckets.iter().sum::<u64>() + latency.above,
                };
            }
        });
        sum
    }
}

/// Waits until the worker has acted on all that it was told before.
fn worker_turns(bench: &mut Bench) {
    // The second kick wakes it after the turn that the first one was in.
    for _ in 0..2 {
        let kicks = bench.metric("disk_kicks", None);
        bench.driver.ring(0).kick_always();
        eventually(|| bench.metric("disk_kicks", None) > kicks);
    }
}

/// Waits until `holds`.
fn eventually(holds: impl Fn() -> bool) {
    let end = std::time::Instant::now() + SOON;
    while !holds() {
        assert!(std::time::Instant::now() < end, "it never came to hold");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// `length` bytes that say where they belong.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    (0..length).map(|_| random.next() as u8).collect()
}

/// A small generator that gives the same numbers each time (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
