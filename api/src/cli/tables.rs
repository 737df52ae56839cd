//! Answers as people read them.

use comfy_table::{Table, presets};
use rackvisor_api::ByteSize;
use rackvisor_api::config::{
    DiskGroup, Limits, Link, NicConfig, NicLimits, OnReboot, ReservationConfig, SerialMode, VmConfig,
};
use rackvisor_api::control::{DeviceState, DiskInfo, NicInfo, VmInfo};
use rackvisor_api::events::{Event, EventKind, GuestPanic};
use serde::Serialize;
use serde_json::Value;

use crate::output::printable;

/// The word that the API uses for a value.
fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        other => format!("{other:?}"),
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// Lines of a label and a text.
#[derive(Default)]
struct Facts(Vec<(&'static str, String)>);

impl Facts {
    fn add(&mut self, label: &'static str, text: impl Into<String>) {
        self.0.push((label, printable(&text.into())));
    }

    fn add_some(&mut self, label: &'static str, text: Option<impl ToString>) {
        if let Some(text) = text {
            self.add(label, text.to_string());
        }
    }

    fn text(&self) -> String {
        let width = self.0.iter().map(|(label, _)| label.len()).max().unwrap_or_default();
        self.0.iter().map(|(label, text)| format!("{label:width$}  {text}\n")).collect()
    }
}

/// Seconds as people say them.
fn duration(milliseconds: u64) -> String {
    let whole = std::time::Duration::from_secs(milliseconds / 1000);
    if milliseconds < 10_000 {
        format!("{:.1}s", milliseconds as f64 / 1000.0)
    } else {
        humantime::format_duration(whole).to_string()
    }
}

/// The VM in full.
pub fn vm(vm: &VmInfo) -> String {
    let mut facts = Facts::default();
    facts.add("name", &vm.config.name);
    let cause = vm.cause.as_deref().map(|cause| format!(" ({cause})")).unwrap_or_default();
    facts.add("state", format!("{}{cause}", vm.state));
    facts.add_some("pending", vm.pending.as_deref());
    facts.add_some("uptime", vm.uptime_ms.map(duration));
    if vm.resets > 0 {
        facts.add("resets", vm.resets.to_string());
    }
    facts.add_some("balloon", balloon(vm));
    facts.add_some("clock", vm.clock_offset.filter(|o| *o != 0).map(|offset| format!("{offset:+} s beyond UTC")));
    facts.add_some("panic", vm.guest_panic.as_ref().map(panic));
    configuration(&vm.config, &mut facts);
    facts.add_some("pty", vm.serial_path.as_ref().map(|path| path.display().to_string()));
    facts.add("process", format!("{} (rackvisor {})", vm.pid, vm.version));
    facts.text()
}

/// What a guest said when it panicked.
fn panic(panic: &GuestPanic) -> String {
    let dumping = if panic.dumping { "writes a dump" } else { "" };
    [&word(&panic.source), &panic.parameters.join(" "), dumping].map(str::trim).join(" ").trim_end().to_owned()
}

/// The balloon, and how far the guest has followed.
fn balloon(vm: &VmInfo) -> Option<String> {
    let size = vm.config.balloon.as_ref()?.size;
    Some(match vm.balloon {
        Some(held) => format!("{size}, holds {}", ByteSize(held)),
        None => size.to_string(),
    })
}

fn configuration(config: &VmConfig, facts: &mut Facts) {
    let topology = config.cpus.topology();
    facts.add(
        "cpus",
        format!("{} ({} × {} × {})", config.cpus.count, topology.sockets, topology.cores, topology.threads),
    );
    let nested = if config.cpus.nested { ", nested" } else { "" };
    facts.add("model", format!("{}{nested}", config.cpus.model));
    if let Some(hyperv) = config.cpus.hyperv.features() {
        facts.add("hyper-v", &hyperv.vendor);
    }
    let memory = &config.memory;
    let traits = [(memory.shared, "shared"), (memory.prefault, "prefaulted")]
        .into_iter()
        .filter(|(on, _)| *on)
        .map(|(_, name)| format!(", {name}"));
    facts.add("memory", format!("{}, pages {}{}", memory.size, word(&memory.hugepages), traits.collect::<String>()));
    for node in &config.numa {
        let cpus = node.cpus.as_ref().map_or_else(|| "no vCPUs".to_owned(), |cpus| format!("vCPUs {cpus}"));
        facts.add("node", format!("{cpus}, {}", node.memory));
    }
    if let Some(boot) = &config.boot {
        facts.add_some("kernel", boot.kernel.as_ref().map(|path| path.display().to_string()));
        facts.add_some("firmware", boot.firmware.as_ref().map(|f| f.code.display().to_string()));
        facts.add_some("variables", boot.firmware.as_ref().map(|f| f.vars.display().to_string()));
        facts.add_some("initrd", boot.initrd.as_ref().map(|path| path.display().to_string()));
        facts.add_some("cmdline", boot.kernel.as_ref().map(|_| boot.cmdline.clone()));
    }
    for disk in &config.disks {
        facts.add(
            "disk",
            format!("{}: {}{}", disk.id, disk.path.display(), if disk.read_only { " (read-only)" } else { "" }),
        );
    }
    for nic in &config.nics {
        facts.add(
            "nic",
            format!(
                "{}: {} on {}{}",
                nic.id,
                nic.mac,
                tap(nic, None),
                if nic.link == Link::Down { " (link down)" } else { "" }
            ),
        );
    }
    if config.rng {
        facts.add("rng", "yes");
    }
    facts.add_some("generation", config.generation_id);
    facts.add_some("tpm", config.tpm.as_ref().map(|tpm| tpm.socket.display().to_string()));
    if config.serial.mode != SerialMode::Off {
        let path = config.serial.path.as_ref().map(|path| format!(" {}", path.display())).unwrap_or_default();
        facts.add("serial", format!("{}{path}", word(&config.serial.mode)));
    }
    if config.on_reboot == OnReboot::Stop {
        facts.add("reboot", "stops the VM");
    }
}

/// One line about the VM, after an action.
pub fn vm_line(vm: &VmInfo) -> String {
    let cause = vm.cause.as_deref().map(|cause| format!(" ({})", printable(cause))).unwrap_or_default();
    format!("{} is {}{cause}", vm.config.name, vm.state)
}

fn size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".to_owned(), |bytes| ByteSize(bytes).to_string())
}

/// About how many bytes: three digits are enough in a table.
fn about(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while value >= 1024.0 {
        value /= 1024.0;
        unit = units.next();
    }
    let unit = unit.copied().unwrap_or_default();
    if bytes < 1024 { format!("{bytes}{unit}") } else { format!("{value:.1}{unit}") }
}

/// All disks.
pub fn disks(disks: &Vec<DiskInfo>) -> String {
    if disks.is_empty() {
        return "the VM has no disks".into();
    }
    let mut table = table(&["ID", "PCI", "STATE", "SIZE", "READ", "WRITTEN", "ERRORS", "PATH"]);
    for disk in disks {
        table.add_row([
            disk.config.id.clone(),
            disk.pci.clone(),
            word(&disk.state),
            size(disk.capacity),
            about(disk.counters.read_bytes),
            about(disk.counters.written_bytes),
            disk.counters.errors.to_string(),
            printable(&disk.config.path.display().to_string()),
        ]);
    }
    table.trim_fmt()
}

fn broken(state: DeviceState) -> &'static str {
    if state == DeviceState::NeedsReset { ": broken until the guest's driver resets it" } else { "" }
}

/// One disk in full.
pub fn disk(disk: &DiskInfo) -> String {
    let (config, counters) = (&disk.config, &disk.counters);
    let mut facts = Facts::default();
    facts.add("id", &config.id);
    facts.add("state", format!("{}{}", word(&disk.state), broken(disk.state)));
    facts.add("pci", &disk.pci);
    facts.add("path", config.path.display().to_string());
    facts.add("access", if config.read_only { "read-only" } else { "read and write" });
    facts.add(
        "size",
        disk.capacity.map_or_else(|| "-".to_owned(), |bytes| format!("{} ({bytes} bytes)", ByteSize(bytes))),
    );
    if let (Some(logical), Some(physical)) = (disk.logical_block_size, disk.physical_block_size) {
        facts.add("blocks", format!("{logical} logical, {physical} physical"));
    }
    if disk.stalled || disk.in_flight > 0 {
        let stalled = if disk.stalled { ": stalled" } else { "" };
        facts.add("in flight", format!("{}, oldest {} ms{stalled}", disk.in_flight, disk.oldest_request_ms));
    }
    if disk.held > 0 {
        facts.add("held", format!("{} failed, tried again by resume", disk.held));
    }
    facts.add("queues", format!("{} of {} entries", config.queues, config.queue_size));
    facts.add("cache", word(&config.cache));
    facts.add_some("direct", config.direct);
    facts.add_some("wwid", disk.wwid.as_deref().or(config.wwid.as_deref()));
    facts.add_some("reserved", config.reservation.as_ref().map(reserved));
    facts.add_some("serial", disk.serial.as_deref().or(config.serial.as_deref()));
    facts.add("on error", word(&config.on_error));
    facts.add("stall after", config.stall_after.to_string());
    if !config.limits.is_unlimited() {
        facts.add("limits", limits(&config.limits));
    }
    facts.add_some("group", config.group.as_deref());
    if !config.affinity.is_empty() {
        facts.add("affinity", config.affinity.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
    }
    facts.add("reads", format!("{} ({})", counters.reads, about(counters.read_bytes)));
    facts.add("writes", format!("{} ({})", counters.writes, about(counters.written_bytes)));
    facts.add("flushes", counters.flushes.to_string());
    facts.add("discards", counters.discards.to_string());
    facts.add("errors", counters.errors.to_string());
    facts.text()
}

/// "1000 ops/s (burst 2000), 100MiB/s".
fn reserved(reservation: &ReservationConfig) -> String {
    let by = reservation.helper.as_ref().map(|socket| format!(" by the helper at {}", socket.display()));
    format!("with key {}{}", reservation.key, by.unwrap_or_default())
}

fn limits(limits: &Limits) -> String {
    rates(rate(limits.ops_per_second, limits.ops_burst, " ops/s"), limits.bytes_per_second, limits.bytes_burst)
}

fn nic_limits(limits: &NicLimits) -> String {
    let packets = rate(limits.packets_per_second, limits.packets_burst, " frames/s");
    rates(packets, limits.bytes_per_second, limits.bytes_burst)
}

fn rate<T: ToString>(rate: Option<T>, burst: Option<T>, unit: &str) -> Option<String> {
    let burst = burst.map_or_else(String::new, |burst| format!(" (burst {})", burst.to_string()));
    rate.map(|rate| format!("{}{unit}{burst}", rate.to_string()))
}

fn rates(first: Option<String>, bytes: Option<ByteSize>, burst: Option<ByteSize>) -> String {
    let parts: Vec<_> = first.into_iter().chain(rate(bytes, burst, "/s")).collect();
    if parts.is_empty() { "none".into() } else { parts.join(", ") }
}

/// All groups of disks.
pub fn groups(groups: &Vec<DiskGroup>) -> String {
    if groups.is_empty() {
        return "the VM has no groups of disks".into();
    }
    let mut table = table(&["ID", "LIMITS"]);
    for group in groups {
        table.add_row([group.id.clone(), limits(&group.limits)]);
    }
    table.trim_fmt()
}

/// One group of disks.
pub fn group(group: &DiskGroup) -> String {
    let mut facts = Facts::default();
    facts.add("id", &group.id);
    facts.add("limits", limits(&group.limits));
    facts.text()
}

/// The name of a tap, where it is known; else where its descriptors come from.
fn tap(nic: &NicConfig, name: Option<&str>) -> String {
    let name = name.or(nic.tap.as_deref()).map(str::to_owned);
    name.or_else(|| nic.tap_fds.as_ref().map(|fds| format!("a tap {fds}"))).unwrap_or_default()
}

/// All NICs.
pub fn nics(nics: &Vec<NicInfo>) -> String {
    if nics.is_empty() {
        return "the VM has no NICs".into();
    }
    let mut table = table(&["ID", "PCI", "STATE", "LINK", "MAC", "TAP", "RX", "TX", "DROPPED"]);
    for nic in nics {
        table.add_row([
            nic.config.id.clone(),
            nic.pci.clone(),
            word(&nic.state),
            word(&nic.link),
            nic.config.mac.to_string(),
            printable(&tap(&nic.config, nic.tap.as_deref())),
            about(nic.counters.rx_bytes),
            about(nic.counters.tx_bytes),
            nic.counters.rx_dropped.saturating_add(nic.counters.tx_dropped).to_string(),
        ]);
    }
    table.trim_fmt()
}

/// One NIC in full.
pub fn nic(nic: &NicInfo) -> String {
    let (config, counters) = (&nic.config, &nic.counters);
    let mut facts = Facts::default();
    facts.add("id", &config.id);
    facts.add("state", format!("{}{}", word(&nic.state), broken(nic.state)));
    facts.add("pci", &nic.pci);
    facts.add("link", word(&nic.link));
    if config.antispoof {
        facts.add("antispoof", "drops frames under another address");
    }
    if config.vhost {
        facts.add("vhost", "the host's kernel moves the frames");
    }
    if !config.rx_limits.is_unlimited() {
        facts.add("receives", nic_limits(&config.rx_limits));
    }
    if !config.tx_limits.is_unlimited() {
        facts.add("sends", nic_limits(&config.tx_limits));
    }
    facts.add("mac", config.mac.to_string());
    facts.add("tap", tap(config, nic.tap.as_deref()));
    facts.add_some("descriptors", config.tap_fds.as_ref());
    facts.add_some("mtu", config.mtu);
    let rss = if config.rss { ", RSS" } else { "" };
    facts.add("queues", format!("{} pairs of {} entries{rss}", config.queues, config.queue_size));
    facts.add(
        "received",
        format!("{} frames ({}), {} dropped", counters.rx_frames, about(counters.rx_bytes), counters.rx_dropped),
    );
    facts.add(
        "sent",
        format!("{} frames ({}), {} dropped", counters.tx_frames, about(counters.tx_bytes), counters.tx_dropped),
    );
    facts.add("errors", counters.errors.to_string());
    facts.text()
}

/// One event on one line.
pub fn event(event: &Event) -> String {
    let what = match &event.what {
        EventKind::StateChanged { from, to, cause } => {
            format!("{from} → {to}{}", cause.as_deref().map(|cause| format!(" ({cause})")).unwrap_or_default())
        }
        EventKind::GuestReset | EventKind::GuestShutdown => String::new(),
        EventKind::Crashed { cause } => cause.clone(),
        EventKind::GuestPanicked(told) => panic(told),
        EventKind::WatchdogExpired { action } => word(action),
        EventKind::DeviceError { device, detail } | EventKind::DeviceRestored { device, detail } => {
            format!("{device}: {detail}")
        }
        EventKind::DiskResized { device, capacity } => format!("{device}: {}", ByteSize(*capacity)),
        EventKind::LinkChanged { device, link } => format!("{device}: {}", word(link)),
        EventKind::ReservationLost { device, holder } => {
            let taker = holder.map(|key| format!(", which has the key {key}")).unwrap_or_default();
            format!("{device}: to another host{taker}")
        }
        EventKind::Lagged { missed } => format!("{missed} events are missing here"),
        EventKind::DiskError { device, operation, sector, bytes, detail, action, .. } => {
            let action = word(action);
            format!("{device}: {operation} of {bytes} bytes at sector {sector}: {} ({action})", printable(detail))
        }
        EventKind::DiskStalled { device, requests, oldest_ms } => {
            format!("{device}: {requests} requests outstanding, oldest {oldest_ms} ms")
        }
        EventKind::DiskRecovered { device, stalled_ms } => format!("{device}: after {stalled_ms} ms"),
        EventKind::Other { data, .. } => data.to_string(),
    };
    printable(format!("{}  {:>5}  {}  {:<14} {what}", event.time, event.id, event.vm, event.what.name()).trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_tables_are_short() {
        for (bytes, text) in [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (1 << 40, "1.0TiB"), (u64::MAX, "16.0EiB")]
        {
            assert_eq!(about(bytes), text);
        }
    }

    #[test]
    fn text_from_elsewhere_cannot_drive_the_terminal() {
        let mut facts = Facts::default();
        facts.add("path", "a\x1b[2Jb\nc");
        assert_eq!(facts.text(), "path  a\u{fffd}[2Jb\u{fffd}c\n");
    }
}
