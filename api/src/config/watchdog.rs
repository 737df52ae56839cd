//! The watchdog.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A watchdog timer for the guest, which Windows and Linux find by ACPI (WDAT).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WatchdogConfig {
    /// What happens when the guest has not reset the timer in time.
    #[serde(default)]
    pub action: WatchdogAction,
}

/// What happens when a watchdog expires. There is always a `watchdog-expired` event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WatchdogAction {
    /// The guest starts anew.
    #[default]
    Reset,
    /// The VM stops.
    Shutdown,
    /// The VM is paused, for somebody to look at it.
    Pause,
    /// Every vCPU gets a non-maskable interrupt, on which guests can write a dump.
    Nmi,
    /// Nothing else.
    None,
}
