//! A model of viostor, behind the real transport and a PCI bus (PLATFORM §1, §2; virtio_stor.c): which features it takes, how its queues
//! and vectors go together, how it changes its power state, writes a crash dump, and resets a disk in mid-I/O, after which it uses
//! the memory of every outstanding request for other things at once.

use super::memory::MemoryDisk;
use super::with_file::{SIZE, TempFile, direct_works};
use super::*;
use crate::virtio::double::windows::{Computer, Library, NO_VECTOR};
use crate::virtio::double::{EVENT_IDX, RAM_BASE, RAM_SIZE, VERSION_1};
use crate::virtio::pci::DriverState;

const SLOT: u8 = 4;
const BAR: u64 = 0x8_0000_0000;
/// ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
const READY: u8 = 1 | 2 | 8 | 4;
/// Features that viostor takes where they are offered: SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, CONFIG_WCE, MQ, DISCARD,
/// WRITE_ZEROES; indirect descriptors, event indexes, IOMMU, packed rings.
const KNOWN: u64 = 1 << 1
    | 1 << 2
    | 1 << 4
    | 1 << feature::RO
    | 1 << 6
    | FLUSH
    | 1 << 11
    | 1 << feature::MQ
    | 1 << feature::DISCARD
    | 1 << feature::WRITE_ZEROES
    | INDIRECT_DESC
    | EVENT_IDX
    | 1 << 33
    | 1 << 34;

struct Viostor {
    driver: TestDriver,
    library: Library,
    /// Header, data and status of all requests.
    arena: u64,
}

/// Requests at once, and bytes of each.
const REQUESTS: u64 = 32;
const LENGTH: u64 = 64 << 10;
/// Each request has its data, 512 bytes that shift the next one's, its header and its status.
const STRIDE: u64 = LENGTH + 512 + 4096;
const ARENA: u64 = REQUESTS * STRIDE;

impl Viostor {
    fn new(device: VirtioBlock) -> Self {
        let mut driver = TestDriver::new(device.queue_sizes());
        let arena = driver.allocate(ARENA, 4096);
        let library = Library::attach(&Computer::new(), SLOT, BAR, Box::new(device), &driver);
        Self { driver, library, arena }
    }

    /// From power-on or a reset to a running device with empty rings, for its queues with their vectors; gives what was agreed on.
    fn start(&mut self, known: u64, queues: &[(u16, u16)]) -> u64 {
        let agreed = self.library.negotiate(known | INDIRECT_DESC);
        // The activation itself is the transport's to make; this one only empties the rings.
        drop(self.driver.activation(agreed));
        self.library.set_up(&mut self.driver, queues);
        self.library.ready();
        agreed
    }

    /// The same with one queue and no interrupts: this driver polls.
    fn bring_up(&mut self, features: u64) {
        self.start(features, &[(0, NO_VECTOR)]);
    }

    /// Where the parts of request `index` lie: every other one's data is misaligned. Data, header, status.
    fn places(&self, index: u64) -> (u64, u64, u64) {
        let base = self.arena + index * STRIDE;
        let shift = if index % 2 == 1 { 4 } else { 0 };
        (base + shift, base + LENGTH + 512, base + LENGTH + 512 + 16)
    }

    /// Makes a request available: reads and writes in turn, each of its own part of the disk.
    fn send(&mut self, index: u64, kind: u32) {
        self.send_to(0, index, kind);
    }

    fn send_to(&mut self, queue: usize, index: u64, kind: u32) {
        let (data, header, status) = self.places(index);
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&(index * LENGTH / 512).to_le_bytes());
        self.driver.write(header, &raw);
        self.driver.write(status, &[0xaa]);
        let data = Buffer { address: data, length: LENGTH as u32, writable: kind == IN };
        let chain = [Buffer::readable(header, 16), data, Buffer::writable(status, 1)];
        self.driver.ring(queue).add_indirect(&chain);
    }

    fn kick(&self) {
        self.library.kick_always(0);
    }

    fn reuse(&self, fill: u8) {
        self.driver.write(self.arena, &vec![fill; ARENA as usize]);
    }

    fn is_untouched(&self, fill: u8) -> bool {
        self.driver.read(self.arena, ARENA as usize).iter().all(|byte| *byte == fill)
    }

    /// A flush through the ring: whatever the worker still had to do is done when it is answered.
    fn flush(&mut self, header: u64) {
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&T_FLUSH.to_le_bytes());
        self.driver.write(header, &raw);
        self.driver.ring(0).add(&[Buffer::readable(header, 16), Buffer::writable(header + 16, 1)]);
        self.kick();
        self.driver.ring(0).wait_used(SOON).expect("the disk answers");
        assert_eq!(self.driver.read(header + 16, 1), [STATUS_OK]);
    }
}

#[test]
fn a_reset_in_mid_io_reads_non_zero_until_nothing_can_reach_the_drivers_memory_any_more() {
    let disk = MemoryDisk::new(4 << 20);
    let notifier = Arc::new(RecordedNotifier::default());
    let device = disk.device(&BlockOptions::new("root", ""), notifier);
    let mut viostor = Viostor::new(device);
    let flush_header = viostor.driver.allocate(32, 16);
    viostor.bring_up(FLUSH);
    disk.hold(true);
    viostor.reuse(0x11);
    for index in 0..REQUESTS {
        viostor.send(index, if index % 4 < 2 { IN } else { OUT });
    }
    viostor.kick();
    eventually(|| disk.pending() == REQUESTS as usize);

    viostor.library.begin_reset();
    let before = viostor.driver.read(RAM_BASE, RAM_SIZE);
    for _ in 0..1000 {
        assert_eq!(viostor.library.status(), READY, "requests are in flight");
    }
    assert!(viostor.driver.read(RAM_BASE, RAM_SIZE) == before, "the reset writes to memory by itself");
    assert_eq!(disk.pending(), REQUESTS as usize, "none was dropped: the disk will have its say");
    disk.hold(false);
    let end = std::time::Instant::now() + SOON;
    while viostor.library.status() != 0 {
        assert!(std::time::Instant::now() < end, "the reset never ends");
    }

    // From here on the memory is the driver's: rings, headers, data, status bytes.
    assert_eq!(viostor.library.pci.driver_state(), DriverState::Idle);
    viostor.reuse(0x22);
    viostor.bring_up(FLUSH);
    viostor.flush(flush_header);
    assert!(viostor.is_untouched(0x22), "late DMA");
    assert_eq!(viostor.driver.ring(0).used_index(), 1, "the new ring has only what the new driver asked for");
    // What was written before the reset came from the memory as it was then.
    for index in 0..REQUESTS {
        let written = disk.bytes(index * LENGTH, LENGTH as usize);
        let expected = if index % 4 < 2 { 0 } else { 0x11 };
        assert!(written.iter().all(|byte| *byte == expected), "request {index}");
    }
}

#[test]
fn resets_at_any_moment_of_real_io_leave_reused_memory_alone() {
    let file = TempFile::new(SIZE);
    let direct = direct_works(&file.options().path);
    let options = BlockOptions { direct: Some(direct), queue_size: 64, ..file.options() };
    let notifier = Arc::new(RecordedNotifier::default());
    let device = VirtioBlock::new(options, &PlainThreads, notifier).unwrap();
    let mut viostor = Viostor::new(device);
    let flush_header = viostor.driver.allocate(32, 16);
    let mut random = Random(0x7105);
    let mut in_mid_io = 0;
    for round in 0..200_u64 {
        viostor.bring_up(if round % 2 == 0 { FLUSH } else { FLUSH | EVENT_IDX });
        viostor.flush(flush_header);
        let fill = round as u8;
        assert!(round == 0 || viostor.is_untouched(fill.wrapping_sub(1)), "late DMA in round {round}");
        for index in 0..REQUESTS {
            viostor.send(index, if random.below(2) == 0 { IN } else { OUT });
        }
        viostor.kick();
        for _ in 0..random.below(2000) {
            std::hint::spin_loop();
        }
        in_mid_io += u64::from(viostor.library.reset() > 0);
        viostor.reuse(fill);
    }
    assert!(in_mid_io > 20, "only {in_mid_io} resets of 200 came in mid-I/O");
}

#[test]
fn viostor_takes_all_features_that_it_knows_and_each_queue_interrupts_by_its_own_vector() {
    let disk = MemoryDisk::new(4 << 20);
    let options = BlockOptions { queues: 2, ..BlockOptions::new("root", "") };
    let mut viostor = Viostor::new(disk.device(&options, Arc::default()));
    viostor.library.connect_interrupts(3);
    viostor.library.negotiate(KNOWN);
    let word = |offset| u32::from_le_bytes(viostor.library.config(offset));
    // Its largest transfer is a page less than that many, and Server 2025 stops with limits of zero.
    assert!(word(12) >= 254, "seg_max {}", word(12));
    assert_eq!(word(20), 512, "blk_size");
    assert!([36, 40, 44, 48, 52].into_iter().all(|limit| word(limit) > 0));
    assert_eq!(viostor.library.config(34), 2_u16.to_le_bytes(), "num_queues");
    assert_eq!(viostor.library.queues(), 2);
    viostor.library.set_config_vector(0);
    let agreed = viostor.start(KNOWN, &[(0, 1), (1, 2)]);
    let wanted = 1 << 2 | 1 << 6 | FLUSH | 1 << 11 | 1 << feature::MQ | INDIRECT_DESC | EVENT_IDX | VERSION_1;
    assert_eq!(agreed & wanted, wanted);
    viostor.reuse(0x33);
    for queue in [1, 0] {
        viostor.send_to(queue.into(), queue.into(), OUT);
        viostor.library.kick(&mut viostor.driver, queue);
        viostor.library.wait_interrupt(queue + 1);
        assert!(viostor.driver.ring(queue.into()).take_used().is_some());
        assert_eq!(disk.bytes(u64::from(queue) * LENGTH, 4), [0x33; 4]);
    }
    assert!(!viostor.library.interrupted(0), "nothing has changed");
    assert_eq!(viostor.library.computer.rung(), 2, "kicks leave the guest by ioeventfd");
}

#[test]
fn with_fewer_vectors_than_queues_viostor_uses_one_of_each() {
    let disk = MemoryDisk::new(4 << 20);
    let options = BlockOptions { queues: 4, ..BlockOptions::new("root", "") };
    let mut viostor = Viostor::new(disk.device(&options, Arc::default()));
    viostor.library.connect_interrupts(1);
    viostor.start(KNOWN, &[(0, 0)]);
    viostor.library.set_config_vector(0);
    viostor.reuse(0x44);
    for index in 0..REQUESTS {
        viostor.send(index, OUT);
        viostor.library.kick(&mut viostor.driver, 0);
        viostor.library.wait_interrupt(0);
        assert!(viostor.driver.ring(0).take_used().is_some());
        viostor.driver.ring(0).want_interrupts(true);
    }
    assert_eq!(disk.bytes((REQUESTS - 1) * LENGTH, 4), [0x44; 4]);
}

#[test]
fn viostor_hears_of_a_disk_that_has_grown() {
    let file = TempFile::new(SIZE);
    let device = VirtioBlock::new(file.options(), &PlainThreads, Arc::<RecordedNotifier>::default()).unwrap();
    let handle = device.handle();
    let mut viostor = Viostor::new(device);
    viostor.library.connect_interrupts(2);
    viostor.start(KNOWN, &[(0, 1)]);
    viostor.library.set_config_vector(0);
    std::fs::OpenOptions::new().write(true).open(file.options().path).unwrap().set_len(2 * SIZE).unwrap();
    handle.rescan().unwrap();
    viostor.library.wait_interrupt(0);
    assert_eq!(u64::from_le_bytes(viostor.library.config(0)), 2 * SIZE / 512);
}

#[test]
fn a_crash_dump_is_written_by_polling_one_queue_over_the_ruins_of_the_others() {
    let disk = MemoryDisk::new(4 << 20);
    let options = BlockOptions { queues: 2, ..BlockOptions::new("root", "") };
    let mut viostor = Viostor::new(disk.device(&options, Arc::default()));
    viostor.library.connect_interrupts(3);
    viostor.start(KNOWN, &[(0, 1), (1, 2)]);
    disk.hold(true);
    viostor.reuse(0x55);
    for index in 0..REQUESTS {
        viostor.send_to((index % 2) as usize, index, OUT);
    }
    viostor.library.kick_always(0);
    viostor.library.kick_always(1);
    eventually(|| disk.pending() == REQUESTS as usize);
    disk.hold(false);

    // The dump driver knows nothing of what was, and the rest of the system stands still.
    let flush_header = viostor.driver.allocate(32, 16);
    viostor.library.reset();
    for vector in 0..3 {
        viostor.library.interrupted(vector);
    }
    viostor.start(KNOWN & !(1 << feature::MQ), &[(0, NO_VECTOR)]);
    viostor.reuse(0x66);
    for index in 0..REQUESTS {
        viostor.send(index, OUT);
        viostor.library.kick(&mut viostor.driver, 0);
        assert!(viostor.driver.ring(0).wait_used(SOON).is_some(), "request {index} of the dump");
    }
    viostor.flush(flush_header);
    assert!(disk.bytes(0, (REQUESTS * LENGTH) as usize).iter().all(|byte| *byte == 0x66));
    assert!((0..3).all(|vector| !viostor.library.interrupted(vector)), "nobody is there to take an interrupt");
}

#[test]
fn viostor_finds_its_disk_as_it_was_after_each_change_of_its_power_state() {
    let disk = MemoryDisk::new(4 << 20);
    let options = BlockOptions { queues: 2, ..BlockOptions::new("root", "") };
    let mut viostor = Viostor::new(disk.device(&options, Arc::default()));
    let mut agreed = None;
    for round in 1..=3 {
        // To D0, from D3 or from a hibernation, whose loader has used the disk in its own way.
        viostor.library.connect_interrupts(3);
        viostor.library.set_config_vector(0);
        let again = viostor.start(KNOWN, &[(0, 1), (1, 2)]);
        assert_eq!(*agreed.get_or_insert(again), again);
        viostor.reuse(round);
        for queue in [0, 1] {
            viostor.send_to(queue.into(), queue.into(), OUT);
            viostor.library.kick(&mut viostor.driver, queue);
            viostor.library.wait_interrupt(queue + 1);
            assert_eq!(disk.bytes(u64::from(queue) * LENGTH, 2), [round; 2]);
        }
        assert_eq!((viostor.driver.ring(0).used_index(), viostor.driver.ring(1).used_index()), (1, 1));
        // To D3: vectors are taken away after the device has been reset.
        viostor.library.reset();
        viostor.library.connect_interrupts(0);
        assert_eq!(viostor.library.isr(), 0);
    }
}

#[test]
fn a_disk_that_moves_in_mid_io_is_found_at_its_new_place_and_loses_nothing() {
    let disk = MemoryDisk::new(4 << 20);
    let mut viostor = Viostor::new(disk.device(&BlockOptions::new("root", ""), Arc::default()));
    let computer = Arc::clone(&viostor.library.computer);
    let rng = crate::virtio::rng::VirtioRng::new("rng", &PlainThreads, Arc::<RecordedNotifier>::default()).unwrap();
    let mut other = TestDriver::new(rng.queue_sizes());
    let mut neighbour = Library::attach(&computer, SLOT + 1, BAR + 0x1_0000, Box::new(rng), &other);
    viostor.library.connect_interrupts(2);
    viostor.start(KNOWN, &[(0, 1)]);
    neighbour.negotiate(INDIRECT_DESC);
    drop(other.activation(INDIRECT_DESC));
    neighbour.set_up(&mut other, &[(0, NO_VECTOR)]);
    neighbour.ready();
    let bytes = other.allocate(64, 1);
    viostor.reuse(0x77);
    for round in 0..8_u64 {
        disk.hold(true);
        viostor.send(round, OUT);
        viostor.library.kick(&mut viostor.driver, 0);
        eventually(|| disk.pending() == 1);
        // PnP asks for sizes and moves both, one over the place of the other, with a request in flight.
        assert_eq!((computer.size(SLOT), computer.size(SLOT + 1)), (0x1_0000, 0x1_0000));
        let base = BAR + 0x80_0000 * (round + 1);
        let old = viostor.library.bar();
        computer.place(SLOT, base);
        computer.place(SLOT + 1, old);
        viostor.library.moved();
        neighbour.moved();
        assert_eq!(computer.doorbells(), [old + 0x4000, base + 0x4000], "kicks move with their BARs");
        disk.hold(false);
        viostor.library.wait_interrupt(1);
        assert!(viostor.driver.ring(0).take_used().is_some());
        viostor.driver.ring(0).want_interrupts(true);
        other.ring(0).add(&[Buffer::writable(bytes, 64)]);
        neighbour.kick(&mut other, 0);
        assert_eq!(other.ring(0).wait_used(SOON).unwrap().length, 64);
        assert_eq!(viostor.library.status(), READY);
        assert_eq!(disk.bytes(round * LENGTH, 2), [0x77; 2]);
    }
    // An operating system that stops its driver first starts it anew at the new place.
    viostor.library.reset();
    computer.place(SLOT, BAR + 0x1000_0000);
    viostor.library.moved();
    viostor.start(KNOWN, &[(0, 1)]);
    viostor.send(20, OUT);
    viostor.library.kick(&mut viostor.driver, 0);
    viostor.library.wait_interrupt(1);
    assert_eq!(disk.bytes(20 * LENGTH, 2), [0x77; 2]);
}
