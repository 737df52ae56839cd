//! The root with functions, buses and ioeventfds that record what happens to them.

use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bridge::{HOST_BRIDGE_SLOT, HostBridge, LPC_SLOT, LpcBridge};
use super::config::{COMMAND, COMMAND_IO, COMMAND_MEMORY, ConfigSpace, Identity, bar_register};
use super::*;
use crate::IoEvents;
use crate::bus::{Bus, VmRequest};

const ECAM: u64 = 0xb000_0000;
const WINDOWS: Windows = Windows { low: 0xc000_0000..0xfc00_0000, high: 1 << 40..1 << 41, io: 0xc000..0xd000 };
const MEMORY64: BarKind = BarKind::Memory64 { prefetchable: true };
const MEMORY32: BarKind = BarKind::Memory32 { prefetchable: false };
const KICK_OFFSET: u64 = 0x40;

/// Registers that answer with their name.
struct Named(u8);

impl BusDevice for Named {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Option<VmRequest> {
        None
    }
}

struct Function {
    name: u8,
    config: Mutex<ConfigSpace>,
    kick: Arc<EventFd>,
    busy: Mutex<u32>,
}

impl Function {
    fn new(name: u8, bars: &[(u8, BarKind, u64)]) -> Arc<Self> {
        let identity =
            Identity { vendor: 0x1234, device: name.into(), revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut config = ConfigSpace::new(&identity);
        for (index, kind, length) in bars {
            config.add_bar(*index, *kind, *length).unwrap();
        }
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Arc::new(Self { name, config: Mutex::new(config), kick, busy: Mutex::new(0) })
    }
}

impl PciFunction for Function {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        self.config.lock().unwrap().write(offset, data).into()
    }

    fn bars(&self) -> Vec<BarMapping> {
        let config = self.config.lock().unwrap();
        let mapping = |(index, kind, length)| BarMapping {
            index,
            address: config.bar_address(index),
            length,
            kind,
            device: Arc::new(Named(self.name)) as Arc<dyn BusDevice>,
            ioevents: vec![(KICK_OFFSET, Arc::clone(&self.kick))],
        };
        config.bars().map(mapping).collect()
    }

    fn reset(&self) -> Result<(), StillBusy> {
        let mut busy = self.busy.lock().unwrap();
        if *busy > 0 {
            *busy -= 1;
            return Err(StillBusy { requests: 1, ..StillBusy::default() });
        }
        self.config.lock().unwrap().reset();
        Ok(())
    }
}

/// The addresses that are registered, in order.
#[derive(Default)]
struct Recorded {
    addresses: Mutex<Vec<u64>>,
    full: Mutex<bool>,
}

impl Recorded {
    fn now(&self) -> Vec<u64> {
        let mut addresses = self.addresses.lock().unwrap().clone();
        addresses.sort_unstable();
        addresses
    }
}

impl IoEvents for Recorded {
    fn register(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        let mut addresses = self.addresses.lock().unwrap();
        if *self.full.lock().unwrap() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if addresses.contains(&address) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        addresses.push(address);
        Ok(())
    }

    fn unregister(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        let mut addresses = self.addresses.lock().unwrap();
        let Some(position) = addresses.iter().position(|a| *a == address) else {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        };
        addresses.remove(position);
        Ok(())
    }
}

struct Machine {
    root: Root,
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    events: Arc<Recorded>,
    bridge: Arc<HostBridge>,
}

impl Machine {
    /// A machine with ECAM on and its bridges in place.
    fn new() -> Self {
        let (mmio, pio, events) = (Arc::new(Bus::new()), Arc::new(Bus::new()), Arc::new(Recorded::default()));
        let root = Root::new(Arc::clone(&mmio), Arc::clone(&pio), Arc::clone(&events) as Arc<dyn IoEvents>);
        let bridge = Arc::new(HostBridge::new(Some(ECAM), root.ecam()));
        root.insert(HOST_BRIDGE_SLOT, Arc::clone(&bridge) as Arc<dyn PciFunction>).unwrap();
        root.insert(LPC_SLOT, Arc::new(LpcBridge::new(Arc::default()))).unwrap();
        root.claim_config_ports(Some(Arc::new(Named(0x99)))).unwrap();
        Self { root, mmio, pio, events, bridge }
    }

    fn with(self, slot: u8, function: Arc<Function>) -> Self {
        self.root.insert(slot, function).unwrap();
        self
    }

    /// A vCPU's configuration write through ECAM, with what it does about the request.
    fn write(&self, slot: u8, register: u16, data: &[u8]) -> Option<VmRequest> {
        let request = self.mmio.write(ECAM + u64::from(slot) * 0x8000 + u64::from(register), data);
        match request {
            Some(VmRequest::BarsChanged(slot)) => self.root.remap(slot),
            other => assert_eq!(other, None),
        }
        request
    }

    fn place(&self, slot: u8, index: u8, address: u64) -> Option<VmRequest> {
        self.write(slot, bar_register(index), &address.to_le_bytes())
    }

    fn decode(&self, slot: u8, bits: u16) -> Option<VmRequest> {
        self.write(slot, COMMAND, &bits.to_le_bytes())
    }

    fn ecam(&self, base: u64, slot: u8, register: u16) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(base + u64::from(slot) * 0x8000 + u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn ports(&self, slot: u8, register: u16) -> u32 {
        let address = 1 << 31 | u32::from(slot) << 11 | u32::from(register & 0xfc);
        assert_eq!(self.pio.write(0xcf8, &address.to_le_bytes()), None);
        let mut data = [0; 4];
        self.pio.read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    /// Who answers at a memory address; 0xff is nobody.
    fn at(&self, address: u64) -> u8 {
        let mut data = [0];
        self.mmio.read(address, &mut data);
        data[0]
    }
}

#[test]
fn ports_and_ecam_reach_the_same_registers() {
    let machine = Machine::new().with(3, Function::new(7, &[(0, MEMORY64, 0x1000)]));
    for slot in 0..SLOT_COUNT {
        for register in (0..0x100).step_by(4) {
            assert_eq!(machine.ports(slot, register), machine.ecam(ECAM, slot, register), "{slot:#x}/{register:#x}");
        }
    }
    assert_eq!(machine.ports(0, 0), 0x29c0_8086);
    assert_eq!(machine.ports(0x1f, 0), 0x2918_8086);
    assert_eq!(machine.ports(0x1f, 0x04) & 7, 7, "the LPC bridge decodes ports and memory");
    assert_eq!(machine.ports(0x1f, 0x0c) & 0x80_0000, 0, "the LPC bridge is its device's only function");
    assert_eq!(machine.ports(3, 0), 0x0007_1234);
    assert_eq!(machine.ports(4, 0), u32::MAX, "an empty slot");
}

#[test]
fn bytes_and_words_of_the_data_port_reach_the_bytes_of_the_register() {
    let machine = Machine::new();
    machine.ports(0x1f, 0x60);
    assert_eq!(machine.pio.write(0xcfe, &[0x8b]), None);
    assert_eq!(machine.ecam(ECAM, 0x1f, 0x60), 0x808b_8080);
    assert_eq!(machine.pio.write(0xcfc, &[0x0a, 0x0b]), None);
    let mut word = [0; 2];
    machine.pio.read(0xcfd, &mut word);
    assert_eq!(word, [0x0b, 0x8b]);
    machine.pio.read(0xcff, &mut word);
    assert_eq!(word, [0xff; 2], "past the last port");
}

#[test]
fn only_a_dword_reaches_the_address_port_and_the_byte_at_0xcf9_is_the_reset_register() {
    let machine = Machine::new();
    assert_eq!(machine.ports(0x1f, 0), 0x2918_8086);
    for (port, data) in [(0xcf8, &[0; 1][..]), (0xcf8, &[0; 2]), (0xcfa, &[0; 2]), (0xcf9, &[6]), (0xcfa, &[0; 4])] {
        assert_eq!(machine.pio.write(port, data), None);
    }
    let mut data = [0; 4];
    machine.pio.read(0xcfc, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x2918_8086, "the address is still latched");
    machine.pio.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_f800);
    let mut byte = [0];
    machine.pio.read(0xcf9, &mut byte);
    assert_eq!(byte, [0x99]);
    machine.pio.write(0xcf8, &0x7fff_ffff_u32.to_le_bytes());
    machine.pio.read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4], "not enabled");
}

#[test]
fn other_buses_and_functions_are_empty_and_no_access_runs_into_the_next_function() {
    let machine = Machine::new();
    for offset in [1 << 20, 255 << 20, 1 << 12, 7 << 12, 0x1f << 15 | 1 << 12] {
        let mut data = [0; 4];
        machine.mmio.read(ECAM + offset, &mut data);
        assert_eq!(data, [0xff; 4], "{offset:#x}");
        assert_eq!(machine.mmio.write(ECAM + offset, &data), None);
    }
    let mut data = [0; 8];
    machine.mmio.read(ECAM + 0xffc, &mut data);
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn sizing_with_decoding_off_asks_for_nothing_and_maps_nothing() {
    let machine = Machine::new().with(1, Function::new(1, &[(0, MEMORY64, 0x1000), (2, BarKind::Io, 0x20)]));
    assert_eq!(machine.place(1, 0, u64::MAX), None);
    assert_eq!(machine.ecam(ECAM, 1, 0x10), 0xffff_f00c);
    assert_eq!(machine.place(1, 0, 0x8000_0000), None);
    assert_eq!(machine.decode(1, 0x400), None);
    assert_eq!(machine.at(0x8000_0000), 0xff);
    assert_eq!(machine.decode(1, COMMAND_MEMORY), Some(VmRequest::BarsChanged(1)));
    assert_eq!(machine.at(0x8000_0000), 1);
}

#[test]
fn a_bar_that_moves_takes_its_ioeventfds_with_it() {
    let machine = Machine::new().with(1, Function::new(1, &[(0, MEMORY64, 0x1000)]));
    machine.place(1, 0, 0x8000_0000);
    machine.decode(1, COMMAND_MEMORY);
    assert_eq!(machine.events.now(), [0x8000_0040]);
    assert_eq!(machine.place(1, 0, 0x9_0000_0000), Some(VmRequest::BarsChanged(1)));
    assert_eq!(machine.events.now(), [0x9_0000_0040]);
    assert_eq!((machine.at(0x8000_0000), machine.at(0x9_0000_0000)), (0xff, 1));
    machine.decode(1, 0);
    assert!(machine.events.now().is_empty());
    assert_eq!(machine.at(0x9_0000_0000), 0xff);
}

#[test]
fn a_bar_on_top_of_another_stays_unmapped_until_the_other_one_leaves() {
    let machine = Machine::new()
        .with(1, Function::new(1, &[(0, MEMORY64, 0x1000)]))
        .with(2, Function::new(2, &[(0, MEMORY64, 0x1000)]));
    for slot in [1, 2] {
        machine.place(slot, 0, 0x8000_0000);
        machine.decode(slot, COMMAND_MEMORY);
    }
    assert_eq!(machine.at(0x8000_0000), 1);
    assert_eq!(machine.events.now(), [0x8000_0040]);
    machine.place(1, 0, 0x8100_0000);
    assert_eq!((machine.at(0x8000_0000), machine.at(0x8100_0000)), (2, 1));
    assert_eq!(machine.events.now(), [0x8000_0040, 0x8100_0040]);
}

#[test]
fn two_bars_of_one_function_may_swap_their_places() {
    let function = Function::new(1, &[(0, MEMORY32, 0x1000), (1, MEMORY32, 0x1000)]);
    let machine = Machine::new().with(1, function);
    machine.place(1, 0, 0x8000_1000_8000_0000);
    machine.decode(1, COMMAND_MEMORY);
    assert_eq!(machine.events.now(), [0x8000_0040, 0x8000_1040]);
    machine.place(1, 0, 0x8000_0000_8000_1000);
    assert_eq!(machine.events.now(), [0x8000_0040, 0x8000_1040]);
}

#[test]
fn a_bar_outside_of_the_windows_or_over_ecam_stays_unmapped() {
    let machine = Machine::new().with(1, Function::new(1, &[(0, MEMORY64, 0x1000)]));
    machine.root.set_windows(WINDOWS);
    machine.decode(1, COMMAND_MEMORY);
    for address in [0x1000, WINDOWS.low.end, WINDOWS.low.start - 0x1000, 1 << 41, u64::MAX - 0xfff, ECAM] {
        machine.place(1, 0, address);
        assert!(machine.events.now().is_empty(), "{address:#x}");
    }
    machine.place(1, 0, WINDOWS.low.start);
    assert_eq!(machine.at(WINDOWS.low.start), 1);
    assert_eq!(machine.ecam(ECAM, 0, 0), 0x29c0_8086);
}

#[test]
fn a_bar_works_without_ioeventfds_when_the_host_has_none_left() {
    let machine = Machine::new().with(1, Function::new(1, &[(0, MEMORY64, 0x1000)]));
    *machine.events.full.lock().unwrap() = true;
    machine.place(1, 0, 0x8000_0000);
    machine.decode(1, COMMAND_MEMORY);
    assert_eq!(machine.at(0x8000_0000), 1);
    machine.place(1, 0, 0x8000_1000);
    assert_eq!(machine.at(0x8000_1000), 1);
}

#[test]
fn ecam_answers_where_the_guest_moves_it_and_nowhere_else() {
    let machine = Machine::new();
    assert_eq!(machine.bridge.ecam_window(), Some((ECAM, 256 << 20)));
    assert_eq!(machine.write(0, 0x64, &[0; 4]), None, "the same value");
    let moved = 0xe000_0001_u32.to_le_bytes();
    assert_eq!(machine.write(0, 0x60, &moved), Some(VmRequest::BarsChanged(0)));
    assert_eq!(machine.bridge.ecam_window(), Some((0xe000_0000, 256 << 20)));
    assert_eq!(machine.ecam(0xe000_0000, 0, 0x60), 0xe000_0001);
    assert_eq!(machine.ecam(ECAM, 0, 0), u32::MAX);
    machine.root.reset().unwrap();
    assert_eq!(machine.ecam(ECAM, 0, 0x60), 0xb000_0001, "back at its power-on place");
}

#[test]
fn pciexbar_decides_the_length_of_the_window_and_can_switch_it_off() {
    let machine = Machine::new();
    machine.ports(0, 0x60);
    for (value, window) in [
        (0xb400_0005_u32, Some((0xb400_0000, 64 << 20))),
        (0xb400_0003, Some((0xb000_0000, 128 << 20))),
        (0xb000_0007, None),
        (0xb000_0000, None),
        (0x0000_0001, None),
    ] {
        assert_eq!(
            machine.pio.write(0xcfc, &value.to_le_bytes()),
            Some(VmRequest::BarsChanged(0)).filter(|_| { value != 0xb000_0000 && value != 1 })
        );
        assert_eq!(machine.bridge.ecam_window(), window, "{value:#x}");
        machine.root.remap(0);
        assert_eq!(machine.at(0xb000_0000) == 0x86, window == Some((0xb000_0000, 128 << 20)));
    }
}

#[test]
fn the_vmm_assigns_bars_in_slot_order_naturally_aligned_from_the_window_of_their_kind() {
    let bars = [(0, MEMORY64, 0x1_0000), (2, MEMORY32, 0x1000), (3, MEMORY32, 0x4000), (4, BarKind::Io, 0x20)];
    let machine = Machine::new().with(2, Function::new(2, &bars)).with(1, Function::new(1, &bars[..1]));
    machine.root.assign_bars(&WINDOWS).unwrap();
    assert_eq!(machine.ecam(ECAM, 1, 0x14), 0x100);
    assert_eq!(machine.ecam(ECAM, 1, 0x10), 0x0000_000c);
    assert_eq!(machine.ecam(ECAM, 2, 0x10), 0x0001_000c);
    assert_eq!(machine.ecam(ECAM, 2, 0x18), 0xc000_0000);
    assert_eq!(machine.ecam(ECAM, 2, 0x1c), 0xc000_4000);
    assert_eq!(machine.ecam(ECAM, 2, 0x20), 0x0000_c001);
    assert_eq!(machine.ecam(ECAM, 1, 4) & 7, u32::from(COMMAND_MEMORY));
    assert_eq!(machine.ecam(ECAM, 2, 4) & 7, u32::from(COMMAND_MEMORY | COMMAND_IO));
    assert_eq!((machine.at(1 << 40), machine.at((1 << 40) + 0x1_0000), machine.at(0xc000_4000)), (1, 2, 2));
    let mut port = [0];
    machine.pio.read(0xc01f, &mut port);
    assert_eq!(port, [2]);
    let events = machine.events.now();
    machine.root.assign_bars(&WINDOWS).unwrap();
    assert_eq!(machine.events.now(), events, "doing it again changes nothing");
}

#[test]
fn a_full_window_is_an_error_that_names_the_bar() {
    let machine = Machine::new().with(1, Function::new(1, &[(0, MEMORY64, 0x1000), (3, MEMORY32, 1 << 31)]));
    let full = AssignError { slot: 1, index: 3, length: 1 << 31 };
    assert_eq!(machine.root.assign_bars(&WINDOWS), Err(full));
}

#[test]
fn a_removed_function_leaves_nothing_mapped_and_its_slot_free() {
    let machine = Machine::new().with(1, Function::new(1, &[(0, MEMORY64, 0x1000)]));
    machine.root.assign_bars(&WINDOWS).unwrap();
    assert!(machine.root.remove(1).is_some());
    assert!(machine.root.remove(1).is_none());
    assert!(machine.root.remove(200).is_none());
    assert_eq!((machine.at(1 << 40), machine.events.now()), (0xff, vec![]));
    assert_eq!(machine.ecam(ECAM, 1, 0), u32::MAX);
    let again = machine.with(1, Function::new(9, &[]));
    assert_eq!(again.root.insert(1, Function::new(8, &[])), Err(SlotError::Taken(1)));
    assert_eq!(again.root.insert(32, Function::new(8, &[])), Err(SlotError::BadSlot(32)));
    again.root.remap(255);
}

#[test]
fn a_machine_reset_is_honest_about_a_function_that_still_drains() {
    let busy = Function::new(1, &[(0, MEMORY64, 0x1000)]);
    *busy.busy.lock().unwrap() = 2;
    let machine = Machine::new().with(1, busy).with(2, Function::new(2, &[(0, MEMORY64, 0x1000)]));
    machine.root.assign_bars(&WINDOWS).unwrap();
    assert_eq!(machine.root.reset().unwrap_err().requests, 1);
    assert!(machine.root.reset().is_err());
    assert_eq!(machine.root.reset(), Ok(()));
    assert_eq!((machine.at(1 << 40), machine.events.now()), (0xff, vec![]));
}

#[test]
fn nothing_keeps_a_dropped_root_alive() {
    let machine = Machine::new();
    let bridge = Arc::downgrade(&machine.bridge);
    let ecam = machine.root.ecam();
    drop(machine);
    assert!(bridge.upgrade().is_none());
    let mut data = [0; 4];
    ecam.read(0, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(ecam.write(0, &data), None);
}
