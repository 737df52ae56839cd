//! The real-time clock: what it shows at boot, and what became of it.
#![allow(unsafe_code)] // The C library alone knows the host's time zone.

use std::sync::Arc;

use rackvisor_api::config::ClockConfig;
use rackvisor_devices::chipset::{Rtc, Watchdog};

/// Seconds beyond UTC that the clock is to show now.
pub fn offset(config: ClockConfig) -> i64 {
    match config {
        ClockConfig::Utc => 0,
        ClockConfig::Localtime => time_zone(),
        ClockConfig::Offset(seconds) => seconds,
    }
}

unsafe extern "C" {
    /// POSIX `tzset`, which the `libc` crate lacks for this target.
    fn tzset();
}

/// Seconds that the host's time zone is ahead of UTC now; 0 if it has none.
fn time_zone() -> i64 {
    // SAFETY: `tzset` only reads the environment and files, `time` takes a null pointer, and `localtime_r` a structure of its own to
    // fill, which is plain data.
    unsafe {
        // The zone may have been set since the process started.
        tzset();
        let mut local: libc::tm = std::mem::zeroed();
        let now = libc::time(std::ptr::null_mut());
        if libc::localtime_r(&raw const now, &raw mut local).is_null() { 0 } else { local.tm_gmtoff }
    }
}

/// What counts time for the guest.
#[derive(Clone)]
pub struct LiveClock {
    rtc: Arc<Rtc>,
    watchdog: Option<Arc<Watchdog>>,
    configured: i64,
}

impl LiveClock {
    /// `configured` are the seconds that the clock would be beyond UTC if no guest had set it.
    pub(super) fn new(rtc: Arc<Rtc>, watchdog: Option<Arc<Watchdog>>, configured: i64) -> Self {
        Self { rtc, watchdog, configured }
    }

    /// Seconds that the clock is beyond UTC, with what the guest itself set.
    #[must_use]
    pub fn offset(&self) -> i64 {
        self.rtc.offset_seconds()
    }

    /// Seconds of that that guests have set.
    #[must_use]
    pub fn shift(&self) -> i64 {
        self.offset().saturating_sub(self.configured)
    }

    /// Whether the watchdog has expired; says so once.
    #[must_use]
    pub fn expires(&self) -> bool {
        self.watchdog.as_ref().is_some_and(|watchdog| watchdog.expires())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_time_is_what_the_hosts_date_says() {
        if std::env::var_os("RACKVISOR_ZONE").is_none() {
            // In a process of its own, whose zone is not that of the tests beside it.
            let me = std::env::current_exe().unwrap();
            let name = "assembly::clock::tests::local_time_is_what_the_hosts_date_says";
            for (zone, seconds) in [("UTC0", "0"), ("<+0530>-5:30", "19800"), ("<-03>3", "-10800")] {
                let mut child = std::process::Command::new(&me);
                let child = child.args(["--exact", name]).env("TZ", zone).env("RACKVISOR_ZONE", seconds);
                assert!(child.output().unwrap().status.success(), "{zone}");
            }
            return;
        }
        let wanted: i64 = std::env::var("RACKVISOR_ZONE").unwrap().parse().unwrap();
        assert_eq!(offset(ClockConfig::Localtime), wanted);
        assert_eq!((offset(ClockConfig::Utc), offset(ClockConfig::Offset(-5))), (0, -5));
    }
}
