//! What a request costs between ring and backend, without a guest: time, and allocations, of which there must be none.
//!
//! The backend plays the driver: it makes requests available when its worker comes to wait for events, and the clock and
//! the count of allocations run from there until the worker comes back. So nothing but the worker's own work is measured:
//! with a backend that completes at once, the ring and the request path; with io_uring on a file in memory, a whole turn.
//! Interrupts are not asked for.

#![allow(
    missing_docs,
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a benchmark: it counts allocations, and what goes wrong ends it"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rackvisor_devices::block::{
    BlockBackend, BlockFile, BlockOptions, BlockSource, Completion, Event, OpenMode, Request, Signal, UringBackend,
    VirtioBlock,
};
use rackvisor_devices::virtio::VirtioDevice;
use rackvisor_devices::virtio::double::{EVENT_IDX, INDIRECT_DESC, TestDriver};
use rackvisor_devices::{GuestMemory, NoNotifier, PlainThreads};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

const QUEUE_SIZE: u16 = 256;
const BLOCK: u32 = 4096;
const DISK: u64 = 16 << 20;
const WARM_UP: u64 = 1000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Counts what a worker allocates while it is measured.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static MEASURED: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if MEASURED.get() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller vows.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller vows.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller vows.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The driver's side of a ring whose chains are written once and made available again and again.
struct Driver {
    memory: GuestMemory,
    available: u64,
    used: u64,
    heads: Vec<u16>,
    index: u16,
}

impl Driver {
    fn store(&self, address: u64, value: u16) {
        self.memory.memory().store(value.to_le(), GuestAddress(address), Ordering::SeqCst).unwrap();
    }

    /// Whether the device has answered all there was.
    fn is_answered(&self) -> bool {
        let index: u16 = self.memory.memory().load(GuestAddress(self.used + 2), Ordering::SeqCst).unwrap();
        u16::from_le(index) == self.index
    }

    fn make_available(&mut self) {
        // Far from what comes next: no interrupts.
        self.store(self.available + 4 + 2 * u64::from(QUEUE_SIZE), self.index.wrapping_sub(1));
        for &head in &self.heads {
            self.store(self.available + 4 + 2 * u64::from(self.index % QUEUE_SIZE), head);
            self.index = self.index.wrapping_add(1);
        }
        self.store(self.available + 2, self.index);
    }
}

/// What the worker's thread is to measure: so many times all chains.
struct Order {
    rounds: u64,
    driver: Driver,
}

/// Answers at once, or by `inner`, and plays the driver meanwhile.
struct Player {
    inner: Option<UringBackend>,
    done: Vec<Event>,
    command: Option<EventFd>,
    orders: Receiver<Order>,
    results: Sender<(Duration, Driver)>,
    order: Option<Order>,
    spent: Duration,
    /// Since when the worker works on an order.
    since: Option<Instant>,
}

impl Player {
    /// Makes more available once all is answered. False while there is nothing to measure.
    fn play(&mut self) -> bool {
        let Some(order) = &mut self.order else { return false };
        if order.driver.is_answered() {
            if order.rounds == 0 {
                let order = self.order.take().unwrap();
                self.results.send((std::mem::take(&mut self.spent), order.driver)).unwrap();
                return false;
            }
            order.rounds -= 1;
            order.driver.make_available();
        }
        true
    }
}

impl BlockBackend for Player {
    fn prepare(&mut self) -> io::Result<()> {
        self.inner.as_mut().map_or(Ok(()), BlockBackend::prepare)
    }

    fn watch(&mut self, signal: Signal, event: Option<EventFd>) -> io::Result<()> {
        if signal == Signal::Command {
            self.command = event;
        }
        Ok(())
    }

    unsafe fn submit(&mut self, request: Request<'_>) {
        match &mut self.inner {
            // SAFETY: as the caller vows.
            Some(inner) => unsafe { inner.submit(request) },
            None => self.done.push(Event::Done(Completion { id: request.id, result: Ok(request.length) })),
        }
    }

    /// The time that a worker spends on looking for work is not what is measured.
    fn is_ready(&mut self) -> bool {
        true
    }

    fn wait(&mut self, _timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        MEASURED.set(false);
        self.spent += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        while !self.play() {
            // Whoever gives orders has given commands before: these come first.
            self.order = self.orders.try_recv().ok();
            if self.command.as_ref().unwrap().read().is_ok() {
                events.push(Event::Signal(Signal::Command));
                return Ok(());
            }
            if self.order.is_none() {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        MEASURED.set(true);
        self.since = Some(Instant::now());
        match &mut self.inner {
            Some(inner) => inner.wait(Some(Duration::ZERO), events),
            None => {
                events.append(&mut self.done);
                Ok(())
            }
        }
    }
}

/// A file in memory, removed at the end.
struct Image(PathBuf);

impl Image {
    fn new() -> Self {
        let path = Path::new("/dev/shm").join(format!("rackvisor-block-path.{}", std::process::id()));
        File::create(&path).unwrap().set_len(DISK).unwrap();
        Self(path)
    }

    fn open(&self) -> Arc<BlockFile> {
        let mode = OpenMode { read_only: false, direct: Some(false), block_size: None, wwid: None };
        Arc::new(BlockFile::open(&self.0, &mode).unwrap())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// One kind of request in one kind of chain, `batch` of them at once.
#[derive(Clone, Copy)]
struct Case {
    write: bool,
    indirect: bool,
    batch: u16,
}

/// Writes the chains; gives their heads.
fn chains(driver: &mut TestDriver, case: Case) -> Vec<u16> {
    let table = driver.ring(0).addresses().0;
    let mut heads = Vec::new();
    for number in 0..case.batch {
        let header = driver.allocate(16, 16);
        let data = driver.allocate(u64::from(BLOCK), 4096);
        let status = driver.allocate(1, 1);
        driver.write(header, &u32::from(case.write).to_le_bytes());
        driver.write(header + 8, &(u64::from(number) * 8).to_le_bytes());
        let direction = if case.write { 0 } else { WRITE };
        let (chain, first, head) = match case.indirect {
            true => (driver.allocate(48, 16), 0, number),
            false => (table, 3 * number, 3 * number),
        };
        let ring = driver.ring(0);
        ring.write_descriptor(chain, first, header, 16, NEXT, first + 1);
        ring.write_descriptor(chain, first + 1, data, BLOCK, NEXT | direction, first + 2);
        ring.write_descriptor(chain, first + 2, status, 1, WRITE, 0);
        if case.indirect {
            ring.write_descriptor(table, head, chain, 48, INDIRECT, 0);
        }
        heads.push(head);
    }
    heads
}

fn measure(criterion: &mut Criterion, name: &str, uring: bool, case: Case) {
    let image = Image::new();
    let file = image.open();
    let (orders, received) = channel();
    let (results, answers) = channel();
    let parts = Mutex::new(Some((received, results)));
    let options = BlockOptions { queue_size: QUEUE_SIZE, ..BlockOptions::new("bench", "") };
    let descriptor = Arc::clone(file.file());
    let geometry = file.geometry();
    let mut device = VirtioBlock::with_backends(
        &options,
        file,
        &|metrics| {
            let (orders, results) = parts.lock().unwrap().take().unwrap();
            let inner =
                || UringBackend::new(Arc::clone(&descriptor), geometry, QUEUE_SIZE, Arc::clone(metrics)).unwrap();
            Ok(Box::new(Player {
                inner: uring.then(inner),
                done: Vec::with_capacity(usize::from(QUEUE_SIZE)),
                command: None,
                orders,
                results,
                order: None,
                spent: Duration::ZERO,
                since: None,
            }))
        },
        &PlainThreads,
        Arc::new(NoNotifier),
    )
    .unwrap();
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    device.start(driver.activation(INDIRECT_DESC | EVENT_IDX)).unwrap();
    let heads = chains(&mut driver, case);
    let (_, available, used) = driver.ring(0).addresses();
    let mut player = Some(Driver { memory: driver.memory(), available, used, heads, index: 0 });
    let mut run = |rounds| {
        orders.send(Order { rounds, driver: player.take().unwrap() }).unwrap();
        let (spent, driver) = answers.recv().unwrap();
        player = Some(driver);
        spent
    };
    run(WARM_UP);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let mut requests = 0;
    let mut group = criterion.benchmark_group("block path");
    group.throughput(Throughput::Elements(u64::from(case.batch)));
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|rounds| {
            requests += rounds * u64::from(case.batch);
            run(rounds)
        });
    });
    group.finish();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    println!("{name}: {allocations} allocations in {requests} requests\n");
    assert_eq!(allocations, 0, "{name}: requests allocate");
}

/// A count that counts nothing would always be 0.
fn check_the_count() {
    MEASURED.set(true);
    drop(std::hint::black_box(Box::new(0_u8)));
    MEASURED.set(false);
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 1, "allocations are counted");
}

fn benches(criterion: &mut Criterion) {
    check_the_count();
    for (way, uring) in [("at once", false), ("io_uring", true)] {
        for (kind, write) in [("read", false), ("write", true)] {
            for (shape, indirect) in [("direct", false), ("indirect", true)] {
                for batch in [1, 32] {
                    let name = format!("{way}: {kind} 4k, {shape}, {batch} at once");
                    measure(criterion, &name, uring, Case { write, indirect, batch });
                }
            }
        }
    }
}

criterion_group! {
    name = path;
    config = Criterion::default().sample_size(30).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(300));
    targets = benches
}
criterion_main!(path);
