//! The in-kernel part of the chipset (PICs, I/O APIC, PIT): its state at power-on, so that a reset can return to it.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;

use super::{KvmError, refused};

/// State of the in-kernel chipset.
pub struct ChipsetState {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
}

impl ChipsetState {
    /// Reads the state of `vm`.
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
