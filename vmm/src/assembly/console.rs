//! The serial console that the configuration asks for.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rackvisor_api::config::{SerialConfig, SerialMode};
use rackvisor_devices::console::{Console, ConsoleMode, ConsoleOutput, InputSink};

use super::{AssemblyError, Host};

/// How long readers have to take the last output when the guest has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

/// What to do with a console on this process's terminal.
#[derive(Clone, Default)]
pub struct StdioHooks {
    /// Called when the user leaves the console with Ctrl-A X. Without it the keys go to the guest.
    pub escape: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// The console of a machine.
pub struct LiveConsole {
    console: Console,
}

impl LiveConsole {
    /// Opens the console that `config` asks for.
    ///
    /// # Errors
    /// [`AssemblyError::Console`], or [`AssemblyError::Host`] if the configuration names no path where one is needed.
    pub fn open(config: &SerialConfig, host: &Host) -> Result<Self, AssemblyError> {
        let path = || -> Result<PathBuf, AssemblyError> {
            config.path.clone().ok_or_else(|| AssemblyError::host("serial console")(&"its mode needs a `path`"))
        };
        let mode = match config.mode {
            SerialMode::Off => ConsoleMode::Off,
            SerialMode::Stdio => {
                let hook = host.options.stdio.escape.clone();
                ConsoleMode::Stdio { escape: hook.map(|hook| -> Box<dyn Fn() + Send> { Box::new(move || hook()) }) }
            }
            SerialMode::File => ConsoleMode::File(path()?),
            SerialMode::Pty => ConsoleMode::Pty,
            SerialMode::Socket => ConsoleMode::Socket(path()?),
        };
        Ok(Self { console: Console::new(mode, &*host.spawner)? })
    }

    /// Where the guest's output goes.
    #[must_use]
    pub fn output(&self) -> ConsoleOutput {
        self.console.output()
    }

    /// Where what users type goes.
    pub fn set_input(&self, sink: Arc<dyn InputSink>) {
        self.console.set_input(sink);
    }

    /// The pseudo-terminal, if it is one.
    #[must_use]
    pub fn pty_path(&self) -> Option<PathBuf> {
        self.console.pty_path().map(ToOwned::to_owned)
    }

    /// Gives the readers the last output and ends the console.
    pub fn close(self) {
        if !self.console.shutdown(Instant::now() + LAST_OUTPUT) {
            tracing::warn!("a reader of the console did not take the last output in time");
        }
    }
}
