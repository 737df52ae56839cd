//! What the driver reads of a disk: features and configuration space (virtio 1.2 §5.2.3, §5.2.4).

use super::backend::Geometry;

/// Feature bits (§5.2.3). SECURE_ERASE is never offered: no SAN transport does it through Linux's block layer.
pub mod feature {
    /// Configuration has `seg_max`.
    pub const SEG_MAX: u32 = 2;
    /// The disk is read-only.
    pub const RO: u32 = 5;
    /// Configuration has `blk_size`.
    pub const BLK_SIZE: u32 = 6;
    /// Flushes are understood.
    pub const FLUSH: u32 = 9;
    /// Configuration has `topology`.
    pub const TOPOLOGY: u32 = 10;
    /// Configuration has `writeback`, which the driver may write.
    pub const CONFIG_WCE: u32 = 11;
    /// Several queues.
    pub const MQ: u32 = 12;
    /// Discards are understood.
    pub const DISCARD: u32 = 13;
    /// Write-zeroes is understood.
    pub const WRITE_ZEROES: u32 = 14;
}

/// Bytes in a sector, the unit of the protocol whatever the block size (§5.2.6).
pub const SECTOR: u64 = 512;
/// The most segments of one discard or write-zeroes request.
pub const MAX_RANGES: usize = 16;
/// The most data segments of one request, which is what drivers can use well.
const MAX_SEGMENTS: u16 = 254;
/// Offset of `writeback` (u8), the one field that drivers write.
pub const WRITEBACK_OFFSET: u64 = 32;
const LENGTH: usize = 96;

/// The features that a disk of this shape offers.
#[must_use]
pub fn features(geometry: &Geometry, queues: usize) -> u64 {
    let mut bits = 1 << feature::SEG_MAX
        | 1 << feature::BLK_SIZE
        | 1 << feature::FLUSH
        | 1 << feature::TOPOLOGY
        | 1 << feature::CONFIG_WCE;
    let mut offer = |feature: u32, wanted: bool| bits |= u64::from(wanted) << feature;
    offer(feature::MQ, queues > 1);
    offer(feature::RO, geometry.read_only);
    offer(feature::DISCARD, geometry.discard.is_some());
    offer(feature::WRITE_ZEROES, geometry.write_zeroes.is_some());
    bits
}

/// Data segments per request for queues of this size. A chain, also an indirect one, must not be longer than its queue
/// (§2.7.5.3.1), and header and status take a descriptor each: 254 fit a queue of 256.
#[must_use]
pub fn segments(queue_size: u16) -> u16 {
    queue_size.saturating_sub(2).clamp(1, MAX_SEGMENTS)
}

/// What changes in the configuration while the device lives, and what the queues make of it.
#[derive(Debug, Clone, Copy)]
pub struct Variable {
    /// Bytes.
    pub capacity: u64,
    /// Whether writes may stay in a volatile cache until a flush.
    pub writeback: bool,
    /// Number of queues.
    pub queues: u16,
    /// Size of each queue.
    pub queue_size: u16,
}

/// Fills `data` from the configuration at `offset`; bytes past its end are zero. Fields are filled whatever was
/// negotiated: drivers read them before.
pub fn read(geometry: &Geometry, variable: Variable, offset: u64, data: &mut [u8]) {
    let space = encode(geometry, variable);
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (position, byte) in data.iter_mut().enumerate() {
        *byte = start.checked_add(position).and_then(|at| space.get(at)).copied().unwrap_or(0);
    }
}

fn encode(geometry: &Geometry, variable: Variable) -> [u8; LENGTH] {
    let block = geometry.logical_block_size.max(1);
    let blocks16 = |bytes: u32| u16::try_from(bytes / block).unwrap_or(u16::MAX);
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
    let exponent = (geometry.physical_block_size / block).max(1).ilog2();
    let mut space = Writer { space: [0; LENGTH], at: 0 };
    space.put(&(variable.capacity / SECTOR).to_le_bytes());
    space.put(&0_u32.to_le_bytes()); // size_max: no limit, and not offered
    space.put(&u32::from(segments(variable.queue_size)).to_le_bytes());
    space.put(&[0; 4]); // cylinders, heads, sectors: nothing spins
    space.put(&geometry.logical_block_size.to_le_bytes());
    space.put(&[u8::try_from(exponent).unwrap_or(0)]);
    space.put(&[u8::try_from(geometry.alignment_offset / block).unwrap_or(0)]);
    space.put(&blocks16(geometry.min_io).to_le_bytes());
    space.put(&(geometry.opt_io / block).to_le_bytes());
    space.put(&[u8::from(variable.writeback), 0]);
    space.put(&variable.queues.to_le_bytes());
    for limits in [geometry.discard, geometry.write_zeroes] {
        let ranges = limits.map_or(0, |_| u32::try_from(MAX_RANGES).unwrap_or(1));
        space.put(&limits.map_or(0, |limits| sectors(limits.max_bytes)).to_le_bytes());
        space.put(&ranges.to_le_bytes());
        if space.at == 44 {
            let alignment = limits.map_or(0, |limits| u64::from(limits.granularity));
            space.put(&sectors(alignment).to_le_bytes());
        }
    }
    space.put(&[u8::from(geometry.discard.is_some() && geometry.write_zeroes.is_some())]); // write_zeroes_may_unmap
    space.space
}

struct Writer {
    space: [u8; LENGTH],
    at: usize,
}

impl Writer {
    fn put(&mut self, bytes: &[u8]) {
        if let Some(place) = self.space.get_mut(self.at..self.at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        self.at += bytes.len();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::backend::RangeLimits;
    use super::*;

    pub fn geometry() -> Geometry {
        Geometry {
            capacity: 1 << 30,
            logical_block_size: 512,
            physical_block_size: 4096,
            alignment_offset: 1024,
            min_io: 4096,
            opt_io: 1 << 20,
            rotational: false,
            read_only: false,
            discard: Some(RangeLimits { max_bytes: 1 << 20, granularity: 4096 }),
            write_zeroes: Some(RangeLimits { max_bytes: 2 << 20, granularity: 4096 }),
            memory_alignment: 1,
            offset_alignment: 1,
        }
    }

    fn variable() -> Variable {
        Variable { capacity: 1 << 30, writeback: true, queues: 3, queue_size: 256 }
    }

    fn field<const N: usize>(geometry: &Geometry, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        read(geometry, variable(), offset, &mut data);
        data
    }

    #[test]
    fn every_field_is_where_the_specification_puts_it() {
        let shape = geometry();
        let word = |offset| u32::from_le_bytes(field(&shape, offset));
        assert_eq!(u64::from_le_bytes(field(&shape, 0)), 1 << 21, "capacity");
        assert_eq!(word(12), 254, "seg_max");
        assert_eq!(word(20), 512, "blk_size");
        assert_eq!(field(&shape, 24), [3], "physical_block_exp");
        assert_eq!(field(&shape, 25), [2], "alignment_offset");
        assert_eq!(u16::from_le_bytes(field(&shape, 26)), 8, "min_io_size");
        assert_eq!(word(28), 2048, "opt_io_size");
        assert_eq!(field(&shape, WRITEBACK_OFFSET), [1], "writeback");
        assert_eq!(u16::from_le_bytes(field(&shape, 34)), 3, "num_queues");
        assert_eq!([36, 40, 44].map(word), [2048, 16, 8], "discard");
        assert_eq!([48, 52].map(word), [4096, 16], "write_zeroes");
        assert_eq!(field(&shape, 56), [1], "write_zeroes_may_unmap");
        assert_eq!(field(&shape, 57), [0; 64], "the end and what is past it");
        assert_eq!(field(&shape, u64::MAX), [0; 2]);
    }

    #[test]
    fn discard_and_write_zeroes_are_offered_only_with_limits() {
        let with = geometry();
        let without = Geometry { discard: None, write_zeroes: None, read_only: true, ..with };
        let bit = |feature: u32| 1_u64 << feature;
        assert_eq!(features(&with, 1) & bit(feature::DISCARD), bit(feature::DISCARD));
        let mask = bit(feature::DISCARD) | bit(feature::WRITE_ZEROES) | bit(feature::MQ) | bit(feature::RO);
        assert_eq!(features(&without, 2) & mask, bit(feature::RO) | bit(feature::MQ));
        assert_eq!(field(&without, 36), [0; 21]);
    }

    #[test]
    fn a_chain_with_all_segments_fits_its_queue() {
        for size in [4, 16, 128, 256, 1024] {
            assert!(segments(size) + 2 <= size, "queue of {size}");
        }
        assert_eq!(segments(256), 254);
    }
}
