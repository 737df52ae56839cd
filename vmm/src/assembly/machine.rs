//! A machine that exists: its parts, and the lifecycle that all of them share.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use rackvisor_api::config::{BALLOON_ID, BootConfig, RNG_ID, VmConfig, slot_assignment};
use rackvisor_devices::tpm::Tpm;
use rackvisor_devices::virtio::VirtioDevice;
use rackvisor_devices::virtio::pci::VirtioPci;
use rackvisor_devices::virtio::rng::VirtioRng;

use super::console::LiveConsole;
use super::inventory::Inventory;
use super::platform::{self, Platform, Processors};
use super::{AssemblyError, DeviceStart, Host, MachineBusy, balloon, disks, nics, tpm};
use crate::boot::loading::Loading;
use crate::boot::{BootImages, LoadedImages};
use crate::cpu::metrics::VcpuSetMetrics;
use crate::cpu::{self, NewVcpus, VcpuSet};
use crate::kvm;
use crate::kvm::chipset::{ChipsetState, Irqchip};
use crate::kvm::interrupts::KvmMsis;
use crate::memory::Ram;

/// A machine. Fields are dropped in order: first what runs, then what it uses.
pub struct Machine {
    vcpus: VcpuSet,
    inventory: Inventory,
    platform: Platform,
    console: LiveConsole,
    /// What a direct boot loads, and the configuration that its tables follow from.
    direct: Option<Direct>,
    /// What of the chipset is in the kernel, besides local APICs.
    chipset_state: Option<ChipsetState>,
    vm: Arc<VmFd>,
    ram: Ram,
}

/// A boot without firmware.
struct Direct {
    images: BootImages,
    config: VmConfig,
    apic_ids: Vec<u32>,
}

impl Machine {
    /// Puts together what `config` describes, loads the guest and leaves everything parked.
    ///
    /// # Errors
    /// [`AssemblyError`]; everything is given back then.
    pub fn assemble(config: &VmConfig, host: &Host) -> Result<Self, AssemblyError> {
        let boot = config.boot.as_ref().ok_or_else(|| AssemblyError::Config(BootConfig::missing()))?;
        if let Some(confinement) = &host.options.confinement {
            confinement.check(config).map_err(AssemblyError::Config)?;
        }
        let images = BootImages::open(boot)?;
        let kvm = kvm::open()?;
        let mut ram = Ram::new(&config.memory, &config.numa)?;
        let begin = |images| Loading::begin(images, ram.shared(), ram.size(), &*host.spawner);
        let loading = images.map(begin).transpose().map_err(|e| AssemblyError::host("thread for the images")(&e))?;
        let by_firmware = boot.firmware.is_some();
        let smm = boot.firmware.as_ref().is_some_and(|firmware| firmware.smm);
        if by_firmware {
            kvm::rom::check(&kvm)?;
        }
        if smm {
            kvm::smm::check(&kvm)?;
        }
        let apic_ids = cpu::apic_ids(&config.cpus);
        let irqchip = Irqchip::reaching(&apic_ids);
        let vm = kvm::create_vm(&kvm, &ram, smm, irqchip)?;
        let new_vcpus = NewVcpus::create(&kvm, &vm, &config.cpus, by_firmware)?;
        let msis = KvmMsis::new(Arc::clone(&vm), irqchip).map_err(|e| AssemblyError::host("interrupt routes")(&e))?;
        let console = LiveConsole::open(&config.serial, host)?;
        let tpm = tpm::open(config.tpm.as_ref(), host)?;
        let processors = Processors { vm: &vm, apic_ids: &apic_ids, irqchip, msis: &msis };
        let mut platform = platform::build(config, &processors, &console, host, tpm, &mut ram)?;
        platform.add_firmware(config, host, &vm, ram.shared(), &apic_ids)?;
        let mut inventory = Inventory::new(console.pty_path());
        inventory.clock = Some(platform.live_clock());
        inventory.parts.memory = ram.slots().collect();
        inventory.parts.tpm = platform.tpm().map(Tpm::metrics);
        inventory.parts.metrics.extend(inventory.parts.tpm.clone());
        inventory.generation = platform.generation().cloned();
        let sockets = Sockets { host, ram: &ram, msis, platform: &platform };
        attach_devices(config, &sockets, &mut inventory)?;
        platform.assign_bars()?;
        let vcpus = new_vcpus.start(&platform.for_vcpus(), &host.vcpu_events, &*host.spawner)?;
        inventory.parts.vcpus = vcpus.metrics();
        inventory.parts.metrics.push(Arc::new(VcpuSetMetrics(vcpus.metrics())));
        let chipset_state = (irqchip == Irqchip::Kernel).then(|| ChipsetState::save(&vm)).transpose()?;
        let (direct, loaded) = match loading.map(Loading::finish).transpose()? {
            Some((images, loaded)) => (Some(Direct { images, config: config.clone(), apic_ids }), Some(loaded)),
            None => (None, None),
        };
        let machine = Self { vcpus, inventory, platform, console, direct, chipset_state, vm, ram };
        machine.enter(loaded.as_ref())?;
        Ok(machine)
    }

    /// Describes the machine to a kernel that is loaded and puts the vCPUs at its entry, or where firmware starts.
    fn enter(&self, loaded: Option<&LoadedImages>) -> Result<(), AssemblyError> {
        self.platform.place_generation_id()?;
        let (Some(direct), Some(loaded)) = (&self.direct, loaded) else { return Ok(self.vcpus.reset(None)?) };
        let rsdp = self.platform.write_tables(&direct.config, &direct.apic_ids, self.ram.map())?;
        let entry = direct.images.describe(loaded, self.ram.map(), self.ram.size(), rsdp)?;
        Ok(self.vcpus.reset(Some(&entry))?)
    }

    /// Lets the guest run.
    pub fn start_vcpus(&mut self) {
        self.vcpus.start();
    }

    /// Stops the guest, then every device, and says what has not stopped yet. Never waits: the machine's owner is told when the
    /// vCPUs have and when a device has; call it again then.
    ///
    /// # Errors
    /// [`MachineBusy`] for the vCPUs, or the device that waits longest.
    pub fn stop(&mut self) -> Result<(), MachineBusy> {
        self.vcpus.stop()?;
        self.platform.pause(true);
        let busy = self.inventory.transports().iter().filter_map(|t| {
            let busy = t.pause().err()?;
            Some((t.id().to_owned(), busy))
        });
        let tpm = self.platform.tpm().and_then(|tpm| {
            let busy = tpm.stop().err()?;
            Some((tpm.id().to_owned(), busy))
        });
        match busy.chain(tpm).max_by_key(|(_, busy)| busy.oldest) {
            None => Ok(()),
            Some((device, busy)) => Err(MachineBusy::Device { device, busy }),
        }
    }

    /// Lets the devices go on where they stopped.
    ///
    /// # Errors
    /// [`DeviceStart`] for the first device that does not.
    pub fn resume_devices(&self) -> Result<(), DeviceStart> {
        self.platform.pause(false);
        self.inventory
            .transports()
            .iter()
            .try_for_each(|t| t.resume().map_err(|source| DeviceStart { device: t.id().to_owned(), source }))
    }

    /// Back to power-on, with the guest loaded anew. vCPUs and devices must be stopped. May read files: not for the
    /// control thread.
    ///
    /// # Errors
    /// [`AssemblyError`]; the guest must not be started then.
    pub fn reset(&mut self) -> Result<(), AssemblyError> {
        self.platform.reset()?;
        if let Some(state) = &self.chipset_state {
            state.restore(&self.vm)?;
        }
        if self.platform.wants_memory_overwrite() {
            self.ram.clear()?;
        }
        let load = |direct: &mut Direct| direct.images.load(self.ram.map(), self.ram.size());
        let loaded = self.direct.as_mut().map(load).transpose()?;
        self.enter(loaded.as_ref())
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.platform.power().press_power_button();
    }

    /// Presses the sleep button.
    pub fn press_sleep_button(&self) {
        self.platform.power().press_sleep_button();
    }

    /// Sends a non-maskable interrupt to every vCPU.
    pub fn nmi(&self) {
        self.vcpus.nmi();
    }

    /// What describes this machine, for as long as anybody wants it.
    #[must_use]
    pub fn inventory(&self) -> Inventory {
        self.inventory.clone()
    }

    /// Flushes the disks, ends all threads and gives everything back. May wait for a disk: not for the control thread.
    ///
    /// # Errors
    /// What the last flush of a disk said, or which vCPU does not end.
    pub fn dismantle(self) -> Result<(), String> {
        let mut failures: Vec<String> = self.inventory.flush_disks();
        failures.extend(self.vcpus.end().err().map(|error| error.to_string()));
        self.console.close();
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }
}

/// Where devices are plugged in.
struct Sockets<'a> {
    host: &'a Host,
    ram: &'a Ram,
    msis: KvmMsis,
    platform: &'a Platform,
}

impl Sockets<'_> {
    fn plug(
        &self,
        inventory: &mut Inventory,
        slot: u8,
        id: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), AssemblyError> {
        let refused = |e: &dyn std::fmt::Display| AssemblyError::host(format!("device \"{id}\""))(e);
        let notifier = Arc::clone(&self.host.notifier);
        let transport = VirtioPci::new(id.to_owned(), device, self.ram.shared(), &self.msis, notifier);
        let transport = Arc::new(transport.map_err(|e| refused(&e))?);
        self.platform.root().insert(slot, Arc::clone(&transport) as _).map_err(|e| refused(&e))?;
        inventory.add_transport(transport);
        Ok(())
    }
}

fn attach_devices(config: &VmConfig, sockets: &Sockets<'_>, inventory: &mut Inventory) -> Result<(), AssemblyError> {
    inventory.add_groups(&config.disk_groups);
    for (id, slot) in slot_assignment(config).map_err(AssemblyError::Config)? {
        let device: Box<dyn VirtioDevice> = if let Some(disk) = config.disk(&id) {
            let group = disk.group.as_ref().and_then(|group| inventory.group(group)).cloned();
            let (device, live) = disks::open(disk, group, sockets.host)?;
            inventory.add_disk(&id, live);
            Box::new(device)
        } else if let Some(nic) = config.nic(&id) {
            let (device, live) = nics::open(nic, sockets.host)?;
            inventory.add_nic(&id, live);
            Box::new(device)
        } else if let Some(config) = config.balloon.as_ref().filter(|_| id == BALLOON_ID) {
            let (device, live) = balloon::open(config, sockets.host)?;
            inventory.balloon = Some(live);
            Box::new(device)
        } else {
            let device = VirtioRng::new(RNG_ID, &*sockets.host.spawner, Arc::clone(&sockets.host.notifier));
            Box::new(device.map_err(|e| AssemblyError::host("entropy device")(&e))?)
        };
        sockets.plug(inventory, slot, &id, device)?;
    }
    Ok(())
}
