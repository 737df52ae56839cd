//! The balloon with a driver's double, and with a model of virtio-win's driver behind a PCI bus.

mod windows;

use std::time::{Duration, Instant};

use super::*;
use crate::PlainThreads;
use crate::virtio::double::{
    Buffer, INDIRECT_DESC, RAM_BASE, RAM_SIZE, RecordedNotifier, TestDriver, UNMAPPED, Used, stop_within,
};

/// Offset of what the balloon is to hold.
const NUM_PAGES: u64 = 0;
const SOON: Duration = Duration::from_secs(20);
const ALL: u64 = 1 << feature::STATS_VQ | 1 << feature::PAGE_REPORTING | INDIRECT_DESC;

fn options() -> BalloonOptions {
    BalloonOptions { id: "balloon".into(), size: 0, deflate_on_oom: true, free_page_reporting: true }
}

struct Bench {
    device: VirtioBalloon,
    driver: TestDriver,
    /// What is given back, full of ones.
    area: u64,
}

const AREA: u64 = 16 * PAGE;

impl Bench {
    fn running(features: u64) -> Self {
        let device = VirtioBalloon::new(options(), &PlainThreads, Arc::<RecordedNotifier>::default()).unwrap();
        let mut driver = TestDriver::new(device.queue_sizes());
        let area = driver.allocate(AREA, PAGE);
        let mut bench = Self { device, driver, area };
        bench.fill();
        bench.device.start(bench.driver.activation(features)).unwrap();
        bench
    }

    fn fill(&self) {
        self.driver.write(self.area, &[1; AREA as usize]);
    }

    /// Which pages of the area are empty.
    fn empty(&self) -> Vec<usize> {
        let data = self.driver.read(self.area, AREA as usize);
        let pages = data.chunks(PAGE as usize).enumerate();
        pages.filter(|(_, page)| page.iter().all(|byte| *byte == 0)).map(|(number, _)| number).collect()
    }

    fn send(&mut self, queue: usize, chain: &[Buffer]) -> Used {
        let head = self.driver.ring(queue).add(chain);
        self.driver.ring(queue).kick();
        let used = self.driver.ring(queue).wait_used(SOON).expect("the balloon answers");
        assert_eq!(used.head, head);
        used
    }

    fn name(&mut self, queue: usize, pages: &[u32]) {
        let data: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let place = self.driver.allocate(data.len() as u64, 4);
        self.driver.write(place, &data);
        // In two pieces, cut within a number.
        let cut = data.len() as u32 / 2 - 1;
        let rest = Buffer::readable(place + u64::from(cut), data.len() as u32 - cut);
        assert_eq!(self.send(queue, &[Buffer::readable(place, cut), rest]).length, 0);
    }

    fn value(&self, name: &str, label: Option<&str>) -> Option<f64> {
        value(&*self.device.metrics(), name, label)
    }

    fn stop(&mut self) -> Vec<StoppedQueue> {
        stop_within(&mut self.device, SOON)
    }
}

fn value(metrics: &dyn MetricSource, name: &str, label: Option<&str>) -> Option<f64> {
    let mut found = None;
    metrics.collect(&mut |sample| {
        let labelled = label.is_none_or(|label| sample.labels.iter().any(|(_, value)| value == label));
        if sample.name == name && labelled {
            found = match sample.value {
                Value::Counter(value) => Some(value as f64),
                Value::Gauge(value) => Some(value),
                Value::Latency(_) => None,
            };
        }
    });
    found
}

/// Waits until `holds`.
fn eventually(mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < end, "it never came to hold");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn pages_that_the_driver_puts_into_the_balloon_go_back_to_the_host() {
    let mut bench = Bench::running(ALL);
    let first = (bench.area / PAGE) as u32;
    bench.name(0, &[first + 9, first + 3, first + 2, first + 9, first + 4, (UNMAPPED / PAGE) as u32, u32::MAX]);
    assert_eq!(bench.empty(), [2, 3, 4, 9]);
    let pages = |bench: &Bench, name| bench.value(name, None).map(|bytes| bytes / PAGE as f64);
    assert_eq!(pages(&bench, "balloon_inflated_bytes"), Some(4.0));
    assert_eq!(pages(&bench, "balloon_refused_bytes"), Some(2.0));
    // What comes out of it is there for the guest to use.
    bench.name(1, &[first + 9, first + 3]);
    assert_eq!(pages(&bench, "balloon_deflated_bytes"), Some(2.0));
    bench.fill();
    assert!(bench.empty().is_empty());
}

#[test]
fn free_pages_go_back_whole_by_either_queue_that_drivers_report_them_on() {
    let mut bench = Bench::running(ALL);
    let area = bench.area;
    for queue in [3, 4] {
        bench.fill();
        let odd = Buffer::writable(area + 8 * PAGE + 1, 3 * PAGE as u32);
        assert_eq!(bench.send(queue, &[Buffer::writable(area + PAGE, 2 * PAGE as u32), odd]).length, 0);
        assert_eq!(bench.empty(), [1, 2, 9, 10]);
    }
    // Half of it is not RAM.
    bench.driver.write(RAM_BASE + RAM_SIZE as u64 - PAGE, &[1; PAGE as usize]);
    bench.send(3, &[Buffer::writable(RAM_BASE + RAM_SIZE as u64 - PAGE, 2 * PAGE as u32)]);
    assert_eq!(bench.driver.read(RAM_BASE + RAM_SIZE as u64 - PAGE, 8), [0; 8]);
    for nowhere in [u64::MAX, u64::MAX - PAGE, UNMAPPED] {
        bench.send(3, &[Buffer::writable(nowhere, 3 * PAGE as u32)]);
    }
    assert_eq!(bench.value("balloon_reported_bytes", None), Some(9.0 * PAGE as f64));

    let mut bench = Bench::running(ALL & !(1 << feature::PAGE_REPORTING));
    let area = bench.area;
    bench.send(4, &[Buffer::writable(area, AREA as u32)]);
    assert!(bench.empty().is_empty(), "this driver did not say that it would");
}

#[test]
fn the_driver_is_asked_for_statistics_when_somebody_looks_at_them() {
    let mut bench = Bench::running(ALL);
    let place = bench.driver.allocate(128, 2);
    let tell = |bench: &Bench, free: u64| {
        let statistics: [(u16, u64); 4] = [(4, free), (2, 17), (99, 1), (0xffff, u64::MAX)];
        let data = statistics.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat());
        bench.driver.write(place, &data.collect::<Vec<u8>>());
    };
    assert_eq!(bench.value("balloon_guest_memory_bytes", Some("free")), None);
    tell(&bench, 1 << 20);
    let buffer = Buffer::readable(place, 40);
    bench.driver.ring(2).add(&[buffer]);
    bench.driver.ring(2).kick();
    eventually(|| bench.value("balloon_guest_memory_bytes", Some("free")).is_some());
    // That look has asked for more.
    for round in 2..6_u64 {
        assert!(bench.driver.ring(2).wait_used(SOON).is_some());
        tell(&bench, round << 20);
        bench.driver.ring(2).add(&[buffer]);
        bench.driver.ring(2).kick();
        let expected = Some((round << 20) as f64);
        let metrics = bench.device.metrics();
        // No look before the driver has told them: it would find the buffer gone.
        eventually(|| value(&*metrics, "balloon_guest_memory_bytes", Some("free")) == expected);
    }
    assert_eq!(bench.value("balloon_guest_faults", Some("major")), Some(17.0));

    // A pause keeps the buffer with the driver's statistics, a reset forgets them.
    bench.driver.ring(2).wait_used(SOON);
    bench.driver.ring(2).add(&[buffer]);
    bench.driver.ring(2).kick();
    let stopped = bench.stop();
    assert_eq!(stopped[2].state.next_avail, stopped[2].state.next_used);
    bench.device.start(bench.driver.resume(ALL, &stopped)).unwrap();
    let metrics = bench.device.metrics();
    eventually(|| {
        metrics.collect(&mut |_| ());
        bench.driver.ring(2).take_used().is_some()
    });
    bench.stop();
    bench.device.reset();
    assert_eq!(bench.value("balloon_guest_memory_bytes", Some("free")), None);
}

#[test]
fn the_size_is_told_by_the_configuration_and_what_the_driver_made_of_it_comes_back() {
    let options = BalloonOptions { size: 3 * PAGE, ..options() };
    let mut device = VirtioBalloon::new(options, &PlainThreads, Arc::<RecordedNotifier>::default()).unwrap();
    let config = |device: &VirtioBalloon| {
        let mut config = [0xee; 12];
        device.read_config(0, &mut config);
        [0, 4, 8].map(|at| u32::from_le_bytes(config[at..at + 4].try_into().unwrap()))
    };
    assert_eq!(config(&device), [3, 0, 0]);
    device.handle().set_size(1 << 40);
    device.write_config(ACTUAL, &7_u32.to_le_bytes());
    for (offset, data) in [(NUM_PAGES, &[9; 4][..]), (ACTUAL, &[9; 2]), (2, &[9; 4]), (8, &[9; 4]), (u64::MAX, &[9; 4])]
    {
        device.write_config(offset, data);
    }
    assert_eq!(config(&device), [1 << 28, 7, 0]);
    assert_eq!(device.handle().held(), 7 * PAGE);
    device.reset();
    assert_eq!(config(&device), [1 << 28, 0, 0]);
    let only = BalloonOptions { deflate_on_oom: false, free_page_reporting: false, ..self::options() };
    let device = VirtioBalloon::new(only, &PlainThreads, Arc::<RecordedNotifier>::default()).unwrap();
    assert_eq!(device.features(), 1 << feature::STATS_VQ);
}

#[test]
fn a_hundred_thousand_chains_of_garbage_neither_stop_nor_break_the_balloon() {
    let mut bench = Bench::running(ALL);
    let base = bench.driver.allocate(1 << 20, 4096);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };
    let (mut resets, mut chains, mut round) = (0, 0, 0);
    while chains < 100_000 {
        let queue = round % 5;
        round += 1;
        let ring = bench.driver.ring(queue);
        let batch = ring.size();
        chains += u32::from(batch);
        let table = ring.addresses().0;
        for index in 0..ring.size() {
            let address = if random(200) == 0 { random(u64::MAX) } else { base + random(1 << 19) };
            let flags = 2 * random(2) + u64::from(random(3) == 0) + if random(40) == 0 { 4 } else { 0 };
            let size = u64::from(ring.size());
            ring.write_descriptor(table, index, address, random(9000) as u32, flags as u16, random(size) as u16);
        }
        for _ in 0..batch {
            ring.push_available(random(batch.into()) as u16);
        }
        ring.publish();
        ring.kick_always();
        let end = Instant::now() + SOON;
        while bench.driver.ring(queue).used_index() != batch && bench.driver.signals().reset_reasons().len() == resets {
            assert!(Instant::now() < end, "the balloon is stuck");
            // Statistics are kept until somebody looks.
            bench.device.metrics().collect(&mut |_| ());
            std::thread::yield_now();
        }
        resets = bench.driver.signals().reset_reasons().len();
        bench.stop();
        bench.device.reset();
        bench.device.start(bench.driver.activation(ALL)).unwrap();
    }
    assert!(resets > 100);
    bench.fill();
    let first = (bench.area / PAGE) as u32;
    bench.name(0, &[first, first + 1]);
    assert_eq!(bench.empty(), [0, 1]);
}
