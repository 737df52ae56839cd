//! The device's side of a split ring (virtio 1.2 §2.7), strict with the driver and quick with batches.
//!
//! `virtio_queue::Queue` holds registers and positions; this adds what a device needs that trusts nobody: every way in
//! which a chain can break the rules is an error instead of a chain that ends early, used elements are published once per
//! batch, and both kinds of interrupt suppression (§2.7.7, §2.7.10) are honoured.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Positions;

const DESCRIPTOR_SIZE: u64 = 16;
const USED_F_NO_NOTIFY: u16 = 1;
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// How the driver broke the rules of the ring. The device asks for a reset then (§2.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RingError {
    /// The rings do not lie in guest RAM, or the queue is not ready.
    #[error("the rings do not lie in guest RAM")]
    RingUnmapped,
    /// More heads are available than the ring has descriptors (§2.7.13.3).
    #[error("available index {index} is more than {size} ahead of {next}")]
    AvailableIndex {
        /// What the driver wrote.
        index: u16,
        /// The next entry that the device would take.
        next: u16,
        /// Descriptors in the ring.
        size: u16,
    },
    /// A head or a next field points past its table.
    #[error("descriptor {index} is past the end of a table of {size}")]
    DescriptorIndex {
        /// The bad index.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// The chain has more descriptors than is legal: it has a cycle, or is too long (§2.7.5.3.1).
    #[error("the chain at head {head} has a cycle or more than {limit} descriptors")]
    TooLong {
        /// First descriptor of the chain.
        head: u16,
        /// The most that is legal.
        limit: u16,
    },
    /// An indirect descriptor where none is allowed, or with a table that is none (§2.7.5.3.1).
    #[error("the chain at head {head} has a bad indirect descriptor: {why}")]
    Indirect {
        /// First descriptor of the chain.
        head: u16,
        /// What is wrong.
        why: &'static str,
    },
    /// A device-readable descriptor after a device-writable one (§2.7.4.2).
    #[error("the chain at head {head} has a readable descriptor after a writable one")]
    Order {
        /// First descriptor of the chain.
        head: u16,
    },
    /// The chain holds 4 GiB or more (§2.7.5.2).
    #[error("the chain at head {head} holds 4 GiB or more")]
    TooLarge {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A table or a buffer is not in guest RAM.
    #[error("the chain at head {head} points to {address:#x}, which is not guest RAM")]
    Unmapped {
        /// First descriptor of the chain.
        head: u16,
        /// Guest-physical address.
        address: u64,
    },
    /// More chains are outstanding than the ring has descriptors: a head was made available again before it was used.
    #[error("more than {size} chains are outstanding at once")]
    TooMany {
        /// Descriptors in the ring.
        size: u16,
    },
}

/// A piece of a chain: `length` (never 0) bytes at a guest-physical address, not yet known to be RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
}

/// A chain in pieces: those that the device reads, then those that it writes. Reused from chain to chain.
#[derive(Debug, Default)]
pub struct Chain {
    segments: Vec<Segment>,
    readable: usize,
}

impl Chain {
    /// Room for chains of `segments` pieces without further allocation.
    #[must_use]
    pub fn with_capacity(segments: usize) -> Self {
        Self { segments: Vec::with_capacity(segments), readable: 0 }
    }

    /// What the device reads.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// What the device writes.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }
}

/// A split ring that a device works on.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    positions: Arc<Positions>,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    event_idx: bool,
    /// Whether INDIRECT_DESC was negotiated.
    indirect: bool,
    next_available: u16,
    /// The available index as it was read last.
    available_index: u16,
    next_used: u16,
    /// `next_used` as the driver can see it.
    shown: u16,
    /// `shown` when the driver's wish for interrupts was last looked at.
    told: u16,
    kicks_wanted: bool,
}

type Result<T> = std::result::Result<T, RingError>;

impl Ring {
    /// Works on `queue` from where it stopped, and tells `positions` how far it is. `indirect`: whether the driver negotiated
    /// INDIRECT_DESC.
    ///
    /// # Errors
    /// [`RingError::RingUnmapped`] if the queue is not ready or its rings are not all in RAM.
    pub fn new(queue: Queue, positions: Arc<Positions>, indirect: bool, memory: &GuestMemoryMmap) -> Result<Self> {
        if !queue.is_valid(memory) {
            return Err(RingError::RingUnmapped);
        }
        let (next_available, next_used) = (queue.next_avail(), queue.next_used());
        Ok(Self {
            size: queue.size(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            event_idx: queue.event_idx_enabled(),
            indirect,
            next_available,
            available_index: next_available,
            next_used,
            shown: next_used,
            told: next_used,
            kicks_wanted: true,
            queue,
            positions,
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The most descriptors of a chain. Longer indirect tables than the ring are tolerated up to 256, as drivers make them.
    #[must_use]
    pub fn chain_limit(&self) -> u16 {
        self.size.max(256)
    }

    /// Registers and positions, as they are saved.
    #[must_use]
    pub fn state(&self) -> QueueState {
        QueueState { next_avail: self.next_available, next_used: self.next_used, ..self.queue.state() }
    }

    /// Takes the head of the next available chain.
    ///
    /// # Errors
    /// [`RingError`] if the driver made too many available or the head is no descriptor of this ring.
    pub fn next_head(&mut self, memory: &GuestMemoryMmap) -> Result<Option<u16>> {
        if self.next_available == self.available_index {
            self.read_available_index(memory)?;
            if self.next_available == self.available_index {
                return Ok(None);
            }
        }
        let head = self.head_at(memory, self.next_available)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// The head that the driver made available at `position`, or another one that has taken its place since.
    ///
    /// # Errors
    /// [`RingError`] if it is no descriptor of this ring.
    pub fn head_at(&self, memory: &GuestMemoryMmap, position: u16) -> Result<u16> {
        let slot = u64::from(position % self.size);
        let head = self.load(memory, self.available + 4 + 2 * slot, Ordering::Relaxed)?;
        if head < self.size { Ok(head) } else { Err(RingError::DescriptorIndex { index: head, size: self.size }) }
    }

    /// The driver's available index: how far it is, whoever has the ring.
    ///
    /// # Errors
    /// [`RingError::RingUnmapped`] if the ring is no longer in RAM.
    pub fn offered(&self, memory: &GuestMemoryMmap) -> Result<u16> {
        self.load(memory, self.available + 2, Ordering::Acquire)
    }

    /// How many chains [`Ring::next_head`] can take.
    ///
    /// # Errors
    /// [`RingError`] if the driver made too many available.
    pub fn waiting(&mut self, memory: &GuestMemoryMmap) -> Result<u16> {
        self.read_available_index(memory)?;
        Ok(self.available_index.wrapping_sub(self.next_available))
    }

    /// Whether [`Ring::next_head`] has something to tell: a head, or what is wrong with the ring.
    #[must_use]
    pub fn is_available(&self, memory: &GuestMemoryMmap) -> bool {
        self.offered(memory) != Ok(self.next_available)
    }

    /// Gives back the last `count` heads that were taken (at most as many as are not used yet): they are taken again next.
    pub fn rewind(&mut self, count: u16) {
        self.next_available = self.next_available.wrapping_sub(count);
    }

    /// Somebody else has the ring from now on, until [`Ring::resync`].
    pub fn give_away(&self) {
        self.positions.hide();
    }

    /// Goes on from the used index in memory, after somebody else had the ring who left nothing in flight: what was taken and
    /// not used is taken again.
    ///
    /// # Errors
    /// [`RingError::RingUnmapped`] if the ring is no longer in RAM.
    pub fn resync(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        let used = self.load(memory, self.used + 2, Ordering::Acquire)?;
        (self.next_available, self.available_index) = (used, used);
        (self.next_used, self.shown, self.told) = (used, used, used);
        // Unknown, so the next wish for kicks is written down.
        self.kicks_wanted = false;
        self.tell_position();
        Ok(())
    }

    fn read_available_index(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        // Pairs with the driver's barrier: descriptors and entries are written before the index.
        let index = self.offered(memory)?;
        if index.wrapping_sub(self.next_available) > self.size {
            return Err(RingError::AvailableIndex { index, next: self.next_available, size: self.size });
        }
        self.available_index = index;
        self.tell_position();
        Ok(())
    }

    /// Once before chains are taken and once after they are used is often enough for who looks on.
    fn tell_position(&self) {
        self.positions.show(self.next_available, self.shown);
    }

    /// Walks the chain at `head` into `chain`. Descriptors of length 0 count but give no segment.
    ///
    /// # Errors
    /// [`RingError`] for every way in which the chain breaks the rules; the walk always ends.
    pub fn walk(&self, memory: &GuestMemoryMmap, head: u16, chain: &mut Chain) -> Result<()> {
        chain.segments.clear();
        chain.readable = 0;
        let mut walk = Walk { head, left: self.chain_limit(), total: 0, writing: false };
        let limit = self.chain_limit();
        let (mut table, mut entries, mut index, mut nested) = (self.descriptors, self.size, head, false);
        loop {
            let descriptor = read_descriptor(memory, head, table, index)?;
            if descriptor.refers_to_indirect_table() {
                (table, entries) = self.indirect_table(head, descriptor, nested)?;
                (index, nested) = (0, true);
                continue;
            }
            walk.left = walk.left.checked_sub(1).ok_or(RingError::TooLong { head, limit })?;
            walk.add(descriptor, chain)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
            if index >= entries {
                return Err(RingError::DescriptorIndex { index, size: entries });
            }
        }
    }

    fn indirect_table(&self, head: u16, descriptor: Descriptor, nested: bool) -> Result<(u64, u16)> {
        let bad = |why| Err(RingError::Indirect { head, why });
        if !self.indirect {
            return bad("INDIRECT_DESC was not negotiated");
        }
        if nested {
            return bad("it is in an indirect table itself");
        }
        if descriptor.has_next() {
            return bad("it has a next descriptor");
        }
        let entries = descriptor.len() / 16;
        match u16::try_from(entries) {
            Ok(entries) if entries > 0 && descriptor.len().is_multiple_of(16) => Ok((descriptor.addr().0, entries)),
            _ => bad("the length of its table is no multiple of 16, or is 0 or too large"),
        }
    }

    /// Writes a used element: the device is done with the chain at `head` and wrote `length` bytes. The driver sees it with
    /// the next [`Ring::publish`].
    ///
    /// # Errors
    /// [`RingError::RingUnmapped`] if the ring is no longer in RAM.
    pub fn put_used(&mut self, memory: &GuestMemoryMmap, head: u16, length: u32) -> Result<()> {
        let slot = u64::from(self.next_used % self.size);
        let element = u64::from(head) | u64::from(length) << 32;
        memory
            .write_slice(&element.to_le_bytes(), GuestAddress(self.used + 4 + 8 * slot))
            .map_err(|_| RingError::RingUnmapped)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Makes the used elements visible that were put since the last call; tells whether the driver wants an interrupt.
    ///
    /// # Errors
    /// [`RingError::RingUnmapped`] if the ring is no longer in RAM.
    pub fn publish(&mut self, memory: &GuestMemoryMmap) -> Result<bool> {
        self.show(memory)?;
        self.wants_interrupt(memory)
    }

    /// Makes the used elements visible that were put since the last call, for a driver that is to be interrupted later.
    ///
    /// # Errors
    /// [`RingError::RingUnmapped`] if the ring is no longer in RAM.
    pub fn show(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        if self.shown != self.next_used {
            self.store(memory, self.used + 2, self.next_used, Ordering::Release)?;
            self.shown = self.next_used;
            self.tell_position();
        }
        Ok(())
    }

    /// Whether used elements were shown since [`Ring::wants_interrupt`] was last asked.
    #[must_use]
    pub fn is_untold(&self) -> bool {
        self.shown != self.told
    }

    /// Whether the driver wants an interrupt for the used elements that were shown since this was last asked.
    ///
    /// # Errors
    /// [`RingError::RingUnmapped`] if the ring is no longer in RAM.
    pub fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool> {
        let (old, new) = (self.told, self.shown);
        if old == new {
            return Ok(false);
        }
        self.told = new;
        // The index must be visible before the wish of the driver is read, or both sides wait for each other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(memory, self.available + 4 + 2 * u64::from(self.size), Ordering::Relaxed)?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            Ok(self.load(memory, self.available, Ordering::Relaxed)? & AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver not to kick: the device looks at the ring anyway. A hint, which the driver may miss.
    ///
    /// # Errors
    /// [`RingError::RingUnmapped`] if the ring is no longer in RAM.
    pub fn disable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        // With EVENT_IDX a kick is asked for once: as long as the event is not moved on, there is no other.
        if self.kicks_wanted && !self.event_idx {
            self.store(memory, self.used, USED_F_NO_NOTIFY, Ordering::Relaxed)?;
        }
        self.kicks_wanted = false;
        Ok(())
    }

    /// Asks for a kick with the next chain; tells whether there is one already, for which no kick will come.
    ///
    /// # Errors
    /// [`RingError`] if the available index is bad.
    pub fn enable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<bool> {
        if self.event_idx {
            let event = self.used + 4 + 8 * u64::from(self.size);
            self.store(memory, event, self.next_available, Ordering::Relaxed)?;
        } else if !self.kicks_wanted {
            self.store(memory, self.used, 0, Ordering::Relaxed)?;
        }
        self.kicks_wanted = true;
        fence(Ordering::SeqCst);
        self.read_available_index(memory)?;
        Ok(self.available_index != self.next_available)
    }

    /// Asks for a kick once `count` chains (at least one) are available; tells whether they are already, for which no kick
    /// will come. A driver without EVENT_IDX is asked not to kick.
    ///
    /// # Errors
    /// [`RingError`] if the available index is bad.
    pub fn kick_after(&mut self, memory: &GuestMemoryMmap, count: u16) -> Result<bool> {
        if self.event_idx {
            let event = self.used + 4 + 8 * u64::from(self.size);
            let last = self.next_available.wrapping_add(count.saturating_sub(1));
            self.store(memory, event, last, Ordering::Relaxed)?;
            self.kicks_wanted = true;
            fence(Ordering::SeqCst);
        } else {
            self.disable_kicks(memory)?;
        }
        Ok(self.waiting(memory)? >= count)
    }

    fn load(&self, memory: &GuestMemoryMmap, address: u64, order: Ordering) -> Result<u16> {
        memory.load(GuestAddress(address), order).map(u16::from_le).map_err(|_| RingError::RingUnmapped)
    }

    fn store(&self, memory: &GuestMemoryMmap, address: u64, value: u16, order: Ordering) -> Result<()> {
        memory.store(value.to_le(), GuestAddress(address), order).map_err(|_| RingError::RingUnmapped)
    }
}

fn read_descriptor(memory: &GuestMemoryMmap, head: u16, table: u64, index: u16) -> Result<Descriptor> {
    let unmapped = RingError::Unmapped { head, address: table };
    let address = table.checked_add(DESCRIPTOR_SIZE * u64::from(index)).ok_or(unmapped)?;
    memory.read_obj(GuestAddress(address)).map_err(|_| unmapped)
}

struct Walk {
    head: u16,
    left: u16,
    total: u32,
    writing: bool,
}

impl Walk {
    fn add(&mut self, descriptor: Descriptor, chain: &mut Chain) -> Result<()> {
        let length = descriptor.len();
        self.total = self.total.checked_add(length).ok_or(RingError::TooLarge { head: self.head })?;
        if descriptor.is_write_only() {
            self.writing = true;
        } else if self.writing {
            return Err(RingError::Order { head: self.head });
        }
        if length > 0 {
            chain.segments.push(Segment { address: descriptor.addr().0, length });
            chain.readable += usize::from(!self.writing);
        }
        Ok(())
    }
}
