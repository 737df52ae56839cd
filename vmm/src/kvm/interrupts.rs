//! Interrupts into KVM: lines of the chipset, and message-signalled interrupts as irqfds with a route each. With [`Irqchip::Split`]
//! the pins of our I/O APIC have such routes as well, at the numbers that KVM's would have: for these KVM tells of ends of interrupts.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use rackvisor_devices::chipset::PinMessages;
use rackvisor_devices::interrupt::{InterruptLine, MsiController, MsiMessage, MsiSource};
use rackvisor_devices::throttle::Throttle;
use vmm_sys_util::eventfd::EventFd;

use super::chipset::Irqchip;

/// Pins of the I/O APIC; message-signalled interrupts get the numbers above.
pub(super) const IOAPIC_PINS: u32 = 24;
/// Pins of the two 8259 PICs together.
const PIC_PINS: u32 = 16;
/// What KVM holds at most (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

/// In the address of a message with an extended destination ID: bits 14:8 of the APIC ID, and the mark of an address that has
/// another form, for interrupt remapping (`virt_destid_8_14` in Linux' arch/x86/include/asm/msi.h, and the bit below).
const EXTENDED_SHIFT: u32 = 5;
const EXTENDED: u32 = 0x7f << EXTENDED_SHIFT;
const REMAPPABLE: u32 = 1 << 4;

/// A line of the chipset: a pin of the I/O APIC (and of a PIC below 16).
pub struct KvmLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl KvmLine {
    /// The line with number `gsi` (0..=23) of `vm`.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

static LINE_LOG: Throttle = Throttle::new();

impl InterruptLine for KvmLine {
    fn set(&self, asserted: bool) {
        set_line(&self.vm, self.gsi, asserted);
    }
}

fn set_line(vm: &VmFd, gsi: u32, asserted: bool) {
    // KVM refuses only a number that does not exist; this one was checked when the machine was made.
    if let Err(error) = vm.set_irq_line(gsi, asserted)
        && let Some(held_back) = LINE_LOG.pass()
    {
        tracing::error!(gsi, held_back, %error, "KVM refused an interrupt line");
    }
}

/// Makes message-signalled interrupts for one VM and keeps KVM's routing table.
#[derive(Clone)]
pub struct KvmMsis {
    vm: Arc<VmFd>,
    irqchip: Irqchip,
    routes: Arc<Mutex<BTreeMap<u32, Option<MsiMessage>>>>,
}

impl KvmMsis {
    /// No message-signalled interrupt yet, and the lines of the chipset, if `irqchip` has them in the kernel, wired as the ACPI
    /// tables say.
    ///
    /// # Errors
    /// What KVM answered.
    pub fn new(vm: Arc<VmFd>, irqchip: Irqchip) -> io::Result<Self> {
        let msis = Self { vm, irqchip, routes: Arc::default() };
        msis.apply(&BTreeMap::new())?;
        Ok(msis)
    }

    fn apply(&self, routes: &BTreeMap<u32, Option<MsiMessage>>) -> io::Result<()> {
        let messages = routes.iter().filter_map(|(gsi, message)| Some(self.msi_route(*gsi, (*message)?)));
        let lines = chipset_routes().filter(|_| self.irqchip == Irqchip::Kernel);
        let entries: Vec<_> = lines.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm.set_gsi_routing(&table).map_err(io::Error::from)
    }

    fn msi_route(&self, gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
        let (address_lo, address_hi) = match self.irqchip {
            Irqchip::Kernel => (message.address as u32, (message.address >> 32) as u32),
            Irqchip::Split => wide_address(message.address),
        };
        let msi = kvm_irq_routing_msi { address_lo, address_hi, data: message.data, ..Default::default() };
        kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
            ..Default::default()
        }
    }
}

/// A guest's address of a message in the form that KVM takes with 32-bit IDs: bits 31:8 of the destination in the upper word.
/// What the guest has there is no part of the address of an interrupt, and KVM would refuse some of it.
fn wide_address(address: u64) -> (u32, u32) {
    let low = address as u32;
    let extended = if low & REMAPPABLE == 0 { low & EXTENDED } else { 0 };
    (low & !EXTENDED, extended >> EXTENDED_SHIFT << 8)
}

impl PinMessages for KvmMsis {
    fn route(&self, pin: u8, message: MsiMessage) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let former = routes.insert(u32::from(pin), Some(message)).flatten();
        let applied = self.apply(&routes);
        if applied.is_err() {
            routes.insert(u32::from(pin), former);
        }
        applied
    }

    fn send(&self, pin: u8) {
        // A line whose route is a message sends it when it is raised, and need not be lowered.
        set_line(&self.vm, u32::from(pin), true);
    }
}

impl MsiController for KvmMsis {
    fn create(&self) -> io::Result<Box<dyn MsiSource>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let gsi = (IOAPIC_PINS..MAX_ROUTES - IOAPIC_PINS - PIC_PINS)
            .find(|gsi| !routes.contains_key(gsi))
            .ok_or_else(|| io::Error::other("KVM has no interrupt route left: give the VM fewer queues"))?;
        routes.insert(gsi, None);
        Ok(Box::new(KvmMsi { event, gsi, msis: self.clone() }))
    }
}

struct KvmMsi {
    event: EventFd,
    gsi: u32,
    msis: KvmMsis,
}

impl MsiSource for KvmMsi {
    fn set_message(&self, message: MsiMessage) -> io::Result<()> {
        let mut routes = self.msis.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let former = routes.insert(self.gsi, Some(message)).flatten();
        let applied = self.msis.apply(&routes).and_then(|()| match former {
            Some(_) => Ok(()),
            None => self.msis.vm.register_irqfd(&self.event, self.gsi).map_err(io::Error::from),
        });
        if applied.is_err() {
            routes.insert(self.gsi, former);
        }
        applied
    }

    fn event(&self) -> &EventFd {
        &self.event
    }

    fn connect(&self, event: &EventFd) -> io::Result<()> {
        self.msis.vm.register_irqfd(event, self.gsi).map_err(io::Error::from)
    }

    fn disconnect(&self, event: &EventFd) {
        if let Err(error) = self.msis.vm.unregister_irqfd(event, self.gsi) {
            tracing::error!(gsi = self.gsi, %error, "KVM does not let go of an interrupt's eventfd");
        }
    }
}

impl Drop for KvmMsi {
    fn drop(&mut self) {
        let mut routes = self.msis.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.remove(&self.gsi).flatten().is_some() {
            // Nobody fires it any more: a stale route does no harm, and the next change of a route removes it.
            let _ = self.msis.vm.unregister_irqfd(&self.event, self.gsi);
        }
    }
}

/// The routes that KVM sets up by itself and forgets when it is given others.
fn chipset_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let route = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    };
    let pics = (0..PIC_PINS).map(move |gsi| match gsi {
        0..8 => route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    // The PIT's line 0 is wired to pin 2 of the I/O APIC, as the MADT says; line 2 joins the PICs.
    let pins = (0..IOAPIC_PINS).filter(|gsi| *gsi != 2);
    let ioapic = pins.map(move |gsi| route(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
    pics.chain(ioapic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_of_fifteen_bits_becomes_one_of_thirty_two() {
        assert_eq!(wide_address(0xfee0_1000), (0xfee0_1000, 0));
        assert_eq!(wide_address(0xfeef_f00c), (0xfeef_f00c, 0), "logical, with redirection hint");
        // APIC ID 0x124: 0x24 in bits 19:12, 1 in bits 11:5.
        assert_eq!(wide_address(0xfee2_4000 | 1 << 5), (0xfee2_4000, 0x100));
        assert_eq!(wide_address(0xfeef_f000 | 0x7f << 5), (0xfeef_f000, 0x7f00));
    }

    #[test]
    fn nothing_that_a_guest_writes_is_an_address_that_kvm_refuses() {
        let mut address = 1u64;
        for _ in 0..10_000 {
            address = address.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(0x1234_5678_9abc_def1);
            let (low, high) = wide_address(address);
            assert_eq!((low & EXTENDED, high & !0x7f00), (0, 0), "{address:#x}");
            assert_eq!(low & !EXTENDED, address as u32 & !EXTENDED, "{address:#x}");
        }
        assert_eq!(wide_address(0xfee0_0000 | REMAPPABLE as u64 | 0x7f << 5), (0xfee0_0010, 0));
    }
}
