//! PCI: configuration space, capabilities, the root of bus 0, MSI-X.
//!
//! A function ([`PciFunction`]) owns its registers and says where its BARs want to be ([`PciFunction::bars`]). The [`Root`]
//! owns what is really mapped: after a guest has moved something, [`Root::remap`] makes the buses and ioeventfds follow.

mod access;
pub mod bridge;
pub mod config;
pub mod msix;
mod root;
pub mod smram;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::virtio::StillBusy;

pub use access::{CONFIG_PORTS_BASE, CONFIG_PORTS_LENGTH};
pub use config::BarKind;
pub use root::{AssignError, Root, SLOT_COUNT, SlotError, Windows};

/// What a write to configuration space changed outside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum ConfigEffect {
    /// Nothing.
    None,
    /// [`PciFunction::bars`] answers differently now.
    BarsChanged,
}

impl From<bool> for ConfigEffect {
    fn from(bars_changed: bool) -> Self {
        if bars_changed { Self::BarsChanged } else { Self::None }
    }
}

/// A region of a function, and where the function wants it.
#[derive(Clone)]
pub struct BarMapping {
    /// BAR register; for [`BarKind::Fixed`] any number that no other region of the function has.
    pub index: u8,
    /// First address; `None` while the function does not decode it.
    pub address: Option<u64>,
    /// Bytes or ports.
    pub length: u64,
    /// What it decodes.
    pub kind: BarKind,
    /// Who answers there.
    pub device: Arc<dyn BusDevice>,
    /// Offsets whose writes signal an eventfd, wherever the region goes. Memory only.
    pub ioevents: Vec<(u64, Arc<EventFd>)>,
}

/// One function of bus 0. Accesses come from several vCPU threads at once: it does its own interior locking.
pub trait PciFunction: Send + Sync {
    /// Fills `data` (1, 2, 4 or 8 bytes) from configuration space at `offset`; the access ends within its 4096 bytes.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes `data` (1, 2, 4 or 8 bytes) to configuration space at `offset`; the access ends within its 4096 bytes.
    fn config_write(&self, offset: u16, data: &[u8]) -> ConfigEffect;

    /// All regions with their present addresses. Same regions in same order, always.
    fn bars(&self) -> Vec<BarMapping>;

    /// Back to power-on, as at a machine reset. The caller maps the BARs anew.
    ///
    /// # Errors
    /// [`StillBusy`] while the device drains: ask again.
    fn reset(&self) -> Result<(), StillBusy>;
}
