//! A terminal for programs that want one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::mpsc::{self, Receiver};

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, tcgetattr};

use crate::PATIENCE;

/// A pseudo-terminal, and what is shown on it.
pub struct Terminal {
    keyboard: File,
    inside: OwnedFd,
    screen: Receiver<Vec<u8>>,
    shown: Vec<u8>,
    seen: usize,
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Terminal {
    /// A new one.
    pub fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let inside = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let keyboard = File::from(master);
        let mut output = keyboard.try_clone().unwrap();
        let (sender, screen) = mpsc::channel();
        // Reading a terminal has no timeout, waiting for a channel has. The thread ends with the terminal.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { keyboard, inside, screen, shown: Vec::new(), seen: 0 }
    }

    /// For the standard streams of a program.
    pub fn stdio(&self) -> Stdio {
        self.inside.try_clone().unwrap().into()
    }

    /// Its settings.
    pub fn settings(&self) -> Termios {
        tcgetattr(self.inside.as_fd()).unwrap()
    }

    /// Types keys.
    pub fn type_keys(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Waits until `text` is shown.
    pub fn wait_for(&mut self, text: &str) {
        loop {
            let found = self.shown[self.seen..].windows(text.len()).position(|window| window == text.as_bytes());
            if let Some(at) = found {
                self.seen += at + text.len();
                return;
            }
            match self.screen.recv_timeout(PATIENCE) {
                Ok(more) => self.shown.extend(more),
                Err(error) => panic!("{text:?} is not shown: {error}\n{}", String::from_utf8_lossy(&self.shown)),
            }
        }
    }
}
