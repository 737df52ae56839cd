//! The firmware's side of the flash memory.

mod kills;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use vm_memory::MmapRegion;

use super::*;
use crate::PlainThreads;

const SIZE: usize = 4 * BLOCK;

/// Remembers what the guest can read by itself.
#[derive(Default)]
struct Mapping {
    readable: AtomicBool,
    changes: AtomicU32,
}

impl FlashMapping for Arc<Mapping> {
    fn set_readable(&self, readable: bool) -> io::Result<()> {
        self.readable.store(readable, Ordering::Relaxed);
        self.changes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A store that does what the test says.
struct Store {
    content: Arc<Mutex<Vec<u8>>>,
    writes: Arc<AtomicU32>,
    failing: Arc<AtomicBool>,
    /// One message lets one write through.
    gate: Option<Receiver<()>>,
}

impl FlashStore for Store {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some(gate) = &self.gate {
            let _ = gate.recv();
        }
        if self.failing.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let start = usize::try_from(offset).unwrap();
        self.content.lock().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
        self.writes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Default)]
struct Events(Mutex<Vec<DeviceEvent>>);

impl DeviceNotifier for Events {
    fn notify(&self, device: &str, event: DeviceEvent) {
        assert_eq!(device, DEVICE);
        self.0.lock().unwrap().push(event);
    }
}

struct Bench {
    flash: Flash,
    mapping: Arc<Mapping>,
    content: Arc<Mutex<Vec<u8>>>,
    writes: Arc<AtomicU32>,
    failing: Arc<AtomicBool>,
    events: Arc<Events>,
}

impl Bench {
    fn new() -> Self {
        Self::with_gate(None)
    }

    fn with_gate(gate: Option<Receiver<()>>) -> Self {
        let content = Arc::new(Mutex::new(vec![0xff; SIZE]));
        let (writes, failing) = (Arc::<AtomicU32>::default(), Arc::<AtomicBool>::default());
        let store =
            Store { content: Arc::clone(&content), writes: Arc::clone(&writes), failing: Arc::clone(&failing), gate };
        let array = Arc::new(MmapRegion::new(SIZE).unwrap());
        array.as_volatile_slice().write_slice(&[0xff; SIZE], 0).unwrap();
        let (mapping, events) = (Arc::<Mapping>::default(), Arc::<Events>::default());
        let notifier = Arc::clone(&events) as _;
        let flash =
            Flash::new(array, Box::new(Arc::clone(&mapping)), Box::new(store), &PlainThreads, notifier).unwrap();
        Self { flash, mapping, content, writes, failing, events }
    }

    fn write(&self, offset: u64, byte: u8) {
        assert_eq!(self.flash.write(offset, &[byte]), None);
    }

    fn read(&self, offset: u64) -> u8 {
        let mut data = [0];
        self.flash.read(offset, &mut data);
        data[0]
    }

    fn program(&self, offset: u64, bytes: &[u8]) {
        for (offset, byte) in (offset..).zip(bytes) {
            self.write(offset, 0x10);
            self.write(offset, *byte);
        }
    }

    fn stored(&self, offset: usize) -> u8 {
        self.content.lock().unwrap()[offset]
    }

    fn events(&self) -> Vec<DeviceEvent> {
        std::mem::take(&mut self.events.0.lock().unwrap())
    }
}

#[test]
fn edk2_takes_it_for_flash_and_neither_for_ram_nor_for_rom() {
    // QemuFlashDetected() of OvmfPkg/QemuFlashFvbServicesRuntimeDxe.
    let bench = Bench::new();
    let original = bench.read(0);
    bench.write(0, 0x50);
    assert_eq!(bench.read(0), original, "the command was stored as RAM would");
    bench.write(0, 0x70);
    assert_eq!(bench.read(0), 0, "the status is not clear");
    bench.write(0, 0xff);
    assert_eq!(bench.read(0), original);
}

#[test]
fn a_run_of_programming_is_stored_by_one_write_before_the_array_is_read_again() {
    let bench = Bench::new();
    bench.program(0x1ffe, b"abcd");
    assert_eq!(bench.writes.load(Ordering::Relaxed), 0);
    assert_eq!(bench.read(0x1ffe), READY, "the status is read meanwhile");
    bench.write(0x2001, 0xff);
    assert_eq!(bench.writes.load(Ordering::Relaxed), 1);
    assert_eq!(&bench.content.lock().unwrap()[0x1ffd..0x2003], b"\xffabcd\xff");
    assert_eq!(bench.read(0x1fff), b'b');
    bench.write(0, 0xff);
    assert_eq!(bench.writes.load(Ordering::Relaxed), 1, "nothing was left to store");
}

#[test]
fn programming_clears_bits_and_erasing_a_block_sets_all_of_it() {
    let bench = Bench::new();
    bench.program(0x1004, &[0xf0]);
    bench.program(0x1004, &[0x3c]);
    bench.write(0, 0xff);
    assert_eq!((bench.read(0x1004), bench.stored(0x1004)), (0x30, 0x30));
    bench.program(0x2000, &[0]);
    bench.write(0x1abc, 0x20);
    bench.write(0x1abc, 0xd0);
    bench.write(0, 0xff);
    assert_eq!((bench.read(0x1004), bench.stored(0x1004)), (0xff, 0xff));
    assert_eq!((bench.read(0x2000), bench.stored(0x2000)), (0, 0), "the next block stays");
}

#[test]
fn nothing_is_stored_together_with_what_the_firmware_did_elsewhere_or_otherwise() {
    let bench = Bench::new();
    let erase = |offset| [0x20, 0xd0].into_iter().for_each(|command| bench.write(offset, command));
    let writes = || bench.writes.load(Ordering::Relaxed);
    bench.program(0, b"abc");
    bench.program(3, b"d");
    bench.program(0x10, b"e");
    assert_eq!((writes(), bench.stored(3), bench.stored(0x10)), (1, b'd', 0xff));
    erase(0x1000);
    erase(0x2000);
    assert_eq!((writes(), bench.stored(0x10)), (2, b'e'));
    bench.program(0x2000, b"f");
    assert_eq!((writes(), bench.stored(0x2000)), (3, 0xff));
    bench.write(0, 0xff);
    assert_eq!((writes(), bench.stored(0x2000)), (4, b'f'));
}

#[test]
fn an_erasure_that_is_not_confirmed_does_not_happen_and_the_status_says_so() {
    let bench = Bench::new();
    bench.program(0, &[0]);
    bench.write(0, 0x20);
    bench.write(0, 0x10);
    assert_eq!(bench.read(0), 0);
    bench.write(0, 0x70);
    assert_eq!(bench.read(0), READY | ERASE_ERROR | PROGRAM_ERROR);
}

#[test]
fn the_guest_reads_the_array_by_itself_but_for_the_time_of_a_command() {
    let bench = Bench::new();
    assert!(bench.mapping.readable.load(Ordering::Relaxed));
    bench.program(0, &[1, 2, 3]);
    assert!(!bench.mapping.readable.load(Ordering::Relaxed));
    bench.write(0, 0xff);
    assert!(bench.mapping.readable.load(Ordering::Relaxed));
    assert_eq!(bench.mapping.changes.load(Ordering::Relaxed), 3, "not once for each byte");
}

#[test]
fn a_reset_in_the_middle_of_a_run_stores_it_and_shows_the_array() {
    let bench = Bench::new();
    bench.program(8, &[0x55]);
    bench.write(9, 0x10);
    bench.flash.reset();
    assert!(bench.mapping.readable.load(Ordering::Relaxed));
    assert_eq!((bench.read(8), bench.stored(8)), (0x55, 0x55));
    bench.write(9, 0x70);
    assert_eq!(bench.read(9), READY, "the half command is forgotten");
}

#[test]
fn accesses_across_the_end_and_of_any_width_change_nothing_beyond_it() {
    let bench = Bench::new();
    let last = SIZE as u64 - 1;
    bench.write(last, 0x10);
    assert_eq!(bench.flash.write(last, &[0; 8]), None);
    bench.write(0, 0x70);
    assert_eq!(bench.read(0), READY | PROGRAM_ERROR);
    bench.write(u64::MAX, 0x20);
    bench.write(u64::MAX, 0xd0);
    bench.write(0, 0xff);
    assert_eq!((bench.read(last), bench.stored(SIZE - 1)), (0xff, 0xff));
    bench.write(0, 0x40);
    assert_eq!(bench.flash.write(0, &[1, 2, 3, 4, 5, 6, 7, 8]), None);
    bench.write(0, 0xff);
    assert_eq!((bench.stored(0), bench.stored(7), bench.stored(8)), (1, 8, 0xff));
}

#[test]
fn while_the_store_fails_the_memory_is_write_protected_and_then_all_is_stored() {
    let bench = Bench::new();
    bench.failing.store(true, Ordering::Relaxed);
    bench.program(0, &[0x11]);
    bench.write(0, 0xff);
    assert!(
        matches!(&bench.events()[..], [DeviceEvent::BackendLost { reason }] if reason.contains("Input/output error"))
    );
    bench.program(0x3000, &[0x22]);
    assert_eq!(bench.read(0), READY | PROGRAM_ERROR);
    bench.write(0, 0xff);
    assert_eq!(bench.read(0x3000), 0xff, "what cannot be kept is not shown");
    assert_eq!(bench.events(), [], "it is told once");
    bench.failing.store(false, Ordering::Relaxed);
    bench.program(0x3000, &[0x33]);
    bench.write(0, 0xff);
    assert_eq!((bench.stored(0), bench.stored(0x3000), bench.read(0x3000)), (0x11, 0x33, 0x33));
    assert!(matches!(bench.events()[..], [DeviceEvent::BackendRestored { .. }]));
}

#[test]
fn a_store_that_hangs_holds_the_guest_for_a_bounded_time_and_gets_nothing_twice() {
    let (open, gate): (Sender<()>, _) = mpsc::channel();
    let bench = Bench::with_gate(Some(gate));
    bench.program(0, &[0x11]);
    bench.write(0, 0xff);
    assert!(matches!(&bench.events()[..], [DeviceEvent::BackendLost { .. }]));
    bench.program(1, &[0x22]);
    bench.write(0, 0xff);
    assert_eq!((bench.read(0), bench.read(1)), (0x11, 0xff));
    open.send(()).unwrap();
    while bench.writes.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    drop(open);
    while bench.read(1) == 0xff {
        bench.program(1, &[0x22]);
        bench.write(0, 0xff);
    }
    assert_eq!((bench.stored(0), bench.stored(1)), (0x11, 0x22));
    assert_eq!(bench.writes.load(Ordering::Relaxed), 2);
    assert!(matches!(bench.events()[..], [DeviceEvent::BackendRestored { .. }]));
}

#[test]
fn what_was_programmed_last_is_stored_when_the_machine_ends() {
    let bench = Bench::new();
    bench.program(5, &[0x77]);
    drop(bench.flash);
    assert_eq!(bench.content.lock().unwrap()[5], 0x77);
}
