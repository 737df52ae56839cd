//! The part of the chipset that is in the kernel: what it is, and its state at power-on, so that a reset can return to it.

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_irqchip, kvm_pit_config,
    kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::interrupts::IOAPIC_PINS;
use super::{KvmError, refused};

/// The highest APIC ID that KVM's I/O APIC and messages in their old form reach; 255 means all.
const MAX_XAPIC_ID: u32 = 254;

/// Which interrupt controllers are in the kernel. Follows from the APIC IDs alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irqchip {
    /// All of a PC's: local APICs, I/O APIC, and the two 8259 with the 8254 timer.
    Kernel,
    /// Local APICs, with IDs of 32 bits. The I/O APIC is ours, and the 8259 and 8254 are not there: firmware and operating systems
    /// that know of so many processors do without, as they do on Hyper-V.
    Split,
}

impl Irqchip {
    /// The one that reaches these local APICs.
    #[must_use]
    pub fn reaching(apic_ids: &[u32]) -> Self {
        if apic_ids.iter().any(|id| *id > MAX_XAPIC_ID) { Self::Split } else { Self::Kernel }
    }

    /// Makes it, before there are vCPUs.
    ///
    /// # Errors
    /// [`KvmError`].
    pub(super) fn create(self, kvm: &Kvm, vm: &VmFd) -> Result<(), KvmError> {
        match self {
            Self::Kernel => {
                vm.create_irq_chip().map_err(refused("the in-kernel interrupt controllers"))?;
                let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                vm.create_pit2(pit).map_err(refused("the in-kernel timer"))
            }
            Self::Split => {
                let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
                let enable = |cap, value: u32, name| {
                    if kvm.check_extension_raw(u64::from(cap)) == 0 {
                        return Err(KvmError::NoWideIds(name));
                    }
                    let mut enable = kvm_enable_cap { cap, ..Default::default() };
                    enable.args[0] = u64::from(value);
                    vm.enable_cap(&enable).map_err(refused(name))
                };
                enable(KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS, "KVM_CAP_SPLIT_IRQCHIP")?;
                enable(Cap::X2ApicApi as u32, flags, "KVM_CAP_X2APIC_API")
            }
        }
    }
}

/// State of the in-kernel chipset.
pub struct ChipsetState {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
}

impl ChipsetState {
    /// Reads the state of `vm`, whose chipset is [`Irqchip::Kernel`].
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC].map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map(|()| chip).map_err(refused("the state of an interrupt controller"))
        });
        let pit = vm.get_pit2().map_err(refused("the state of the timer"))?;
        Ok(Self { chips: chips.into_iter().collect::<Result<_, _>>()?, pit })
    }

    /// Writes the state to `vm`.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(refused("the state of an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(refused("the state of the timer"))
    }
}
