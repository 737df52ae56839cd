//! Processors.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::{Pointer, Problem};

/// The most vCPUs a VM can have.
pub const MAX_CPUS: u8 = 254;

/// The virtual processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpusConfig {
    /// How many vCPUs.
    #[schema(minimum = 1, maximum = 254, default = 1)]
    pub count: u8,
    /// How the guest sees them arranged; default: one socket of `count` cores of one thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
}

/// An arrangement of vCPUs; `sockets · cores · threads` is their count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Packages.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 254, default = 1)]
    pub sockets: u8,
    /// Cores of each package.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 254, default = 1)]
    pub cores: u8,
    /// Threads of each core.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 254, default = 1)]
    pub threads: u8,
}

fn one() -> u8 {
    1
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self { count: 1, topology: None }
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
        let Some(Topology { sockets, cores, threads }) = self.topology else {
            return Ok(());
        };
        let product = u32::from(sockets) * u32::from(cores) * u32::from(threads);
        if product != u32::from(self.count) {
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
