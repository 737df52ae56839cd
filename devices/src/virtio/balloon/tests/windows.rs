//! A model of virtio-win's balloon driver (Balloon/sys): one request at a time of up to a page of page frame numbers, statistics from
//! its service, and pages that it keeps through a sleep and gives back when it is removed.

use super::*;
use crate::virtio::TransportSignals;
use crate::virtio::double::windows::{Computer, Library};

const SLOT: u8 = 6;
const BAR: u64 = 0xa_0000_0000;
/// It takes the statistics alone: neither DEFLATE_ON_OOM, as it has Windows' own event of low memory, nor MUST_TELL_HOST.
const KNOWN: u64 = 1 << feature::STATS_VQ;
/// The vector of everything.
const VECTOR: u16 = 0;
/// Page frame numbers of 64 bits fit into a page so often, though it sends 32.
const MOST: usize = 512;
const STATISTICS_LENGTH: u32 = 16 * 10;

struct Balloon {
    driver: TestDriver,
    library: Library,
    handle: BalloonHandle,
    signals: Arc<dyn TransportSignals>,
    numbers: u64,
    statistics: u64,
    /// Pages of the guest that are free, and those in the balloon.
    free: Vec<u32>,
    pages: Vec<u32>,
}

impl Balloon {
    fn new(pages: u32) -> Self {
        let device = VirtioBalloon::new(options(), &PlainThreads, Arc::<RecordedNotifier>::default()).unwrap();
        let handle = device.handle();
        let mut driver = TestDriver::new(device.queue_sizes());
        let (numbers, statistics) = (driver.allocate(PAGE, PAGE), driver.allocate(STATISTICS_LENGTH.into(), 2));
        let memory = driver.allocate(u64::from(pages) * PAGE, PAGE);
        driver.write(memory, &vec![1; pages as usize * PAGE as usize]);
        let library = Library::attach(&Computer::new(), SLOT, BAR, Box::new(device), &driver);
        let signals = library.pci.signals();
        let free = (0..pages).map(|page| (memory / PAGE) as u32 + page).collect();
        Self { driver, library, handle, signals, numbers, statistics, free, pages: Vec::new() }
    }

    /// To D0: all queues by one vector, a buffer of statistics that say nothing yet, and what it has in the balloon already.
    fn enter_d0(&mut self) {
        self.library.connect_interrupts(1);
        let agreed = self.library.negotiate(KNOWN);
        drop(self.driver.activation(agreed));
        self.library.set_config_vector(VECTOR);
        self.library.set_up(&mut self.driver, &[(0, VECTOR), (1, VECTOR), (2, VECTOR)]);
        self.library.ready();
        self.tell_statistics(&[0xff; STATISTICS_LENGTH as usize]);
        self.work();
    }

    fn tell_statistics(&mut self, statistics: &[u8]) {
        self.driver.write(self.statistics, statistics);
        self.driver.ring(2).add(&[Buffer::readable(self.statistics, STATISTICS_LENGTH)]);
        self.library.kick(&mut self.driver, 2);
    }

    /// What its thread does whenever there was an interrupt.
    fn work(&mut self) {
        loop {
            let wanted = u32::from_le_bytes(self.library.config(NUM_PAGES)) as usize;
            if wanted > self.pages.len() {
                let count = (wanted - self.pages.len()).min(MOST).min(self.free.len());
                let taken = self.free.split_off(self.free.len() - count);
                self.tell_host(0, &taken);
                self.pages.extend(taken);
            } else if wanted < self.pages.len() {
                self.leak(self.pages.len() - wanted);
            }
            self.library.set_config(ACTUAL, &(self.pages.len() as u32).to_le_bytes());
            if wanted == self.pages.len() || self.free.is_empty() {
                return;
            }
        }
    }

    fn leak(&mut self, count: usize) {
        let given = self.pages.split_off(self.pages.len() - count.min(MOST));
        self.tell_host(1, &given);
        self.free.extend(given);
    }

    /// One request, for whose end it waits by the interrupt.
    fn tell_host(&mut self, queue: u16, numbers: &[u32]) {
        let data: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.driver.write(self.numbers, &data);
        self.library.interrupted(VECTOR);
        self.driver.ring(queue.into()).add(&[Buffer::readable(self.numbers, data.len() as u32)]);
        self.library.kick(&mut self.driver, queue);
        self.library.wait_interrupt(VECTOR);
        assert!(self.driver.ring(queue.into()).wait_used(SOON).is_some());
        self.driver.ring(queue.into()).want_interrupts(true);
    }

    /// The host wants another size.
    fn resize(&mut self, pages: u64) {
        self.handle.set_size(pages * PAGE);
        self.library.interrupted(VECTOR);
        self.signals.config_changed();
        self.library.wait_interrupt(VECTOR);
        self.work();
    }

    fn is_empty(&self, page: u32) -> bool {
        self.driver.read(u64::from(page) * PAGE, PAGE as usize).iter().all(|byte| *byte == 0)
    }
}

#[test]
fn the_balloon_of_windows_follows_its_size_through_sleep_and_removal() {
    let mut balloon = Balloon::new(2000);
    balloon.enter_d0();
    balloon.resize(1500);
    assert_eq!((balloon.handle.held(), balloon.pages.len()), (1500 * PAGE, 1500));
    assert!(balloon.pages.iter().all(|page| balloon.is_empty(*page)));
    assert!(!balloon.free.iter().any(|page| balloon.is_empty(*page)), "what is not in it is the guest's");
    balloon.resize(100);
    assert_eq!(balloon.handle.held(), 100 * PAGE);
    balloon.resize(5000);
    assert_eq!(balloon.handle.held(), 2000 * PAGE, "as much as it gets");
    balloon.resize(100);

    // To D3 and back with its pages.
    balloon.library.reset();
    assert_eq!(balloon.handle.held(), 0);
    balloon.enter_d0();
    assert_eq!(balloon.handle.held(), 100 * PAGE);

    // It is removed: all comes out first.
    while !balloon.pages.is_empty() {
        balloon.leak(balloon.pages.len());
    }
    balloon.library.set_config(ACTUAL, &[0; 4]);
    assert_eq!(balloon.handle.held(), 0);
    balloon.library.reset();
}

#[test]
fn the_statistics_of_windows_come_when_its_service_has_some() {
    let mut balloon = Balloon::new(10);
    balloon.enter_d0();
    let metrics = balloon.library.pci.metrics();
    let free = || value(&*metrics, "balloon_guest_memory_bytes", Some("free"));
    assert_eq!(free(), None, "it has said nothing yet");
    for told in [5_u64 << 30, 6 << 30] {
        // Each look asks for them.
        eventually(|| {
            free();
            balloon.driver.ring(2).take_used().is_some()
        });
        let mut statistics = [0xff; STATISTICS_LENGTH as usize];
        statistics[..10].copy_from_slice(&[&4_u16.to_le_bytes()[..], &told.to_le_bytes()].concat());
        balloon.tell_statistics(&statistics);
        eventually(|| free() == Some(told as f64));
    }
}
