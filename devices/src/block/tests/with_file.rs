//! With a real file and io_uring.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::*;
use crate::DeviceEvent;
use crate::block::{RescanError, feature};
use crate::virtio::double::EVENT_IDX;

pub const SIZE: u64 = 8 << 20;

/// A file that is removed at the end.
pub struct TempFile(PathBuf);

impl TempFile {
    pub fn new(bytes: u64) -> Self {
        Self::at(std::env::temp_dir(), bytes)
    }

    pub fn at(directory: impl Into<PathBuf>, bytes: u64) -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = directory.into().join(format!("rackvisor-block-{}-{number}", std::process::id()));
        File::create(&path).unwrap().set_len(bytes).unwrap();
        Self(path)
    }

    pub fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        File::open(&self.0).unwrap().read_exact_at(&mut data, offset).unwrap();
        data
    }

    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        OpenOptions::new().write(true).open(&self.0).unwrap().write_all_at(bytes, offset).unwrap();
    }

    pub fn options(&self) -> BlockOptions {
        BlockOptions { direct: Some(false), ..BlockOptions::new("root", &self.0) }
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

pub fn direct_works(path: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

#[test]
fn what_is_written_is_on_the_file_and_is_read_back() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(file.options()).unwrap().started(FLUSH);
    let bytes = pattern(1, 64 << 10);
    assert_eq!(bench.write(100, &bytes), ok(1));
    assert_eq!(bench.request(T_FLUSH, 0, &[]), ok(1));
    assert_eq!(file.bytes(100 * 512, bytes.len()), bytes);
    assert_eq!(bench.read(100, 64 << 10), (ok((64 << 10) + 1), bytes));
    assert_eq!(bench.read(SIZE / 512 - 1, 512), (ok(513), vec![0; 512]));
    assert_eq!(bench.metric("disk_requests", Some("read")), 2);
    assert_eq!(bench.metric("disk_request_seconds", Some("write")), 1);
    assert_eq!(bench.metric("disk_written_bytes", None), 64 << 10);
    assert_eq!(bench.metric("disk_read_bytes", None), (64 << 10) + 512);
}

#[test]
fn a_request_may_be_cut_into_descriptors_anywhere() {
    let file = TempFile::new(SIZE);
    for direct in [false, direct_works(&file.0)] {
        let options = BlockOptions { direct: Some(direct), ..file.options() };
        let mut bench = Bench::open(options).unwrap().started(FLUSH);
        let mut random = Random(7);
        for round in 0..200 {
            let bytes = pattern(round, 4096);
            let gap = u32::from(round % 2 == 0);
            let (header, data) = (bench.header, bench.data);
            for (kind, length) in [(OUT, 1), (IN, 4097)] {
                let pieces = cut(&mut random, Buffer { address: data, length: 4096, writable: kind == IN }, gap);
                if kind == OUT {
                    let mut left = bytes.as_slice();
                    for piece in &pieces {
                        let (now, later) = left.split_at(piece.length as usize);
                        bench.driver.write(piece.address, now);
                        left = later;
                    }
                }
                bench.header(kind, 8 * round);
                let mut chain = cut(&mut random, Buffer::readable(header, 16), 0);
                chain.extend(&pieces);
                chain.push(Buffer::writable(bench.status, 1));
                let ring = bench.driver.ring(0);
                let head = if kind == OUT { ring.add(&chain) } else { ring.add_indirect(&chain) };
                ring.kick();
                assert_eq!(bench.answer(0, head), ok(length));
                let seen = pieces.iter().flat_map(|piece| bench.driver.read(piece.address, piece.length as usize));
                assert_eq!(seen.collect::<Vec<_>>(), bytes);
                bench.driver.write(data, &[0; 8192]);
            }
            assert_eq!(file.bytes(4096 * round, 4096), bytes);
        }
        assert_eq!(bench.metric("disk_bounced_requests", None) > 0, direct, "direct: {direct}");
    }
}

/// Cuts a buffer into pieces that lie `gap` bytes apart.
fn cut(random: &mut Random, buffer: Buffer, gap: u32) -> Vec<Buffer> {
    let mut pieces = Vec::new();
    let (mut address, mut left) = (buffer.address, buffer.length);
    while left > 0 {
        let length = 1 + random.below(u64::from(left)) as u32;
        pieces.push(Buffer { address, length, ..buffer });
        address += u64::from(length + gap);
        left -= length;
    }
    pieces
}

#[test]
fn misaligned_buffers_of_any_number_and_size_go_through_direct_io() {
    let file = TempFile::new(SIZE);
    if !direct_works(&file.0) {
        eprintln!("SKIPPED: misaligned buffers: O_DIRECT does not work in {}", std::env::temp_dir().display());
        return;
    }
    let options = BlockOptions { direct: Some(true), ..file.options() };
    let mut bench = Bench::open(options).unwrap().started(FLUSH);
    // More at once than there are buffers to bounce through, and larger than one.
    let large = 160 << 10;
    let requests = 20_u64;
    let base = bench.driver.allocate(requests * (large + 512) + 1, 4096) + 1;
    let headers = bench.driver.allocate(requests * 16, 16);
    let statuses = bench.driver.allocate(requests, 1);
    for kind in [OUT, IN] {
        for i in 0..requests {
            let mut header = [0; 16];
            header[0] = kind as u8;
            header[8..].copy_from_slice(&(i * large / 512).to_le_bytes());
            bench.driver.write(headers + 16 * i, &header);
            let address = base + i * (large + 512);
            let fill = if kind == OUT { pattern(i, large as usize) } else { vec![0; large as usize] };
            bench.driver.write(address, &fill);
            let data = Buffer { address, length: large as u32, writable: kind == IN };
            let chain = [Buffer::readable(headers + 16 * i, 16), data, Buffer::writable(statuses + i, 1)];
            bench.driver.ring(0).stage(&chain);
        }
        bench.driver.ring(0).publish();
        bench.driver.ring(0).kick();
        for _ in 0..requests {
            bench.driver.ring(0).wait_used(SOON).expect("the disk answers");
        }
        assert_eq!(bench.driver.read(statuses, requests as usize), vec![0; requests as usize]);
    }
    for i in 0..requests {
        let expected = pattern(i, large as usize);
        assert!(bench.driver.read(base + i * (large + 512), large as usize) == expected, "request {i}");
        assert!(file.bytes(i * large, large as usize) == expected, "request {i} on the disk");
    }
}

#[test]
fn every_queue_works_at_the_same_time() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(BlockOptions { queues: 4, ..file.options() }).unwrap();
    assert_ne!(bench.device.features() & 1 << feature::MQ, 0);
    bench.start(FLUSH);
    for queue in 0..4 {
        let bytes = pattern(queue, 4096);
        bench.driver.write(bench.data, &bytes);
        let data = Buffer::readable(bench.data, 4096);
        let head = bench.send(queue as usize, OUT, queue * 8, &[data]);
        assert_eq!(bench.answer(queue as usize, head), ok(1));
        assert_eq!(file.bytes(queue * 4096, 4096), bytes);
    }
    let stopped = bench.stop();
    assert_eq!(stopped.iter().map(|queue| queue.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn a_driver_may_use_fewer_queues_than_there_are() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(BlockOptions { queues: 4, ..file.options() }).unwrap();
    let activation = bench.driver.activation_of(FLUSH | INDIRECT_DESC, &[1, 3]);
    bench.device.start(activation).unwrap();
    let head = bench.send(3, T_FLUSH, 0, &[]);
    assert_eq!(bench.answer(3, head), ok(1));
    assert_eq!(bench.stop().iter().map(|queue| queue.index).collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(file.options()).unwrap().started(FLUSH);
    let wanted = 1 << feature::DISCARD | 1 << feature::WRITE_ZEROES;
    assert_eq!(bench.device.features() & wanted, wanted);
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        assert_eq!(bench.write(0, &pattern(3, 64 << 10)), ok(1));
        assert_eq!(bench.ranges(kind, &[(8, 8, flags), (32, 16, flags), (40, 0, flags)]), ok(1));
        let mut expected = pattern(3, 64 << 10);
        expected[8 * 512..16 * 512].fill(0);
        expected[32 * 512..48 * 512].fill(0);
        assert!(file.bytes(0, 64 << 10) == expected, "type {kind}, flags {flags}");
    }
    assert_eq!(bench.metric("disk_requests", Some("discard")), 1);
    assert_eq!(bench.metric("disk_requests", Some("write_zeroes")), 2);
}

#[test]
fn a_read_only_disk_is_read_and_refuses_all_that_changes_it() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(BlockOptions { read_only: true, ..file.options() }).unwrap();
    let masked = 1 << feature::RO | 1 << feature::DISCARD | 1 << feature::WRITE_ZEROES;
    assert_eq!(bench.device.features() & masked, 1 << feature::RO);
    bench.start(FLUSH);
    assert_eq!(bench.write(0, &[1; 512]), REFUSED);
    assert_eq!(bench.ranges(DISCARD, &[(0, 8, 0)]), REFUSED);
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, 8, 0)]), REFUSED);
    assert_eq!(bench.request(T_FLUSH, 0, &[]), ok(1));
    assert_eq!(bench.read(0, 512), (ok(513), vec![0; 512]));
}

#[test]
fn a_second_writer_is_refused_and_readers_share() {
    let file = TempFile::new(SIZE);
    let writer = Bench::open(file.options()).unwrap();
    let readers = BlockOptions { read_only: true, ..file.options() };
    for options in [file.options(), readers.clone()] {
        let error = Bench::open(options).err().expect("the disk is locked");
        assert!(matches!(error, BlockError::Locked { .. }), "{error}");
        assert!(error.to_string().contains(file.0.to_str().unwrap()), "{error}");
    }
    drop(writer);
    let reader = Bench::open(readers.clone()).expect("a dropped disk is free at once");
    let other = Bench::open(readers).unwrap();
    assert!(matches!(Bench::open(file.options()), Err(BlockError::Locked { .. })));
    drop((reader, other));
    Bench::open(file.options()).unwrap();
}

#[test]
fn a_disk_that_grew_is_seen_at_once_and_one_that_shrank_keeps_its_size() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(file.options()).unwrap().started(FLUSH);
    let handle = bench.device.handle();
    assert_eq!(bench.write(SIZE / 512, &[1; 512]), REFUSED);
    OpenOptions::new().write(true).open(&file.0).unwrap().set_len(2 * SIZE + 100).unwrap();
    assert_eq!(handle.rescan().unwrap(), 2 * SIZE);
    assert_eq!(handle.geometry().capacity, 2 * SIZE);
    assert_eq!(bench.driver.signals().config_changes(), 1);
    assert!(bench.notifier.events().contains(&("root".into(), DeviceEvent::Resized { bytes: 2 * SIZE })));
    let mut capacity = [0; 8];
    bench.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2 * SIZE / 512);
    assert_eq!(bench.write(SIZE / 512, &[1; 512]), ok(1));
    assert_eq!(handle.rescan().unwrap(), 2 * SIZE, "nothing new");
    assert_eq!(bench.driver.signals().config_changes(), 1);
    OpenOptions::new().write(true).open(&file.0).unwrap().set_len(SIZE).unwrap();
    assert!(matches!(handle.rescan(), Err(RescanError::Shrunk { to: SIZE, .. })));
    assert_eq!(handle.geometry().capacity, 2 * SIZE);
    assert_eq!(bench.driver.signals().config_changes(), 1);
    assert_eq!(bench.read(SIZE / 512, 512).0, REFUSED, "what is no longer there is an error, not zeroes");
    assert_eq!(bench.metric("disk_errors", Some("read")), 1);
}

#[test]
fn the_guest_reads_a_stable_identity_of_twenty_bytes() {
    let file = TempFile::new(SIZE);
    for (serial, expected) in [(None, "root"), (Some("SN-0123456789ABCDEFG"), "SN-0123456789ABCDEFG")] {
        let options = BlockOptions { serial: serial.map(str::to_owned), ..file.options() };
        let mut bench = Bench::open(options).unwrap().started(FLUSH);
        assert_eq!(bench.device.handle().serial(), expected);
        let data = bench.data;
        assert_eq!(bench.request(GET_ID, 0, &[Buffer::writable(data, 20)]), ok(21));
        let mut identity = [0; 20];
        identity[..expected.len()].copy_from_slice(expected.as_bytes());
        assert_eq!(bench.driver.read(data, 20), identity);
        // Less room gets less, and more is left alone.
        bench.driver.write(data, &[7; 32]);
        assert_eq!(bench.request(GET_ID, 0, &[Buffer::writable(data, 2), Buffer::writable(data + 8, 1)]), ok(4));
        assert_eq!(bench.driver.read(data, 9), [identity[0], identity[1], 7, 7, 7, 7, 7, 7, identity[2]]);
        assert_eq!(bench.request(GET_ID, 0, &[Buffer::writable(data, 32)]), ok(21));
        assert_eq!(bench.driver.read(data + 19, 4), [identity[19], 7, 7, 7]);
    }
}

#[test]
fn rings_go_on_where_they_stopped_and_lose_no_request() {
    let file = TempFile::new(SIZE);
    for features in [FLUSH, FLUSH | EVENT_IDX] {
        let mut bench = Bench::open(BlockOptions { queue_size: 16, ..file.options() }).unwrap().started(features);
        for round in 0..50_u64 {
            let bytes = pattern(round, 512);
            assert_eq!(bench.write(round, &bytes), ok(1));
            let stopped = bench.stop();
            assert_eq!(stopped.len(), 1);
            assert!(bench.stop().is_empty(), "a stopped device has no queues to give back");
            // Made available while nobody works on the ring.
            let head = bench.send(0, IN, round, &[Buffer::writable(bench.data + 4096, 512)]);
            bench.resume(features, &stopped);
            assert_eq!(bench.answer(0, head), ok(513));
            assert_eq!(bench.driver.read(bench.data + 4096, 512), bytes);
        }
    }
}

#[test]
fn a_block_size_above_the_hosts_is_kept_to() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(BlockOptions { block_size: Some(4096), ..file.options() }).unwrap().started(FLUSH);
    let mut block_size = [0; 4];
    bench.device.read_config(20, &mut block_size);
    assert_eq!(u32::from_le_bytes(block_size), 4096);
    assert_eq!(bench.write(8, &pattern(1, 4096)), ok(1));
    assert_eq!(bench.write(8, &pattern(1, 512)), REFUSED);
    assert_eq!(bench.write(1, &pattern(1, 4096)), REFUSED);
    assert_eq!(bench.ranges(DISCARD, &[(8, 4, 0)]), REFUSED);
}

#[test]
fn a_path_that_is_no_disk_is_refused_with_a_remedy() {
    let error = |options: BlockOptions| Bench::open(options).err().expect("no disk").to_string();
    let file = TempFile::new(SIZE);
    let at = |path: &str| BlockOptions::new("root", path);
    assert!(error(at("/nowhere/disk.img")).contains("check the path"));
    assert!(error(at("/")).contains("a disk is a regular file or a block device"));
    assert!(error(at("/dev/null")).contains("is a character device"));
    let fifo = std::ffi::CString::new(format!("{}.fifo", file.0.display())).unwrap();
    make_fifo(&fifo);
    let path = fifo.to_str().unwrap();
    assert!(error(BlockOptions { read_only: true, ..at(path) }).contains("is a FIFO"));
    std::fs::remove_file(path).unwrap();
    for bytes in [0, 1, 511, 1000] {
        let file = TempFile::new(bytes);
        assert!(error(file.options()).contains(&format!("has {bytes} bytes")));
    }
    for block_size in [0, 256, 1000, 8192] {
        let options = BlockOptions { block_size: Some(block_size), ..file.options() };
        assert!(error(options).contains("cannot show blocks"), "{block_size}");
    }
    let wwid = Some("naa.6001405a1b2c3d4e".to_owned());
    let error_of_wwid = error(BlockOptions { wwid, ..file.options() });
    assert!(error_of_wwid.contains("is a file, which has no world-wide identifier"), "{error_of_wwid}");
    let key = std::num::NonZeroU64::new(0xabc).unwrap();
    let reservation = Some(crate::block::ReservationOptions { key, preempt: false, helper: None });
    assert!(
        error(BlockOptions { reservation: reservation.clone(), ..file.options() })
            .contains("has no persistent reservations")
    );
    assert!(error(BlockOptions { reservation, read_only: true, ..file.options() }).contains("needs no reservation"));
    assert!(error(BlockOptions { queues: 0, ..file.options() }).contains("0 queues"));
    assert!(error(BlockOptions { queue_size: 100, ..file.options() }).contains("power of two"));
    assert!(error(BlockOptions { serial: Some(String::new()), ..file.options() }).contains("printable"));
}

#[allow(unsafe_code)]
fn make_fifo(path: &std::ffi::CStr) {
    // SAFETY: the path is a C string.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
}

#[test]
fn threads_and_descriptors_go_with_the_device() {
    let file = TempFile::new(SIZE);
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.starts_with("leaves.q")).count()
    };
    for started in [false, true] {
        let options = BlockOptions { id: "leaves".into(), queues: 3, ..file.options() };
        let mut bench = Bench::open(options).unwrap();
        if started {
            bench.start(FLUSH);
            bench.write(0, &[1; 512]);
        }
        // A thread names itself, and leaves /proc a moment after it was joined.
        eventually(|| threads() == 3);
        let handle = bench.device.handle();
        drop(bench);
        eventually(|| threads() == 0);
        assert!(matches!(handle.rescan(), Err(RescanError::Closed { .. })));
        let held = std::fs::read_dir("/proc/self/fd").unwrap();
        let held = held.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()).filter(|link| *link == file.0);
        assert_eq!(held.count(), 0);
    }
}

#[test]
fn the_name_of_a_thread_keeps_its_queue() {
    let file = TempFile::new(SIZE);
    let id = "a-very-long-n\u{e4}me-of-a-disk";
    let bench = Bench::open(BlockOptions { id: id.into(), ..file.options() }).unwrap();
    eventually(|| {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let mut names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.any(|name| name.trim() == "a-very-long-.q0")
    });
    drop(bench);
}

#[test]
fn interrupts_come_only_when_the_driver_wants_them() {
    let file = TempFile::new(SIZE);
    for features in [FLUSH, FLUSH | EVENT_IDX] {
        let mut bench = Bench::open(file.options()).unwrap().started(features);
        bench.driver.ring(0).want_interrupts(false);
        for _ in 0..20 {
            assert_eq!(bench.request(T_FLUSH, 0, &[]), ok(1));
            bench.driver.ring(0).want_interrupts(false);
        }
        let stopped = bench.stop();
        assert_eq!(bench.driver.ring(0).interrupts(), 0, "none is wanted");
        bench.resume(features, &stopped);
        bench.driver.ring(0).want_interrupts(true);
        assert_eq!(bench.request(T_FLUSH, 0, &[]), ok(1));
        assert!(bench.driver.ring(0).wait_interrupt(SOON));
        bench.stop();
        assert_eq!(bench.driver.ring(0).interrupts(), 1);
        assert_eq!(bench.metric("disk_interrupts", None), 1);
    }
}

#[test]
fn without_flush_and_in_write_through_mode_writes_still_work() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(BlockOptions { writeback: false, ..file.options() }).unwrap().started(0);
    let mut writeback = [9];
    bench.device.read_config(32, &mut writeback);
    assert_eq!(writeback, [0]);
    assert_eq!(bench.write(0, &pattern(1, 4096)), ok(1));
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, 2, 0)]), ok(1));
    let mut expected = pattern(1, 4096);
    expected[..1024].fill(0);
    assert_eq!(file.bytes(0, 4096), expected);
    bench.device.write_config(32, &[1]);
    bench.device.write_config(32, &[7]);
    bench.device.write_config(0, &[7]);
    bench.device.read_config(32, &mut writeback);
    assert_eq!(writeback, [1]);
    bench.stop();
    bench.device.reset();
    bench.device.read_config(32, &mut writeback);
    assert_eq!(writeback, [0], "a reset forgets what the driver chose");
}

#[test]
fn a_read_that_the_file_ends_in_fails_and_says_so() {
    let file = TempFile::new(SIZE);
    let mut bench = Bench::open(file.options()).unwrap().started(FLUSH);
    OpenOptions::new().write(true).open(&file.0).unwrap().set_len(SIZE - 512).unwrap();
    assert_eq!(bench.read(SIZE / 512 - 2, 1024).0, REFUSED, "half of it is there: that is not success");
    let failed = |event: &DeviceEvent| matches!(event, DeviceEvent::IoError { errno: libc::EIO, .. });
    assert!(bench.notifier.wait(SOON, failed).is_some());
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_make_them() {
    // tmpfs punches holes, but has no other way to make zeroes than to write them.
    let file = TempFile::at("/dev/shm", SIZE);
    let mut bench = Bench::open(file.options()).unwrap().started(0);
    let large = 3 << 20;
    for (flags, sectors) in [(0, large / 512 - 16), (1, large / 512 - 16), (0, 1)] {
        OpenOptions::new().write(true).open(&file.0).unwrap().write_all_at(&vec![7; large], 0).unwrap();
        assert_eq!(bench.ranges(WRITE_ZEROES, &[(8, sectors as u32, flags)]), ok(1));
        let mut expected = vec![7; large];
        expected[8 * 512..(8 + sectors) * 512].fill(0);
        assert!(file.bytes(0, large) == expected, "{sectors} sectors, flags {flags}");
    }
}

#[test]
fn two_queues_full_of_requests_lose_no_kick_and_mix_up_no_data() {
    for (direct, features) in [(false, FLUSH), (true, FLUSH | EVENT_IDX)] {
        let file = TempFile::new(SIZE);
        let direct = direct && direct_works(&file.0);
        let options = BlockOptions { queues: 2, queue_size: 32, direct: Some(direct), ..file.options() };
        let mut bench = Bench::open(options).unwrap().started(features);
        let mut random = Random(99);
        // Each slot of a queue has its own sectors, header, status and data; `holds` is what its sectors hold.
        let slots = 10_usize;
        let base = bench.driver.allocate(2 * slots as u64 * 8192, 8192);
        let place = |queue: usize, slot: usize| base + 8192 * (queue * slots + slot) as u64;
        let mut holds = vec![vec![vec![0; 4096]; slots]; 2];
        let mut flying: Vec<Vec<(u16, usize, bool)>> = vec![Vec::new(); 2];
        for step in 0..6000_u64 {
            let queue = random.below(2) as usize;
            for (slot, held) in holds[queue].iter_mut().enumerate() {
                if flying[queue].iter().any(|(_, busy, _)| *busy == slot) || random.below(2) == 0 {
                    continue;
                }
                let writes = random.below(2) == 0;
                let at = place(queue, slot);
                let mut header = [0; 16];
                header[0] = u8::from(writes);
                header[8..].copy_from_slice(&(8 * (queue * slots + slot) as u64).to_le_bytes());
                bench.driver.write(at, &header);
                bench.driver.write(at + 16, &[0xaa]);
                if writes {
                    *held = pattern(step * 16 + slot as u64, 4096);
                    bench.driver.write(at + 4096, held);
                } else {
                    bench.driver.write(at + 4096, &[0xee; 4096]);
                }
                let data = Buffer { address: at + 4096, length: 4096, writable: !writes };
                let chain = [Buffer::readable(at, 16), data, Buffer::writable(at + 16, 1)];
                let head = bench.driver.ring(queue).stage(&chain);
                flying[queue].push((head, slot, writes));
            }
            bench.driver.ring(queue).publish();
            bench.driver.ring(queue).kick();
            for _ in 0..random.below(flying[queue].len() as u64 + 1) {
                let used = bench.driver.ring(queue).wait_used(SOON).expect("no kick is lost");
                let index = flying[queue].iter().position(|(head, _, _)| *head == used.head).expect("a head in flight");
                let (_, slot, writes) = flying[queue].swap_remove(index);
                let at = place(queue, slot);
                assert_eq!(bench.driver.read(at + 16, 1), [STATUS_OK]);
                assert_eq!(used.length, if writes { 1 } else { 4097 });
                assert!(bench.driver.read(at + 4096, 4096) == holds[queue][slot], "step {step}");
            }
        }
        for (queue, left) in flying.iter().enumerate() {
            for _ in left {
                bench.driver.ring(queue).wait_used(SOON).expect("no kick is lost");
            }
        }
        for (queue, stopped) in bench.stop().iter().enumerate() {
            assert_eq!(stopped.state.next_avail, stopped.state.next_used);
            let ring = bench.driver.ring(queue);
            assert_eq!((ring.take_used(), ring.free_descriptors()), (None, 32));
        }
        let kicks = bench.driver.ring(0).kicks() + bench.driver.ring(1).kicks();
        assert!(bench.metric("disk_requests", None) > kicks, "{kicks} kicks are too many");
    }
}
