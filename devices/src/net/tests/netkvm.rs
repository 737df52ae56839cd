//! A model of NetKVM, behind the real transport and a PCI bus (PLATFORM §4; ParaNdis_Common.cpp): the features that it takes, the order in
//! which it gives buffers and commands, and what it does when the power state or the link changes, or its device is taken away.

use std::collections::VecDeque;

use super::*;
use crate::virtio::double::windows::{Computer, Library};
use crate::virtio::double::{EVENT_IDX, INDIRECT_DESC};

const SLOT: u8 = 5;
const BAR: u64 = 0x9_0000_0000;
const STANDBY: u64 = 1 << 62;
/// Features that NetKVM takes where they are offered, besides the ring's: RSC_EXT, any layout, IOMMU and ordering among them.
const KNOWN: u64 = INDIRECT_DESC
    | EVENT_IDX
    | 1 << 27
    | 1 << 33
    | 1 << 36
    | 1 << 61
    | STANDBY
    | bit(features::CSUM)
    | bit(features::GUEST_CSUM)
    | bit(features::CTRL_GUEST_OFFLOADS)
    | bit(features::MTU)
    | bit(features::MAC)
    | bit(features::GUEST_TSO4)
    | bit(features::GUEST_TSO6)
    | bit(features::HOST_TSO4)
    | bit(features::HOST_TSO6)
    | bit(features::MRG_RXBUF)
    | bit(features::STATUS)
    | bit(features::CTRL_VQ)
    | bit(features::CTRL_RX)
    | bit(features::CTRL_VLAN)
    | bit(features::CTRL_RX_EXTRA)
    | bit(features::GUEST_ANNOUNCE)
    | bit(features::MQ)
    | bit(features::CTRL_MAC_ADDR)
    | bit(features::HOST_USO)
    | bit(features::HASH_REPORT)
    | bit(features::RSS)
    | bit(features::SPEED_DUPLEX);
/// What it uses of ours.
const TAKEN: u64 = KNOWN & !(1 << 27 | 1 << 33 | 1 << 36 | 1 << 61 | STANDBY);

/// A buffer for a frame of any size that hardware may join: a page at a time.
const PAGES: u64 = 17;
const RECEIVE: u64 = PAGES * 4096;
/// Receive buffers of each queue.
const BUFFERS: usize = 8;

struct NetKvm {
    driver: TestDriver,
    library: Library,
    host: Vec<UnixDatagram>,
    handle: NetHandle,
    /// Pairs of the card, and those that there are processors for.
    hardware: u16,
    pairs: u16,
    agreed: u64,
    mac: [u8; 6],
    /// Receive buffers, by queue pair, as the card has them.
    given: Vec<VecDeque<(u16, u64)>>,
    command: u64,
}

impl NetKvm {
    fn new(options: NetOptions, host: Vec<UnixDatagram>, processors: u16) -> Self {
        let hardware = options.queue_pairs;
        let device = VirtioNet::new(options, &PlainThreads, Arc::<RecordedNotifier>::default()).unwrap();
        let handle = device.handle();
        let mut driver = TestDriver::new(device.queue_sizes());
        let library = Library::attach(&Computer::new(), SLOT, BAR, Box::new(device), &driver);
        let pairs = hardware.min(processors);
        let command = driver.allocate(4096, 4096);
        let given = vec![VecDeque::new(); pairs.into()];
        Self { driver, library, host, handle, hardware, pairs, agreed: 0, mac: [0; 6], given, command }
    }

    fn has(&self, feature: u32) -> bool {
        self.agreed & bit(feature) != 0
    }

    /// Bytes before each frame.
    fn header(&self) -> usize {
        if self.has(features::HASH_REPORT) { HASH_HEADER_SIZE } else { HEADER_SIZE }
    }

    fn control(&self) -> u16 {
        2 * self.hardware
    }

    /// The vector of the control queue and of changes.
    fn control_vector(&self) -> u16 {
        2 * self.pairs
    }

    fn link_status(&self) -> u16 {
        u16::from_le_bytes(self.library.config(6))
    }

    /// Reads what the card says of itself, mostly byte by byte.
    fn initialise(&mut self) {
        self.library.connect_interrupts(2 * self.pairs + 1);
        self.agreed = self.library.negotiate(KNOWN);
        assert_eq!(self.agreed & STANDBY, 0, "it would wait for another card");
        self.mac = std::array::from_fn(|at| self.library.config::<1>(at as u64)[0]);
        assert_eq!(self.library.config(8), self.hardware.to_le_bytes());
        assert_eq!(u32::from_le_bytes(self.library.config(12)), 10_000, "Mbit/s");
        let rss: [u8; 8] = std::array::from_fn(|at| self.library.config::<1>(16 + at as u64)[0]);
        assert_eq!(rss[0], 1, "full duplex");
        if self.has(features::RSS) {
            assert!(rss[1] >= 40 && u16::from_le_bytes([rss[2], rss[3]]) >= 128, "{rss:?}");
        }
    }

    /// From a reset to D0: queues, buffers, and only then the driver's word that it is ready, and its first commands.
    fn enter_d0(&mut self) {
        drop(self.driver.activation(self.agreed));
        let mut queues = vec![(self.control(), self.control_vector())];
        queues.extend((0..2 * self.pairs).map(|queue| (queue, queue)));
        self.library.set_up(&mut self.driver, &queues);
        self.library.set_config_vector(self.control_vector());
        self.given.iter_mut().for_each(VecDeque::clear);
        for pair in 0..self.pairs {
            for _ in 0..BUFFERS {
                let address = self.driver.allocate(RECEIVE, 4096);
                self.give(pair, address);
            }
        }
        self.library.ready();
        if self.pairs > 1 && self.has(features::RSS) {
            let config = [&[0; 10][..], &self.pairs.to_le_bytes(), &[0]].concat();
            assert!(self.command(4, 1, &config, &[]), "a configuration without any hash");
        } else if self.pairs > 1 {
            assert!(self.command(4, 0, &self.pairs.to_le_bytes(), &[]));
        }
        assert_eq!(self.handle.state().active_pairs, self.pairs);
        let offloads = bit(features::GUEST_CSUM) | bit(features::GUEST_TSO4) | bit(features::GUEST_TSO6);
        assert!(self.command(5, 0, &offloads.to_le_bytes(), &[]));
        let mac = self.mac;
        assert!(self.command(1, 1, &mac, &[]));
        for pair in 0..self.pairs {
            self.library.kick(&mut self.driver, 2 * pair);
        }
    }

    fn start(&mut self) {
        self.initialise();
        self.enter_d0();
        self.filter(true, &[[1, 0, 0x5e, 0, 0, 1]], None);
    }

    /// A chain that needs no other of the ring, a page in each of its descriptors.
    fn give(&mut self, pair: u16, address: u64) {
        let pages: Vec<Buffer> = (0..PAGES).map(|page| Buffer::writable(address + 4096 * page, 4096)).collect();
        let head = self.driver.ring(usize::from(pair) * 2).add_indirect(&pages);
        self.given[usize::from(pair)].push_back((head, address));
    }

    /// Header, one or two buffers and the answer in a descriptor each; polls for it.
    fn command(&mut self, class: u8, command: u8, first: &[u8], second: &[u8]) -> bool {
        let (place, answer) = (self.command, self.command + 4095);
        self.driver.write(place, &[class, command]);
        self.driver.write(answer, &[0xaa]);
        let mut chain = vec![Buffer::readable(place, 2)];
        let mut at = place + 16;
        for data in [first, second].into_iter().filter(|data| !data.is_empty()) {
            self.driver.write(at, data);
            chain.push(Buffer::readable(at, data.len() as u32));
            at += data.len() as u64;
        }
        chain.push(Buffer::writable(answer, 1));
        let queue = self.control();
        self.driver.ring(queue.into()).add(&chain);
        self.library.kick(&mut self.driver, queue);
        self.driver.ring(queue.into()).wait_used(SOON).expect("commands are answered");
        self.driver.read(answer, 1) == [0]
    }

    /// What the system wants to receive: own, group and broadcast frames, or nothing; from one VLAN, or all.
    fn filter(&mut self, receive: bool, groups: &[[u8; 6]], vlan: Option<u16>) {
        for (mode, on) in [(0, false), (1, false), (3, !receive), (4, !receive), (5, !receive)] {
            assert!(self.command(0, mode, &[on.into()], &[]), "receive mode {mode}");
        }
        let tables = [&(groups.len() as u32).to_le_bytes()[..], &groups.concat()].concat();
        assert!(self.command(1, 0, &0_u32.to_le_bytes(), &tables));
        // One by one, where it is for all.
        let vlans = vlan.map_or(0..=4094, |vlan| vlan..=vlan);
        for vlan in vlans {
            assert!(self.command(2, 0, &vlan.to_le_bytes(), &[]), "VLAN {vlan}");
        }
    }

    /// Header and data in descriptors of their own.
    fn transmit(&mut self, pair: u16, frame: &[u8]) {
        let (header, data) = (self.driver.allocate(20, 4), self.driver.allocate(frame.len() as u64, 1));
        self.driver.write(data, frame);
        let chain = [Buffer::readable(header, self.header() as u32), Buffer::readable(data, frame.len() as u32)];
        let queue = 2 * pair + 1;
        self.driver.ring(queue.into()).add_indirect(&chain);
        self.library.kick(&mut self.driver, queue);
        self.driver.ring(queue.into()).wait_used(SOON).expect("frames are sent");
    }

    /// The next frame of a pair, when its vector says so; its buffer goes back.
    fn receive(&mut self, pair: u16) -> Vec<u8> {
        let ring = usize::from(pair) * 2;
        let used = match self.driver.ring(ring).take_used() {
            Some(used) => used,
            None => {
                self.driver.ring(ring).want_interrupts(true);
                self.library.wait_interrupt(2 * pair);
                self.driver.ring(ring).wait_used(SOON).expect("a frame comes")
            }
        };
        let given = &mut self.given[usize::from(pair)];
        let position = given.iter().position(|(head, _)| *head == used.head).unwrap();
        let (_, address) = given.remove(position).unwrap();
        let data = self.driver.read(address, used.length as usize);
        assert_eq!(num_buffers(&data), 1, "every frame fits into its buffer");
        self.give(pair, address);
        self.library.kick(&mut self.driver, 2 * pair);
        data[self.header()..].to_vec()
    }

    fn arrive(&self, frame: &[u8]) {
        self.host[0].send(&[&vec![0; self.header()], frame].concat()).unwrap();
    }

    /// The next frame that the host gets, without its header.
    fn sent(&self, pair: u16) -> Vec<u8> {
        let mut data = vec![0; 65_600];
        let length = take(&self.host[usize::from(pair)], &mut data).unwrap();
        data[self.header()..length].to_vec()
    }
}

fn ethernet(to: [u8; 6], rest: &[u8]) -> Vec<u8> {
    [&to[..], &[2, 0, 0, 0, 0, 9], &[8, 0], rest, &[0; 46]].concat()
}

fn netkvm(pairs: u16, processors: u16) -> NetKvm {
    let (tap, host) = double(pairs);
    NetKvm::new(NetOptions { mtu: Some(1500), ..options(tap, pairs) }, host, processors)
}

#[test]
fn netkvm_starts_with_all_that_it_knows_and_moves_frames_both_ways() {
    // More pairs than processors: the control queue comes behind all of them.
    let mut netkvm = netkvm(4, 2);
    netkvm.start();
    let plain = TAKEN & !(bit(features::RSS) | bit(features::HASH_REPORT));
    assert_eq!(netkvm.agreed & plain, plain);
    assert_eq!(netkvm.mac, MAC);
    assert_eq!(netkvm.link_status(), 1);
    for pair in 0..2 {
        let frame = ethernet([2, 0, 0, 0, 0, 7], b"out");
        netkvm.transmit(pair, &frame);
        assert_eq!(netkvm.sent(pair), frame);
    }
    // Buffers were given before the driver was ready, whatever the kick.
    for (number, length) in (0_u8..).zip([60, 1514, 30_000, 65_000, 90, 100, 110, 120, 130, 140]) {
        let frame = ethernet(MAC, &vec![number; length]);
        netkvm.arrive(&frame);
        assert_eq!(netkvm.receive(0), frame);
    }
    assert!(netkvm.library.computer.rung() > 0);
}

#[test]
fn netkvm_begins_rss_without_hashes_and_gets_their_report_in_each_header() {
    if !steering::is_possible() {
        return;
    }
    let (tap, host) = double(2);
    let mut netkvm = NetKvm::new(NetOptions { mtu: Some(1500), ..steering::rss_options(tap, 2) }, host, 2);
    netkvm.start();
    assert_eq!(netkvm.agreed & TAKEN, TAKEN);
    // The system's own configuration comes later, as an OID.
    let config = steering::rss(0x3f, 0, &[0, 1, 0, 1], 2);
    assert!(netkvm.command(4, 1, &config[2..], &[]));
    let frame = ethernet(MAC, b"hashed or not");
    netkvm.arrive(&frame);
    assert_eq!(netkvm.receive(0), frame);
    netkvm.transmit(1, &frame);
    assert_eq!(netkvm.sent(1), frame);
}

#[test]
fn netkvm_receives_what_its_system_wants_from_the_vlan_that_it_wants() {
    let mut netkvm = netkvm(1, 1);
    netkvm.initialise();
    netkvm.enter_d0();
    let tagged = |vlan: u8| [&MAC[..], &[2, 0, 0, 0, 0, 9, 0x81, 0, 0, vlan], &[0; 60]].concat();
    let (group, end) = ([1, 0, 0x5e, 0, 0, 7], ethernet([0xff; 6], b"the end"));
    netkvm.filter(true, &[group], Some(7));
    let wanted = [ethernet(MAC, b"own"), ethernet(group, b"group"), tagged(7), end.clone()];
    for frame in [&wanted[..3], &[ethernet([1, 0, 0x5e, 0, 0, 8], b"other group"), tagged(8), end]].concat() {
        netkvm.arrive(&frame);
    }
    for frame in wanted {
        assert_eq!(netkvm.receive(0), frame);
    }
}

#[test]
fn netkvm_hears_of_its_link_and_announces_itself_when_it_is_asked_to() {
    let mut netkvm = netkvm(1, 1);
    netkvm.start();
    for up in [false, true] {
        netkvm.handle.set_link(up);
        netkvm.library.wait_interrupt(netkvm.control_vector());
        assert_eq!(netkvm.link_status(), u16::from(up));
    }
    netkvm.handle.announce();
    netkvm.library.wait_interrupt(netkvm.control_vector());
    wait(|| netkvm.link_status() == 3, "the card asks for it");
    netkvm.transmit(0, &ethernet([0xff; 6], b"gratuitous ARP"));
    assert!(netkvm.command(3, 0, &[], &[]));
    // The card asks five times in all, so that it may ask again at once.
    wait(
        || {
            netkvm.link_status() == 1 || {
                assert!(netkvm.command(3, 0, &[], &[]));
                false
            }
        },
        "it has heard",
    );
}

#[test]
fn netkvm_goes_on_after_each_sleep_and_a_card_that_is_taken_away_writes_to_no_memory() {
    let mut netkvm = netkvm(2, 2);
    netkvm.start();
    for round in 0..3_u8 {
        let frame = ethernet(MAC, &[round; 64]);
        netkvm.arrive(&frame);
        assert_eq!(netkvm.receive(0), frame);
        // To D3 with frames under way, and back: the features are those of before.
        netkvm.arrive(&ethernet(MAC, b"lost in its sleep"));
        netkvm.library.reset();
        assert_eq!(netkvm.library.negotiate(netkvm.agreed), netkvm.agreed);
        netkvm.enter_d0();
        netkvm.filter(true, &[], Some(1));
    }
    // Surprise removal: the driver resets the card, and everything that it had is somebody else's.
    netkvm.library.reset();
    let memory: Vec<u64> = netkvm.given.iter().flatten().map(|(_, address)| *address).collect();
    for address in &memory {
        netkvm.driver.write(*address, &vec![0x5a; RECEIVE as usize]);
    }
    netkvm.arrive(&ethernet(MAC, b"too late"));
    assert_eq!(netkvm.handle.state().active_pairs, 1);
    for address in memory {
        assert!(netkvm.driver.read(address, RECEIVE as usize).iter().all(|byte| *byte == 0x5a), "{address:#x}");
    }
}
