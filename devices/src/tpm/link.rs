//! The connection to swtpm (`swtpm/tpm_ioctl.h`, swtpm_ioctl(8)): a control channel, which is its Unix socket, and a data channel for
//! commands of the guest, which is a socket pair of ours whose other end it is given (CMD_SET_DATAFD).
//!
//! Control messages are a 32-bit command and its parameters, answers a 32-bit result and more, all big-endian. Nothing here waits
//! longer than it is told.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::TpmError;
use super::crb::{BUFFER, HEADER, Shared, error_response, size_of};
use crate::socket::{self, By};

/// Commands of the control channel.
mod control {
    pub const GET_CAPABILITY: u32 = 0x01;
    pub const INIT: u32 = 0x02;
    pub const GET_TPMESTABLISHED: u32 = 0x04;
    pub const SET_LOCALITY: u32 = 0x05;
    pub const STOP: u32 = 0x0e;
    pub const SET_DATAFD: u32 = 0x10;
    pub const SET_BUFFERSIZE: u32 = 0x11;
}

/// Bits of GET_CAPABILITY that are needed, with the names of what they stand for.
const NEEDED: [(u64, &str); 6] = [
    (1 << 0, "CMD_INIT"),
    (1 << 2, "CMD_GET_TPMESTABLISHED"),
    (1 << 3, "CMD_SET_LOCALITY"),
    (1 << 10, "CMD_STOP"),
    (1 << 12, "CMD_SET_DATAFD"),
    (1 << 13, "CMD_SET_BUFFERSIZE"),
];
/// A flag of INIT: what was suspended with an earlier machine is not taken up.
const DELETE_VOLATILE: u32 = 1;
/// TPM2_GetTestResult, which a TPM answers in any state: with the tag of its own version.
const PROBE: [u8; HEADER] = [0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x7c];

/// A connection. Fields are dropped in order: swtpm takes a new data channel only after it has seen the end of the former one.
#[derive(Debug)]
pub(super) struct Link {
    data: UnixStream,
    control: UnixStream,
}

impl Link {
    /// Connects, and hands the data channel over.
    pub(super) fn connect(socket: &Path, within: Duration) -> Result<Self, TpmError> {
        let by = By::after(within);
        let refused = |source| TpmError::Connect { path: socket.to_owned(), source };
        let control = socket::connect(socket).map_err(refused)?;
        let (data, theirs) = UnixStream::pair()?;
        data.set_nonblocking(true)?;
        let mut link = Self { data, control };
        link.say(control::GET_CAPABILITY, &[], None)?;
        // The only answer without a result.
        let capabilities = u64::from_be_bytes(link.hear("CMD_GET_CAPABILITY", by)?);
        if let Some((_, name)) = NEEDED.iter().find(|(bit, _)| capabilities & bit == 0) {
            return Err(TpmError::Lacks(name));
        }
        link.say(control::SET_DATAFD, &[], Some(theirs.as_raw_fd()))?;
        link.result("CMD_SET_DATAFD", by)?;
        Ok(link)
    }

    /// Switches the TPM off and on (`_TPM_Init`); gives its tpmEstablished flag.
    pub(super) fn power_on(&mut self, within: Duration) -> Result<bool, TpmError> {
        let by = By::after(within);
        self.power_off(within)?;
        let size = BUFFER as u32;
        self.say(control::SET_BUFFERSIZE, &size.to_be_bytes(), None)?;
        self.result("CMD_SET_BUFFERSIZE", by)?;
        let [used, _, _] = self.words("CMD_SET_BUFFERSIZE", by)?;
        if used != size {
            return Err(TpmError::Lacks("buffers of 3968 bytes"));
        }
        self.say(control::INIT, &DELETE_VOLATILE.to_be_bytes(), None)?;
        self.result("CMD_INIT", by)?;
        self.say(control::SET_LOCALITY, &[0; 4], None)?;
        self.result("CMD_SET_LOCALITY", by)?;
        self.say(control::GET_TPMESTABLISHED, &[], None)?;
        self.result("CMD_GET_TPMESTABLISHED", by)?;
        let [established, _, _, _] = self.hear("CMD_GET_TPMESTABLISHED", by)?;
        let answer = self.execute(&PROBE, within, None)?;
        let [tag @ .., _, _, _, _, _, _, _, _] = error_response(0);
        if answer.starts_with(&tag) { Ok(established != 0) } else { Err(TpmError::NotTpm2) }
    }

    /// Switches the TPM off.
    pub(super) fn power_off(&mut self, within: Duration) -> Result<(), TpmError> {
        let by = By::after(within);
        self.say(control::STOP, &[], None)?;
        self.result("CMD_STOP", by)
    }

    /// Has the TPM execute a command; gives its response. A worker that is to end does so in the midst of it.
    pub(super) fn execute(
        &mut self,
        command: &[u8],
        within: Duration,
        worker: Option<&Shared>,
    ) -> Result<Vec<u8>, TpmError> {
        let by = By::after(within);
        // Nothing else is on its way, so it fits.
        self.data.write_all(command)?;
        let mut response = Vec::with_capacity(BUFFER);
        let wake = worker.map_or(-1, |worker| worker.wake_event().as_raw_fd());
        while size_of(&response).is_none_or(|size| response.len() < size) {
            // Asked before each wait: the wake-up may have come, and been taken, with the command's own.
            if worker.is_some_and(Shared::is_ending) {
                return Err(TpmError::Ending);
            }
            match socket::readable([self.data.as_raw_fd(), wake], Some(by.at))? {
                Some(0) => {}
                Some(_) => continue,
                None => return Err(TpmError::Timeout { what: "a command", within }),
            }
            let mut bytes = [0; BUFFER];
            let count = match self.data.read(&mut bytes) {
                Ok(0) => return Err(TpmError::Closed),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            };
            response.extend_from_slice(bytes.get(..count).unwrap_or_default());
            if response.len() > BUFFER || size_of(&response).is_some_and(|size| !(HEADER..=BUFFER).contains(&size)) {
                return Err(TpmError::Garbled(response.len()));
            }
        }
        if size_of(&response) == Some(response.len()) { Ok(response) } else { Err(TpmError::Garbled(response.len())) }
    }

    /// The data channel: readable when swtpm has gone, as it says nothing unasked.
    pub(super) fn data(&self) -> RawFd {
        self.data.as_raw_fd()
    }

    fn say(&mut self, command: u32, parameters: &[u8], descriptor: Option<RawFd>) -> Result<(), TpmError> {
        let message = [&command.to_be_bytes(), parameters].concat();
        match descriptor {
            None => self.control.write_all(&message)?,
            Some(fd) => {
                let sent = self.control.send_with_fd(&message[..], fd);
                sent.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
            }
        }
        Ok(())
    }

    /// The next bytes of the control channel.
    fn hear<const N: usize>(&mut self, what: &'static str, by: By) -> Result<[u8; N], TpmError> {
        let mut answer = [0; N];
        let mut rest = &mut answer[..];
        while !rest.is_empty() {
            if socket::readable([self.control.as_raw_fd()], Some(by.at))?.is_none() {
                return Err(TpmError::Timeout { what, within: by.within });
            }
            match self.control.read(rest) {
                Ok(0) => return Err(TpmError::Closed),
                Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(answer)
    }

    fn words<const N: usize>(&mut self, what: &'static str, by: By) -> Result<[u32; N], TpmError> {
        let mut words = [0; N];
        for word in &mut words {
            *word = u32::from_be_bytes(self.hear(what, by)?);
        }
        Ok(words)
    }

    fn result(&mut self, what: &'static str, by: By) -> Result<(), TpmError> {
        match self.words(what, by)? {
            [0] => Ok(()),
            [code] => Err(TpmError::Refused { what, code }),
        }
    }
}
