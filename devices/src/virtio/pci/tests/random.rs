//! A guest that does anything at all.

use super::*;
use crate::IoEvents;
use crate::bus::Bus;
use crate::pci::bridge::{HostBridge, LpcBridge};
use crate::pci::{Root, Windows};

/// A generator that gives the same accesses on every machine (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    /// Values that hardware cares about more often than chance would have it.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => self.below(0x10_0000) & !0xf,
            4 => self.below(16),
            5 => 0xf,
            6 => (self.below(16) + 1) << 32 | 0xc000_0000,
            _ => self.next(),
        }
    }
}

/// Every register that means something, and sometimes any other.
fn bar_offset(random: &mut Random) -> u64 {
    match random.below(8) {
        0..4 => COMMON + random.below(64),
        4 => DEVICE + random.below(16),
        5 => MSIX + random.below(80),
        6 => NOTIFY + random.below(20),
        _ => random.below(0x1_0000),
    }
}

/// Registers that are there twice are an error, as KVM has it.
#[derive(Default)]
struct Strict(Mutex<Vec<u64>>);

impl IoEvents for Strict {
    fn register(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        let mut addresses = self.0.lock().unwrap();
        assert!(!addresses.contains(&address), "{address:#x} registered twice");
        addresses.push(address);
        Ok(())
    }

    fn unregister(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        let mut addresses = self.0.lock().unwrap();
        let position = addresses.iter().position(|a| *a == address).expect("was registered");
        addresses.swap_remove(position);
        Ok(())
    }
}

/// Chance alone would hardly ever get a device to work.
fn bring_up(driver: &Driver) {
    driver.write(STATUS, &[0]);
    while driver.status() != 0 {}
    driver.set_status(3);
    driver.accept(VERSION_1 | EVENT_IDX);
    driver.set_status(11);
    driver.enable(0);
    driver.set_status(DRIVER_READY);
}

#[test]
fn a_million_random_accesses_neither_panic_nor_leave_the_map_wrong() {
    const ECAM: u64 = 0xb000_0000;
    let (mmio, pio, events) = (Arc::new(Bus::new()), Arc::new(Bus::new()), Arc::new(Strict::default()));
    let root = Root::new(Arc::clone(&mmio), Arc::clone(&pio), Arc::clone(&events) as Arc<dyn IoEvents>);
    root.insert(0, Arc::new(HostBridge::new(Some(ECAM), root.ecam()))).unwrap();
    root.insert(31, Arc::new(LpcBridge::new(Arc::default()))).unwrap();
    root.claim_config_ports(None).unwrap();
    let drivers = [Driver::new(), Driver::new(), Driver::new()];
    for (slot, driver) in (1..).zip(&drivers) {
        root.insert(slot, Arc::new(driver.pci.clone())).unwrap();
    }
    let windows = Windows { low: 0xc000_0000..0xfc00_0000, high: 1 << 32..1 << 40, io: 0xc000..0xd000 };
    root.assign_bars(&windows).unwrap();

    let mut random = Random(0x5eed_0001);
    for round in 0..1_000_000u32 {
        let driver = &drivers[random.below(3) as usize];
        if random.below(500) == 0 {
            bring_up(driver);
        }
        let length = 1 << random.below(4);
        let mut data = random.value().to_le_bytes();
        let data = &mut data[..length];
        let write = random.below(2) == 0;
        let (bus, address) = match random.below(8) {
            0..4 => {
                let offset = bar_offset(&mut random);
                if write {
                    assert_eq!(driver.bar.write(offset, data), None);
                } else {
                    driver.bar.read(offset, data);
                }
                continue;
            }
            4 | 5 => (&mmio, ECAM + random.below(5) * 0x8000 + random.below(0x100)),
            6 => (&pio, 0xcf8 + random.below(8)),
            _ => (&mmio, random.value()),
        };
        if !write {
            bus.read(address, data);
        } else if let Some(VmRequest::BarsChanged(slot)) = bus.write(address, data) {
            root.remap(slot);
        }
        if round % 1000 == 0 {
            driver.device.with(|script| script.busy = 2);
            match random.below(4) {
                0 => drop(driver.pci.pause()),
                1 => drop(driver.pci.resume()),
                2 => drop(driver.pci.reset()),
                _ => drop(root.reset()),
            }
            let _ = driver.pci.resume();
            for slot in 0..32 {
                root.remap(slot);
            }
        }
    }
    assert!(drivers.iter().all(|driver| driver.device.with(|script| script.starts > 100)), "devices did run");
    for slot in 0..32 {
        root.remove(slot);
    }
    assert!(events.0.lock().unwrap().is_empty(), "nothing stays registered");
}
