//! Chains at the edges of what is legal: empty pieces, huge ones, blocks of 4096 bytes, ranges beyond the limits.

use super::memory::MemoryDisk;
use super::with_file::{SIZE, TempFile};
use super::*;
use crate::block::{Geometry, Operation, RangeLimits};

const BLOCK: u64 = 4096;

/// A disk with blocks of 4096 bytes and 64 KiB as the largest range.
fn native_4k(bytes: usize) -> MemoryDisk {
    let limits = Some(RangeLimits { max_bytes: 64 << 10, granularity: BLOCK as u32 });
    MemoryDisk::with_geometry(bytes, |geometry| Geometry {
        logical_block_size: BLOCK as u32,
        physical_block_size: BLOCK as u32,
        alignment_offset: 0,
        discard: limits,
        write_zeroes: limits,
        ..geometry
    })
}

#[test]
fn descriptors_of_length_zero_are_nothing_wherever_they_stand() {
    let disk = MemoryDisk::new(1 << 20);
    let mut bench = disk.bench(BlockOptions::new("root", "")).started(FLUSH);
    let (header, data, status) = (bench.header, bench.data, bench.status);
    let nothing = Buffer::readable(data, 0);
    let nowhere = Buffer::readable(u64::MAX, 0);
    for indirect in [false, true] {
        for kind in [OUT, IN] {
            let bytes = pattern(u64::from(kind), 1024);
            if kind == OUT {
                bench.driver.write(data, &bytes);
            }
            bench.header(kind, 2);
            let writable = kind == IN;
            let half = |at: u64| Buffer { address: data + at, length: 512, writable };
            let none = Buffer { writable, ..nothing };
            let chain = [
                nothing,
                Buffer::readable(header, 7),
                nowhere,
                Buffer::readable(header + 7, 9),
                nothing,
                half(0),
                none,
                half(512),
                Buffer::writable(data, 0),
                Buffer::writable(status, 1),
                Buffer::writable(u64::MAX, 0),
            ];
            let ring = bench.driver.ring(0);
            let head = if indirect { ring.add_indirect(&chain) } else { ring.add(&chain) };
            ring.kick();
            let length = if kind == IN { 1025 } else { 1 };
            assert_eq!(bench.answer(0, head), ok(length), "indirect: {indirect}, type {kind}");
        }
    }
    let transfers: Vec<_> = disk.seen().iter().map(|(_, offset, length)| (*offset, *length)).collect();
    assert_eq!(transfers, [(1024, 1024); 4]);
}

#[test]
fn a_request_without_data_does_nothing_and_succeeds() {
    let disk = MemoryDisk::new(1 << 20);
    let mut bench = disk.bench(BlockOptions::new("root", "")).started(FLUSH);
    let data = bench.data;
    for kind in [IN, OUT] {
        assert_eq!(bench.request(kind, 0, &[]), ok(1));
        assert_eq!(bench.request(kind, 0, &[Buffer { address: data, length: 0, writable: kind == IN }]), ok(1));
    }
    assert!(disk.seen().is_empty());
}

#[test]
fn a_transfer_of_more_than_the_kernel_does_at_once_is_done_to_its_end() {
    // Holes of tmpfs cost no memory to read. Linux moves at most 0x7ffff000 bytes with one system call.
    let length = 16 << 20;
    let pieces = 129_u64;
    let bytes = pieces * length;
    let file = TempFile::at("/dev/shm", bytes + 512);
    file.fill(bytes - 512, &pattern(5, 1024));
    let mut bench = Bench::open(file.options()).unwrap();
    let large = bench.driver.allocate(length, 4096);
    bench.start(FLUSH);
    let chain = vec![Buffer::writable(large, length as u32); pieces as usize];
    assert_eq!(bench.request(IN, 0, &chain), ok(bytes as u32 + 1));
    // Each piece names the same memory: the last one has the end of the disk in it.
    assert_eq!(bench.driver.read(large + length - 512, 512), pattern(5, 1024)[..512]);
    assert_eq!(bench.metric("disk_read_bytes", None), bytes);
    // One sector further, and it is past the end.
    assert_eq!(bench.request(IN, 2, &chain), REFUSED);
}

#[test]
fn as_many_segments_as_the_configuration_says_are_one_request() {
    let disk = MemoryDisk::new(1 << 20);
    let mut bench = disk.bench(BlockOptions::new("root", "")).started(FLUSH);
    let mut segments = [0; 4];
    bench.device.read_config(12, &mut segments);
    assert_eq!(u32::from_le_bytes(segments), 254);
    // Back to front, so that none goes on where another ended.
    let bytes = pattern(9, 254 * 512);
    let pieces: Vec<_> = (0..254).rev().map(|i| Buffer::readable(bench.data + 512 * i, 512)).collect();
    for (piece, sector) in pieces.iter().zip(bytes.chunks(512)) {
        bench.driver.write(piece.address, sector);
    }
    assert_eq!(bench.request(OUT, 0, &pieces), ok(1));
    assert!(disk.bytes(0, bytes.len()) == bytes);
    assert_eq!(disk.seen().len(), 1);
}

#[test]
fn a_disk_of_4096_byte_blocks_takes_whole_blocks_only() {
    let disk = native_4k(1 << 20);
    let mut bench = disk.bench(BlockOptions::new("root", "")).started(FLUSH);
    let mut blocks = [0; 4];
    bench.device.read_config(20, &mut blocks);
    assert_eq!(u32::from_le_bytes(blocks), 4096);
    for sector in 1..8 {
        assert_eq!(bench.write(sector, &[1; 4096]), REFUSED, "sector {sector}");
        assert_eq!(bench.read(sector, 4096).0, REFUSED, "sector {sector}");
        assert_eq!(bench.read(0, 512 * sector as u32).0, REFUSED, "{sector} sectors");
        assert_eq!(bench.ranges(DISCARD, &[(sector, 8, 0)]), REFUSED);
        assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, sector as u32, 0)]), REFUSED);
    }
    assert!(disk.seen().is_empty());
    let bytes = pattern(2, 8192);
    assert_eq!(bench.write(8, &bytes), ok(1));
    assert_eq!(bench.read(8, 8192), (ok(8193), bytes));
    assert_eq!(bench.write((1 << 20) / 512 - 8, &[1; 4096]), ok(1), "the last block");
}

#[test]
fn a_range_of_eight_times_the_limit_reaches_the_disk_whole() {
    // As drivers of disks with 4096-byte blocks ask for it: they take the limit for blocks where it counts sectors.
    let disk = native_4k(4 << 20);
    let mut bench = disk.bench(BlockOptions::new("root", "")).started(FLUSH);
    let mut limit = [0; 4];
    bench.device.read_config(36, &mut limit);
    let limit = u32::from_le_bytes(limit);
    assert_eq!(limit, 128);
    disk.fill(0xaa);
    assert_eq!(bench.ranges(DISCARD, &[(8, 8 * limit, 0)]), ok(1));
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(8, 8 * limit, 1)]), ok(1));
    let length = 8 * u64::from(limit) * 512;
    let done = |wanted: fn(&Operation) -> bool| {
        let seen = disk.seen();
        seen.iter().filter(|(operation, _, _)| wanted(operation)).map(|(_, _, length)| length).sum::<u64>()
    };
    assert_eq!(done(|operation| *operation == Operation::Discard), length);
    assert_eq!(done(|operation| matches!(operation, Operation::WriteZeroes { .. })), length);
    assert!(disk.bytes(0, 4096).iter().all(|byte| *byte == 0xaa), "before it");
    assert!(disk.bytes(4096, length as usize).iter().all(|byte| *byte == 0));
    assert!(disk.bytes(4096 + length, 4096).iter().all(|byte| *byte == 0xaa), "behind it");
}

#[test]
fn a_file_is_discarded_in_pieces_of_the_limit_up_to_eight_times_as_far() {
    const GIB: u64 = 1 << 30;
    let file = TempFile::at("/dev/shm", 9 * GIB);
    let mut bench = Bench::open(file.options()).unwrap().started(FLUSH);
    let mut limit = [0; 4];
    bench.device.read_config(36, &mut limit);
    assert_eq!(u64::from(u32::from_le_bytes(limit)) * 512, GIB);
    let marks: Vec<u64> = (0..8).map(|n| n * GIB + SIZE).chain([GIB - 4096, 8 * GIB - 4096]).collect();
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 1)] {
        for mark in marks.iter().chain(&[0, 8 * GIB + BLOCK]) {
            file.fill(*mark, &[7; 4096]);
        }
        assert_eq!(bench.ranges(kind, &[(8, (8 * GIB / 512) as u32, flags)]), ok(1));
        for mark in &marks {
            assert_eq!(file.bytes(*mark, 4096), [0; 4096], "type {kind} at {mark}");
        }
        assert_eq!(file.bytes(0, 4096), [7; 4096], "before it");
        assert_eq!(file.bytes(8 * GIB + BLOCK, 4096), [7; 4096], "behind it");
    }
}
