//! What the API shows of the VM and its devices, and what it may change of them.

use rackvisor_api::config::{
    DiskConfig, DiskGroup, DiskPatch, NicConfig, NicPatch, VmConfig, VmPatch, slot_assignment,
};
use rackvisor_api::control::{DeviceState, DiskCounters, DiskInfo, NicCounters, NicInfo, Request, Response, VmInfo};
use rackvisor_api::events::EventKind;
use rackvisor_api::problem::{Code, Problem};
use rackvisor_api::state::VmState;
use rackvisor_devices::virtio::balloon::BalloonHandle;
use rackvisor_devices::virtio::pci::{DriverState, VirtioPci};

use super::controller::Controller;
use crate::assembly::{LiveClock, LiveDisk};

impl Controller {
    pub(super) fn describe(&self) -> Result<VmInfo, Problem> {
        let config = self.config()?;
        Ok(VmInfo {
            state: self.state,
            cause: self.cause.clone(),
            pending: self.pending(),
            uptime_ms: self.booted.map(|b| u64::try_from(b.elapsed().as_millis()).unwrap_or(u64::MAX)),
            resets: self.resets,
            guest_panic: self.guest_panic.clone(),
            clock_offset: self.clock_offset(),
            balloon: self.inventory.as_ref().and_then(|i| i.balloon.as_ref()).map(BalloonHandle::held),
            vcpus: self.inventory.as_ref().map_or(0, |_| config.cpus.count),
            serial_path: self.inventory.as_ref().and_then(|i| i.serial_path.clone()),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            config: config.clone(),
        })
    }

    fn clock_offset(&self) -> Option<i64> {
        let clock = self.inventory.as_ref().and_then(|inventory| inventory.clock.as_ref());
        clock.map(LiveClock::offset).or(self.last_clock_offset)
    }

    /// Answers a request about devices.
    pub(super) fn device_request(&mut self, request: Request) -> Result<Response, Problem> {
        match request {
            Request::Describe => self.described(),
            Request::PatchVm(patch) => self.patch_vm(&patch),
            Request::ListDisks => {
                let ids: Vec<_> = self.config()?.disks.iter().map(|d| d.id.clone()).collect();
                Ok(Response::Disks(ids.iter().map(|id| self.disk_info(id)).collect::<Result<_, _>>()?))
            }
            Request::GetDisk(id) => Ok(Response::Disk(Box::new(self.disk_info(&id)?))),
            Request::PutDisk(disk) => {
                let (config, created) = self.config()?.with_disk((*disk).clone())?;
                self.config = Some(config);
                let info = Box::new(self.disk_info(&disk.id)?);
                Ok(if created { Response::DiskCreated(info) } else { Response::Disk(info) })
            }
            Request::PatchDisk(id, patch) => self.patch_disk(&id, &patch),
            Request::DeleteDisk(id) => {
                self.config = Some(self.config()?.without_disk(&id)?);
                Ok(Response::Deleted)
            }
            Request::ListDiskGroups => Ok(Response::DiskGroups(self.config()?.disk_groups.clone())),
            Request::GetDiskGroup(id) => Ok(Response::DiskGroup(Box::new(self.group_config(&id)?.clone()))),
            Request::PatchDiskGroup(id, patch) => {
                let group = patch.apply(self.group_config(&id)?);
                self.config = Some(self.config()?.with_disk_group(group.clone())?);
                if let Some(inventory) = &self.inventory {
                    inventory.limit_group(&id, &group.limits);
                }
                Ok(Response::DiskGroup(Box::new(group)))
            }
            Request::ListNics => {
                let ids: Vec<_> = self.config()?.nics.iter().map(|n| n.id.clone()).collect();
                Ok(Response::Nics(ids.iter().map(|id| self.nic_info(id)).collect::<Result<_, _>>()?))
            }
            Request::GetNic(id) => Ok(Response::Nic(Box::new(self.nic_info(&id)?))),
            Request::PatchNic(id, patch) => self.patch_nic(&id, &patch),
            Request::AnnounceNic(id) => {
                let info = Box::new(self.nic_info(&id)?);
                let live = self.inventory.as_ref().and_then(|i| i.nic(&id));
                live.ok_or_else(|| Problem::no_guest("announce"))?.announce();
                Ok(Response::Nic(info))
            }
            Request::Define(..) | Request::PutNic(..) | Request::DeleteNic(_) | Request::Forget | Request::Act(_) => {
                Err(Problem::new(
                    Code::Internal,
                    "a request about the VM came where only its devices are served",
                    "report this with the log of the VMM",
                ))
            }
        }
    }

    pub(super) fn config(&self) -> Result<&VmConfig, Problem> {
        self.config.as_ref().ok_or_else(Problem::vm_undefined)
    }

    fn disk_config(&self, id: &str) -> Result<&DiskConfig, Problem> {
        self.config()?.disk(id).ok_or_else(|| Problem::no_such_disk(id))
    }

    fn group_config(&self, id: &str) -> Result<&DiskGroup, Problem> {
        self.config()?.disk_group(id).ok_or_else(|| Problem::no_such_disk_group(id))
    }

    pub(super) fn nic_config(&self, id: &str) -> Result<&NicConfig, Problem> {
        self.config()?.nic(id).ok_or_else(|| Problem::no_such_nic(id))
    }

    /// The guest is told of another generation ID, and asked for another size of the balloon.
    fn patch_vm(&mut self, patch: &VmPatch) -> Result<Response, Problem> {
        let changed = patch.apply(self.config()?, self.inventory.is_some())?;
        let live = self.inventory.as_ref().and_then(|i| i.generation.as_ref());
        if let (Some(live), Some(id)) = (live, changed.generation_id) {
            live.change(id.memory()).map_err(|e| {
                let detail = format!("the generation ID cannot be written to the guest's memory: {e}");
                Problem::new(Code::Internal, detail, "report this with the log of the VMM")
            })?;
        }
        if let (Some(inventory), Some(balloon)) = (&self.inventory, &changed.balloon)
            && self.config()?.balloon.as_ref() != Some(balloon)
        {
            inventory.resize_balloon(balloon.size.bytes());
        }
        self.config = Some(changed);
        self.described()
    }

    /// Some of a disk may change at any time, and its size is looked at again; the rest needs a guest that does not exist.
    fn patch_disk(&mut self, id: &str, patch: &DiskPatch) -> Result<Response, Problem> {
        let disk = self.disk_config(id)?;
        if self.inventory.is_some() && !patch.is_live() {
            return Err(while_running(
                id,
                "`limits`, `on_error`, `stall_after`, or nothing (which looks at the size again)",
            ));
        }
        let changed = patch.apply(disk)?;
        let config = self.config()?.with_disk(changed.clone())?.0;
        if let Some(live) = self.inventory.as_ref().and_then(|i| i.disk(id)) {
            live.rescan().map_err(|e| {
                Problem::new(Code::Unusable, e.to_string(), "a disk may grow while it is in use, never shrink")
            })?;
            live.configure(&changed);
        }
        self.config = Some(config);
        Ok(Response::Disk(Box::new(self.disk_info(id)?)))
    }

    /// The link and the limits may change while the guest exists.
    fn patch_nic(&mut self, id: &str, patch: &NicPatch) -> Result<Response, Problem> {
        let old = self.nic_config(id)?.clone();
        let changed = patch.apply(&old)?;
        if !patch.is_live() {
            return Err(while_running(id, "`link`, `rx_limits` and `tx_limits`"));
        }
        let link = changed.link;
        self.config = Some(self.config()?.with_nic(changed.clone())?.0);
        if let Some(live) = self.inventory.as_ref().and_then(|i| i.nic(id)) {
            live.configure(&changed);
            if link != old.link {
                self.publish(EventKind::LinkChanged { device: id.to_owned(), link });
            }
        }
        Ok(Response::Nic(Box::new(self.nic_info(id)?)))
    }

    fn pci(&self, id: &str) -> Result<String, Problem> {
        let slots = slot_assignment(self.config()?)?;
        let slot = slots.iter().find(|(device, _)| device == id).map_or(0, |(_, slot)| *slot);
        Ok(format!("0000:00:{slot:02x}.0"))
    }

    fn device_state(&self, id: &str) -> DeviceState {
        match self.inventory.as_ref().and_then(|i| i.transport(id)).map(VirtioPci::driver_state) {
            None => DeviceState::Configured,
            Some(DriverState::NeedsReset) => DeviceState::NeedsReset,
            Some(DriverState::Idle) => DeviceState::Idle,
            Some(DriverState::Active) if self.state == VmState::Paused => DeviceState::Paused,
            Some(DriverState::Active) => DeviceState::Active,
        }
    }

    fn disk_info(&self, id: &str) -> Result<DiskInfo, Problem> {
        let config = self.disk_config(id)?.clone();
        let live = self.inventory.as_ref().and_then(|i| i.disk(id));
        let geometry = live.map(|l| l.geometry());
        let (in_flight, oldest) = live.map(LiveDisk::in_flight).unwrap_or_default();
        Ok(DiskInfo {
            state: self.device_state(id),
            pci: self.pci(id)?,
            capacity: geometry.as_ref().map(|g| g.capacity),
            logical_block_size: geometry.as_ref().map(|g| g.logical_block_size),
            physical_block_size: geometry.as_ref().map(|g| g.physical_block_size),
            alignment_offset: geometry.as_ref().map(|g| g.alignment_offset),
            min_io: geometry.as_ref().map(|g| g.min_io),
            opt_io: geometry.as_ref().map(|g| g.opt_io),
            rotational: geometry.as_ref().map(|g| g.rotational),
            discard_max: geometry.as_ref().map(|g| g.discard.map_or(0, |d| d.max_bytes)),
            write_zeroes_max: geometry.as_ref().map(|g| g.write_zeroes.map_or(0, |w| w.max_bytes)),
            wwid: live.and_then(LiveDisk::wwid),
            serial: live.map(LiveDisk::serial),
            in_flight,
            oldest_request_ms: u64::try_from(oldest.as_millis()).unwrap_or(u64::MAX),
            stalled: self.is_stalled(id),
            held: live.map_or(0, LiveDisk::held),
            counters: live.map_or_else(DiskCounters::default, |l| l.counters()),
            config,
        })
    }

    pub(super) fn nic_info(&self, id: &str) -> Result<NicInfo, Problem> {
        let config = self.nic_config(id)?.clone();
        let live = self.inventory.as_ref().and_then(|i| i.nic(id));
        Ok(NicInfo {
            state: self.device_state(id),
            pci: self.pci(id)?,
            link: config.link,
            tap: config.tap.as_deref().or_else(|| self.taps.name(id)).map(str::to_owned),
            counters: live.map_or_else(NicCounters::default, |l| l.counters()),
            config,
        })
    }
}

fn while_running(id: &str, possible: &str) -> Problem {
    let detail = format!("device \"{id}\" is in use by the guest: only {possible} is possible");
    Problem::new(Code::HotplugUnsupported, detail, "shut the VM down first")
}
