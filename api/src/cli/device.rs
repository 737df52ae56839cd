//! `rackctl disk …`, `rackctl group …` and `rackctl nic …`.

use rackvisor_api::client::Client;
use rackvisor_api::config::{
    DiskConfig, DiskGroupPatch, DiskPatch, LimitsPatch, NicConfig, NicLimitsPatch, NicPatch, Patch, ReservationConfig,
};
use rackvisor_api::size::ByteSize;

use crate::args::{DiskCommand, DiskOptions, GroupCommand, LimitOptions, NicCommand, NicOptions};
use crate::output::{Failure, Output};
use crate::tables;

/// Runs a command about disks.
pub fn disk(client: &Client, output: &Output, command: &DiskCommand) -> Result<(), Failure> {
    match command {
        DiskCommand::List => output.value(&client.disks()?, tables::disks),
        DiskCommand::Show { id } => output.value(&client.disk(id)?, tables::disk),
        DiskCommand::Add { id, path, options } => {
            let disk = disk_patch(options, &[]).apply(&DiskConfig::new(id, path))?;
            output.value(&client.put_disk(&disk)?, tables::disk)
        }
        DiskCommand::Patch { id, path, options, unset } => {
            let patch = DiskPatch { path: set(path), ..disk_patch(options, unset) };
            output.value(&client.patch_disk(id, &patch)?, tables::disk)
        }
        DiskCommand::Remove { id } => {
            client.delete_disk(id)?;
            output.done(&format!("disk {id} is removed"))
        }
    }
}

/// Runs a command about groups of disks.
pub fn group(client: &Client, output: &Output, command: &GroupCommand) -> Result<(), Failure> {
    match command {
        GroupCommand::List => output.value(&client.disk_groups()?, tables::groups),
        GroupCommand::Show { id } => output.value(&client.disk_group(id)?, tables::group),
        GroupCommand::Patch { id, limits } => {
            let patch = DiskGroupPatch { limits: limits_patch(limits, &[]) };
            output.value(&client.patch_disk_group(id, &patch)?, tables::group)
        }
    }
}

/// Runs a command about NICs.
pub fn nic(client: &Client, output: &Output, command: &NicCommand) -> Result<(), Failure> {
    match command {
        NicCommand::List => output.value(&client.nics()?, tables::nics),
        NicCommand::Show { id } => output.value(&client.nic(id)?, tables::nic),
        NicCommand::Add { id, tap, mac, options } => {
            let nic = nic_patch(options, &[]).apply(&NicConfig::new(id, tap, *mac))?;
            output.value(&client.put_nic(&nic)?, tables::nic)
        }
        NicCommand::Patch { id, tap, mac, options, unset } => {
            // A name takes the place of descriptors.
            let tap_fds = if tap.is_some() { Patch::Clear } else { Patch::Keep };
            let patch = NicPatch { tap: set(tap), tap_fds, mac: set(mac), ..nic_patch(options, unset) };
            output.value(&client.patch_nic(id, &patch)?, tables::nic)
        }
        NicCommand::Announce { id } => output.value(&client.announce_nic(id)?, tables::nic),
        NicCommand::Remove { id } => {
            client.delete_nic(id)?;
            output.done(&format!("NIC {id} is removed"))
        }
    }
}

fn set<T: Clone>(value: &Option<T>) -> Patch<T> {
    value.clone().map_or(Patch::Keep, Patch::Set)
}

/// A property that was given, taken back, or neither; given wins.
fn property<T: Clone>(value: &Option<T>, name: &str, unset: &[String]) -> Patch<T> {
    match value {
        Some(value) => Patch::Set(value.clone()),
        None if unset.iter().any(|other| other == name) => Patch::Clear,
        None => Patch::Keep,
    }
}

fn disk_patch(options: &DiskOptions, unset: &[String]) -> DiskPatch {
    let reservation = options.reservation.map(|key| ReservationConfig {
        key,
        preempt: options.preempt,
        helper: options.reservation_helper.clone(),
    });
    DiskPatch {
        path: Patch::Keep,
        read_only: property(&options.read_only, "read_only", unset),
        queues: property(&options.queues, "queues", unset),
        queue_size: property(&options.queue_size, "queue_size", unset),
        direct: property(&options.direct, "direct", unset),
        serial: property(&options.serial, "serial", unset),
        slot: property(&options.slot, "slot", unset),
        boot_index: property(&options.boot_index, "boot_index", unset),
        cache: property(&options.cache, "cache", unset),
        wwid: property(&options.wwid, "wwid", unset),
        reservation: property(&reservation, "reservation", unset),
        on_error: property(&options.on_error, "on_error", unset),
        stall_after: property(&options.stall_after, "stall_after", unset),
        limits: limits_patch(&options.limits, unset),
        group: property(&options.group, "group", unset),
        affinity: property(&(!options.affinity.is_empty()).then(|| options.affinity.clone()), "affinity", unset),
    }
}

/// 0 takes a limit away.
fn limit<T: Copy + Default + PartialEq>(value: Option<T>) -> Patch<T> {
    value.map_or(Patch::Keep, |value| if value == T::default() { Patch::Clear } else { Patch::Set(value) })
}

fn nic_limits(packets: Option<u64>, bytes: Option<ByteSize>, name: &str, unset: &[String]) -> Patch<NicLimitsPatch> {
    let (packets_per_second, bytes_per_second) = (limit(packets), limit(bytes));
    let patch = NicLimitsPatch { packets_per_second, bytes_per_second, ..NicLimitsPatch::default() };
    let given = (patch != NicLimitsPatch::default()).then_some(patch);
    property(&given, name, unset)
}

fn limits_patch(options: &LimitOptions, unset: &[String]) -> Patch<LimitsPatch> {
    let patch = LimitsPatch {
        ops_per_second: limit(options.ops),
        ops_burst: limit(options.ops_burst),
        bytes_per_second: limit::<ByteSize>(options.bytes),
        bytes_burst: limit::<ByteSize>(options.bytes_burst),
    };
    let given = (patch != LimitsPatch::default()).then_some(patch);
    property(&given, "limits", unset)
}

fn nic_patch(options: &NicOptions, unset: &[String]) -> NicPatch {
    NicPatch {
        tap: Patch::Keep,
        tap_fds: Patch::Keep,
        mac: Patch::Keep,
        queues: property(&options.queues, "queues", unset),
        queue_size: property(&options.queue_size, "queue_size", unset),
        mtu: property(&options.mtu, "mtu", unset),
        link: property(&options.link, "link", unset),
        antispoof: property(&options.antispoof, "antispoof", unset),
        rss: property(&options.rss, "rss", unset),
        vhost: property(&options.vhost, "vhost", unset),
        rx_limits: nic_limits(options.rx_packets, options.rx_bytes, "rx_limits", unset),
        tx_limits: nic_limits(options.tx_packets, options.tx_bytes, "tx_limits", unset),
        slot: property(&options.slot, "slot", unset),
        boot_index: property(&options.boot_index, "boot_index", unset),
    }
}
