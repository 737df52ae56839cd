//! What Windows does to a virtio function, as registers see it: its PnP manager, and the library under all drivers of virtio-win
//! (VirtIOPCICommon.c, VirtIOPCIModern.c), which viostor, NetKVM and the balloon share. The models of these are made of it.
//!
//! Every access goes the way that a guest's takes: configuration space by ECAM, registers at the address that the BAR has at that
//! moment, kicks by the ioeventfd that is registered there, or else by the register.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::{TestDriver, VERSION_1};
use crate::IoEvents;
use crate::bus::{Bus, VmRequest};
use crate::interrupt::double::TestMsis;
use crate::pci::Root;
use crate::pci::bridge::{HOST_BRIDGE_SLOT, HostBridge};
use crate::virtio::VirtioDevice;
use crate::virtio::double::RecordedNotifier;
use crate::virtio::pci::VirtioPci;

const ECAM: u64 = 0xb000_0000;
/// Long enough for a busy machine; only failing tests wait so long.
const SOON: Duration = Duration::from_secs(20);

// Configuration space.
const COMMAND: u16 = 4;
const MEMORY: u16 = 2;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const VENDOR_SPECIFIC: u8 = 9;
const MSIX: u8 = 0x11;

// The common configuration (virtio 1.2 §4.1.4.3).
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_VECTOR: u64 = 16;
const NUM_QUEUES: u64 = 18;
const STATUS: u64 = 20;
const CONFIG_GENERATION: u64 = 21;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_DESC: u64 = 32;
const QUEUE_AVAIL: u64 = 40;
const QUEUE_USED: u64 = 48;

/// VIRTIO_MSI_NO_VECTOR.
pub(crate) const NO_VECTOR: u16 = 0xffff;
const READY: u8 = 15;

/// Rings eventfds as KVM does.
#[derive(Default)]
struct Doorbells {
    events: Mutex<BTreeMap<u64, EventFd>>,
    rung: AtomicU64,
}

impl IoEvents for Doorbells {
    fn register(&self, address: u64, event: &EventFd) -> io::Result<()> {
        match self.events.lock().unwrap().insert(address, event.try_clone()?) {
            None => Ok(()),
            Some(_) => Err(io::Error::from_raw_os_error(libc::EEXIST)),
        }
    }

    fn unregister(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        let removed = self.events.lock().unwrap().remove(&address);
        removed.map(drop).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }
}

/// A computer with a PCI bus, as its PnP manager sees it.
pub(crate) struct Computer {
    root: Root,
    mmio: Arc<Bus>,
    doorbells: Arc<Doorbells>,
}

impl Computer {
    pub(crate) fn new() -> Arc<Self> {
        let (mmio, doorbells) = (Arc::new(Bus::new()), Arc::new(Doorbells::default()));
        let root = Root::new(Arc::clone(&mmio), Arc::new(Bus::new()), Arc::clone(&doorbells) as Arc<dyn IoEvents>);
        let bridge = Arc::new(HostBridge::new(Some(ECAM), root.ecam()));
        root.insert(HOST_BRIDGE_SLOT, bridge).unwrap();
        root.remap(HOST_BRIDGE_SLOT);
        Arc::new(Self { root, mmio, doorbells })
    }

    fn config<const N: usize>(&self, slot: u8, register: u16) -> [u8; N] {
        self.read(ECAM + u64::from(slot) * 0x8000 + u64::from(register))
    }

    fn set_config(&self, slot: u8, register: u16, data: &[u8]) {
        match self.mmio.write(ECAM + u64::from(slot) * 0x8000 + u64::from(register), data) {
            Some(VmRequest::BarsChanged(slot)) => self.root.remap(slot),
            other => assert_eq!(other, None),
        }
    }

    pub(crate) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.mmio.read(address, &mut data);
        data
    }

    fn write(&self, address: u64, data: &[u8]) {
        if let Some(event) = self.doorbells.events.lock().unwrap().get(&address) {
            self.doorbells.rung.fetch_add(1, Ordering::Relaxed);
            event.write(1).unwrap();
            return;
        }
        assert_eq!(self.mmio.write(address, data), None);
    }

    /// Addresses of doorbells.
    pub(crate) fn doorbells(&self) -> Vec<u64> {
        self.doorbells.events.lock().unwrap().keys().copied().collect()
    }

    /// Kicks that needed no exit.
    pub(crate) fn rung(&self) -> u64 {
        self.doorbells.rung.load(Ordering::Relaxed)
    }

    fn decode(&self, slot: u8, on: bool) {
        let command = u16::from_le_bytes(self.config(slot, COMMAND));
        let command = if on { command | MEMORY } else { command & !MEMORY };
        self.set_config(slot, COMMAND, &command.to_le_bytes());
    }

    /// The size of BAR 0, asked for as PnP managers do, whatever the function is doing: nothing is different afterwards.
    pub(crate) fn size(&self, slot: u8) -> u64 {
        let (command, bar) = (self.config::<2>(slot, COMMAND), self.config::<8>(slot, BAR0));
        self.decode(slot, false);
        for half in [BAR0, BAR0 + 4] {
            self.set_config(slot, half, &[0xff; 4]);
        }
        let mask = u64::from_le_bytes(self.config(slot, BAR0)) & !0xf;
        for (half, value) in [(BAR0, &bar[..4]), (BAR0 + 4, &bar[4..])] {
            self.set_config(slot, half, value);
        }
        self.set_config(slot, COMMAND, &command);
        mask.wrapping_neg()
    }

    /// Puts BAR 0 to another address.
    pub(crate) fn place(&self, slot: u8, address: u64) {
        self.decode(slot, false);
        let address = address.to_le_bytes();
        self.set_config(slot, BAR0, &address[..4]);
        self.set_config(slot, BAR0 + 4, &address[4..]);
        self.decode(slot, true);
        assert_eq!(self.bar(slot), u64::from_le_bytes(address));
    }

    fn bar(&self, slot: u8) -> u64 {
        u64::from_le_bytes(self.config(slot, BAR0)) & !0xf
    }

    /// The capabilities of a function: ID, type of virtio structure, offset in configuration space.
    fn capabilities(&self, slot: u8) -> Vec<(u8, u8, u16)> {
        let mut found = Vec::new();
        let [mut offset] = self.config::<1>(slot, CAPABILITIES);
        while offset != 0 {
            let [id, next, _, kind] = self.config(slot, offset.into());
            found.push((id, kind, offset.into()));
            assert!(found.len() < 48, "the list of capabilities is a circle");
            offset = next;
        }
        found
    }
}

/// Where the structures of a function are, as guest-physical addresses.
#[derive(Clone, Copy)]
struct Places {
    common: u64,
    notify: u64,
    multiplier: u64,
    isr: u64,
    device: u64,
    msix_table: u64,
    msix_control: u16,
}

/// The library of virtio-win, with one function.
pub(crate) struct Library {
    pub(crate) computer: Arc<Computer>,
    pub(crate) pci: VirtioPci,
    pub(crate) slot: u8,
    places: Places,
    /// Of each vector.
    injected: Vec<EventFd>,
    message_interrupts: bool,
}

impl Library {
    /// Plugs `device` into `slot` of `computer`, with its BAR at `address`, and finds its structures.
    pub(crate) fn attach(
        computer: &Arc<Computer>,
        slot: u8,
        address: u64,
        device: Box<dyn VirtioDevice>,
        driver: &TestDriver,
    ) -> Self {
        let (msis, injected) = TestMsis::new();
        let notifier = Arc::new(RecordedNotifier::default());
        let pci = VirtioPci::new(format!("slot{slot}"), device, driver.memory(), &msis, notifier).unwrap();
        computer.root.insert(slot, Arc::new(pci.clone())).unwrap();
        // What the INF files of virtio-win ask for.
        let identity = computer.config::<4>(slot, 0);
        assert_eq!((u16::from_le_bytes([identity[0], identity[1]]), identity[3]), (0x1af4, 0x10));
        assert_eq!(computer.config::<4>(slot, 0x2c), [0xf4, 0x1a, 0, 0x11], "SUBSYS_11001AF4");
        assert_eq!(computer.config::<1>(slot, 8), [1], "REV_01");
        computer.place(slot, address);
        let places = Self::find(computer, slot);
        let injected = injected.try_iter().collect();
        Self { computer: Arc::clone(computer), pci, slot, places, injected, message_interrupts: false }
    }

    /// Looks for the structures, as at each start of the function.
    fn find(computer: &Computer, slot: u8) -> Places {
        let capabilities = computer.capabilities(slot);
        let (bar, length) = (computer.bar(slot), computer.size(slot));
        let structure = |kind: u8, least: u32, align: u64| {
            let of_kind = |(id, this, _): &&(u8, u8, u16)| *id == VENDOR_SPECIFIC && *this == kind;
            let (_, _, at) = *capabilities.iter().find(of_kind).unwrap_or_else(|| panic!("no structure {kind}"));
            let [_, _, _, _, which, ..] = computer.config::<8>(slot, at);
            assert_eq!(which, 0, "structure {kind} is in BAR 0");
            let number = |at| u32::from_le_bytes(computer.config(slot, at));
            let (offset, size) = (u64::from(number(at + 8)), number(at + 12));
            assert!(size >= least && offset % align == 0 && offset + u64::from(size) <= length, "structure {kind}");
            (bar + offset, at)
        };
        let (notify, at) = structure(2, 2, 2);
        let multiplier = u32::from_le_bytes(computer.config(slot, at + 16)).into();
        let (_, _, msix) = *capabilities.iter().find(|(id, ..)| *id == MSIX).unwrap();
        let table = u64::from(u32::from_le_bytes(computer.config(slot, msix + 4)));
        Places {
            common: structure(1, 56, 4).0,
            notify,
            multiplier,
            isr: structure(3, 1, 1).0,
            device: structure(4, 1, 4).0,
            msix_table: bar + (table & !7),
            msix_control: msix + 2,
        }
    }

    /// The resources of the function have changed: its structures are looked for anew.
    pub(crate) fn moved(&mut self) {
        self.places = Self::find(&self.computer, self.slot);
    }

    /// Connects the first `count` vectors (0: none), as HAL does.
    pub(crate) fn connect_interrupts(&mut self, count: u16) {
        for vector in 0..u64::from(count) {
            let entry = self.places.msix_table + 16 * vector;
            for (offset, value) in [(0, 0xfee0_0000_u32), (4, 0), (8, 0x50 + vector as u32), (12, 0)] {
                self.computer.write(entry + offset, &value.to_le_bytes());
            }
        }
        let control = if count > 0 { 0x8000_u16 } else { 0 };
        self.computer.set_config(self.slot, self.places.msix_control, &control.to_le_bytes());
        self.message_interrupts = count > 0;
    }

    /// Where BAR 0 is.
    pub(crate) fn bar(&self) -> u64 {
        self.computer.bar(self.slot)
    }

    fn get<const N: usize>(&self, register: u64) -> [u8; N] {
        self.computer.read(self.places.common + register)
    }

    fn set<const N: usize>(&self, register: u64, value: [u8; N]) {
        self.computer.write(self.places.common + register, &value);
    }

    pub(crate) fn status(&self) -> u8 {
        self.get::<1>(STATUS)[0]
    }

    fn add_status(&self, bits: u8) {
        self.set(STATUS, [self.status() | bits]);
    }

    /// Writes zero to the status.
    pub(crate) fn begin_reset(&self) {
        self.set(STATUS, [0]);
    }

    /// The same, and polls until it reads zero, as drivers do before they touch their memory again; says how often.
    pub(crate) fn reset(&self) -> u64 {
        self.begin_reset();
        let end = Instant::now() + SOON;
        let mut polls = 0;
        while self.status() != 0 {
            assert!(Instant::now() < end, "the reset never ends");
            polls += 1;
        }
        polls
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.set(DEVICE_FEATURE_SELECT, select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.get(DEVICE_FEATURE)))
        };
        half(0) | half(1) << 32
    }

    /// From a reset to FEATURES_OK, with what is offered of `known`; gives what was agreed on.
    pub(crate) fn negotiate(&self, known: u64) -> u64 {
        self.reset();
        self.add_status(1);
        self.add_status(2);
        let agreed = self.offered() & (known | VERSION_1);
        assert_ne!(agreed & VERSION_1, 0);
        for (select, half) in [(0_u32, agreed as u32), (1, (agreed >> 32) as u32)] {
            self.set(DRIVER_FEATURE_SELECT, select.to_le_bytes());
            self.set(DRIVER_FEATURE, half.to_le_bytes());
        }
        self.add_status(8);
        assert_eq!(self.status(), 11, "the device takes {agreed:#x}");
        agreed
    }

    pub(crate) fn queues(&self) -> u16 {
        u16::from_le_bytes(self.get(NUM_QUEUES))
    }

    /// Sets the vector of configuration changes, which has to be readable.
    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.set(CONFIG_VECTOR, vector.to_le_bytes());
        assert_eq!(self.get(CONFIG_VECTOR), vector.to_le_bytes());
    }

    /// Describes `queues`, each with its vector, to the device and then enables them: there is no way back but a reset.
    pub(crate) fn set_up(&self, driver: &mut TestDriver, queues: &[(u16, u16)]) {
        for (queue, vector) in queues {
            assert!(*queue < self.queues());
            self.set(QUEUE_SELECT, queue.to_le_bytes());
            let size = u16::from_le_bytes(self.get(QUEUE_SIZE));
            assert!(size.is_power_of_two(), "queue {queue} has {size} entries");
            let ring = driver.ring((*queue).into());
            assert!(ring.size() <= size);
            self.set(QUEUE_SIZE, ring.size().to_le_bytes());
            let (descriptors, available, used) = ring.addresses();
            for (register, address) in [(QUEUE_DESC, descriptors), (QUEUE_AVAIL, available), (QUEUE_USED, used)] {
                self.set(register, (address as u32).to_le_bytes());
                self.set(register + 4, ((address >> 32) as u32).to_le_bytes());
            }
            if *vector != NO_VECTOR {
                self.set(QUEUE_VECTOR, vector.to_le_bytes());
                assert_eq!(self.get(QUEUE_VECTOR), vector.to_le_bytes(), "vector of queue {queue}");
            }
        }
        for (queue, _) in queues {
            self.set(QUEUE_SELECT, queue.to_le_bytes());
            self.set(QUEUE_ENABLE, 1_u16.to_le_bytes());
        }
    }

    /// Sets DRIVER_OK.
    pub(crate) fn ready(&self) {
        self.add_status(4);
        assert_eq!(self.status(), READY);
    }

    /// Kicks a queue if the device wants that; the notification register is a word with the queue in it.
    pub(crate) fn kick(&self, driver: &mut TestDriver, queue: u16) {
        if driver.ring(queue.into()).kick() {
            self.kick_always(queue);
        }
    }

    pub(crate) fn kick_always(&self, queue: u16) {
        self.set(QUEUE_SELECT, queue.to_le_bytes());
        let offset = u64::from(u16::from_le_bytes(self.get(QUEUE_NOTIFY_OFF)));
        self.computer.write(self.places.notify + offset * self.places.multiplier, &queue.to_le_bytes());
    }

    /// Reads the configuration of the device with accesses of `N` bytes until it holds still.
    pub(crate) fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        loop {
            let before = self.get::<1>(CONFIG_GENERATION);
            let value = self.computer.read(self.places.device + offset);
            if self.get(CONFIG_GENERATION) == before {
                return value;
            }
        }
    }

    pub(crate) fn set_config(&self, offset: u64, value: &[u8]) {
        self.computer.write(self.places.device + offset, value);
    }

    /// The interrupt status, which reading clears; only drivers without message interrupts read it.
    pub(crate) fn isr(&self) -> u8 {
        assert!(!self.message_interrupts);
        self.computer.read::<1>(self.places.isr)[0]
    }

    /// Whether the vector was injected since this was last asked.
    pub(crate) fn interrupted(&self, vector: u16) -> bool {
        self.injected[usize::from(vector)].read().is_ok()
    }

    /// Waits until the vector is injected.
    pub(crate) fn wait_interrupt(&self, vector: u16) {
        let end = Instant::now() + SOON;
        while !self.interrupted(vector) {
            assert!(Instant::now() < end, "vector {vector} never comes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
