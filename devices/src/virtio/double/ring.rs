//! One split ring, seen from its driver.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Arena;
use crate::interrupt::double::test_vector;
use crate::interrupt::{QueueInterrupt, Vector};
use crate::virtio::ActiveQueue;

const DESCRIPTOR_SIZE: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;

/// A piece of guest memory that a chain is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// Whether the device writes to it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    #[must_use]
    pub fn readable(address: u64, length: u32) -> Self {
        Self { address, length, writable: false }
    }

    /// A buffer that the device writes.
    #[must_use]
    pub fn writable(address: u64, length: u32) -> Self {
        Self { address, length, writable: true }
    }

    fn flags(self) -> u16 {
        if self.writable { F_WRITE } else { 0 }
    }
}

/// An element of the used ring (§2.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// First descriptor of the chain that the device is done with.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub length: u32,
}

/// A split ring with its kick and its interrupt.
pub struct TestRing {
    arena: Arena,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    free: Vec<u16>,
    /// The descriptors of each chain that the device has.
    chains: HashMap<u16, Vec<u16>>,
    /// An indirect table for each head that ever needed one, and how many descriptors it holds.
    tables: HashMap<u16, (u64, usize)>,
    next_available: u16,
    /// What `next_available` was when the driver last thought about kicking.
    last_kick_check: u16,
    next_used: u16,
    event_idx: bool,
    kick: EventFd,
    kicks: u64,
    vector: Arc<Vector>,
    interrupts: EventFd,
}

impl TestRing {
    pub(super) fn new(arena: &Arena, size: u16) -> Self {
        assert!(size.is_power_of_two(), "ring size {size} is no power of two");
        let (vector, interrupts) = test_vector();
        vector.unmask();
        let vector = Arc::new(vector);
        let entries = u64::from(size);
        Self {
            arena: arena.clone(),
            size,
            descriptors: arena.allocate(DESCRIPTOR_SIZE * entries, 16),
            available: arena.allocate(6 + 2 * entries, 2),
            used: arena.allocate(6 + 8 * entries, 4),
            free: Vec::new(),
            chains: HashMap::new(),
            tables: HashMap::new(),
            next_available: 0,
            last_kick_check: 0,
            next_used: 0,
            event_idx: false,
            kick: EventFd::new(EFD_NONBLOCK).expect("descriptors are left"),
            kicks: 0,
            vector,
            interrupts,
        }
    }

    /// Back to an empty ring; called by [`TestDriver::activation`](super::TestDriver::activation).
    pub(super) fn initialise(&mut self, event_idx: bool) {
        self.free = (0..self.size).rev().collect();
        self.chains.clear();
        (self.next_available, self.last_kick_check, self.next_used) = (0, 0, 0);
        self.event_idx = event_idx;
        self.arena.write(self.available, &vec![0; 6 + 2 * usize::from(self.size)]);
        self.arena.write(self.used, &vec![0; 6 + 8 * usize::from(self.size)]);
        let _ = self.kick.read();
        let _ = self.interrupts.read();
    }

    pub(super) fn fresh_queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).expect("a power of two");
        queue.try_set_desc_table_address(vm_memory::GuestAddress(self.descriptors)).expect("aligned");
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(self.available)).expect("aligned");
        queue.try_set_used_ring_address(vm_memory::GuestAddress(self.used)).expect("aligned");
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        queue
    }

    pub(super) fn active(&self, index: usize, queue: Queue) -> ActiveQueue {
        ActiveQueue {
            index: u16::try_from(index).expect("few queues"),
            queue,
            positions: Arc::default(),
            kick: self.kick.try_clone().expect("descriptors are left"),
            interrupt: QueueInterrupt::new(Some(Arc::clone(&self.vector))),
        }
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Addresses of descriptor table, available ring and used ring.
    #[must_use]
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.descriptors, self.available, self.used)
    }

    /// The eventfd that kicks the device.
    #[must_use]
    pub fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    // Well-behaved chains.

    /// Adds a chain of direct descriptors and publishes it; gives its head.
    ///
    /// # Panics
    /// If `buffers` is empty or more than there are free descriptors.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.stage(buffers);
        self.publish();
        head
    }

    /// Adds a chain of one descriptor that points to an indirect table (§2.7.5.3) and publishes it; gives its head.
    ///
    /// # Panics
    /// If there is no free descriptor.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.take_descriptor();
        let table = self.table_for(head, buffers.len());
        self.write_chain(table, buffers, &(0..).take(buffers.len()).collect::<Vec<u16>>());
        let length = DESCRIPTOR_SIZE * buffers.len() as u64;
        self.write_descriptor(self.descriptors, head, table, length as u32, F_INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.push_available(head);
        self.publish();
        head
    }

    /// As [`TestRing::add`] without publishing: several chains can become visible at once with [`TestRing::publish`].
    ///
    /// # Panics
    /// If `buffers` is empty or more than there are free descriptors.
    pub fn stage(&mut self, buffers: &[Buffer]) -> u16 {
        assert!(!buffers.is_empty(), "a chain has at least one descriptor");
        let indexes: Vec<u16> = buffers.iter().map(|_| self.take_descriptor()).collect();
        self.write_chain(self.descriptors, buffers, &indexes);
        let head = indexes[0];
        self.chains.insert(head, indexes);
        self.push_available(head);
        head
    }

    /// Number of free descriptors.
    #[must_use]
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    fn take_descriptor(&mut self) -> u16 {
        self.free.pop().expect("free descriptors are left: the ring is initialised and not full")
    }

    fn table_for(&mut self, head: u16, entries: usize) -> u64 {
        match self.tables.get(&head) {
            Some(&(table, capacity)) if capacity >= entries => table,
            _ => {
                let table = self.arena.allocate(DESCRIPTOR_SIZE * entries.max(1) as u64, 16);
                self.tables.insert(head, (table, entries));
                table
            }
        }
    }

    fn write_chain(&self, table: u64, buffers: &[Buffer], indexes: &[u16]) {
        for (position, (buffer, &index)) in buffers.iter().zip(indexes).enumerate() {
            let next = indexes.get(position + 1).copied();
            let flags = buffer.flags() | if next.is_some() { F_NEXT } else { 0 };
            self.write_descriptor(table, index, buffer.address, buffer.length, flags, next.unwrap_or(0));
        }
    }

    // Anything goes.

    /// Writes descriptor `index` of the table at `table` (the ring's own is the first of [`TestRing::addresses`]).
    /// `flags`: 1 next, 2 device-writable, 4 indirect.
    pub fn write_descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut raw = [0; DESCRIPTOR_SIZE as usize];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.arena.write(table + DESCRIPTOR_SIZE * u64::from(index), &raw);
    }

    /// Puts `head` (of any value) into the next slot of the available ring, not yet visible to the device.
    pub fn push_available(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.arena.store16(self.available + 4 + 2 * slot, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Makes all that was staged visible to the device.
    pub fn publish(&self) {
        self.set_available_index(self.next_available);
    }

    /// Writes any value to the index of the available ring.
    pub fn set_available_index(&self, index: u16) {
        fence(Ordering::SeqCst);
        self.arena.store16(self.available + 2, index);
    }

    // Notifications.

    /// Kicks the device if it wants that, as §2.7.7 says; tells whether it did.
    pub fn kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (new, old) = (self.next_available, self.last_kick_check);
        self.last_kick_check = new;
        let wanted = if self.event_idx {
            let event = self.arena.load16(self.used + 4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.arena.load16(self.used) & NO_NOTIFY == 0
        };
        if wanted {
            self.kick_always();
        }
        wanted
    }

    /// Kicks the device whether it wants that or not.
    pub fn kick_always(&mut self) {
        self.kicks += 1;
        self.kick.write(1).expect("an eventfd takes a kick");
    }

    /// How often the device was kicked.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Asks for an interrupt once the used index has passed `index` (§2.7.10.1); only with EVENT_IDX.
    pub fn set_used_event(&self, index: u16) {
        self.arena.store16(self.available + 4 + 2 * u64::from(self.size), index);
        fence(Ordering::SeqCst);
    }

    /// Asks for an interrupt with the next used element, or for none for now.
    pub fn want_interrupts(&self, wanted: bool) {
        if self.event_idx {
            self.set_used_event(if wanted { self.next_used } else { self.next_used.wrapping_sub(1) });
        } else {
            self.arena.store16(self.available, if wanted { 0 } else { NO_INTERRUPT });
            fence(Ordering::SeqCst);
        }
    }

    /// How often the device has triggered the interrupt since the ring was made.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.vector.fired()
    }

    /// Waits for an interrupt that has not been waited for yet; tells whether one came in time.
    pub fn wait_interrupt(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        loop {
            if self.interrupts.read().is_ok() {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !readable(&self.interrupts, left) {
                return self.interrupts.read().is_ok();
            }
        }
    }

    // Used elements.

    /// The index of the used ring as the device last published it.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.arena.load16(self.used + 2)
    }

    /// Takes the next used element, if there is one, and frees the descriptors of its chain.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_index() == self.next_used {
            return None;
        }
        fence(Ordering::SeqCst);
        let slot = u64::from(self.next_used % self.size);
        let raw = self.arena.read(self.used + 4 + 8 * slot, 8);
        let id = u32::from_le_bytes(raw[..4].try_into().expect("4 bytes"));
        let length = u32::from_le_bytes(raw[4..].try_into().expect("4 bytes"));
        let head = u16::try_from(id).expect("the device uses heads of this ring");
        assert!(head < self.size, "the device used head {head} of a ring of {}", self.size);
        self.next_used = self.next_used.wrapping_add(1);
        self.free.extend(self.chains.remove(&head).unwrap_or_default());
        Some(Used { head, length })
    }

    /// Waits for the next used element, with no need for an interrupt.
    pub fn wait_used(&mut self, timeout: Duration) -> Option<Used> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(used) = self.take_used() {
                return Some(used);
            }
            if Instant::now() >= end {
                return None;
            }
            readable(&self.interrupts, Duration::from_millis(1));
            // The interrupt may be there already while the element is not: do not spin on the processor of the device.
            std::thread::yield_now();
        }
    }
}

fn readable(event: &EventFd, timeout: Duration) -> bool {
    super::signals::poll_readable(event.as_raw_fd(), timeout)
}
