//! The system calls for eBPF programs and their maps.
#![allow(unsafe_code)] // bpf(2) and shared mappings have no safe wrappers among our dependencies.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use super::assembler::Instruction;
use super::layout::WORD;

const MAP_CREATE: libc::c_int = 0;
const PROG_LOAD: libc::c_int = 5;
const MAP_TYPE_ARRAY: u32 = 2;
const PROG_TYPE_SOCKET_FILTER: u32 = 1;
/// The map's values can be mapped into memory (Linux 5.5).
const F_MMAPABLE: u32 = 1 << 10;

/// The start of `union bpf_attr` for MAP_CREATE.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// The start of `union bpf_attr` for PROG_LOAD.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// Calls bpf(2).
///
/// # Safety
/// `attributes` is what `command` takes, and each pointer in it is good for what the command does with it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    let (start, size) = (std::ptr::from_mut(attributes), size_of::<T>());
    // SAFETY: the kernel reads and writes `size` bytes at `start`, which are borrowed; the rest is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, start, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(libc::c_int::try_from(result).unwrap_or(-1)) }
}

/// Makes a map of one value of `words` words, all zero, that can be mapped.
pub(super) fn create_map(words: usize) -> io::Result<OwnedFd> {
    let value_size = u32::try_from(words * WORD).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let mut attributes =
        MapCreate { map_type: MAP_TYPE_ARRAY, key_size: 4, value_size, max_entries: 1, map_flags: F_MMAPABLE };
    // SAFETY: these are the attributes of MAP_CREATE, without pointers.
    let fd = unsafe { bpf(MAP_CREATE, &mut attributes)? };
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Loads a program for frames. What the verifier says goes to `log`, unless that is empty.
pub(super) fn load_program(instructions: &[Instruction], log: &mut [u8]) -> io::Result<OwnedFd> {
    let length = |bytes: usize| u32::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG));
    let license = c"Apache-2.0";
    let mut attributes = ProgLoad {
        prog_type: PROG_TYPE_SOCKET_FILTER,
        insn_cnt: length(instructions.len())?,
        insns: address(instructions.as_ptr()),
        license: address(license.as_ptr()),
        log_level: u32::from(!log.is_empty()),
        log_size: length(log.len())?,
        log_buf: if log.is_empty() { 0 } else { address(log.as_mut_ptr()) },
        kern_version: 0,
        prog_flags: 0,
    };
    let fd = loop {
        // SAFETY: these are the attributes of PROG_LOAD; the pointers are to slices with their lengths and to a string that
        // ends with a zero, all of which outlive the call.
        match unsafe { bpf(PROG_LOAD, &mut attributes) } {
            // The verifier was interrupted, as by the end of a ring of io_uring that this thread made.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            loaded => break loaded?,
        }
    };
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pointer as the kernel takes it.
fn address<T>(pointer: *const T) -> u64 {
    u64::try_from(pointer.addr()).unwrap_or(0)
}

/// The words of a map that is shared with the kernel.
pub(super) struct State {
    start: NonNull<AtomicU32>,
    words: usize,
}

// SAFETY: the mapping belongs to this value alone, and its words are atomics.
unsafe impl Send for State {}
// SAFETY: as above.
unsafe impl Sync for State {}

impl State {
    /// Maps the words of `map`, which [`create_map`] made with as many.
    pub(super) fn new(map: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses; the result is checked.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), words * WORD, access, libc::MAP_SHARED, map.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { start, words })
    }

    pub(super) fn words(&self) -> &[AtomicU32] {
        // SAFETY: as many words are mapped as long as this lives, aligned to a page, and both sides only ever access them as
        // words; the kernel grants no mapping beyond the value.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody can have borrowed it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * WORD) };
    }
}

/// Runs a program over a frame, as a tap would; gives its result.
#[cfg(test)]
pub(super) fn run_program(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<u32> {
    const PROG_TEST_RUN: libc::c_int = 10;
    /// The start of `union bpf_attr` for PROG_TEST_RUN.
    #[repr(C)]
    struct TestRun {
        prog_fd: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
    }
    // The kernel hides an Ethernet header from programs of this kind, but a tap does not: it gets another one to hide.
    let data = [&[0; 14], frame].concat();
    let mut attributes = TestRun {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        retval: 0,
        data_size_in: u32::try_from(data.len()).unwrap(),
        data_size_out: 0,
        data_in: address(data.as_ptr()),
        data_out: 0,
        repeat: 0,
        duration: 0,
    };
    // SAFETY: these are the attributes of PROG_TEST_RUN; the frame outlives the call.
    unsafe { bpf(PROG_TEST_RUN, &mut attributes)? };
    Ok(attributes.retval)
}
