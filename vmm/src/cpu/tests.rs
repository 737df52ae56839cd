//! vCPUs that run a few instructions of integer code: that much any KVM can, also a software one.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rackvisor_api::config::{CpusConfig, MemoryConfig};
use rackvisor_api::size::ByteSize;
use rackvisor_devices::bus::{Bus, BusDevice, VmRequest};
use rackvisor_devices::pci::Root;
use rackvisor_devices::{IoEvents, PlainThreads};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::{EventSink, Platform, VcpuEvent, install_kick_handler};
use super::{CpuError, NewVcpus, VcpuSet, apic_ids};
use crate::boot::{Entry, Mode};
use crate::kvm;
use crate::kvm::chipset::Irqchip;
use crate::kvm::smm::KvmSmis;
use crate::memory::Ram;

const CODE: u64 = 0x1000;
const COUNTER: u64 = 0x2000;
const PORT: u64 = 0x100;
/// A write to this port asks for a reset.
const RESET_PORT: u64 = 0x200;
/// A write to this port is answered when the test allows it.
const SLOW_PORT: u64 = 0x300;
const PATIENCE: Duration = Duration::from_secs(30);

/// `loop: inc dword [COUNTER]; jmp loop`
const COUNT: &[u8] = &[0xff, 0x05, 0x00, 0x20, 0x00, 0x00, 0xeb, 0xf8];

struct NoIoEvents;

impl IoEvents for NoIoEvents {
    fn register(&self, _address: u64, _event: &EventFd) -> std::io::Result<()> {
        Ok(())
    }

    fn unregister(&self, _address: u64, _event: &EventFd) -> std::io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Recorder {
    writes: Mutex<Vec<Vec<u8>>>,
}

impl BusDevice for Recorder {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<VmRequest> {
        self.writes.lock().unwrap().push(data.to_vec());
        None
    }
}

struct ResetPort;

/// A device that answers a write when it is allowed to, and tells that it was asked.
struct Slow {
    asked: SyncSender<()>,
    allowed: Mutex<Receiver<()>>,
}

impl BusDevice for Slow {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, _data: &[u8]) -> Option<VmRequest> {
        self.asked.send(()).unwrap();
        self.allowed.lock().unwrap().recv().unwrap();
        None
    }
}

impl BusDevice for ResetPort {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, _data: &[u8]) -> Option<VmRequest> {
        Some(VmRequest::Reset)
    }
}

/// A guest with `code` at its entry. Fields are dropped in order.
struct Guest {
    vcpus: VcpuSet,
    port: Arc<Recorder>,
    /// A write to the slow port is there.
    asked: Receiver<()>,
    /// Answers it.
    allow: Sender<()>,
    events: Receiver<VcpuEvent>,
    ram: Ram,
}

/// `None`, said aloud, where there is no KVM.
fn guest(code: &[u8], count: u16) -> Option<Guest> {
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("SKIPPED: a test of vCPUs: {error}");
            return None;
        }
    };
    install_kick_handler().unwrap();
    let ram = Ram::new(&MemoryConfig::new(ByteSize::mib(128)), &[]).unwrap();
    ram.map().write_slice(code, GuestAddress(CODE)).unwrap();
    let config = CpusConfig { count, ..CpusConfig::default() };
    let vm = kvm::create_vm(&kvm, &ram, false, Irqchip::Kernel).unwrap();
    let new = NewVcpus::create(&kvm, &vm, &config, false).unwrap();
    let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let port = Arc::new(Recorder::default());
    pio.insert(PORT, 4, Arc::clone(&port) as _).unwrap();
    pio.insert(RESET_PORT, 1, Arc::new(ResetPort)).unwrap();
    let ((asks, asked), (allow, allowed)) = (sync_channel(16), channel());
    pio.insert(SLOW_PORT, 1, Arc::new(Slow { asked: asks, allowed: Mutex::new(allowed) })).unwrap();
    let pci = Arc::new(Root::new(Arc::clone(&mmio), Arc::clone(&pio), Arc::new(NoIoEvents)));
    let (sender, events) = channel();
    let sink: EventSink = Arc::new(move |event| drop(sender.send(event)));
    let smis = KvmSmis::new(vm, &apic_ids(&config));
    let platform = Platform { pio, smm_mmio: Arc::clone(&mmio), mmio, pci, smis, io_apic: None };
    let vcpus = new.start(&platform, &sink, &PlainThreads).unwrap();
    let guest = Guest { vcpus, port, asked, allow, events, ram };
    guest.reset();
    Some(guest)
}

impl Guest {
    fn reset(&self) {
        self.vcpus.reset(Some(&Entry { rip: CODE, info: 0, mode: Mode::Protected })).unwrap();
    }

    fn counter(&self) -> u32 {
        self.ram.map().read_obj(GuestAddress(COUNTER)).unwrap()
    }

    /// Waits until the guest has counted further than `from`.
    fn counts_beyond(&self, from: u32) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while self.counter() <= from {
            assert!(std::time::Instant::now() < deadline, "the guest does not run");
            std::thread::yield_now();
        }
    }

    /// Stops the guest and waits until it has.
    fn stop(&mut self) {
        let _ = self.vcpus.stop();
        assert_eq!(self.event(), VcpuEvent::Stopped);
        self.vcpus.stop().unwrap();
    }

    fn event(&self) -> VcpuEvent {
        self.events.recv_timeout(PATIENCE).expect("the guest must have come this far")
    }
}

#[test]
fn a_vcpu_stands_still_between_stop_and_start_and_goes_on_where_it_was() {
    let Some(mut guest) = guest(COUNT, 2) else { return };
    guest.vcpus.start();
    for _ in 0..50 {
        let before = guest.counter();
        guest.counts_beyond(before);
        guest.stop();
        let stopped = guest.counter();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(guest.counter(), stopped);
        guest.vcpus.start();
    }
    guest.stop();
    assert_eq!(guest.events.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout), "nothing else happened");
}

#[test]
fn string_output_reaches_the_device_item_by_item() {
    // mov esi, CODE; mov ecx, 3; mov dx, PORT; rep outsw; mov dx, RESET_PORT; out dx, al; hlt
    let code =
        [
            &[
                0xbe, 0x00, 0x10, 0x00, 0x00, 0xb9, 0x03, 0x00, 0x00, 0x00, 0x66, 0xba, 0x00, 0x01, 0xfc, 0xf3, 0x66,
                0x6f,
            ][..],
            &[0x66, 0xba, 0x00, 0x02, 0xee, 0xf4],
        ]
        .concat();
    let Some(mut guest) = guest(&code, 1) else { return };
    guest.vcpus.start();
    assert_eq!(guest.event(), VcpuEvent::Request(VmRequest::Reset));
    assert_eq!(*guest.port.writes.lock().unwrap(), [code[0..2].to_vec(), code[2..4].to_vec(), code[4..6].to_vec()]);
}

#[test]
fn a_guest_that_asks_for_a_reset_waits_for_it_and_starts_anew_with_clean_registers() {
    // add byte [COUNTER], bl; inc ebx; inc dword [COUNTER]; mov dx, RESET_PORT; out dx, al; inc dword [COUNTER]; hlt
    let code = [
        &[0x00, 0x1d, 0x00, 0x20, 0x00, 0x00, 0x43][..],
        &[0xff, 0x05, 0x00, 0x20, 0x00, 0x00, 0x66, 0xba, 0x00, 0x02, 0xee],
        &[0xff, 0x05, 0x00, 0x20, 0x00, 0x00, 0xf4],
    ]
    .concat();
    let Some(mut guest) = guest(&code, 1) else { return };
    for round in 1..=20 {
        guest.vcpus.start();
        assert_eq!(guest.event(), VcpuEvent::Request(VmRequest::Reset));
        guest.stop();
        assert_eq!(guest.counter(), round, "EBX is zero again, and nothing ran behind the request");
        guest.reset();
    }
}

#[test]
fn a_triple_fault_is_a_crash_that_says_which_vcpu_and_where() {
    // lidt [CODE + 9] (limit 0); ud2
    let Some(mut guest) = guest(&[0x0f, 0x01, 0x1d, 0x09, 0x10, 0x00, 0x00, 0x0f, 0x0b, 0, 0, 0, 0, 0, 0], 1) else {
        return;
    };
    guest.vcpus.start();
    let VcpuEvent::Crashed(cause) = guest.event() else { panic!("not a crash") };
    assert!(cause.starts_with("vCPU 0: "), "{cause}");
    assert!(cause.contains("rip 0x"), "{cause}");
}

/// `mov dx, SLOW_PORT; out dx, al; loop: inc dword [COUNTER]; jmp loop`
fn ask_then_count() -> Vec<u8> {
    [&[0x66, 0xba, 0x00, 0x03, 0xee][..], COUNT].concat()
}

#[test]
fn nobody_waits_for_a_vcpu_that_waits_for_a_device_and_it_is_told_when_it_has_stopped() {
    let Some(mut guest) = guest(&ask_then_count(), 2) else { return };
    guest.vcpus.start();
    guest.asked.recv_timeout(PATIENCE).unwrap();
    let busy = guest.vcpus.stop().unwrap_err();
    assert!((1..=2).contains(&busy.left), "{busy}");
    // The second one may stop before it asks.
    guest.allow.send(()).unwrap();
    guest.allow.send(()).unwrap();
    assert_eq!(guest.event(), VcpuEvent::Stopped);
    guest.vcpus.stop().unwrap();
    let stopped = guest.counter();
    std::thread::sleep(Duration::from_millis(1));
    assert_eq!(guest.counter(), stopped);
}

#[test]
fn a_thread_that_does_not_end_is_named_and_never_runs_the_guest_again() {
    let Some(mut guest) = guest(&ask_then_count(), 1) else { return };
    guest.vcpus.start();
    guest.asked.recv_timeout(PATIENCE).unwrap();
    let error = guest.vcpus.end_within(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, CpuError::NoEnd { index: 0 }), "{error}");
    let Guest { vcpus, allow, events, ram, .. } = guest;
    drop(vcpus);
    allow.send(()).unwrap();
    // The thread lets go of its end of the events with all else that it has.
    assert_eq!(events.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
    assert_eq!(ram.map().read_obj::<u32>(GuestAddress(COUNTER)).unwrap(), 0);
}

#[test]
fn vcpus_end_when_the_set_is_dropped_whatever_the_guest_does() {
    for code in [COUNT, &[0xf4]] {
        let Some(mut guest) = guest(code, 4) else { return };
        guest.vcpus.start();
        drop(guest);
    }
}
