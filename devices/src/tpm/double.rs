//! A swtpm of a few lines: the control channel as the real one speaks it, and answers as a test wants them.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking, also in its helpers"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempdir::TempDir;

use super::crb::error_response;
use crate::socket;

/// What the double does with a command.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// Answers with success and what followed the header of the command.
    Echo,
    /// Says nothing, and reads nothing.
    Hang,
    /// Closes both channels.
    Die,
    /// Answers with these bytes.
    Say(Vec<u8>),
}

/// What a test may change and look at.
pub struct Script {
    /// What happens to the next command.
    pub mode: Mode,
    /// What the control channel says that it can do.
    pub capabilities: u64,
    /// A control command that is refused, and the result.
    pub refuse: Option<(u32, u32)>,
    /// Whether control commands are not answered.
    pub deaf: bool,
    /// Answers as a TPM 1.2.
    pub old: bool,
    /// The tpmEstablished flag.
    pub established: bool,
    /// Control commands so far.
    pub controls: Vec<u32>,
    /// Commands so far, but for the probe.
    pub commands: Vec<Vec<u8>>,
    ended: bool,
}

/// The double, served by a thread until it is dropped.
pub struct Swtpm {
    _folder: TempDir,
    socket: PathBuf,
    script: Arc<Mutex<Script>>,
    thread: Option<JoinHandle<()>>,
}

impl Swtpm {
    /// Begins to listen.
    ///
    /// # Panics
    /// When there is no room for its socket.
    #[must_use]
    pub fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let socket = folder.as_path().join("ctrl");
        let listener = UnixListener::bind(&socket).unwrap();
        let script = Arc::new(Mutex::new(Script {
            mode: Mode::Echo,
            capabilities: 0xffff,
            refuse: None,
            deaf: false,
            old: false,
            established: false,
            controls: Vec::new(),
            commands: Vec::new(),
            ended: false,
        }));
        let double = Double { script: Arc::clone(&script) };
        let thread = Some(std::thread::spawn(move || double.run(&listener)));
        Self { _folder: folder, socket, script, thread }
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What may be changed and looked at.
    ///
    /// # Panics
    /// When its thread has.
    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.script.lock().unwrap().ended = true;
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Double {
    script: Arc<Mutex<Script>>,
}

impl Double {
    fn run(&self, listener: &UnixListener) {
        while self.wait(|_| [listener.as_raw_fd()]).is_some() {
            let (control, _) = listener.accept().unwrap();
            self.serve(control);
        }
    }

    /// Which of those that the script lets be looked at can be read, or nothing when the test is over.
    fn wait<const N: usize>(&self, descriptors: impl Fn(&Script) -> [i32; N]) -> Option<usize> {
        loop {
            let script = self.script.lock().unwrap();
            if script.ended {
                return None;
            }
            let descriptors = descriptors(&script);
            drop(script);
            let soon = Instant::now() + Duration::from_millis(5);
            if let Some(ready) = socket::readable(descriptors, Some(soon)).unwrap() {
                return Some(ready);
            }
        }
    }

    /// One connection at a time, as the real one.
    fn serve(&self, mut control: UnixStream) {
        let mut data: Option<File> = None;
        loop {
            let data_fd = data.as_ref().map_or(-1, AsRawFd::as_raw_fd);
            let watched = |script: &Script| [control.as_raw_fd(), if script.mode == Mode::Hang { -1 } else { data_fd }];
            let goes_on = match self.wait(watched) {
                None => false,
                Some(0) => self.control(&mut control, &mut data),
                Some(_) => self.command(&mut data),
            };
            if !goes_on {
                return;
            }
        }
    }

    fn control(&self, control: &mut UnixStream, data: &mut Option<File>) -> bool {
        let mut message = [0; 64];
        let Ok((length @ 4.., passed)) = control.recv_with_fd(&mut message) else { return false };
        let command = u32::from_be_bytes(message[..4].try_into().unwrap());
        let mut script = self.script.lock().unwrap();
        script.controls.push(command);
        if script.deaf {
            return true;
        }
        let mut answer = vec![0; 4];
        match (command, length, script.refuse) {
            (command, _, Some((refused, code))) if command == refused => answer = code.to_be_bytes().to_vec(),
            (0x01, 4, _) => answer = script.capabilities.to_be_bytes().to_vec(),
            (0x02 | 0x05, 8, _) | (0x0e, 4, _) => {}
            (0x04, 4, _) => answer.extend([u8::from(script.established), 0, 0, 0]),
            (0x10, 4, _) => *data = passed,
            (0x11, 8, _) => answer.extend([&message[4..8], &[0; 8]].concat()),
            other => panic!("a control command that swtpm does not know: {other:?}"),
        }
        control.write_all(&answer).is_ok()
    }

    fn command(&self, data: &mut Option<File>) -> bool {
        let mut script = self.script.lock().unwrap();
        if script.mode == Mode::Hang {
            // Left where it is, for when it goes on.
            return true;
        }
        let mut command = vec![0; 8192];
        let stream = data.as_mut().unwrap();
        let Ok(length @ 1..) = stream.read(&mut command) else {
            *data = None;
            return true;
        };
        command.truncate(length);
        if command[6..10] == [0, 0, 0x01, 0x7c] {
            let mut answer = error_response(0x100);
            if script.old {
                answer[..2].copy_from_slice(&[0x00, 0xc4]);
            }
            return stream.write_all(&answer).is_ok();
        }
        script.commands.push(command.clone());
        let answer = match script.mode.clone() {
            Mode::Echo => {
                let length = u32::try_from(command.len()).unwrap().to_be_bytes();
                [&[0x80, 0x01], &length[..], &[0; 4], &command[10..]].concat()
            }
            Mode::Say(bytes) => bytes,
            Mode::Hang => unreachable!("looked at above"),
            Mode::Die => return false,
        };
        stream.write_all(&answer).is_ok()
    }
}
