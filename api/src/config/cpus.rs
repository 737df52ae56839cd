//! Processors.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::hyperv::HypervConfig;
use crate::problem::{Pointer, Problem};

/// The most vCPUs a VM can have.
pub const MAX_CPUS: u16 = 1024;

/// The virtual processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpusConfig {
    /// How many vCPUs, 1 to 1024. Where one has an APIC ID above 254, in which socket, core and thread number have bits of their own
    /// (so that three cores take as many IDs as four), the VM has no 8259 interrupt controllers and no 8254 timer.
    #[schema(minimum = 1, maximum = 1024, default = 1)]
    pub count: u16,
    /// How the guest sees them arranged; default: one socket of `count` cores of one thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// What CPU the guest sees.
    pub model: CpuModelName,
    /// Bits of physical addresses that the guest sees, 36 to 52; default: 40 with `x86-64-v2`, 46 with the newer models, else
    /// the host's. The host must have as many.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 36, maximum = 52)]
    pub phys_bits: Option<u8>,
    /// Whether the guest may run guests of its own.
    #[schema(default = false)]
    pub nested: bool,
    /// Whether the guest sees a Hyper-V. Windows wants one.
    #[schema(default = false)]
    pub hyperv: HypervConfig,
}

/// A CPU as the guest sees it. All but `host` are the same on every host with CPUs of the same vendor, whatever its CPU and
/// kernel have besides; a host that lacks some of it is told so at boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub enum CpuModelName {
    /// All that this host has.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// The level of this name of the x86-64 psABI: SSE4.2, POPCNT.
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    /// The level of this name: AVX2, BMI2, FMA; and AES.
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
    /// The level of this name: AVX-512.
    #[serde(rename = "x86-64-v4")]
    X86_64V4,
}

impl std::fmt::Display for CpuModelName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
            Self::X86_64V4 => "x86-64-v4",
        })
    }
}

/// An arrangement of vCPUs; `sockets · cores · threads` is their count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Packages.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1024, default = 1)]
    pub sockets: u16,
    /// Cores of each package.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1024, default = 1)]
    pub cores: u16,
    /// Threads of each core.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1024, default = 1)]
    pub threads: u16,
}

fn one() -> u16 {
    1
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            count: 1,
            topology: None,
            model: CpuModelName::Host,
            phys_bits: None,
            nested: false,
            hyperv: HypervConfig::default(),
        }
    }
}

impl CpusConfig {
    /// The topology asked for, or the default one.
    pub fn topology(&self) -> Topology {
        self.topology.unwrap_or(Topology { sockets: 1, cores: self.count, threads: 1 })
    }

    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        if self.count == 0 || self.count > MAX_CPUS {
            return Err(Problem::invalid(
                &at.key("count"),
                format!("{} vCPUs are not possible", self.count),
                format!("choose 1 to {MAX_CPUS}"),
            ));
        }
        if let Some(bits) = self.phys_bits
            && !(36..=52).contains(&bits)
        {
            let detail = format!("{bits} bits of physical addresses are not possible");
            return Err(Problem::invalid(&at.key("phys_bits"), detail, "choose 36 to 52, or leave it out"));
        }
        self.hyperv.check(&at.key("hyperv"))?;
        let Some(Topology { sockets, cores, threads }) = self.topology else {
            return Ok(());
        };
        let product = u64::from(sockets) * u64::from(cores) * u64::from(threads);
        if product != u64::from(self.count) {
            return Err(Problem::invalid(
                &at.key("topology"),
                format!(
                    "{sockets} sockets × {cores} cores × {threads} threads are {product} vCPUs, but count is {}",
                    self.count
                ),
                "make the product equal to count, or leave topology out",
            ));
        }
        Ok(())
    }
}
