//! The transport with a device that does as it is told, and a driver that writes registers.

mod lifecycle;
mod random;
mod registers;

use std::sync::{Arc, Mutex};

use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::DeviceEvent;
use crate::interrupt::double::TestMsis;
use crate::virtio::{Activation, DeviceType, StoppedQueue};

const COMMON: u64 = 0x0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x4000;
const MSIX: u64 = 0x8000;
const PENDING: u64 = 0xc000;

const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const DRIVER_READY: u8 = 1 | 2 | 8 | 4;

const RAM: usize = 1 << 20;
const OFFERED: u64 = 1 << 5 | 1 << 40;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

/// What the test and its device share.
#[derive(Default)]
struct Script {
    /// How often `stop` answers "still busy".
    busy: u32,
    /// `start` fails.
    refuse: bool,
    /// `start` breaks the device at once, as a worker would.
    break_at_start: bool,
    running: Option<Activation>,
    starts: u32,
    stops: u32,
    resets: u32,
    config: [u8; 8],
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Script>>);

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut Script) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    fn running(&self) -> bool {
        self.with(|script| script.running.is_some())
    }

    /// The device works: it takes `count` requests from each of its queues.
    fn advance(&self, count: u16) {
        self.with(|script| {
            for active in &mut script.running.as_mut().unwrap().queues {
                active.queue.set_next_avail(active.queue.next_avail().wrapping_add(count));
                active.queue.set_next_used(active.queue.next_used().wrapping_add(count));
            }
        });
    }
}

struct Device(Shared);

struct NoMetrics;

impl MetricSource for NoMetrics {
    fn collect(&self, _visit: &mut dyn FnMut(Sample)) {}
}

impl VirtioDevice for Device {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 64, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.0.with(|script| script.config);
        let from = config.get(usize::try_from(offset).unwrap()..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data.len() == 1 {
            self.0.with(|script| script.config[0] = data[0]);
        }
    }

    fn start(&mut self, activation: Activation) -> Result<(), StartError> {
        self.0.with(|script| {
            script.starts += 1;
            assert!(script.running.is_none(), "started twice");
            if script.refuse {
                return Err(StartError::WorkerGone);
            }
            if script.break_at_start {
                activation.signals.needs_reset("told to");
            }
            script.running = Some(activation);
            Ok(())
        })
    }

    fn stop(&mut self) -> Result<Vec<StoppedQueue>, StillBusy> {
        self.0.with(|script| {
            script.stops += 1;
            if script.running.is_some() && script.busy > 0 {
                script.busy -= 1;
                return Err(StillBusy { requests: script.busy + 1, ..StillBusy::default() });
            }
            let queues = script.running.take().map(|activation| activation.queues).unwrap_or_default();
            Ok(queues.iter().map(|active| StoppedQueue { index: active.index, state: active.queue.state() }).collect())
        })
    }

    fn reset(&mut self) {
        self.0.with(|script| {
            assert!(script.running.is_none(), "reset while running");
            script.resets += 1;
        });
    }

    fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::new(NoMetrics)
    }
}

#[derive(Default)]
struct Notified(Mutex<Vec<(String, DeviceEvent)>>);

impl DeviceNotifier for Notified {
    fn notify(&self, device: &str, event: DeviceEvent) {
        self.0.lock().unwrap().push((device.to_owned(), event));
    }
}

/// The driver: accesses to the BAR and to configuration space.
struct Driver {
    pci: VirtioPci,
    bar: Arc<dyn BusDevice>,
    device: Shared,
    vectors: Vec<EventFd>,
    notified: Arc<Notified>,
}

impl Driver {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let (device, notified) = (Shared::default(), Arc::new(Notified::default()));
        let (msis, vectors) = TestMsis::new();
        let boxed = Box::new(Device(device.clone()));
        let pci =
            VirtioPci::new("disk0".to_owned(), boxed, GuestMemory::new(memory), &msis, Arc::clone(&notified) as _)
                .unwrap();
        let bar = pci.bars().remove(0).device;
        Self { pci, bar, device, vectors: vectors.try_iter().collect(), notified }
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0x5a; N];
        self.bar.read(offset, &mut data);
        data
    }

    fn write(&self, offset: u64, data: &[u8]) {
        assert_eq!(self.bar.write(offset, data), None);
    }

    fn status(&self) -> u8 {
        self.read::<1>(STATUS)[0]
    }

    fn set_status(&self, status: u8) -> u8 {
        self.write(STATUS, &[status]);
        self.status()
    }

    fn word(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    fn set_word(&self, offset: u64, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(0, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(4)))
        };
        half(0) | half(1) << 32
    }

    fn accept(&self, features: u64) {
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(8, &select.to_le_bytes());
            self.write(12, &half.to_le_bytes());
        }
    }

    /// Up to FEATURES_OK.
    fn negotiate(&self) {
        assert_eq!(self.set_status(1), 1);
        assert_eq!(self.set_status(3), 3);
        self.accept(VERSION_1 | EVENT_IDX);
        assert_eq!(self.set_status(11), 11);
    }

    /// Enables queue `index` with 16 descriptors and a vector of its own.
    fn enable(&self, index: u16) {
        let base = 0x1_0000 * (u64::from(index) + 1);
        self.set_word(QUEUE_SELECT, index);
        self.set_word(QUEUE_SIZE, 16);
        self.set_word(QUEUE_VECTOR, index);
        for (register, address) in [(32, base), (40, base + 0x1000), (48, base + 0x2000)] {
            self.write(register, &address.to_le_bytes());
        }
        self.set_word(QUEUE_ENABLE, 1);
    }

    /// A driver that uses queues 0 and 1, up to DRIVER_OK.
    fn ready() -> Self {
        let driver = Self::new();
        driver.negotiate();
        driver.enable(0);
        driver.enable(1);
        assert_eq!(driver.set_status(DRIVER_READY), DRIVER_READY);
        assert!(driver.device.running());
        driver
    }

    /// Routes and unmasks all four vectors and assigns the last one to configuration changes.
    fn use_interrupts(&self) {
        for vector in 0..4 {
            self.write(MSIX + vector * 16, &0xfee0_0000_u64.to_le_bytes());
            self.write(MSIX + vector * 16 + 8, &0x40_u64.to_le_bytes());
        }
        self.pci_write(self.capability(0x11, None) + 2, &0x8000_u16.to_le_bytes());
        self.set_word(16, 3);
    }

    fn interrupted(&self, vector: usize) -> bool {
        self.vectors[vector].read().is_ok()
    }

    /// What the worker of the `n`th active queue finds in its kick.
    fn kicked(&self, n: usize) -> bool {
        self.device.with(|script| script.running.as_ref().unwrap().queues[n].kick.read().is_ok())
    }

    fn pci_read<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.pci.config_read(offset, &mut data);
        data
    }

    fn pci_write(&self, offset: u16, data: &[u8]) -> bool {
        self.pci.config_write(offset, data) == ConfigEffect::BarsChanged
    }

    /// Offset of the capability with this ID and virtio structure type.
    fn capability(&self, id: u8, kind: Option<u8>) -> u16 {
        let mut offset = u16::from(self.pci_read::<1>(0x34)[0]);
        while offset != 0 {
            let [this, next, _, structure] = self.pci_read(offset);
            if this == id && kind.is_none_or(|kind| kind == structure) {
                return offset;
            }
            offset = u16::from(next);
        }
        panic!("no capability {id:#x}");
    }
}
