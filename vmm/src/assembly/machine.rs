//! A machine that exists: its parts, and the lifecycle that all of them share.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use rackvisor_api::config::{RNG_ID, VmConfig, slot_assignment};
use rackvisor_api::problem::{Code, Problem};
use rackvisor_devices::tpm::Tpm;
use rackvisor_devices::virtio::VirtioDevice;
use rackvisor_devices::virtio::pci::VirtioPci;
use rackvisor_devices::virtio::rng::VirtioRng;

use super::console::LiveConsole;
use super::inventory::Inventory;
use super::platform::{self, Platform};
use super::{AssemblyError, DeviceBusy, DeviceStart, Host, disks, nics, tpm};
use crate::boot::loading::Loading;
use crate::boot::{BootImages, LoadedImages};
use crate::cpu::{NewVcpus, VcpuSet};
use crate::kvm;
use crate::kvm::chipset::ChipsetState;
use crate::kvm::interrupts::KvmMsis;
use crate::memory::Ram;

/// A machine. Fields are dropped in order: first what runs, then what it uses.
pub struct Machine {
    vcpus: VcpuSet,
    inventory: Inventory,
    platform: Platform,
    console: LiveConsole,
    images: BootImages,
    chipset_state: ChipsetState,
    vm: Arc<VmFd>,
    ram: Ram,
}

impl Machine {
    /// Puts together what `config` describes, loads the guest and leaves everything parked.
    ///
    /// # Errors
    /// [`AssemblyError`]; everything is given back then.
    pub fn assemble(config: &VmConfig, host: &Host) -> Result<Self, AssemblyError> {
        let boot = config.boot.as_ref().ok_or_else(no_boot)?;
        let images = BootImages::open(boot)?;
        let kvm = kvm::open()?;
        let ram = Ram::new(&config.memory, &config.numa)?;
        let loading = Loading::begin(images, ram.shared(), ram.size(), &*host.spawner);
        let loading = loading.map_err(|e| AssemblyError::host("thread for the images")(&e))?;
        let vm = kvm::create_vm(&kvm, &ram)?;
        let new_vcpus = NewVcpus::create(&kvm, &vm, &config.cpus)?;
        let console = LiveConsole::open(&config.serial, host)?;
        let platform = {
            let tpm = tpm::open(config.tpm.as_ref(), host)?;
            platform::build(config, &vm, &new_vcpus.apic_ids, &console, tpm, ram.shared())?
        };
        let mut inventory = Inventory::new(console.pty_path());
        inventory.metrics.extend(platform.tpm().map(Tpm::metrics));
        inventory.generation = platform.generation().cloned();
        let msis = KvmMsis::new(Arc::clone(&vm)).map_err(|e| AssemblyError::host("interrupt routes")(&e))?;
        let sockets = Sockets { host, ram: &ram, msis, platform: &platform };
        attach_devices(config, &sockets, &mut inventory)?;
        platform.assign_bars()?;
        let vcpus = new_vcpus.start(&platform.for_vcpus(), &host.vcpu_events, &*host.spawner)?;
        inventory.metrics.push(vcpus.metrics());
        let chipset_state = ChipsetState::save(&vm)?;
        let (images, loaded) = loading.finish()?;
        let machine = Self { vcpus, inventory, platform, console, images, chipset_state, vm, ram };
        machine.enter(&loaded)?;
        Ok(machine)
    }

    /// Describes the machine to the loaded guest and puts the vCPUs at its entry.
    fn enter(&self, loaded: &LoadedImages) -> Result<(), AssemblyError> {
        let rsdp = self.platform.write_acpi(self.ram.map())?;
        let entry = self.images.describe(loaded, self.ram.map(), self.ram.size(), rsdp)?;
        Ok(self.vcpus.reset(&entry)?)
    }

    /// Lets the guest run.
    pub fn start_vcpus(&self) {
        self.vcpus.start();
    }

    /// Stops the guest; devices still work on what is in flight.
    ///
    /// # Errors
    /// [`AssemblyError::Cpu`] when a vCPU does not answer.
    pub fn stop_vcpus(&self) -> Result<(), AssemblyError> {
        Ok(self.vcpus.stop()?)
    }

    /// Stops every device, and says which one has not drained yet. Never waits; call it again.
    ///
    /// # Errors
    /// [`DeviceBusy`] for the device that waits longest.
    pub fn pause_devices(&self) -> Result<(), DeviceBusy> {
        let busy = self.inventory.transports().iter().filter_map(|t| {
            let busy = t.pause().err()?;
            Some(DeviceBusy { device: t.id().to_owned(), busy })
        });
        let tpm = self.platform.tpm().and_then(|tpm| {
            let busy = tpm.stop().err()?;
            Some(DeviceBusy { device: tpm.id().to_owned(), busy })
        });
        busy.chain(tpm).max_by_key(|b| b.busy.oldest).map_or(Ok(()), Err)
    }

    /// Lets the devices go on where they stopped.
    ///
    /// # Errors
    /// [`DeviceStart`] for the first device that does not.
    pub fn resume_devices(&self) -> Result<(), DeviceStart> {
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
        self.chipset_state.restore(&self.vm)?;
        if self.platform.wants_memory_overwrite() {
            self.ram.clear()?;
        }
        let loaded = self.images.load(self.ram.map(), self.ram.size())?;
        self.enter(&loaded)
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.platform.power().press_power_button();
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
    /// What the last flush of a disk said.
    pub fn dismantle(self) -> Result<(), String> {
        let failures: Vec<String> = self.inventory.flush_disks();
        drop(self.vcpus);
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
        inventory.metrics.push(transport.metrics());
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
        } else {
            let device = VirtioRng::new(RNG_ID, &*sockets.host.spawner, Arc::clone(&sockets.host.notifier));
            Box::new(device.map_err(|e| AssemblyError::host("entropy device")(&e))?)
        };
        sockets.plug(inventory, slot, &id, device)?;
    }
    Ok(())
}

fn no_boot() -> AssemblyError {
    let detail = "the configuration names nothing to boot from";
    AssemblyError::Config(Problem::new(Code::BootSourceMissing, detail, "give boot.kernel"))
}
