//! Ring-level tests of the card. Its tap is a pair of sockets that keep frames apart, or a real one where the machine has any.

mod coalescing;
mod control;
mod descriptors;
mod hostile;
mod identity;
mod lifecycle;
mod limits;
mod netkvm;
mod pace;
pub(super) mod real;
mod receive;
mod steering;
mod transmit;
mod vhost;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::features::bit;
use super::tap::{HASH_HEADER_SIZE, HEADER_SIZE};
use super::*;
use crate::PlainThreads;
use crate::limiter::{Limits, Rate};
use crate::metrics::Value;
use crate::virtio::double::{Buffer, RecordedNotifier, TestDriver, Used, stop_within};
use crate::virtio::{StoppedQueue, VirtioDevice};

/// Long enough for a busy machine; only failing tests wait so long.
const SOON: Duration = Duration::from_secs(20);
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const RX: usize = 0;
const TX: usize = 1;
const BUFFER: u32 = 2048;

struct Card {
    device: VirtioNet,
    driver: TestDriver,
    /// The other end of each queue of the tap.
    host: Vec<UnixDatagram>,
    notifier: Arc<RecordedNotifier>,
    features: u64,
    /// Receive buffers of a real tap, which also gets frames that the test did not send.
    given: HashMap<u16, u64>,
}

fn double(pairs: u16) -> (Tap, Vec<UnixDatagram>) {
    let (ours, theirs): (Vec<OwnedFd>, Vec<UnixDatagram>) = (0..pairs)
        .map(|_| {
            let (a, b) = UnixDatagram::pair().unwrap();
            b.set_read_timeout(Some(SOON)).unwrap();
            b.set_write_timeout(Some(SOON)).unwrap();
            (OwnedFd::from(a), b)
        })
        .unzip();
    (Tap::double(ours), theirs)
}

fn options(tap: Tap, queue_pairs: u16) -> NetOptions {
    NetOptions {
        id: "net0".to_owned(),
        tap,
        mac: MAC,
        queue_pairs,
        queue_size: 256,
        mtu: None,
        link_up: true,
        antispoof: false,
        rss: false,
        vhost: false,
        rx_limits: Limits::default(),
        tx_limits: Limits::default(),
    }
}

/// Receives what the guest sent, also where the kernel interrupts that: a thread that made a ring of io_uring is, when that ends.
fn take(host: &UnixDatagram, data: &mut [u8]) -> io::Result<usize> {
    loop {
        match host.recv(data) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            taken => return taken,
        }
    }
}

impl Card {
    /// A card that is not started.
    fn parked(pairs: u16, ring_size: u16, features: u64) -> Self {
        let (tap, host) = double(pairs);
        Self::with_tap(tap, host, pairs, ring_size, features)
    }

    fn with_tap(tap: Tap, host: Vec<UnixDatagram>, pairs: u16, ring_size: u16, features: u64) -> Self {
        Self::with_options(options(tap, pairs), host, ring_size, features)
    }

    fn with_options(options: NetOptions, host: Vec<UnixDatagram>, ring_size: u16, features: u64) -> Self {
        let notifier = Arc::new(RecordedNotifier::default());
        let pairs = options.queue_pairs;
        let device = VirtioNet::new(options, &PlainThreads, notifier.clone()).unwrap();
        let mut sizes = vec![ring_size; usize::from(pairs) * 2];
        sizes.push(64);
        Self { device, driver: TestDriver::new(&sizes), host, notifier, features, given: HashMap::new() }
    }

    /// A card that runs.
    fn running(pairs: u16, ring_size: u16, features: u64) -> Self {
        let mut card = Self::parked(pairs, ring_size, features);
        card.start();
        card
    }

    fn start(&mut self) {
        self.device.start(self.driver.activation(self.features)).unwrap();
        // A frame that has come through shows that the worker has started and emptied the tap.
        self.send(b"are you there?  ");
        if let Some(host) = self.host.first() {
            let mut data = [0; 64];
            take(host, &mut data).unwrap();
        }
        self.driver.ring(TX).wait_used(SOON).unwrap();
        // Its interrupt comes after it is seen to be used; no test is to take it for one of its own.
        assert!(self.driver.ring(TX).wait_interrupt(SOON));
    }

    /// Bytes before each frame.
    fn header(&self) -> usize {
        if self.features & bit(features::HASH_REPORT) != 0 { HASH_HEADER_SIZE } else { HEADER_SIZE }
    }

    /// Sends `frame` from the guest without looking for its end.
    fn send(&mut self, frame: &[u8]) -> u16 {
        let data = [&vec![0; self.header()], frame].concat();
        let address = self.driver.allocate(data.len() as u64, 1);
        self.driver.write(address, &data);
        let head = self.driver.ring(TX).add(&[Buffer::readable(address, data.len() as u32)]);
        self.driver.ring(TX).kick();
        head
    }

    /// Sends `frame` from the host.
    fn arrive(&self, frame: &[u8]) {
        self.arrive_with(&vec![0; self.header()], frame);
    }

    fn arrive_with(&self, header: &[u8], frame: &[u8]) {
        self.host[0].send(&[header, frame].concat()).unwrap();
    }

    /// Gives a receive buffer of `length` bytes.
    fn give(&mut self, length: u32) -> (u16, u64) {
        let address = self.driver.allocate(length.into(), 1);
        let head = self.driver.ring(RX).add(&[Buffer::writable(address, length)]);
        self.driver.ring(RX).kick();
        (head, address)
    }

    /// Has so many small frames arrive that more are expected.
    fn have_small_frames(&mut self) {
        for seed in 0..32 {
            let (head, _) = self.give(BUFFER);
            self.arrive(&frame(60, seed));
            assert_eq!(self.used(RX).head, head);
            assert!(self.driver.ring(RX).wait_interrupt(SOON));
        }
    }

    fn used(&mut self, ring: usize) -> Used {
        self.driver.ring(ring).wait_used(SOON).expect("the card uses a chain")
    }

    fn stop(&mut self) -> Vec<StoppedQueue> {
        stop_within(&mut self.device, SOON)
    }

    fn resume(&mut self, stopped: &[StoppedQueue]) {
        self.device.start(self.driver.resume(self.features, stopped)).unwrap();
    }

    /// The sum of a counter over queues and of the given reason, if it has one.
    fn count(&self, name: &str, reason: &str) -> u64 {
        let mut sum = 0;
        self.device.metrics().collect(&mut |sample| {
            let matches =
                reason.is_empty() || sample.labels.iter().any(|(key, value)| *key == "reason" && value == reason);
            if let Value::Counter(value) = sample.value
                && sample.name == name
                && matches
            {
                sum += value;
            }
        });
        sum
    }

    fn wait_count(&self, name: &str, reason: &str, wanted: u64) {
        wait(|| self.count(name, reason) >= wanted, name);
        assert_eq!(self.count(name, reason), wanted, "{name} {reason}");
    }
}

/// A card as it starts, and one that expects small frames.
fn cards(ring_size: u16, features: u64) -> [Card; 2] {
    let fresh = Card::running(1, ring_size, features);
    let mut other = Card::running(1, ring_size, features);
    other.have_small_frames();
    [fresh, other]
}

fn wait(mut done: impl FnMut() -> bool, what: &str) {
    let end = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A frame of `length` bytes that differs from those with another `seed` in every byte.
fn frame(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
}

fn num_buffers(header: &[u8]) -> u16 {
    u16::from_le_bytes([header[10], header[11]])
}

#[test]
fn the_configuration_space_shows_mac_status_pairs_mtu_and_speed_whatever_was_negotiated() {
    let (tap, _host) = double(4);
    let options = NetOptions { mtu: Some(9000), link_up: false, ..options(tap, 4) };
    let device = VirtioNet::new(options, &PlainThreads, Arc::new(crate::NoNotifier)).unwrap();
    let mut config = [0xff; 32];
    device.read_config(0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..8], [0, 0], "the link is down");
    assert_eq!(config[8..10], 4u16.to_le_bytes());
    assert_eq!(config[10..12], 9000u16.to_le_bytes());
    assert_eq!(config[12..16], 10_000u32.to_le_bytes());
    assert_eq!(config[16], 1);
    assert_eq!(config[17..], [0; 15], "past the end there are zeros");
    device.handle().set_link(true);
    let mut status = [0xff; 2];
    device.read_config(6, &mut status);
    assert_eq!(status, [1, 0]);
    device.read_config(u64::MAX, &mut status);
    assert_eq!(status, [0, 0]);
    assert_eq!(device.queue_sizes(), [256, 256, 256, 256, 256, 256, 256, 256, 64]);
    use features::{CTRL_VQ, HOST_USO, MQ, MRG_RXBUF, MTU, NOTF_COAL, VQ_NOTF_COAL};
    for feature in [MQ, MTU, CTRL_VQ, MRG_RXBUF, HOST_USO, NOTF_COAL, VQ_NOTF_COAL] {
        assert!(device.features() & bit(feature) != 0, "{feature}");
    }
    let standby = 62;
    for feature in [standby, features::GUEST_UFO, 14, features::RSS, features::HASH_REPORT] {
        assert_eq!(device.features() & bit(feature), 0, "{feature} would be a promise that is not kept");
    }
}

#[test]
fn options_that_do_not_fit_are_refused_with_a_remedy() {
    let refused = |change: fn(&mut NetOptions)| {
        let (tap, _host) = double(1);
        let mut options = options(tap, 1);
        change(&mut options);
        match VirtioNet::new(options, &PlainThreads, Arc::new(crate::NoNotifier)) {
            Ok(_) => panic!("these options must be refused"),
            Err(error) => error.to_string(),
        }
    };
    assert!(refused(|o| o.mac = [1, 2, 3, 4, 5, 6]).contains("01:02:03:04:05:06"));
    assert!(refused(|o| o.mac = [0; 6]).contains("unicast"));
    assert!(refused(|o| o.queue_pairs = 2).contains("2 queue pairs"));
    assert!(refused(|o| o.queue_pairs = 0).contains("0 queue pairs"));
    assert!(refused(|o| o.queue_size = 100).contains("power of two"));
    assert!(refused(|o| o.queue_size = 0).contains("power of two"));
    assert!(refused(|o| o.mtu = Some(67)).contains("MTU 67"));
    assert!(refused(|o| o.rss = true).contains("leave RSS out"));
}
