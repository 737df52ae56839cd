//! A driver that writes what it likes into its rings, its memory and the device's configuration.

pub mod balloon;
pub mod block;
pub mod net;
pub mod rng;

use std::time::{Duration, Instant};

use rackvisor_devices::limiter::{Limits, Rate};
use rackvisor_devices::virtio::VirtioDevice;
use rackvisor_devices::virtio::double::{EVENT_IDX, INDIRECT_DESC, RAM_BASE, TestDriver};

use crate::input::Input;

const RAM: usize = 1 << 20;
/// What buffers mostly are in, so that chains, headers and data meet.
const AREA: u64 = 64 << 10;
/// The most things that a driver does: longer inputs find nothing more.
const ACTIONS: usize = 64;
/// A device that has not stopped by then hangs.
const HANG: Duration = Duration::from_secs(20);
/// How long a kicked device may take before the driver goes on without it.
const SOON: Duration = Duration::from_millis(1);
/// Few enough that a queue waits for its turn when it is to stop.
const SLOW: Limits = Limits { ops: Some(Rate { per_second: 100, burst: Some(2) }), bytes: None };
/// In flags of descriptors (virtio 1.2 §2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A device, its driver, and the other end of the device.
struct Bench<D> {
    device: D,
    driver: TestDriver,
    features: u64,
    rings: usize,
    area: u64,
    /// The index of each available ring as the device sees it.
    available: Vec<u16>,
    running: bool,
}

impl<D: VirtioDevice> Bench<D> {
    /// The driver takes the features that `input` says.
    fn new(device: D, input: &mut Input<'_>) -> Self {
        let sizes: Vec<u16> = device.queue_sizes().to_vec();
        let mut driver = TestDriver::with_ram(RAM, &sizes);
        let area = driver.allocate(AREA, 4096);
        let wanted = input.u64();
        let features = wanted & (device.features() | INDIRECT_DESC | EVENT_IDX);
        let available = vec![0; sizes.len()];
        let mut bench = Self { device, driver, features, rings: sizes.len(), area, available, running: false };
        bench.start_anew();
        bench
    }

    /// Plays all of `input`; `host` does what the other end of the device does. Then the device must stop.
    fn play(mut self, input: &mut Input<'_>, mut host: impl FnMut(&mut Input<'_>, &mut D)) {
        for _ in 0..ACTIONS {
            if input.is_empty() {
                break;
            }
            match input.below(16) {
                0..4 => self.chain(input, false),
                4..6 => self.chain(input, true),
                6 => self.descriptor(input),
                7 => self.write(input),
                8 => host(input, &mut self.device),
                9 => self.push_anything(input),
                10 => self.device.write_config(input.byte().into(), input.bytes()),
                11 => self.read_config(input),
                12 => self.pause(),
                13 => self.reset(),
                14 => self.scribble(input),
                _ => self.kick(input),
            }
        }
        for ring in 0..self.rings {
            self.publish(ring);
            self.settle(ring);
        }
        self.stop();
    }

    fn ring(&mut self, input: &mut Input<'_>) -> usize {
        usize::from(input.byte()) % self.rings
    }

    /// An address: in most cases one of the area.
    fn address(&mut self, input: &mut Input<'_>) -> u64 {
        match input.byte() {
            0xff => input.u64(),
            0xfe => RAM_BASE + u64::from(input.u32()) % (RAM as u64),
            page => self.area + u64::from(page % 16) * 4096 + u64::from(input.byte()) * 16,
        }
    }

    /// A chain whose descriptors are where they belong, with whatever in them.
    fn chain(&mut self, input: &mut Input<'_>, indirect: bool) {
        let ring = self.ring(input);
        let shape = input.byte();
        let (pieces, first) = (1 + u16::from(shape % 8), u16::from(shape / 8 % 8));
        let own = self.driver.ring(ring).addresses().0;
        let table = if indirect { self.address(input) & !0xf } else { own };
        let writable = input.byte();
        for piece in 0..pieces {
            let address = self.address(input);
            let length = u32::from(input.u16());
            let more = if piece + 1 < pieces { NEXT } else { 0 };
            let flags = more | if writable & (1 << piece) != 0 { WRITE } else { 0 };
            let index = if indirect { piece } else { first + piece };
            self.write_descriptor(ring, (table, index), (address, length, flags, index + 1));
        }
        if indirect {
            self.write_descriptor(ring, (own, first), (table, u32::from(pieces) * 16, INDIRECT, 0));
        }
        self.driver.ring(ring).push_available(first);
        self.available[ring] = self.available[ring].wrapping_add(1);
        self.publish(ring);
    }

    /// Writes a descriptor of a table if all of that is RAM.
    fn write_descriptor(&mut self, ring: usize, (table, index): (u64, u16), what: (u64, u32, u16, u16)) {
        let end = RAM_BASE + RAM as u64;
        if (RAM_BASE..end - 16 * (u64::from(index) + 1)).contains(&table) {
            let (address, length, flags, next) = what;
            self.driver.ring(ring).write_descriptor(table, index, address, length, flags, next);
        }
    }

    fn descriptor(&mut self, input: &mut Input<'_>) {
        let ring = self.ring(input);
        let table = self.driver.ring(ring).addresses().0;
        let index = u16::from(input.below(16));
        let address = self.address(input);
        let what = (address, input.u32(), input.u16(), input.u16());
        self.write_descriptor(ring, (table, index), what);
    }

    fn push_anything(&mut self, input: &mut Input<'_>) {
        let ring = self.ring(input);
        self.driver.ring(ring).push_available(input.u16());
        self.available[ring] = self.available[ring].wrapping_add(1);
    }

    /// Writes into the area, where headers, data and indirect tables are.
    fn write(&mut self, input: &mut Input<'_>) {
        let at = u64::from(input.below(16)) * 4096 + u64::from(input.byte()) * 16;
        let bytes = input.bytes();
        let room = usize::try_from(AREA - at).unwrap();
        self.driver.write(self.area + at, &bytes[..bytes.len().min(room)]);
    }

    /// Writes into a ring: flags, indexes, events, elements.
    fn scribble(&mut self, input: &mut Input<'_>) {
        let ring = self.ring(input);
        let (table, available, used) = self.driver.ring(ring).addresses();
        let base = [table, available, used][usize::from(input.below(3))];
        let at = base + u64::from(input.byte());
        self.driver.write(at, &input.u16().to_le_bytes());
    }

    fn read_config(&mut self, input: &mut Input<'_>) {
        let mut data = [0; 8];
        let length = 1 << input.below(4);
        let offset = if input.byte() == 0xff { input.u64() } else { input.byte().into() };
        self.device.read_config(offset, &mut data[..length]);
    }

    /// Shows an index, the right one or any, and lets the device see to it.
    fn kick(&mut self, input: &mut Input<'_>) {
        let ring = self.ring(input);
        if input.below(8) == 7 {
            self.available[ring] = input.u16();
            self.driver.ring(ring).set_available_index(self.available[ring]);
            self.driver.ring(ring).kick_always();
        } else {
            self.publish(ring);
        }
        self.settle(ring);
    }

    fn publish(&mut self, ring: usize) {
        let index = self.available[ring];
        self.driver.ring(ring).set_available_index(index);
        self.driver.ring(ring).kick_always();
    }

    /// Waits until the device has used all there is, or found it broken, or seems to wait itself.
    fn settle(&mut self, ring: usize) {
        let resets = self.driver.signals().resets();
        let end = Instant::now() + SOON;
        while self.running
            && self.driver.ring(ring).used_index() != self.available[ring]
            && self.driver.signals().resets() == resets
            && Instant::now() < end
        {
            std::thread::yield_now();
        }
    }

    fn stop(&mut self) -> Vec<rackvisor_devices::virtio::StoppedQueue> {
        let end = Instant::now() + HANG;
        loop {
            match self.device.stop() {
                Ok(queues) => break queues,
                Err(busy) => assert!(Instant::now() < end, "the device does not stop: {busy}"),
            }
            std::thread::yield_now();
        }
    }

    /// A pause and its end.
    fn pause(&mut self) {
        let stopped = self.stop();
        let activation = self.driver.resume(self.features, &stopped);
        self.running = self.device.start(activation).is_ok();
    }

    fn reset(&mut self) {
        self.stop();
        self.device.reset();
        self.start_anew();
    }

    fn start_anew(&mut self) {
        self.available.fill(0);
        let activation = self.driver.activation(self.features);
        self.running = self.device.start(activation).is_ok();
    }
}
