//! What is left when a thread of the VMM panics: a report in a file that the host agent names, and a line in the log.
//!
//! A thread of its own, which has the file open from the start, finds the names of the backtrace and writes: the thread that
//! panicked may be one that is not allowed to open files, and waits until it is done.

use std::backtrace::Backtrace;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::PanicHookInfo;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::{Duration, SystemTime};

use rackvisor_api::config::VmConfig;
use rackvisor_api::events::Timestamp;
use rackvisor_devices::{ThreadKind, ThreadSpawner};
use serde_json::{Value, json};

use super::{Telemetry, inspect};

/// How long a thread that panicked waits for its report to be written.
const PATIENCE: Duration = Duration::from_secs(5);
/// Reports that may wait.
const QUEUE: usize = 4;
/// What stands where something was taken out.
const REMOVED: &str = "(removed)";
/// What may be secret in a configuration: the kernel's command line carries passwords and keys of installers.
const SECRETS: [&str; 1] = ["/boot/cmdline"];

struct Panic {
    thread: String,
    message: String,
    location: String,
    backtrace: Backtrace,
    written: SyncSender<()>,
}

/// From now on, a thread of this process that panics leaves a report behind: a line of JSON at the end of `file`, which is made
/// (mode 0600) and stays empty as long as nothing panics, and a line in the log. What was done about panics before is done where
/// that is not possible.
///
/// # Errors
/// The file cannot be opened, or there is no thread left.
pub fn report_panics(file: &Path, telemetry: Telemetry, spawner: &dyn ThreadSpawner) -> io::Result<()> {
    let about = |error: io::Error| {
        io::Error::new(error.kind(), format!("cannot open the crash report {}: {error}", file.display()))
    };
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(file).map_err(about)?;
    let (sender, panics) = mpsc::sync_channel(QUEUE);
    drop(spawner.spawn(ThreadKind::Crash, "crash", Box::new(move || write_reports(&panics, &file, &telemetry)))?);
    let former = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let (written, done) = mpsc::sync_channel(1);
        // With a queue that is full there are reports enough.
        if sender.try_send(Panic::of(info, written)).is_err() || done.recv_timeout(PATIENCE).is_err() {
            former(info);
        }
    }));
    Ok(())
}

impl Panic {
    fn of(info: &PanicHookInfo<'_>, written: SyncSender<()>) -> Self {
        let thread = std::thread::current();
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref().map(String::as_str));
        Self {
            thread: thread.name().unwrap_or("?").to_owned(),
            message: text.unwrap_or("(no text)").to_owned(),
            location: info.location().map(ToString::to_string).unwrap_or_default(),
            // Only addresses at first; their names are looked up by who writes.
            backtrace: Backtrace::force_capture(),
            written,
        }
    }

    fn report(&self, telemetry: &Telemetry) -> Value {
        let live = telemetry.live();
        let backtrace = self.backtrace.to_string();
        json!({
            "time": Timestamp(SystemTime::now()),
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "thread": self.thread,
            "message": self.message,
            "location": self.location,
            "backtrace": backtrace.lines().map(str::trim).collect::<Vec<_>>(),
            "state": live.facts.state,
            "operation": live.facts.operation,
            "vcpus": inspect::vcpus(&live),
            "config": live.config.as_deref().map(without_secrets),
        })
    }
}

fn write_reports(panics: &Receiver<Panic>, mut file: &File, telemetry: &Telemetry) {
    for panic in panics {
        tracing::error!(thread = panic.thread, location = panic.location, "a thread panicked: {}", panic.message);
        let mut line = panic.report(telemetry).to_string();
        line.push('\n');
        if let Err(error) = file.write_all(line.as_bytes()).and_then(|()| file.sync_data()) {
            tracing::error!(%error, "the crash report cannot be written");
        }
        let _ = panic.written.try_send(());
    }
}

/// The configuration as others may read it.
fn without_secrets(config: &VmConfig) -> Value {
    let mut config = serde_json::to_value(config).unwrap_or_default();
    for secret in SECRETS {
        if let Some(secret) = config.pointer_mut(secret) {
            *secret = REMOVED.into();
        }
    }
    config
}
