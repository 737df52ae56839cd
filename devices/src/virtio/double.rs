//! The driver's side of split rings (virtio 1.2 §2.7), for tests of devices at ring level.
//!
//! A [`TestDriver`] owns a little guest RAM with one [`TestRing`] for each queue. It makes an [`Activation`] for
//! [`VirtioDevice::start`], adds chains as a real driver does (or breaks every rule, where a
//! test asks for it), kicks when the device wants to be kicked, and sees used elements and interrupts.
//!
//! ```
//! use rackvisor_devices::virtio::double::{Buffer, TestDriver};
//! # use std::time::Duration;
//! # fn run(mut device: impl rackvisor_devices::virtio::VirtioDevice) {
//! let mut driver = TestDriver::new(&[256]);
//! let buffer = driver.allocate(4096, 4096);
//! device.start(driver.activation(0)).unwrap();
//! let ring = driver.ring(0);
//! let head = ring.add(&[Buffer::writable(buffer, 4096)]);
//! ring.kick();
//! let used = ring.wait_used(Duration::from_secs(10)).expect("the device answers");
//! assert_eq!(used.head, head);
//! # }
//! ```

// A double is for tests: what would be an error elsewhere is a broken test here, which may well panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod ring;
mod signals;
#[cfg(test)]
pub(crate) mod windows;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::Queue;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

pub use self::ring::{Buffer, TestRing, Used};
pub use self::signals::{RecordedNotifier, RecordedSignals};
use super::{Activation, ActiveQueue, StoppedQueue, VirtioDevice};
use crate::GuestMemory;

/// Guest-physical address of the first byte of RAM.
pub const RAM_BASE: u64 = 0x10_0000;
/// An address without RAM.
pub const UNMAPPED: u64 = 0x8_0000;
/// Bytes of RAM that [`TestDriver::new`] gives.
pub const RAM_SIZE: usize = 64 << 20;

/// VIRTIO_F_RING_INDIRECT_DESC as a mask (§6).
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_RING_EVENT_IDX as a mask (§6).
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1 as a mask (§6).
pub const VERSION_1: u64 = 1 << 32;

/// Guest RAM that hands out addresses and never takes them back.
#[derive(Clone)]
pub(crate) struct Arena {
    memory: GuestMemory,
    next: Arc<AtomicU64>,
    end: u64,
}

impl Arena {
    fn new(size: usize) -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM_BASE), size)]).expect("test RAM can be mapped");
        let end = RAM_BASE + size as u64;
        Self { memory: GuestMemory::new(ram), next: Arc::new(AtomicU64::new(RAM_BASE)), end }
    }

    fn allocate(&self, length: u64, align: u64) -> u64 {
        assert!(align.is_power_of_two(), "alignment {align} is no power of two");
        let start = self.next.load(Ordering::Relaxed).next_multiple_of(align);
        assert!(start + length <= self.end, "test RAM is exhausted: reuse buffers");
        self.next.store(start + length, Ordering::Relaxed);
        start
    }

    fn write(&self, address: u64, data: &[u8]) {
        self.memory.memory().write_slice(data, GuestAddress(address)).expect("test RAM holds what is written");
    }

    fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.memory().read_slice(&mut data, GuestAddress(address)).expect("test RAM holds what is read");
        data
    }

    fn store16(&self, address: u64, value: u16) {
        self.memory.memory().store(value.to_le(), GuestAddress(address), Ordering::SeqCst).expect("aligned RAM");
    }

    fn load16(&self, address: u64) -> u16 {
        u16::from_le(self.memory.memory().load(GuestAddress(address), Ordering::SeqCst).expect("aligned RAM"))
    }
}

/// A driver with its RAM and rings.
pub struct TestDriver {
    arena: Arena,
    rings: Vec<TestRing>,
    signals: Arc<RecordedSignals>,
}

impl TestDriver {
    /// A driver with [`RAM_SIZE`] bytes of RAM and one ring of each size (powers of two).
    #[must_use]
    pub fn new(queue_sizes: &[u16]) -> Self {
        Self::with_ram(RAM_SIZE, queue_sizes)
    }

    /// A driver with `ram` bytes of RAM (a multiple of 4096) and one ring of each size.
    #[must_use]
    pub fn with_ram(ram: usize, queue_sizes: &[u16]) -> Self {
        let arena = Arena::new(ram);
        let rings = queue_sizes.iter().map(|&size| TestRing::new(&arena, size)).collect();
        Self { arena, rings, signals: Arc::new(RecordedSignals::default()) }
    }

    /// Guest RAM, as a device sees it.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        self.arena.memory.clone()
    }

    /// The address of `length` fresh zero bytes, aligned to `align` bytes. They are never given back: reuse them.
    pub fn allocate(&mut self, length: u64, align: u64) -> u64 {
        self.arena.allocate(length, align)
    }

    /// Writes to guest RAM.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.arena.write(address, data);
    }

    /// Reads from guest RAM.
    #[must_use]
    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        self.arena.read(address, length)
    }

    /// Writes a value to guest RAM.
    pub fn write_obj<T: ByteValued>(&self, address: u64, value: T) {
        self.arena.write(address, value.as_slice());
    }

    /// The ring of queue `index`.
    pub fn ring(&mut self, index: usize) -> &mut TestRing {
        &mut self.rings[index]
    }

    /// What the device told the transport.
    #[must_use]
    pub fn signals(&self) -> &RecordedSignals {
        &self.signals
    }

    /// Initialises all rings and hands them to a device with VERSION_1 and `features` negotiated.
    pub fn activation(&mut self, features: u64) -> Activation {
        let all: Vec<usize> = (0..self.rings.len()).collect();
        self.activation_of(features, &all)
    }

    /// As [`TestDriver::activation`] with only some of the queues enabled, in rising order.
    pub fn activation_of(&mut self, features: u64, enabled: &[usize]) -> Activation {
        for &index in enabled {
            self.rings[index].initialise(features & EVENT_IDX != 0);
        }
        let queues = enabled.iter().map(|&index| self.rings[index].active(index, self.rings[index].fresh_queue()));
        self.activate(features, queues.collect())
    }

    /// Hands the rings to a device again as they are, to go on from the positions that `stop` gave back.
    ///
    /// # Panics
    /// If a position names a ring that this driver does not have, or one that is not valid.
    pub fn resume(&mut self, features: u64, stopped: &[StoppedQueue]) -> Activation {
        let queues = stopped.iter().map(|stopped| {
            let queue = Queue::try_from(stopped.state).expect("stop gives valid positions");
            self.rings[usize::from(stopped.index)].active(usize::from(stopped.index), queue)
        });
        self.activate(features, queues.collect())
    }

    fn activate(&self, features: u64, queues: Vec<ActiveQueue>) -> Activation {
        Activation { features: features | VERSION_1, memory: self.memory(), queues, signals: self.signals.clone() }
    }
}

/// Stops a device; gives the positions of its queues.
///
/// # Panics
/// If it is still busy after `patience`.
pub fn stop_within(device: &mut dyn VirtioDevice, patience: Duration) -> Vec<StoppedQueue> {
    let end = Instant::now() + patience;
    loop {
        match device.stop() {
            Ok(queues) => return queues,
            Err(busy) => assert!(Instant::now() < end, "{busy}"),
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use virtio_queue::{QueueOwnedT, QueueT};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// Plays a device that answers all there is with "1 byte written".
    fn answer_all(memory: &GuestMemory, active: &mut ActiveQueue) -> usize {
        let memory = memory.memory();
        let heads: Vec<u16> = active.queue.iter(&*memory).unwrap().map(|chain| chain.head_index()).collect();
        for &head in &heads {
            active.queue.add_used(&*memory, head, 1).unwrap();
        }
        if active.queue.needs_notification(&*memory).unwrap() {
            active.interrupt.trigger();
        }
        heads.len()
    }

    #[test]
    fn a_device_sees_direct_and_indirect_chains_and_the_driver_sees_them_used() {
        let mut driver = TestDriver::new(&[8]);
        let buffer = driver.allocate(64, 8);
        let mut activation = driver.activation(INDIRECT_DESC);
        let chain = [Buffer::readable(buffer, 16), Buffer::writable(buffer + 16, 48)];
        let direct = driver.ring(0).add(&chain);
        let indirect = driver.ring(0).add_indirect(&chain);
        assert_eq!(driver.ring(0).free_descriptors(), 5);
        let memory = activation.memory.clone();
        let guard = memory.memory();
        for head in [direct, indirect] {
            let seen = activation.queues[0].queue.pop_descriptor_chain(&*guard).unwrap();
            assert_eq!(seen.head_index(), head);
            let seen: Vec<Buffer> =
                seen.map(|d| Buffer { address: d.addr().0, length: d.len(), writable: d.is_write_only() }).collect();
            assert_eq!(seen, chain);
            activation.queues[0].queue.add_used(&*guard, head, 3).unwrap();
        }
        assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head: direct, length: 3 }));
        assert_eq!(driver.ring(0).wait_used(SOON), Some(Used { head: indirect, length: 3 }));
        assert_eq!(driver.ring(0).take_used(), None);
        assert_eq!(driver.ring(0).free_descriptors(), 8);
    }

    #[test]
    fn with_event_idx_the_driver_kicks_and_is_interrupted_only_where_it_was_asked_for() {
        let mut driver = TestDriver::new(&[8]);
        let buffer = driver.allocate(64, 8);
        let mut activation = driver.activation(EVENT_IDX);
        let memory = activation.memory.clone();
        let chain = [Buffer::readable(buffer, 16)];
        driver.ring(0).add(&chain);
        assert!(driver.ring(0).kick(), "avail_event starts at 0: the first chain passes it");
        driver.ring(0).add(&chain);
        assert!(!driver.ring(0).kick(), "nobody asked to be kicked for the second chain");
        driver.ring(0).want_interrupts(false);
        assert_eq!(answer_all(&memory, &mut activation.queues[0]), 2);
        assert_eq!(driver.ring(0).interrupts(), 0);
        while driver.ring(0).take_used().is_some() {}
        activation.queues[0].queue.enable_notification(&*memory.memory()).unwrap();
        driver.ring(0).want_interrupts(true);
        driver.ring(0).add(&chain);
        assert!(driver.ring(0).kick());
        assert_eq!(answer_all(&memory, &mut activation.queues[0]), 1);
        assert!(driver.ring(0).wait_interrupt(SOON));
        assert_eq!((driver.ring(0).kicks(), driver.ring(0).interrupts()), (2, 1));
    }

    #[test]
    fn a_ring_goes_on_from_the_positions_that_stop_gave_back() {
        let mut driver = TestDriver::new(&[2]);
        let buffer = driver.allocate(64, 8);
        let mut activation = driver.activation(0);
        let memory = activation.memory.clone();
        for _ in 0..5 {
            let head = driver.ring(0).add(&[Buffer::writable(buffer, 1)]);
            assert_eq!(answer_all(&memory, &mut activation.queues[0]), 1);
            assert_eq!(driver.ring(0).take_used(), Some(Used { head, length: 1 }));
            let stopped = StoppedQueue { index: 0, state: activation.queues[0].queue.state() };
            activation = driver.resume(0, &[stopped]);
        }
    }
}
