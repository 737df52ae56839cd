//! Descriptors that travel with requests over the Unix socket (SCM_RIGHTS), and those that a process was started with.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use tokio::sync::OwnedSemaphorePermit;

use crate::config::{NicConfig, TapFds};
use crate::problem::{Code, Problem};

/// The most descriptors of one request.
pub const MAX_DESCRIPTORS: usize = 64;

/// Room for the ancillary data of so many.
const ROOM: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// Descriptors that came with a request, in the order in which they were sent. Those that nobody takes are closed with it.
#[derive(Debug, Default)]
pub struct Descriptors {
    fds: Vec<OwnedFd>,
    /// Their places among all that the server holds.
    places: Option<OwnedSemaphorePermit>,
}

impl From<Vec<OwnedFd>> for Descriptors {
    fn from(fds: Vec<OwnedFd>) -> Self {
        Self { fds, places: None }
    }
}

impl Descriptors {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.fds.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.fds.is_empty()
    }

    /// Adds some that came later.
    pub(crate) fn add(&mut self, fds: Vec<OwnedFd>, places: OwnedSemaphorePermit) {
        self.fds.extend(fds);
        match &mut self.places {
            Some(all) => all.merge(places),
            None => self.places = Some(places),
        }
    }

    /// Gives each of these NICs the ones that were passed for it; those that want none get none.
    ///
    /// # Errors
    /// `bad-descriptors` if there are more or less of them than the NICs want; all are closed then.
    pub fn share_out(self, nics: &[NicConfig]) -> Result<Vec<Vec<OwnedFd>>, Problem> {
        let wants = |nic: &NicConfig| nic.tap_fds.as_ref().map_or(0, TapFds::passed);
        let wanted: usize = nics.iter().map(wants).sum();
        if wanted != self.len() {
            let detail = format!("{} descriptors came with the request, but its NICs want {wanted}", self.len());
            let remedy = "pass (SCM_RIGHTS, rackctl define --tap-fd) as many as tap_fds says; a configuration file can only name inherited ones";
            return Err(Problem::new(Code::BadDescriptors, detail, remedy));
        }
        let mut fds = self.fds.into_iter();
        Ok(nics.iter().map(|nic| fds.by_ref().take(wants(nic)).collect()).collect())
    }
}

/// What one read brought.
pub(crate) struct Received {
    /// How many bytes; none at the end of the stream.
    pub(crate) bytes: usize,
    /// The descriptors that came with them.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether the kernel threw descriptors away, for want of room or of free numbers.
    pub(crate) truncated: bool,
}

/// Reads bytes, and the descriptors that came with them if they are not many more than [`MAX_DESCRIPTORS`].
pub(crate) fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<Received> {
    let mut room = [MaybeUninit::uninit(); ROOM];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let message = retry_on_intr(|| {
        rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = rights.flatten().collect();
    Ok(Received { bytes: message.bytes, fds, truncated: message.flags.contains(ReturnFlags::CTRUNC) })
}

/// Writes bytes, and passes descriptors with the first of them.
pub(crate) fn send(socket: impl AsFd, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let rights = SendAncillaryMessage::ScmRights(&borrowed);
    let mut room = vec![MaybeUninit::uninit(); rights.size()];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    if !fds.is_empty() && !ancillary.push(rights) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    let sent =
        retry_on_intr(|| rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL))?;
    Ok(sent)
}

/// The descriptors of this process by their numbers, whoever owns them.
#[derive(Debug)]
pub struct OwnDescriptors(OwnedFd);

impl OwnDescriptors {
    /// Needs Linux 5.6.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn new() -> io::Result<Self> {
        Ok(Self(pidfd_open(getpid(), PidfdFlags::empty())?))
    }

    /// The numbers that are open, in no order.
    ///
    /// # Errors
    /// What the kernel answered: there may be no /proc.
    pub fn numbers() -> io::Result<Vec<u32>> {
        let entries = std::fs::read_dir("/proc/self/fd")?;
        let numbers: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        Ok(numbers)
    }

    /// A copy of the descriptor with this number, which stays with its owner. The copy is closed at exec.
    ///
    /// # Errors
    /// EBADF if there is none; what else the kernel answered.
    pub fn copy(&self, number: u32) -> io::Result<OwnedFd> {
        // Its own has a number that was free before.
        let number = i32::try_from(number).ok().filter(|number| *number != self.0.as_raw_fd());
        let number = number.ok_or(rustix::io::Errno::BADF)?;
        Ok(pidfd_getfd(&self.0, number, PidfdGetfdFlags::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn some(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn descriptors_come_with_the_bytes_that_they_were_sent_with() {
        let (here, there) = UnixStream::pair().unwrap();
        let sent = vec![std::fs::File::open("/").unwrap().into(), std::fs::File::open("/proc").unwrap().into()];
        assert_eq!(send(&here, b"first", &[]).unwrap(), 5);
        assert_eq!(send(&here, b"second", &sent).unwrap(), 6);
        let mut bytes = [0; 64];
        let received = receive(&there, &mut bytes).unwrap();
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(&bytes[..received.bytes], b"firstsecond");
        assert_eq!(received.fds.iter().map(inode).collect::<Vec<_>>(), sent.iter().map(inode).collect::<Vec<_>>());
        for fd in &received.fds {
            assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
        drop(here);
        assert_eq!(receive(&there, &mut bytes).unwrap().bytes, 0);
    }

    #[test]
    fn more_descriptors_than_there_is_room_for_are_told_of() {
        let (here, there) = UnixStream::pair().unwrap();
        for (count, truncated) in [(1, false), (MAX_DESCRIPTORS, false), (253, true), (0, false)] {
            send(&here, b"x", &some(count)).unwrap();
            let received = receive(&there, &mut [0; 8]).unwrap();
            // The kernel aligns the room, which may hold one more then.
            assert_eq!(received.truncated, truncated, "{count}");
            assert_eq!(received.fds.len().min(MAX_DESCRIPTORS), count.min(MAX_DESCRIPTORS));
            assert!(received.fds.len() <= MAX_DESCRIPTORS + 2);
        }
        assert!(send(&here, b"x", &some(254)).is_err(), "SCM_MAX_FD is 253");
    }

    #[test]
    fn each_nic_gets_its_share_in_order() {
        let nic = |id: &str, tap_fds| NicConfig {
            tap: None,
            tap_fds,
            ..NicConfig::new(id, "", "02:00:00:00:00:01".parse().unwrap())
        };
        let nics = [
            nic("a", Some(TapFds::Passed(1))),
            nic("b", Some(TapFds::Inherited(vec![3, 4]))),
            nic("c", Some(TapFds::Passed(2))),
        ];
        let fds = some(3);
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let shares = Descriptors::from(fds).share_out(&nics).unwrap();
        let shares: Vec<Vec<_>> = shares.iter().map(|share| share.iter().map(AsRawFd::as_raw_fd).collect()).collect();
        assert_eq!(shares, [vec![numbers[0]], vec![], numbers[1..].to_vec()]);
        for wrong in [0, 2, 4] {
            let problem = Descriptors::from(some(wrong)).share_out(&nics).unwrap_err();
            assert_eq!(problem.code, Code::BadDescriptors, "{problem}");
        }
    }

    #[test]
    fn a_descriptor_of_this_process_is_found_by_its_number() {
        let file = std::fs::File::open("/proc").unwrap();
        let own = OwnDescriptors::new().unwrap();
        let copy = own.copy(file.as_raw_fd().try_into().unwrap()).unwrap();
        assert_ne!(copy.as_raw_fd(), file.as_raw_fd());
        assert_eq!(rustix::fs::fstat(&copy).unwrap().st_ino, rustix::fs::fstat(&file).unwrap().st_ino);
        // No other test has a number as high.
        let high = rustix::io::fcntl_dupfd_cloexec(&file, 900).unwrap();
        let number = high.as_raw_fd().try_into().unwrap();
        assert!(OwnDescriptors::numbers().unwrap().contains(&number));
        drop(high);
        assert!(!OwnDescriptors::numbers().unwrap().contains(&number));
        for none in [number, 1_000_000, u32::MAX] {
            assert_eq!(own.copy(none).unwrap_err().raw_os_error(), Some(9), "EBADF");
        }
    }
}
