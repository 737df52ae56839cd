//! A transmit queue by itself, and when it takes what the driver has given.

use std::os::fd::{AsFd, BorrowedFd};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::*;
use crate::NoNotifier;
use crate::net::batch::Batch;
use crate::net::counters::PairCounters;
use crate::net::filter::Filter;
use crate::net::lane::Lane;
use crate::net::shared::{CardOptions, Shared};
use crate::net::tx::Tx;
use crate::net::worker::{Context, TUNING};
use crate::pace::Pace;
use crate::pace::moderation::Moderation;
use crate::virtio::double::EVENT_IDX;

/// Frames that are to be there at the level of these tests, and its place in the list of levels.
const GOAL: usize = 4;
const LEVEL: usize = 2;

struct Rig {
    driver: TestDriver,
    tx: Tx,
    shared: Shared,
    counters: PairCounters,
    memory: Arc<GuestMemoryMmap>,
    filter: Filter,
    host: UnixDatagram,
    now: Instant,
}

impl Rig {
    fn new() -> Self {
        let (tap, mut host) = double(1);
        let mut driver = TestDriver::new(&[64]);
        let activation = driver.activation(EVENT_IDX);
        let memory = activation.memory.memory().into_inner();
        let queue = activation.queues.into_iter().next().unwrap();
        let tx = Tx::new(Lane::new(queue, false, &memory).unwrap());
        let card = CardOptions {
            id: "net0".into(),
            mac: MAC,
            antispoof: false,
            link_up: true,
            vhost: false,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
            steering: None,
        };
        let wake = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let shared = Shared::new(card, tap, vec![wake], Arc::new(NoNotifier));
        let (counters, filter) = (PairCounters::default(), Filter::new(MAC, false));
        let host = host.pop().unwrap();
        host.set_nonblocking(true).unwrap();
        Self { driver, tx, shared, counters, memory, filter, host, now: Instant::now() }
    }

    /// Gives a frame; tells whether the driver is to kick.
    fn give(&mut self) -> bool {
        let address = self.driver.allocate(100, 1);
        self.driver.ring(0).add(&[Buffer::readable(address, 100)]);
        self.driver.ring(0).kick()
    }

    fn with<T>(&mut self, act: impl FnOnce(&mut Tx, &Context<'_>) -> T) -> T {
        let tap: BorrowedFd<'_> = self.shared.tap.queue(0).unwrap();
        let context = Context {
            shared: &self.shared,
            counters: &self.counters,
            memory: &self.memory,
            tap: tap.as_fd(),
            in_use: true,
            now: self.now,
            link_up: true,
            filter: &self.filter,
            offloads: 0,
            header: HEADER_SIZE,
            largest_frame: 1600,
            hasher: None,
        };
        act(&mut self.tx, &context)
    }

    fn service(&mut self, moderation: &mut Moderation) {
        let batch = &mut Batch::new();
        assert!(!self.with(|tx, context| tx.service(context, moderation, batch)).unwrap());
    }

    fn rest(&mut self, pace: &mut Pace) -> bool {
        self.with(|tx, context| tx.rest(context, pace)).unwrap()
    }

    fn arrived(&self) -> usize {
        let mut data = [0; 200];
        std::iter::from_fn(|| take(&self.host, &mut data).ok()).count()
    }
}

#[test]
fn frames_gather_until_as_many_are_there_as_are_to_be_and_the_driver_kicks_with_the_last() {
    let mut rig = Rig::new();
    let mut moderation = Moderation::at(LEVEL, TUNING, rig.now);
    assert!(rig.give(), "the first kick is always wanted");
    rig.service(&mut moderation);
    assert!(rig.tx.gathering.is_some());
    for number in 2..=GOAL {
        assert_eq!(rig.arrived(), 0);
        assert_eq!(rig.give(), number == GOAL, "frame {number}");
    }
    rig.service(&mut moderation);
    assert_eq!((rig.arrived(), rig.tx.gathering), (GOAL, None));
}

#[test]
fn frames_that_wait_for_others_in_vain_leave_when_their_time_is_over() {
    let mut rig = Rig::new();
    let mut moderation = Moderation::at(LEVEL, TUNING, rig.now);
    rig.give();
    rig.service(&mut moderation);
    let due = rig.tx.gathering.unwrap();
    assert!(due <= rig.now + TUNING.longest);
    rig.now = due - Duration::from_nanos(1);
    rig.service(&mut moderation);
    assert_eq!((rig.arrived(), rig.tx.gathering), (0, Some(due)));
    rig.now = due;
    rig.service(&mut moderation);
    assert_eq!((rig.arrived(), rig.tx.gathering), (1, None));
}

#[test]
fn a_queue_that_finds_more_while_it_looks_asks_for_no_kick_and_one_that_does_not_asks_for_the_next() {
    let mut rig = Rig::new();
    let mut pace = Pace::begin(TUNING);
    let soon = Duration::from_micros(20);
    (0..5).for_each(|_| pace.polling.waited(soon, true));
    rig.give();
    rig.service(&mut pace.moderation);
    assert!(!rig.give(), "it is awake");
    assert!(rig.rest(&mut pace));
    rig.service(&mut pace.moderation);
    assert_eq!((rig.arrived(), rig.counters.tx_polled.value()), (2, 1));
    assert!(!rig.rest(&mut pace), "nothing comes");
    assert!(pace.polling.window().is_zero(), "it is not looked for again in vain");
    assert!(rig.give());
}
