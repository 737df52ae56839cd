//! All registers of a machine, reached as a vCPU does: chipset, PCI, firmware's devices, and virtio devices behind their
//! transport with workers that run.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rackvisor::assembly::{Facts, Tables};
use rackvisor_devices::bus::{Bus, VmRequest};
use rackvisor_devices::chipset::{Chipset, ChipsetConfig, DebugSink, RtcTimer};
use rackvisor_devices::console::{Console, ConsoleMode, InputSink};
use rackvisor_devices::firmware::fw_cfg::{FW_CFG_BASE, FW_CFG_LENGTH};
use rackvisor_devices::firmware::{AddressFile, Flash, FlashMapping, FlashStore, FwCfg, FwCfgFile};
use rackvisor_devices::generation::GenerationId;
use rackvisor_devices::interrupt::InterruptLine;
use rackvisor_devices::interrupt::double::TestMsis;
use rackvisor_devices::limiter::Limits;
use rackvisor_devices::net::{NetOptions, Tap, VirtioNet};
use rackvisor_devices::pci::bridge::{HostBridge, LpcBridge};
use rackvisor_devices::pci::smram::{Hidden, Smram, SmramMapping};
use rackvisor_devices::pci::{Root, Windows};
use rackvisor_devices::tpm::{PPI_BASE, PPI_LENGTH, Ppi};
use rackvisor_devices::virtio::VirtioDevice;
use rackvisor_devices::virtio::pci::VirtioPci;
use rackvisor_devices::virtio::rng::VirtioRng;
use rackvisor_devices::{GuestMemory, IoEvents, NoNotifier, PlainThreads};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, MmapRegion};

use crate::input::Input;

const RAM: usize = 1 << 20;
/// What tables say of memory.
const TOLD_RAM: u64 = 6 << 30;
const TSEG_MIB: u16 = 16;
const ECAM: u64 = 0xb000_0000;
const FLASH: usize = 0x2000;
const FLASH_BASE: u64 = (1 << 32) - FLASH as u64;
/// Where virtio devices are first; rings, too, are at fixed places of RAM.
const DEVICES: u64 = 2;
const ACTIONS: usize = 128;
const HANG: Duration = Duration::from_secs(20);
/// Registers of a virtio device's BAR (virtio 1.2 §4.1.4.3).
const STATUS: u64 = 20;

/// Where accesses go, in most cases: first port or address, bytes.
const PORTS: [(u64, u64); 13] = [
    (0x600, 0x80),
    (0x680, 8),
    (0xb2, 2),
    (0x70, 2),
    (0x92, 1),
    (0x60, 5),
    (0x3f8, 8),
    (0x505, 1),
    (0x402, 1),
    (0xcf8, 8),
    (FW_CFG_BASE, FW_CFG_LENGTH),
    (0xcf8, 4),
    (0xcfc, 4),
];
const MEMORY: [(u64, u64); 8] = [
    (ECAM, 0x100),
    (ECAM + (31 << 15), 0x100),
    (ECAM + (1 << 15), 0x100),
    (ECAM + (2 << 15), 0x100),
    (ECAM, 1 << 20),
    (FLASH_BASE, FLASH as u64),
    (FLASH_BASE, 1),
    (PPI_BASE, PPI_LENGTH),
];

/// The lines, events and doubles that take everything.
struct Nothing;

impl InterruptLine for Nothing {
    fn set(&self, _asserted: bool) {}
}

impl DebugSink for Nothing {
    fn line(&self, line: &str) {
        assert!(line.len() <= 1024, "a line of {} bytes", line.len());
    }
}

impl SmramMapping for Nothing {
    fn hide(&self, _hidden: Hidden) -> io::Result<()> {
        Ok(())
    }
}

impl FlashMapping for Nothing {
    fn set_readable(&self, _readable: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps flash memory; an odd number of bytes is an error, so that those are seen too.
struct Store;

impl FlashStore for Store {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset + bytes.len() as u64 <= FLASH as u64, "beyond the end");
        if bytes.len() % 2 == 1 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

/// An address that is registered twice is an error, as KVM has it; one that is not registered cannot go.
#[derive(Default)]
struct Strict(Mutex<Vec<u64>>);

impl IoEvents for Strict {
    fn register(&self, address: u64, _event: &vmm_sys_util::eventfd::EventFd) -> io::Result<()> {
        let mut addresses = self.0.lock().unwrap();
        assert!(!addresses.contains(&address), "{address:#x} registered twice");
        addresses.push(address);
        Ok(())
    }

    fn unregister(&self, address: u64, _event: &vmm_sys_util::eventfd::EventFd) -> io::Result<()> {
        let mut addresses = self.0.lock().unwrap();
        let position = addresses.iter().position(|a| *a == address).expect("was registered");
        addresses.swap_remove(position);
        Ok(())
    }
}

struct Machine {
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    root: Arc<Root>,
    chipset: Chipset,
    fw_cfg: Arc<FwCfg>,
    flash: Arc<Flash>,
    generation: Arc<GenerationId>,
    memory: GuestMemory,
    transports: Vec<VirtioPci>,
    network: UnixDatagram,
    _console: Console,
    _timer: RtcTimer,
}

impl Machine {
    fn new() -> Self {
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let root = Root::new(Arc::clone(&mmio), Arc::clone(&pio), Arc::new(Strict::default()) as Arc<dyn IoEvents>);
        let root = Arc::new(root);
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let memory = GuestMemory::new(ram);
        let console = Console::new(ConsoleMode::Off, &PlainThreads).unwrap();
        let chipset = Chipset::new(ChipsetConfig {
            ram_below_4g: RAM as u64,
            ram_above_4g: 0,
            rtc_offset_seconds: 0,
            acpi_from_reset: true,
            smm: true,
            sci: Arc::new(Nothing),
            rtc: Arc::new(Nothing),
            serial: Some((Arc::new(Nothing), console.output())),
            panics: Some(Arc::new(NoNotifier)),
            watchdog: true,
            debug: Some(Arc::new(Nothing)),
        });
        chipset.attach(&pio).unwrap();
        root.claim_config_ports(Some(Arc::clone(&chipset.reset_control) as _)).unwrap();
        let bridge = HostBridge::new(Some(ECAM), root.ecam()).with_smram(Smram::new(Box::new(Nothing), TSEG_MIB));
        let bridge = Arc::new(bridge);
        root.insert(0, Arc::clone(&bridge) as _).unwrap();
        root.insert(31, Arc::new(LpcBridge::new(Arc::clone(&chipset.smi)))).unwrap();
        let files = vec![FwCfgFile::new("etc/early", vec![1; 300])];
        let power = Arc::clone(&chipset.power);
        let generation = Arc::new(GenerationId::new(None, [0; 16], memory.clone(), power));
        let tables = tables(bridge, &root, &generation);
        let source = Box::new(move || tables.files());
        let placed = Arc::clone(&generation);
        let address = AddressFile(Box::new(move |page| placed.placed(page)));
        let live = [("etc/address", Arc::new(address) as _)].into_iter().chain(chipset.smi.files());
        let fw_cfg = FwCfg::new(memory.clone(), 2, files, source).with_live_files(live.collect());
        let fw_cfg = Arc::new(fw_cfg);
        pio.insert(FW_CFG_BASE, FW_CFG_LENGTH, Arc::clone(&fw_cfg) as _).unwrap();
        let array = Arc::new(MmapRegion::new(FLASH).unwrap());
        let flash = Flash::new(array, Box::new(Nothing), Box::new(Store), &PlainThreads, Arc::new(NoNotifier));
        let flash = Arc::new(flash.unwrap());
        mmio.insert(FLASH_BASE, FLASH as u64, Arc::clone(&flash) as _).unwrap();
        mmio.insert(PPI_BASE, PPI_LENGTH, Arc::new(Ppi::new())).unwrap();
        let (network, transports) = devices(&memory);
        for (slot, transport) in (1..).zip(&transports) {
            root.insert(slot, Arc::new(transport.clone())).unwrap();
        }
        let timer = RtcTimer::start(&chipset.rtc, &PlainThreads).unwrap();
        let machine = Self {
            pio,
            mmio,
            root,
            chipset,
            fw_cfg,
            flash,
            generation,
            memory,
            transports,
            network,
            _console: console,
            _timer: timer,
        };
        machine.assign_bars();
        machine
    }

    fn assign_bars(&self) {
        let windows = Windows { low: 0xc000_0000..0xfc00_0000, high: 1 << 32..1 << 40, io: 0xc000..0xd000 };
        self.root.assign_bars(&windows).unwrap();
    }

    /// What a vCPU thread and the control thread make of what the guest asks for.
    fn settle(&self, request: Option<VmRequest>) {
        match request {
            Some(VmRequest::BarsChanged(slot)) => self.root.remap(slot),
            Some(VmRequest::Reset) => self.reset(),
            _ => {}
        }
    }

    fn reset(&self) {
        self.chipset.reset();
        self.flash.reset();
        self.fw_cfg.reset();
        drain(|| self.root.reset());
        self.assign_bars();
    }

    /// The registers of device `index`, wherever the guest has put them.
    fn bar(&self, index: u8) -> u64 {
        let function = self.root.function(1 + index % DEVICES as u8).unwrap();
        function.bars().first().and_then(|bar| bar.address).unwrap_or(1 << 32)
    }
}

/// ACPI tables, made of where the guest has put configuration space and BARs when it asks for them.
fn tables(bridge: Arc<HostBridge>, root: &Arc<Root>, generation: &Arc<GenerationId>) -> Tables {
    let generation = Some(Arc::clone(generation));
    let facts = Facts { pvpanic: true, watchdog: true, tpm: true, pc_chips: true, numa: Vec::new(), generation };
    Tables { apic_ids: vec![0, 1], ram: TOLD_RAM, facts, bridge, root: Some(Arc::downgrade(root)) }
}

/// The devices on PCI, and the network of the card.
fn devices(memory: &GuestMemory) -> (UnixDatagram, Vec<VirtioPci>) {
    let (ours, network) = UnixDatagram::pair().unwrap();
    network.set_nonblocking(true).unwrap();
    let options = NetOptions {
        id: "nic".to_owned(),
        tap: Tap::double(vec![OwnedFd::from(ours)]),
        mac: [0x52, 0x54, 0, 0, 0, 1],
        queue_pairs: 1,
        queue_size: 16,
        mtu: None,
        link_up: true,
        antispoof: false,
        rss: false,
        vhost: false,
        rx_limits: Limits::default(),
        tx_limits: Limits::default(),
    };
    let nic = VirtioNet::new(options, &PlainThreads, Arc::new(NoNotifier)).unwrap();
    let rng = VirtioRng::new("rng", &PlainThreads, Arc::new(NoNotifier)).unwrap();
    let (msis, _) = TestMsis::new();
    let pci = |id: &str, device: Box<dyn VirtioDevice>| {
        VirtioPci::new(id.to_owned(), device, memory.clone(), &msis, Arc::new(NoNotifier)).unwrap()
    };
    (network, vec![pci("nic", Box::new(nic)), pci("rng", Box::new(rng))])
}

/// Asks until nothing is in flight.
fn drain<E: std::fmt::Display>(stop: impl Fn() -> Result<(), E>) {
    let end = Instant::now() + HANG;
    while let Err(busy) = stop() {
        assert!(Instant::now() < end, "a device does not stop: {busy}");
        std::thread::yield_now();
    }
}

/// Plays a vCPU, and what the VM is told from outside.
pub fn play(data: &[u8]) {
    let machine = Machine::new();
    let mut input = Input::new(data);
    for _ in 0..ACTIONS {
        if input.is_empty() {
            break;
        }
        act(&mut input, &machine);
    }
    drain(|| machine.root.reset());
}

fn act(input: &mut Input<'_>, machine: &Machine) {
    match input.below(16) {
        0..4 => {
            let place = PORTS[usize::from(input.below(PORTS.len() as u8))];
            access(input, machine, &machine.pio, place);
        }
        4..7 => {
            let place = MEMORY[usize::from(input.below(MEMORY.len() as u8))];
            access(input, machine, &machine.mmio, place);
        }
        7..10 => {
            // The common registers, MSI-X, kicks, or any others.
            let base = machine.bar(input.byte());
            let part = [(0, 64), (0x2000, 64), (0x4000, 16), (0x8000, 80), (0, 0x1_0000)][usize::from(input.below(5))];
            access(input, machine, &machine.mmio, (base + part.0, part.1));
        }
        10 => bring_up(input, machine),
        11 => {
            let at = GuestAddress(u64::from(input.u32()) % RAM as u64);
            let _ = machine.memory.memory().write(input.bytes(), at);
        }
        12 => {
            let bus = if input.byte() & 1 == 0 { &machine.pio } else { &machine.mmio };
            access(input, machine, bus, (0, u64::MAX));
        }
        13 => drop(machine.network.send(&[&[0; 12], input.bytes()].concat())),
        14 => match input.below(6) {
            0 => machine.chipset.power.press_power_button(),
            1 => machine.chipset.power.press_sleep_button(),
            2 => machine.chipset.pause(input.byte() & 1 != 0),
            3 => drop(machine.generation.change([input.byte(); 16])),
            4 => drop(machine.chipset.serial.as_ref().unwrap().push(input.bytes())),
            _ => machine.reset(),
        },
        _ => {
            let transport = &machine.transports[usize::from(input.byte()) % machine.transports.len()];
            drain(|| transport.pause());
            transport.resume().unwrap();
        }
    }
}

/// A read or a write of 1, 2, 4 or 8 bytes somewhere in `bytes` from `base`.
fn access(input: &mut Input<'_>, machine: &Machine, bus: &Bus, (base, bytes): (u64, u64)) {
    let shape = input.byte();
    let width = 1 << (shape & 3);
    let offset = match bytes {
        0..=0x100 => u64::from(input.byte()),
        0x101..=0x1_0000 => input.u16().into(),
        _ => input.u64(),
    };
    let address = base.wrapping_add(offset % bytes);
    let mut value = match shape >> 5 {
        0 => input.byte().into(),
        1 => input.u16().into(),
        2 => input.u32().into(),
        3 => u64::MAX,
        _ => input.u64(),
    }
    .to_le_bytes();
    if shape & 4 == 0 {
        bus.read(address, &mut value[..width]);
    } else {
        machine.settle(bus.write(address, &value[..width]));
    }
}

/// What a driver does first. Chance alone would hardly ever get a device to work.
fn bring_up(input: &mut Input<'_>, machine: &Machine) {
    let index = input.byte();
    let base = machine.bar(index);
    let write = |at: u64, data: &[u8]| machine.settle(machine.mmio.write(base + at, data));
    let status = || {
        let mut status = [0];
        machine.mmio.read(base + STATUS, &mut status);
        status[0]
    };
    write(STATUS, &[0]);
    let end = Instant::now() + HANG;
    // All-ones if its registers are nowhere.
    while !matches!(status(), 0 | 0xff) {
        assert!(Instant::now() < end, "the device is not reset");
        std::thread::yield_now();
    }
    write(STATUS, &[3]);
    for (select, features) in [(0_u32, input.u32()), (1, 1 | input.u32())] {
        write(8, &select.to_le_bytes());
        write(12, &features.to_le_bytes());
    }
    write(STATUS, &[11]);
    for queue in 0..u16::from(input.below(4)) {
        let ring = 0x1_0000 * (u64::from(queue) + 1);
        write(22, &queue.to_le_bytes());
        write(24, &16_u16.to_le_bytes());
        for (register, address) in [(32, ring), (40, ring + 0x1000), (48, ring + 0x2000)] {
            write(register, &address.to_le_bytes());
        }
        write(28, &[1, 0]);
    }
    write(STATUS, &[15]);
}
