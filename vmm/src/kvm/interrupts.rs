//! Interrupts into KVM: lines of the chipset, and message-signalled interrupts as irqfds with a route each.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use rackvisor_devices::interrupt::{InterruptLine, MsiController, MsiMessage, MsiSource};
use rackvisor_devices::throttle::Throttle;
use vmm_sys_util::eventfd::EventFd;

/// Pins of the I/O APIC; message-signalled interrupts get the numbers above.
const IOAPIC_PINS: u32 = 24;
/// Pins of the two 8259 PICs together.
const PIC_PINS: u32 = 16;
/// What KVM holds at most (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

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
        // KVM refuses only a number that does not exist; this one was checked when the machine was made.
        if let Err(error) = self.vm.set_irq_line(self.gsi, asserted)
            && let Some(held_back) = LINE_LOG.pass()
        {
            tracing::error!(gsi = self.gsi, held_back, %error, "KVM refused an interrupt line");
        }
    }
}

/// Makes message-signalled interrupts for one VM and keeps KVM's routing table.
#[derive(Clone)]
pub struct KvmMsis {
    vm: Arc<VmFd>,
    routes: Arc<Mutex<BTreeMap<u32, Option<MsiMessage>>>>,
}

impl KvmMsis {
    /// No message-signalled interrupt yet, and the lines of the chipset wired as the ACPI tables say.
    ///
    /// # Errors
    /// What KVM answered.
    pub fn new(vm: Arc<VmFd>) -> io::Result<Self> {
        let msis = Self { vm, routes: Arc::default() };
        msis.apply(&BTreeMap::new())?;
        Ok(msis)
    }

    fn apply(&self, routes: &BTreeMap<u32, Option<MsiMessage>>) -> io::Result<()> {
        let messages = routes.iter().filter_map(|(gsi, message)| Some(msi_route(*gsi, (*message)?)));
        let entries: Vec<_> = chipset_routes().chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm.set_gsi_routing(&table).map_err(io::Error::from)
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

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}
