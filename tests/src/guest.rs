//! A guest on the other end of its serial console.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::PATIENCE;

/// How much of the console is shown after a failure.
const SHOWN: usize = 6000;

/// A connection to the console of a guest. After a failure, what the guest said last is shown.
pub struct Guest {
    stream: UnixStream,
    said: Vec<u8>,
    /// What was looked at already.
    seen: usize,
}

impl Guest {
    /// Joins the console socket.
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, said: Vec::new(), seen: 0 }
    }

    /// Waits until the agent listens, also after a reboot.
    pub fn wait_ready(&mut self) {
        self.read_until("@@RV-READY@@\n");
    }

    /// Sends a line to the agent without waiting for what comes of it.
    pub fn send(&mut self, line: &str) {
        self.type_keys(format!("{line}\n").as_bytes());
    }

    /// Sends bytes.
    pub fn type_keys(&mut self, keys: &[u8]) {
        self.stream.write_all(keys).unwrap();
    }

    /// Waits for the end of the command that was sent first; gives its status and output.
    pub fn result(&mut self) -> (i32, String) {
        self.read_until("@@RV-BEGIN@@\n");
        let output = self.read_until("@@RV-END status=");
        let status = self.read_until("@@\n");
        (String::from_utf8(status).unwrap().parse().unwrap(), String::from_utf8(output).unwrap())
    }

    /// Runs a shell command in the guest; gives its status and output.
    pub fn run(&mut self, command: &str) -> (i32, String) {
        self.send(command);
        self.result()
    }

    /// Runs a shell command that must succeed; gives its output without the last line break.
    pub fn ok(&mut self, command: &str) -> String {
        let (status, output) = self.run(command);
        assert_eq!(status, 0, "{command}: {output}");
        output.trim_end_matches('\n').to_owned()
    }

    /// The content of a file of the guest.
    pub fn bytes(&mut self, path: &str) -> Vec<u8> {
        // Each byte on the console is an exit.
        let coded = self.ok(&format!("gzip -c {path} | base64"));
        let mut program = Command::new("sh");
        program.args(["-c", "base64 -d | gunzip"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = program.spawn().unwrap();
        program.stdin.take().unwrap().write_all(coded.as_bytes()).unwrap();
        let output = program.wait_with_output().unwrap();
        assert!(output.status.success(), "{path}: {coded}");
        output.stdout
    }

    /// Reads on to `marker`; gives what stands before it.
    pub fn read_until(&mut self, marker: &str) -> Vec<u8> {
        let mut from = self.seen;
        loop {
            let found = self.said[from..].windows(marker.len()).position(|window| window == marker.as_bytes());
            if let Some(at) = found {
                let before = self.said[self.seen..from + at].to_vec();
                self.seen = from + at + marker.len();
                return before;
            }
            from = self.said.len().saturating_sub(marker.len()).max(from);
            assert!(self.read_more(), "the console ended before {marker:?}");
        }
    }

    /// Reads until the console is closed; gives all that it ever said.
    pub fn read_to_end(&mut self) -> String {
        while self.read_more() {}
        self.seen = self.said.len();
        String::from_utf8_lossy(&self.said).into_owned()
    }

    /// Whether there was more.
    fn read_more(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(length) => {
                self.said.extend_from_slice(&buffer[..length]);
                true
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("the guest said nothing for {} s", PATIENCE.as_secs())
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("console: {error}"),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let tail = &self.said[self.said.len().saturating_sub(SHOWN)..];
            eprintln!("--- console of the guest\n{}", String::from_utf8_lossy(tail));
        }
    }
}
