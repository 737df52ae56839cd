//! Network interfaces (virtio-net).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::{check_id, check_queue_size, check_queues, check_slot};
use super::limits::{NicLimits, NicLimitsPatch};
use super::mac::MacAddr;
use super::patch::{Patch, apply, set};
use super::tap_fds::TapFds;
use super::{default_queue_size, one_queue};
use crate::problem::{Pointer, Problem};

/// A virtio-net interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// The name of the device, unique in the VM: 1 to 32 letters, digits, `_` and `-`.
    #[schema(pattern = "^[A-Za-z0-9_-]{1,32}$")]
    pub id: String,
    /// The tap interface of the host that it is plugged into: this or `tap_fds`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 15)]
    pub tap: Option<String>,
    /// The tap that it is plugged into as descriptors, instead of `tap`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap_fds: Option<TapFds>,
    /// Its Ethernet address, unique in the VM.
    pub mac: MacAddr,
    /// How many pairs of a receive and a transmit queue; each pair has its own worker thread.
    #[serde(default = "one_queue")]
    #[schema(minimum = 1, maximum = 16, default = 1)]
    pub queues: u16,
    /// Entries of each queue: a power of two, 16 to 1024.
    #[serde(default = "default_queue_size")]
    #[schema(minimum = 16, maximum = 1024, default = 256)]
    pub queue_size: u16,
    /// The MTU that the guest is told, 68 to 65535 bytes. Default: it is told none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68, maximum = 65535)]
    pub mtu: Option<u16>,
    /// Whether the cable is plugged in.
    #[serde(default)]
    pub link: Link,
    /// The PCI slot on bus 0. Default: the first free one, in configuration order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 30)]
    pub slot: Option<u8>,
    /// The place in the order in which firmware tries disks and NICs, the lowest first. Default: it is not in that order; if
    /// none is, the firmware decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_index: Option<u16>,
    /// Drop what the guest sends under another address than `mac`, also one that it gave itself.
    #[serde(default)]
    #[schema(default = false)]
    pub antispoof: bool,
    /// Let the guest say which of several `queues` receives a frame, by a hash (RSS) that it is told with the frame (not with
    /// `vhost`). A program in the kernel does it, which the VMM needs CAP_BPF and CAP_PERFMON to load.
    #[serde(default)]
    #[schema(default = false)]
    pub rss: bool,
    /// Have the host's kernel move the frames (/dev/vhost-net) instead of the VMM, with the same features for the guest except
    /// that it is not told the hashes of `rss`, and that interrupts are held back by time alone. Not possible together with
    /// `antispoof` and limits.
    #[serde(default)]
    #[schema(default = false)]
    pub vhost: bool,
    /// What the guest may receive per second. What exceeds it waits in the tap, which drops what it cannot hold.
    #[serde(default)]
    pub rx_limits: NicLimits,
    /// What the guest may send per second. What exceeds it waits in the guest.
    #[serde(default)]
    pub tx_limits: NicLimits,
}

/// The state of a virtual cable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// Plugged in.
    #[default]
    Up,
    /// Unplugged: frames are dropped in both directions.
    Down,
}

impl NicConfig {
    /// A NIC with the defaults for everything else.
    pub fn new(id: impl Into<String>, tap: impl Into<String>, mac: MacAddr) -> Self {
        Self {
            id: id.into(),
            tap: Some(tap.into()),
            tap_fds: None,
            mac,
            queues: one_queue(),
            queue_size: default_queue_size(),
            mtu: None,
            link: Link::default(),
            slot: None,
            boot_index: None,
            antispoof: false,
            rss: false,
            vhost: false,
            rx_limits: NicLimits::default(),
            tx_limits: NicLimits::default(),
        }
    }

    /// Checks what can be told from the NIC alone; `at` is where it stands in the document.
    ///
    /// # Errors
    /// The first field that breaks its rule.
    pub fn check(&self, at: &Pointer) -> Result<(), Problem> {
        check_id(&self.id, &at.key("id"))?;
        check_queues(self.queues, 16, &at.key("queues"))?;
        check_queue_size(self.queue_size, &at.key("queue_size"))?;
        check_slot(self.slot, &at.key("slot"))?;
        self.rx_limits.check(&at.key("rx_limits"))?;
        self.tx_limits.check(&at.key("tx_limits"))?;
        if self.rss && self.queues == 1 {
            return Err(Problem::invalid(
                &at.key("rss"),
                "RSS chooses between queues, and the NIC has one",
                "set queues to 2 or more, one for each CPU of the guest at best, or leave rss out",
            ));
        }
        self.check_vhost(at)?;
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(Problem::invalid(
                &at.key("mtu"),
                "an MTU below 68 bytes is not possible",
                "choose 68 to 65535, or leave it out",
            ));
        }
        match (&self.tap, &self.tap_fds) {
            (Some(name), None) => check_name(name, &at.key("tap")),
            (None, Some(fds)) => fds.check(self.queues, &at.key("tap_fds")),
            (Some(_), Some(_)) => {
                Err(Problem::invalid(&at.key("tap_fds"), "there are both tap and tap_fds", "give one of them"))
            }
            (None, None) => {
                let remedy = "give tap, the name of an interface, or tap_fds, its descriptors";
                Err(Problem::invalid(&at.key("tap"), "the NIC has no tap", remedy))
            }
        }
    }

    /// The kernel moves frames unseen: what needs a look at them is not possible then.
    fn check_vhost(&self, at: &Pointer) -> Result<(), Problem> {
        let conflicts = [
            ("antispoof", self.antispoof),
            ("rx_limits", !self.rx_limits.is_unlimited()),
            ("tx_limits", !self.tx_limits.is_unlimited()),
        ];
        match conflicts.into_iter().find(|(_, set)| self.vhost && *set) {
            Some((field, _)) => Err(Problem::invalid(
                &at.key(field),
                format!("`{field}` is not possible with `vhost`: the host's kernel moves the frames past the VMM"),
                format!(
                    "leave `{field}` out, or set `vhost` to false; the network of the host can do the same to the tap"
                ),
            )),
            None => Ok(()),
        }
    }
}

/// A name that an interface can have.
fn check_name(name: &str, at: &Pointer) -> Result<(), Problem> {
    let fits = (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%');
    if fits {
        return Ok(());
    }
    let remedy = "use 1 to 15 printable characters without '/', ':' and '%'";
    Err(Problem::invalid(at, "this is no name of a host interface", remedy))
}

/// Changes to a NIC, as a JSON merge patch (RFC 7396): a field that is absent stays, `null` goes back to its default.
///
/// While the guest exists only `link`, `rx_limits` and `tx_limits` may change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicPatch {
    /// Another `tap`; null together with other `tap_fds`.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<String>)]
    pub tap: Patch<String>,
    /// Other `tap_fds`, inherited ones; null together with another `tap`. To pass descriptors, replace the NIC.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<TapFds>)]
    pub tap_fds: Patch<TapFds>,
    /// Another `mac`; cannot be null.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<MacAddr>)]
    pub mac: Patch<MacAddr>,
    /// Another `queues`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u16>)]
    pub queues: Patch<u16>,
    /// Another `queue_size`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u16>)]
    pub queue_size: Patch<u16>,
    /// Another `mtu`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u16>)]
    pub mtu: Patch<u16>,
    /// Another `link`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<Link>)]
    pub link: Patch<Link>,
    /// Another `slot`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u8>)]
    pub slot: Patch<u8>,
    /// Another `boot_index`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<u16>)]
    pub boot_index: Patch<u16>,
    /// Another `antispoof`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<bool>)]
    pub antispoof: Patch<bool>,
    /// Another `rss`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<bool>)]
    pub rss: Patch<bool>,
    /// Another `vhost`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<bool>)]
    pub vhost: Patch<bool>,
    /// Changes to `rx_limits`; null takes all of them away.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<NicLimitsPatch>)]
    pub rx_limits: Patch<NicLimitsPatch>,
    /// Changes to `tx_limits`; null takes all of them away.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<NicLimitsPatch>)]
    pub tx_limits: Patch<NicLimitsPatch>,
}

impl NicPatch {
    /// A patch that plugs or unplugs the cable.
    pub fn link(link: Link) -> Self {
        Self { link: Patch::Set(link), ..Self::default() }
    }

    /// Whether it changes only what may change while the guest exists.
    pub fn is_live(&self) -> bool {
        let Self { link, rx_limits, tx_limits, .. } = self.clone();
        *self == Self { link, rx_limits, tx_limits, ..Self::default() }
    }

    /// The NIC after the patch. Not yet checked against the rest of the VM: see [`super::VmConfig::with_nic`].
    ///
    /// # Errors
    /// A required field is null.
    pub fn apply(&self, nic: &NicConfig) -> Result<NicConfig, Problem> {
        let fresh = NicConfig::new("", "", nic.mac);
        Ok(NicConfig {
            id: nic.id.clone(),
            tap: apply(&self.tap, &nic.tap),
            tap_fds: apply(&self.tap_fds, &nic.tap_fds),
            mac: self.mac.required(&nic.mac, "mac")?,
            queues: set(self.queues, nic.queues, fresh.queues),
            queue_size: set(self.queue_size, nic.queue_size, fresh.queue_size),
            mtu: apply(&self.mtu, &nic.mtu),
            link: set(self.link, nic.link, fresh.link),
            slot: apply(&self.slot, &nic.slot),
            boot_index: apply(&self.boot_index, &nic.boot_index),
            antispoof: set(self.antispoof, nic.antispoof, fresh.antispoof),
            rss: set(self.rss, nic.rss, fresh.rss),
            vhost: set(self.vhost, nic.vhost, fresh.vhost),
            rx_limits: NicLimitsPatch::apply_to(&self.rx_limits, &nic.rx_limits),
            tx_limits: NicLimitsPatch::apply_to(&self.tx_limits, &nic.tx_limits),
        })
    }
}
