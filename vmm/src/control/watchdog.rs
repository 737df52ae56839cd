//! What the control thread does when the guest's watchdog expires. It looks once a second: the watchdog counts no less.

use std::time::{Duration, Instant};

use rackvisor_api::config::WatchdogAction;
use rackvisor_api::events::EventKind;
use rackvisor_api::state::{GuestEvent, VmState};

use super::controller::Controller;
use super::operation::Purpose;

const LOOK: Duration = Duration::from_secs(1);

impl Controller {
    /// What is done when the watchdog expires, if there is one.
    fn watchdog_action(&self) -> Option<WatchdogAction> {
        self.config.as_ref().and_then(|config| config.watchdog).map(|watchdog| watchdog.action)
    }

    /// When the watchdog is to be looked at, if there is one.
    pub(super) fn next_look_at_watchdog(&self) -> Option<Instant> {
        let counts = self.inventory.is_some() && self.watchdog_action().is_some();
        self.last_look_at_watchdog.filter(|_| counts).map(|last| last + LOOK)
    }

    /// Acts if the watchdog has expired.
    pub(super) fn look_at_watchdog(&mut self, now: Instant) {
        if self.next_look_at_watchdog().is_none_or(|next| now < next) {
            return;
        }
        self.last_look_at_watchdog = Some(now);
        // What is under way has stopped its time, or will.
        if self.operation.is_some() || self.state != VmState::Running {
            return;
        }
        let clock = self.inventory.as_ref().and_then(|inventory| inventory.clock.as_ref());
        let (true, Some(action)) = (clock.is_some_and(|clock| clock.expires()), self.watchdog_action()) else { return };
        if let Some(held_back) = self.guest_log.pass() {
            tracing::warn!(vm = self.name(), held_back, ?action, "the guest's watchdog expired");
        }
        self.publish(EventKind::WatchdogExpired { action });
        match action {
            WatchdogAction::Reset => self.begin(Purpose::Reset { run: true, by_guest: true }, None),
            WatchdogAction::Shutdown => self.guest_ends(GuestEvent::Shutdown, "the watchdog expired"),
            WatchdogAction::Pause => self.begin(Purpose::Pause { cause: Some("the watchdog expired".into()) }, None),
            WatchdogAction::Nmi => {
                if let Some(machine) = &self.machine {
                    machine.nmi();
                }
            }
            WatchdogAction::None => {}
        }
    }
}
