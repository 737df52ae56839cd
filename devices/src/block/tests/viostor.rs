//! A driver that behaves as viostor does, behind the real transport: on a disk timeout it resets the device in mid-I/O, polls
//! the status until it reads zero, and uses the memory of every outstanding request for other things at once.

use super::memory::MemoryDisk;
use super::with_file::{SIZE, TempFile, direct_works};
use super::*;
use crate::bus::BusDevice;
use crate::interrupt::double::TestMsis;
use crate::pci::PciFunction;
use crate::virtio::double::{RAM_BASE, RAM_SIZE, VERSION_1};
use crate::virtio::pci::{DriverState, VirtioPci};

// Registers of the common configuration (virtio 1.2 §4.1.4.3), and where the notification registers begin.
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;
const NOTIFY: u64 = 0x4000;
/// ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
const READY: u8 = 1 | 2 | 8 | 4;

struct Viostor {
    driver: TestDriver,
    pci: VirtioPci,
    bar: Arc<dyn BusDevice>,
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
        let notifier = Arc::new(RecordedNotifier::default());
        // Nobody listens to the interrupts: this driver polls.
        let (msis, _) = TestMsis::new();
        let pci = VirtioPci::new("root".into(), Box::new(device), driver.memory(), &msis, notifier).unwrap();
        let bar = pci.bars().remove(0).device;
        Self { driver, pci, bar, arena }
    }

    fn set<const N: usize>(&self, register: u64, value: [u8; N]) {
        assert_eq!(self.bar.write(register, &value), None);
    }

    fn status(&self) -> u8 {
        let mut status = [0xff];
        self.bar.read(STATUS, &mut status);
        status[0]
    }

    /// From power-on or a reset to a running device with an empty ring.
    fn bring_up(&mut self, features: u64) {
        // The activation itself is the transport's to make; this one only empties the ring.
        drop(self.driver.activation(features));
        let (descriptors, available, used) = self.driver.ring(0).addresses();
        let size = self.driver.ring(0).size();
        self.set(STATUS, [1]);
        self.set(STATUS, [3]);
        let features = features | VERSION_1 | INDIRECT_DESC;
        for (select, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.set(DRIVER_FEATURE_SELECT, select.to_le_bytes());
            self.set(DRIVER_FEATURE, half.to_le_bytes());
        }
        self.set(STATUS, [11]);
        self.set(QUEUE_SELECT, [0; 2]);
        self.set(QUEUE_SIZE, size.to_le_bytes());
        self.set(QUEUE_DESC, descriptors.to_le_bytes());
        self.set(QUEUE_DRIVER, available.to_le_bytes());
        self.set(QUEUE_DEVICE, used.to_le_bytes());
        self.set(QUEUE_ENABLE, 1_u16.to_le_bytes());
        self.set(STATUS, [READY]);
        assert_eq!(self.status(), READY);
    }

    /// Where the parts of request `index` lie: every other one's data is misaligned. Data, header, status.
    fn places(&self, index: u64) -> (u64, u64, u64) {
        let base = self.arena + index * STRIDE;
        let shift = if index % 2 == 1 { 4 } else { 0 };
        (base + shift, base + LENGTH + 512, base + LENGTH + 512 + 16)
    }

    /// Makes a request available: reads and writes in turn, each of its own part of the disk.
    fn send(&mut self, index: u64, kind: u32) {
        let (data, header, status) = self.places(index);
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&(index * LENGTH / 512).to_le_bytes());
        self.driver.write(header, &raw);
        self.driver.write(status, &[0xaa]);
        let data = Buffer { address: data, length: LENGTH as u32, writable: kind == IN };
        let chain = [Buffer::readable(header, 16), data, Buffer::writable(status, 1)];
        self.driver.ring(0).add_indirect(&chain);
    }

    fn kick(&self) {
        self.set(NOTIFY, [0; 2]);
    }

    /// Writes zero to the status and polls until it reads zero, as a driver does before it touches the memory again.
    fn reset(&self) -> u64 {
        self.set(STATUS, [0]);
        let mut polls = 0;
        let end = std::time::Instant::now() + SOON;
        while self.status() != 0 {
            assert!(std::time::Instant::now() < end, "the reset never ends");
            polls += 1;
        }
        polls
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

    viostor.set(STATUS, [0]);
    let before = viostor.driver.read(RAM_BASE, RAM_SIZE);
    for _ in 0..1000 {
        assert_eq!(viostor.status(), READY, "requests are in flight");
    }
    assert!(viostor.driver.read(RAM_BASE, RAM_SIZE) == before, "the reset writes to memory by itself");
    assert_eq!(disk.pending(), REQUESTS as usize, "none was dropped: the disk will have its say");
    disk.hold(false);
    let end = std::time::Instant::now() + SOON;
    while viostor.status() != 0 {
        assert!(std::time::Instant::now() < end, "the reset never ends");
    }

    // From here on the memory is the driver's: rings, headers, data, status bytes.
    assert_eq!(viostor.pci.driver_state(), DriverState::Idle);
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
        viostor.bring_up(if round % 2 == 0 { FLUSH } else { FLUSH | crate::virtio::double::EVENT_IDX });
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
        in_mid_io += u64::from(viostor.reset() > 0);
        viostor.reuse(fill);
    }
    assert!(in_mid_io > 20, "only {in_mid_io} resets of 200 came in mid-I/O");
}
