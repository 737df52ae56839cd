//! The kernel's ways to persistent reservations: the ioctls of `linux/pr.h`, and SCSI and NVMe commands for what they lack.
//!
//! Linux 6.1 has no ioctl that reads keys, so they are read by PERSISTENT RESERVE IN through SG_IO, or by NVMe's
//! Reservation Report; both pass dm-multipath. Its `IOC_PR_PREEMPT_ABORT` on dm-multipath aborts nothing (`dm_pr_preempt` forgets
//! the flag), so PREEMPT AND ABORT goes through SG_IO as well where that is possible.

// Ioctls have no safe wrapper among our dependencies.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::OnceLock;

use super::keys::{Holder, Kind, MAX_KEYS, Malformed, REPORT_BYTES, Table, parse_report};
use super::scsi::{self, Deed, retried};
use super::{LockedFile, Refusal, Target};

const IOC_PR_REGISTER: libc::Ioctl = 0x4018_70c8;
const IOC_PR_RESERVE: libc::Ioctl = 0x4010_70c9;
const IOC_PR_RELEASE: libc::Ioctl = 0x4010_70ca;
const IOC_PR_PREEMPT_ABORT: libc::Ioctl = 0x4018_70cc;
const IOC_PR_CLEAR: libc::Ioctl = 0x4010_70cd;
/// Linux 6.19.
const IOC_PR_READ_KEYS: libc::Ioctl = 0xc010_70ce;
const IOC_PR_READ_RESERVATION: libc::Ioctl = 0x8010_70cf;
const PR_FL_IGNORE_KEY: u32 = 1;
/// PR_WRITE_EXCLUSIVE_REG_ONLY.
const OURS: u32 = 3;

const SG_IO: libc::Ioctl = 0x2285;
const NVME_IOCTL_ID: libc::Ioctl = 0x4e40;
const NVME_IOCTL_IO_CMD: libc::Ioctl = 0xc048_4e43;

/// Milliseconds that a command of our own may take.
const TIMEOUT: u32 = 10_000;
#[repr(C)]
struct PrReservation {
    key: u64,
    kind: u32,
    flags: u32,
}

#[repr(C)]
struct PrRegistration {
    old_key: u64,
    new_key: u64,
    flags: u32,
    pad: u32,
}

#[repr(C)]
struct PrPreempt {
    /// Of the host that preempts, whatever the kernel's documentation says: both drivers hand it on as that.
    old_key: u64,
    /// Of the one that is preempted.
    new_key: u64,
    kind: u32,
    flags: u32,
}

#[repr(C)]
struct PrClear {
    key: u64,
    flags: u32,
    pad: u32,
}

#[repr(C)]
struct PrReadKeys {
    generation: u32,
    num_keys: u32,
    keys_ptr: u64,
}

#[repr(C)]
#[derive(Default)]
struct PrReadReservation {
    key: u64,
    generation: u32,
    kind: u32,
}

/// `struct sg_io_hdr`.
#[repr(C)]
struct SgIoHdr {
    interface_id: libc::c_int,
    dxfer_direction: libc::c_int,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *mut u8,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: libc::c_int,
    usr_ptr: *mut libc::c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: libc::c_int,
    duration: u32,
    info: u32,
}

/// `struct nvme_passthru_cmd`.
#[repr(C)]
#[derive(Default)]
struct NvmeCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

/// How keys are read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    Kernel,
    Scsi,
    Nvme { nsid: u32 },
}

/// The disk as what takes commands.
pub(super) struct Device {
    file: Arc<LockedFile>,
    reader: OnceLock<Reader>,
}

impl Device {
    pub fn new(file: Arc<LockedFile>) -> Self {
        Self { file, reader: OnceLock::new() }
    }

    /// The namespace, if this is NVMe.
    fn namespace(&self) -> Option<u32> {
        // SAFETY: this request takes no argument.
        let nsid = unsafe { libc::ioctl(self.file.as_raw_fd(), NVME_IOCTL_ID) };
        u32::try_from(nsid).ok().filter(|&nsid| nsid > 0)
    }

    fn read_by(&self, reader: Reader) -> Result<Table, Refusal> {
        match reader {
            Reader::Kernel => {
                let keys = retried(|| self.kernel_keys())?;
                Ok(Table { keys, holder: retried(|| self.kernel_holder())? })
            }
            Reader::Scsi => scsi::read(|question, answer| {
                let command = scsi::reserve_in(question, answer.len());
                self.scsi(&command, answer, true)
            }),
            Reader::Nvme { nsid } => retried(|| self.nvme_report(nsid)),
        }
    }

    fn kernel_keys(&self) -> Result<Vec<u64>, Refusal> {
        let mut keys = vec![0_u64; MAX_KEYS];
        let capacity = u32::try_from(keys.len()).unwrap_or(0);
        let mut argument = PrReadKeys { generation: 0, num_keys: capacity, keys_ptr: keys.as_mut_ptr() as u64 };
        // SAFETY: the request writes one `PrReadKeys`, and at most `num_keys` keys where `keys_ptr` says.
        outcome(unsafe { libc::ioctl(self.file.as_raw_fd(), IOC_PR_READ_KEYS, &raw mut argument) })?;
        if argument.num_keys > capacity {
            return Err(Malformed::TooMany.into());
        }
        keys.truncate(usize::try_from(argument.num_keys).unwrap_or(0));
        Ok(keys)
    }

    fn kernel_holder(&self) -> Result<Option<Holder>, Refusal> {
        let mut argument = PrReadReservation::default();
        // SAFETY: the request writes one `PrReadReservation`.
        outcome(unsafe { libc::ioctl(self.file.as_raw_fd(), IOC_PR_READ_RESERVATION, &raw mut argument) })?;
        let holder = Holder { key: argument.key, kind: Kind::from_linux(argument.kind) };
        Ok((argument.key != 0 || argument.kind != 0).then_some(holder))
    }

    fn scsi_preempt(&self, key: u64, victim: u64) -> Result<(), Refusal> {
        let (command, mut parameters) = scsi::reserve_out(Deed::PreemptAndAbort, key, victim);
        self.scsi(&command, &mut parameters, false).map(drop)
    }

    fn scsi(&self, command: &[u8; scsi::COMMAND], data: &mut [u8], reads: bool) -> Result<usize, Refusal> {
        let mut sense = [0; 32];
        let length = u32::try_from(data.len()).unwrap_or(0);
        let mut header = SgIoHdr {
            interface_id: libc::c_int::from(b'S'),
            dxfer_direction: if reads { -3 } else { -2 },
            cmd_len: 10,
            mx_sb_len: 32,
            iovec_count: 0,
            dxfer_len: length,
            dxferp: data.as_mut_ptr(),
            cmdp: command.as_ptr(),
            sbp: sense.as_mut_ptr(),
            timeout: TIMEOUT,
            flags: 0,
            pack_id: 0,
            usr_ptr: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            msg_status: 0,
            sb_len_wr: 0,
            host_status: 0,
            driver_status: 0,
            resid: 0,
            duration: 0,
            info: 0,
        };
        // SAFETY: the request reads 10 bytes of the command, reads or writes `length` bytes of the data and writes at most 32
        // bytes of sense, all of which live until it returns.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), SG_IO, &raw mut header) };
        if result < 0 {
            return Err(refusal(io::Error::last_os_error()));
        }
        if header.host_status != 0 {
            return Err(Refusal::Unreachable(format!("host status {:#x}", header.host_status)));
        }
        scsi::status(header.status, &sense)?;
        let left = u32::try_from(header.resid).unwrap_or(0);
        Ok(usize::try_from(length.saturating_sub(left)).unwrap_or(0))
    }

    fn nvme_report(&self, nsid: u32) -> Result<Table, Refusal> {
        let mut answer = vec![0; REPORT_BYTES];
        let dwords = u32::try_from(answer.len() / 4).unwrap_or(1);
        for extended in [true, false] {
            let report = NvmeCommand { cdw10: dwords - 1, cdw11: u32::from(extended), ..NvmeCommand::default() };
            match self.nvme(nsid, 0x0e, report, &mut answer) {
                // Host Identifier Inconsistent Format: this host has a 64-bit identifier.
                Ok(0x18) if extended => {}
                Ok(status) => {
                    nvme_status(status)?;
                    return Ok(parse_report(&answer, extended)?);
                }
                Err(refusal) => return Err(refusal),
            }
        }
        Err(Refusal::Refused("neither form of a reservation report".into()))
    }

    /// Sends a command of the I/O queue; gives its status.
    fn nvme(&self, nsid: u32, opcode: u8, command: NvmeCommand, data: &mut [u8]) -> Result<i32, Refusal> {
        let (addr, data_len) = (data.as_mut_ptr() as u64, u32::try_from(data.len()).unwrap_or(0));
        let mut command = NvmeCommand { opcode, nsid, addr, data_len, timeout_ms: TIMEOUT, ..command };
        // SAFETY: the request reads and writes one `NvmeCommand`, and at most `data_len` bytes at `addr`.
        let status = unsafe { libc::ioctl(self.file.as_raw_fd(), NVME_IOCTL_IO_CMD, &raw mut command) };
        if status < 0 { Err(refusal(io::Error::last_os_error())) } else { Ok(status & 0x7ff) }
    }

    fn pr_ioctl<T>(&self, request: libc::Ioctl, argument: &T) -> Result<(), Refusal> {
        // SAFETY: this is only called with requests that read one `T`.
        retried(|| outcome(unsafe { libc::ioctl(self.file.as_raw_fd(), request, std::ptr::from_ref(argument)) }))
    }
}

impl Target for Device {
    fn read(&self) -> Result<Table, Refusal> {
        if let Some(reader) = self.reader.get() {
            return self.read_by(*reader);
        }
        let nvme = self.namespace().map(|nsid| Reader::Nvme { nsid });
        for reader in [Reader::Kernel, nvme.unwrap_or(Reader::Scsi)] {
            match self.read_by(reader) {
                Err(Refusal::Unsupported(_)) if reader == Reader::Kernel => {}
                Ok(table) => {
                    let _ = self.reader.set(reader);
                    return Ok(table);
                }
                refused => return refused,
            }
        }
        Err(Refusal::Unsupported("no way to read keys".into()))
    }

    fn register(&self, key: u64) -> Result<(), Refusal> {
        let argument = PrRegistration { old_key: 0, new_key: key, flags: PR_FL_IGNORE_KEY, pad: 0 };
        self.pr_ioctl(IOC_PR_REGISTER, &argument)
    }

    fn unregister(&self, key: u64) -> Result<(), Refusal> {
        if let Some(nsid) = self.namespace() {
            // The kernel would replace the key by 0 instead of taking it back.
            let mut keys = [0; 16];
            if let Some(place) = keys.first_chunk_mut() {
                *place = key.to_le_bytes();
            }
            let unregister = NvmeCommand { cdw10: 1, ..NvmeCommand::default() };
            return self.nvme(nsid, 0x0d, unregister, &mut keys).and_then(nvme_status);
        }
        self.pr_ioctl(IOC_PR_REGISTER, &PrRegistration { old_key: key, new_key: 0, flags: 0, pad: 0 })
    }

    fn reserve(&self, key: u64) -> Result<(), Refusal> {
        self.pr_ioctl(IOC_PR_RESERVE, &PrReservation { key, kind: OURS, flags: 0 })
    }

    fn release(&self, key: u64) -> Result<(), Refusal> {
        self.pr_ioctl(IOC_PR_RELEASE, &PrReservation { key, kind: OURS, flags: 0 })
    }

    fn preempt(&self, key: u64, victim: u64) -> Result<(), Refusal> {
        if self.namespace().is_none() {
            match retried(|| self.scsi_preempt(key, victim)) {
                Err(Refusal::Unsupported(_) | Refusal::Denied(_) | Refusal::Unreachable(_)) => {}
                done => return done,
            }
        }
        self.pr_ioctl(IOC_PR_PREEMPT_ABORT, &PrPreempt { old_key: key, new_key: victim, kind: OURS, flags: 0 })
    }

    fn clear(&self, key: u64) -> Result<(), Refusal> {
        self.pr_ioctl(IOC_PR_CLEAR, &PrClear { key, flags: 0, pad: 0 })
    }
}

/// What a reservation ioctl answers: an errno, 0, or a status of SCSI, of NVMe, or of `enum pr_status`, as the driver and the
/// version of the kernel like it.
fn outcome(result: libc::c_int) -> Result<(), Refusal> {
    if result < 0 {
        return Err(refusal(io::Error::last_os_error()));
    }
    match (result, result & 0xff) {
        (0, _) => Ok(()),
        // RESERVATION CONFLICT; in its low byte where the kernel adds the host's part.
        (_, 0x18) => Err(Refusal::Conflict),
        // NVMe: Reservation Conflict, with or without "do not retry".
        _ if result & 0x7ff == 0x83 => Err(Refusal::Conflict),
        // The host's part; PR_STS_PATH_FAILED and its like; NVMe's path-related statuses.
        _ if result >> 16 != 0 || result & 0x700 == 0x300 => {
            Err(Refusal::Unreachable(format!("a path failed (status {result:#x})")))
        }
        (_, 0x02) => Err(Refusal::Attention),
        _ => Err(Refusal::Refused(format!("status {result:#x}"))),
    }
}

fn refusal(error: io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(libc::EBADE) => Refusal::Conflict,
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS) => Refusal::Unsupported(error.to_string()),
        Some(libc::EPERM | libc::EACCES) => Refusal::Denied(error),
        _ => Refusal::Unreachable(error.to_string()),
    }
}

fn nvme_status(status: i32) -> Result<(), Refusal> {
    match status {
        0 => Ok(()),
        0x83 => Err(Refusal::Conflict),
        // Invalid Command Opcode, Invalid Field
        0x01 | 0x02 => Err(Refusal::Unsupported(format!("NVMe status {status:#x}"))),
        _ if status & 0x700 == 0x300 => Err(Refusal::Unreachable(format!("NVMe status {status:#x}"))),
        _ => Err(Refusal::Refused(format!("NVMe status {status:#x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_as_large_as_their_ioctls_say() {
        fn size(request: libc::Ioctl) -> usize {
            (request >> 16 & 0x3fff) as usize
        }
        assert_eq!(size_of::<PrRegistration>(), size(IOC_PR_REGISTER));
        assert_eq!(size_of::<PrReservation>(), size(IOC_PR_RESERVE));
        assert_eq!(size_of::<PrReservation>(), size(IOC_PR_RELEASE));
        assert_eq!(size_of::<PrPreempt>(), size(IOC_PR_PREEMPT_ABORT));
        assert_eq!(size_of::<PrClear>(), size(IOC_PR_CLEAR));
        assert_eq!(size_of::<PrReadKeys>(), size(IOC_PR_READ_KEYS));
        assert_eq!(size_of::<PrReadReservation>(), size(IOC_PR_READ_RESERVATION));
        assert_eq!(size_of::<NvmeCommand>(), size(NVME_IOCTL_IO_CMD));
        assert_eq!(size_of::<SgIoHdr>(), 88);
    }

    #[test]
    fn a_conflict_is_known_in_whatever_way_the_kernel_says_it() {
        // enum pr_status; Linux 6.1 with its own byte; with a host byte; NVMe; NVMe with "do not retry".
        for status in [0x18, 0x118, 0x11_0018, 0x83, 0x4083] {
            assert!(matches!(outcome(status), Err(Refusal::Conflict)), "{status:#x}");
        }
        assert!(matches!(refusal(io::Error::from_raw_os_error(libc::EBADE)), Refusal::Conflict));
        assert!(outcome(0).is_ok());
    }

    #[test]
    fn a_path_that_fails_is_no_conflict_and_no_refusal() {
        for status in [0xe_0000, 0xf_0000, 0x1_0000, 0x371, 0x4370] {
            assert!(matches!(outcome(status), Err(Refusal::Unreachable(_))), "{status:#x}");
        }
        for errno in [libc::EIO, libc::ENODEV, libc::ENXIO, libc::ETIMEDOUT, libc::ENOTCONN] {
            assert!(matches!(refusal(io::Error::from_raw_os_error(errno)), Refusal::Unreachable(_)), "{errno}");
        }
        for errno in [libc::EOPNOTSUPP, libc::ENOTTY, libc::EINVAL] {
            assert!(matches!(refusal(io::Error::from_raw_os_error(errno)), Refusal::Unsupported(_)), "{errno}");
        }
        assert!(matches!(refusal(io::Error::from_raw_os_error(libc::EPERM)), Refusal::Denied(_)));
    }

    #[test]
    fn a_file_has_no_reservations_and_the_error_says_so() {
        let path = std::env::temp_dir().join(format!("rackvisor-pr-{}", std::process::id()));
        std::fs::write(&path, [0; 4096]).unwrap();
        let mode = crate::block::OpenMode { read_only: false, direct: Some(false), block_size: None, wwid: None };
        let file = crate::block::BlockFile::open(&path, &mode).unwrap();
        let key = std::num::NonZeroU64::new(0xabc).unwrap();
        let options = super::super::ReservationOptions { key, preempt: true, helper: None };
        let error = super::super::Reservation::acquire(Arc::clone(file.file()), &path, options).unwrap_err();
        assert!(error.to_string().contains("has no persistent reservations"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }
}
