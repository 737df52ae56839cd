//! What takes longer than a message: at most one operation is under way, and it always ends.

use std::time::{Duration, Instant};

use rackvisor_api::config::VmConfig;
use rackvisor_api::control::Reply;
use rackvisor_api::state::VmState;

use super::definition::Subject;

/// How long devices may take to drain before whoever waits for the operation is told so. The operation goes on.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(20);

/// Devices say when they have drained; in case one does not, they are asked again this often.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Why the devices are being drained.
pub enum Purpose {
    /// To pause the VM.
    Pause {
        /// Why, where that is not by request.
        cause: Option<String>,
    },
    /// To let the VM go on after all: the pause took too long.
    GoOn,
    /// To restart the guest; `run` says whether it runs afterwards.
    Reset {
        /// Whether the vCPUs run afterwards.
        run: bool,
        /// Whether the guest asked for it.
        by_guest: bool,
    },
    /// To end the guest.
    End(Ending),
}

/// How the guest ends.
#[derive(Debug, Clone)]
pub struct Ending {
    /// The state afterwards.
    pub to: VmState,
    /// Why, where that is not by request.
    pub cause: Option<String>,
}

/// What is under way.
pub enum Operation {
    /// A job checks the descriptors that come with a definition.
    Define {
        /// The definition.
        config: Box<VmConfig>,
        /// What of it was asked for.
        subject: Subject,
        /// Who waits for it.
        reply: Reply,
    },
    /// A job puts the machine together.
    Boot {
        /// Who waits for it.
        reply: Reply,
    },
    /// Devices complete what is in flight; the vCPUs stand still.
    Drain {
        /// What for.
        purpose: Purpose,
        /// Who waits for it, if anybody does.
        reply: Option<Reply>,
        /// When to tell whoever waits that it takes longer; `None` when that has been told.
        deadline: Option<Instant>,
        /// When to ask the devices again at the latest.
        ask: Instant,
        /// What the devices said when they were last asked.
        busy: String,
    },
    /// A job brings the machine back to power-on.
    Restart {
        /// Whether the vCPUs run afterwards.
        run: bool,
        /// Who waits for it.
        reply: Option<Reply>,
    },
    /// A job takes the machine apart.
    Dismantle {
        /// How the guest ended.
        ending: Ending,
        /// Who waits for it.
        reply: Option<Reply>,
    },
}

impl Operation {
    /// A drain whose asker is told at `deadline` if it has not ended.
    #[must_use]
    pub fn drain(purpose: Purpose, reply: Option<Reply>, deadline: Option<Instant>, busy: String) -> Self {
        let again = Instant::now() + ASK_AGAIN;
        Self::Drain { purpose, reply, deadline, ask: deadline.map_or(again, |deadline| deadline.min(again)), busy }
    }

    /// What it is called where the state of the control thread is shown.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Define { .. } => "define",
            Self::Boot { .. } => "boot",
            Self::Drain { .. } => "drain",
            Self::Restart { .. } => "restart",
            Self::Dismantle { .. } => "dismantle",
        }
    }

    /// When the operation wants to be looked at again without a message.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Drain { ask, .. } => Some(*ask),
            _ => None,
        }
    }
}
