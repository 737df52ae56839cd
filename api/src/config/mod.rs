//! The configuration of a VM: one schema for the API, the configuration file and the library.
//!
//! Reading is strict: unknown, missing and repeated fields, wrong types and values outside their range are refused
//! with a [`Problem`] that points at the field. What needs a look at the host (does the file exist, is the tap free)
//! is not checked here but when the VM boots, or for descriptors when it is defined.

mod balloon;
mod boot;
mod check;
mod clock;
mod cpu_list;
mod cpus;
mod disk;
mod guid;
mod hyperv;
mod limits;
mod mac;
mod memory;
mod nic;
mod numa;
mod parse;
mod patch;
mod reservation;
mod serial;
mod slots;
mod smbios;
mod tap_fds;
#[cfg(test)]
mod tests;
mod tpm;
mod vm_patch;
mod watchdog;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use balloon::{BALLOON_ID, BalloonConfig, BalloonPatch};
pub use boot::{BootConfig, FirmwareConfig, MAX_CMDLINE, boot_order};
pub use clock::ClockConfig;
pub use cpu_list::CpuList;
pub use cpus::{CpuModelName, CpusConfig, MAX_CPUS, Topology};
pub use disk::{CacheMode, DiskConfig, DiskPatch, OnError};
pub use guid::{BadGuid, Guid};
pub use hyperv::{HYPERV_VENDOR, HypervConfig, HypervFeatures};
pub use limits::{DiskGroup, DiskGroupPatch, Limits, LimitsPatch, NicLimits, NicLimitsPatch};
pub use mac::{BadMac, MacAddr};
pub use memory::{HugePages, MAX_MEMORY, MIN_MEMORY, MemoryConfig};
pub use nic::{Link, NicConfig, NicPatch};
pub use numa::NumaNode;
pub use parse::json;
pub use patch::Patch;
pub use reservation::{BadKey, ReservationConfig, ReservationKey};
pub use serial::{SerialConfig, SerialMode};
pub use slots::{RNG_ID, slot_assignment};
pub use smbios::SmbiosConfig;
pub use tap_fds::{INHERITED_FDS, TapFds};
pub use tpm::{TPM_ID, TpmConfig};
pub use vm_patch::VmPatch;
pub use watchdog::{WatchdogAction, WatchdogConfig};

use crate::problem::{Code, Pointer, Problem};
use crate::size::ByteSize;

/// The most groups of disks.
const MAX_GROUPS: usize = 30;

/// The configuration of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The name of the VM: 1 to 64 letters, digits, `.`, `_` and `-`.
    #[schema(pattern = "^[A-Za-z0-9._-]{1,64}$")]
    pub name: String,
    /// The virtual processors. Default: one.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// The memory.
    pub memory: MemoryConfig,
    /// The NUMA nodes. Default: none, and the guest sees one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub numa: Vec<NumaNode>,
    /// What the guest starts from. Needed at present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootConfig>,
    /// How the machine introduces itself to the guest.
    #[serde(default)]
    pub smbios: SmbiosConfig,
    /// The disks, in the order in which the guest finds them.
    #[serde(default)]
    #[schema(max_items = 30)]
    pub disks: Vec<DiskConfig>,
    /// Groups of disks that share limits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 30)]
    pub disk_groups: Vec<DiskGroup>,
    /// The network interfaces, in the order in which the guest finds them.
    #[serde(default)]
    #[schema(max_items = 30)]
    pub nics: Vec<NicConfig>,
    /// Whether the guest has a source of entropy (virtio-rng).
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub rng: bool,
    /// The memory balloon. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// The TPM. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmConfig>,
    /// The generation ID (VM_Gen_Counter): another one tells the guest that it may live a part of its life twice, as after a clone or
    /// the restore of a snapshot. Default: the guest has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation_id: Option<Guid>,
    /// The serial console. Default: off.
    #[serde(default)]
    pub serial: SerialConfig,
    /// What the real-time clock shows. Default: UTC.
    #[serde(default)]
    pub clock: ClockConfig,
    /// Whether the guest can tell of its panics by a pvpanic device (ACPI `QEMU0001`): a `guest-panicked` event.
    #[serde(default)]
    #[schema(default = false)]
    pub pvpanic: bool,
    /// The watchdog timer, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<WatchdogConfig>,
    /// What a reboot by the guest does.
    #[serde(default)]
    pub on_reboot: OnReboot,
}

/// What a reboot by the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// The guest starts again, in the same process.
    #[default]
    Restart,
    /// The VM stops.
    Stop,
}

fn yes() -> bool {
    true
}

fn one_queue() -> u16 {
    1
}

fn default_queue_size() -> u16 {
    256
}

impl VmConfig {
    /// A VM with one vCPU, an entropy device and nothing to boot from yet.
    pub fn new(name: impl Into<String>, memory: ByteSize) -> Self {
        Self {
            name: name.into(),
            cpus: CpusConfig::default(),
            memory: MemoryConfig::new(memory),
            numa: Vec::new(),
            boot: None,
            smbios: SmbiosConfig::default(),
            disks: Vec::new(),
            disk_groups: Vec::new(),
            nics: Vec::new(),
            rng: true,
            balloon: None,
            tpm: None,
            generation_id: None,
            serial: SerialConfig::default(),
            clock: ClockConfig::Utc,
            pvpanic: false,
            watchdog: None,
            on_reboot: OnReboot::default(),
        }
    }

    /// Checks every rule that needs no look at the host.
    ///
    /// # Errors
    /// The first rule that is broken, with the JSON pointer of the field.
    pub fn validate(&self) -> Result<(), Problem> {
        let root = Pointer::root();
        let name_fits = (1..=64).contains(&self.name.len())
            && self.name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !name_fits {
            return Err(Problem::invalid(
                &root.key("name"),
                "this name is not possible",
                "use 1 to 64 letters, digits, '.', '_' and '-'",
            ));
        }
        self.cpus.check(&root.key("cpus"))?;
        self.memory.check(&root.key("memory"))?;
        if let Some(balloon) = &self.balloon {
            balloon.check(&self.memory, &root.key("balloon"))?;
        }
        numa::check(&self.numa, &self.cpus, &self.memory, &root.key("numa"))?;
        match &self.boot {
            Some(boot) => boot.check(&root.key("boot"))?,
            None => return Err(BootConfig::missing().at(&root.key("boot"))),
        }
        self.smbios.check(&root.key("smbios"))?;
        for (i, disk) in self.disks.iter().enumerate() {
            disk.check(&root.key("disks").index(i))?;
        }
        self.check_groups()?;
        for (i, nic) in self.nics.iter().enumerate() {
            nic.check(&root.key("nics").index(i))?;
        }
        self.tpm.as_ref().map_or(Ok(()), |tpm| tpm.check(&root.key("tpm")))?;
        self.serial.check(&root.key("serial"))?;
        self.clock.check(&root.key("clock"))?;
        self.check_unique()?;
        self.check_boot_order()?;
        slot_assignment(self).map(drop)
    }

    fn check_unique(&self) -> Result<(), Problem> {
        let root = Pointer::root();
        let disks =
            self.disks.iter().enumerate().map(|(i, disk)| (disk.id.as_str(), root.key("disks").index(i).key("id")));
        let nics = || self.nics.iter().enumerate().map(|(i, nic)| (nic, root.key("nics").index(i)));
        let nic_ids = nics().map(|(nic, at)| (nic.id.as_str(), at.key("id")));
        let rng = self.rng.then(|| (RNG_ID, root.key("rng")));
        let balloon = self.balloon.as_ref().map(|_| (BALLOON_ID, root.key("balloon")));
        let tpm = self.tpm.as_ref().map(|_| (TPM_ID, root.key("tpm")));
        unique(rng.into_iter().chain(balloon).chain(tpm).chain(disks).chain(nic_ids), "device id")?;
        unique(nics().map(|(nic, at)| (nic.mac, at.key("mac"))), "MAC address")?;
        unique(nics().filter_map(|(nic, at)| Some((nic.tap.as_ref()?, at.key("tap")))), "tap")?;
        let inherited =
            nics().filter_map(|(nic, at)| Some((nic.tap_fds.as_ref()?, at.key("tap_fds").key("inherited"))));
        let numbers =
            |(fds, at): (_, Pointer)| TapFds::inherited(fds).iter().enumerate().map(move |(i, n)| (n, at.index(i)));
        unique(inherited.flat_map(numbers), "descriptor")?;
        self.check_disk_paths()
    }

    /// Each place in the boot order is given once, and only firmware has one.
    fn check_boot_order(&self) -> Result<(), Problem> {
        let root = Pointer::root();
        let disks = self.disks.iter().enumerate().map(|(i, disk)| (disk.boot_index, root.key("disks").index(i)));
        let nics = self.nics.iter().enumerate().map(|(i, nic)| (nic.boot_index, root.key("nics").index(i)));
        let indices = || disks.clone().chain(nics.clone()).filter_map(|(n, at)| Some((n?, at.key("boot_index"))));
        let by_firmware = self.boot.as_ref().is_some_and(|boot| boot.firmware.is_some());
        match indices().next() {
            Some((_, at)) if !by_firmware => {
                let detail = "the boot order is for firmware, and the guest starts from boot.kernel";
                Err(Problem::invalid(&at, detail, "leave it out, or give boot.firmware instead of boot.kernel"))
            }
            _ => unique(indices(), "boot index"),
        }
    }

    /// Groups are named once, and those that disks name exist.
    fn check_groups(&self) -> Result<(), Problem> {
        let at = Pointer::root().key("disk_groups");
        if self.disk_groups.len() > MAX_GROUPS {
            let detail = format!("{} groups of disks are too many", self.disk_groups.len());
            return Err(Problem::invalid(&at, detail, format!("define at most {MAX_GROUPS}")));
        }
        for (i, group) in self.disk_groups.iter().enumerate() {
            group.check(&at.index(i))?;
        }
        let ids = self.disk_groups.iter().enumerate().map(|(i, group)| (group.id.as_str(), at.index(i).key("id")));
        unique(ids, "group id")?;
        for (i, disk) in self.disks.iter().enumerate() {
            if let Some(group) = &disk.group
                && self.disk_group(group).is_none()
            {
                let at = Pointer::root().key("disks").index(i).key("group");
                let remedy = "define it in disk_groups, or leave group out";
                return Err(Problem::invalid(&at, "there is no such group of disks", remedy));
            }
        }
        Ok(())
    }

    /// The group of disks with this id.
    pub fn disk_group(&self, id: &str) -> Option<&DiskGroup> {
        self.disk_groups.iter().find(|group| group.id == id)
    }

    /// This configuration with another group in the place of the one with its id.
    ///
    /// # Errors
    /// `no-such-disk-group`, or the result would not be valid.
    pub fn with_disk_group(&self, group: DiskGroup) -> Result<Self, Problem> {
        self.disk_group(&group.id).ok_or_else(|| Problem::no_such_disk_group(&group.id))?;
        let mut next = self.clone();
        let (index, _) = put(&mut next.disk_groups, group, |group| &group.id);
        next.validate().map_err(|problem| relative(problem, &Pointer::root().key("disk_groups").index(index)))?;
        Ok(next)
    }

    /// One image behind two disks is harmless only if nobody writes it.
    fn check_disk_paths(&self) -> Result<(), Problem> {
        let mut seen: HashMap<_, (&DiskConfig, bool)> = HashMap::new();
        for (i, disk) in self.disks.iter().enumerate() {
            let writable = !disk.read_only;
            match seen.get(&disk.path) {
                Some((other, other_writable)) if writable || *other_writable => {
                    return Err(Problem::new(
                        Code::Duplicate,
                        format!(
                            "disks \"{}\" and \"{}\" have the same path, and not both are read-only",
                            other.id, disk.id
                        ),
                        "give each disk its own path, or make both read-only",
                    )
                    .at(&Pointer::root().key("disks").index(i).key("path")));
                }
                _ => seen.insert(&disk.path, (disk, writable)),
            };
        }
        Ok(())
    }

    /// The disk with this id.
    pub fn disk(&self, id: &str) -> Option<&DiskConfig> {
        self.disks.iter().find(|disk| disk.id == id)
    }

    /// The NIC with this id.
    pub fn nic(&self, id: &str) -> Option<&NicConfig> {
        self.nics.iter().find(|nic| nic.id == id)
    }

    /// This configuration with the disk added, or put in the place of the one with its id; and whether it is new.
    ///
    /// # Errors
    /// The result would not be valid.
    pub fn with_disk(&self, disk: DiskConfig) -> Result<(Self, bool), Problem> {
        let mut next = self.clone();
        let (index, new) = put(&mut next.disks, disk, |disk| &disk.id);
        next.validate().map_err(|problem| relative(problem, &Pointer::root().key("disks").index(index)))?;
        Ok((next, new))
    }

    /// This configuration with the NIC added, or put in the place of the one with its id; and whether it is new.
    ///
    /// # Errors
    /// The result would not be valid.
    pub fn with_nic(&self, nic: NicConfig) -> Result<(Self, bool), Problem> {
        let mut next = self.clone();
        let (index, new) = put(&mut next.nics, nic, |nic| &nic.id);
        next.validate().map_err(|problem| relative(problem, &Pointer::root().key("nics").index(index)))?;
        Ok((next, new))
    }

    /// This configuration without the disk.
    ///
    /// # Errors
    /// `no-such-disk`.
    pub fn without_disk(&self, id: &str) -> Result<Self, Problem> {
        self.disk(id).ok_or_else(|| Problem::no_such_disk(id))?;
        let mut next = self.clone();
        next.disks.retain(|disk| disk.id != id);
        Ok(next)
    }

    /// This configuration without the NIC.
    ///
    /// # Errors
    /// `no-such-nic`.
    pub fn without_nic(&self, id: &str) -> Result<Self, Problem> {
        self.nic(id).ok_or_else(|| Problem::no_such_nic(id))?;
        let mut next = self.clone();
        next.nics.retain(|nic| nic.id != id);
        Ok(next)
    }
}

/// Puts an item in the place of the one with its id, or at the end; says where, and whether it is new.
fn put<T>(items: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String) -> (usize, bool) {
    match items.iter_mut().enumerate().find(|(_, old)| id(old) == id(&item)) {
        Some((index, old)) => {
            *old = item;
            (index, false)
        }
        None => {
            items.push(item);
            (items.len() - 1, true)
        }
    }
}

/// The problem as it looks from the document of one device; what concerns another device points at the whole of it.
fn relative(mut problem: Problem, base: &Pointer) -> Problem {
    problem.pointer = problem.pointer.map(|at| at.strip_prefix(&base.to_string()).unwrap_or_default().to_owned());
    problem
}

fn unique<K: Eq + std::hash::Hash>(items: impl Iterator<Item = (K, Pointer)>, what: &str) -> Result<(), Problem> {
    let mut seen: HashMap<K, Pointer> = HashMap::new();
    for (key, at) in items {
        if let Some(first) = seen.get(&key) {
            let detail = format!("this {what} is already used at {first}");
            return Err(Problem::new(Code::Duplicate, detail, format!("give every device its own {what}")).at(&at));
        }
        seen.insert(key, at);
    }
    Ok(())
}
