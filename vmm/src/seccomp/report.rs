//! Says which thread made which forbidden system call, and ends the process.
#![allow(unsafe_code)] // A signal handler reads what the kernel tells of the call, and answers it.

use std::cell::Cell;
use std::fmt::{self, Write};
use std::io;

use vmm_sys_util::signal::register_signal_handler;

/// Exit code of a process of which a thread made a system call that its policy does not allow: that which a shell, or the jailer, tells of
/// a process that SIGSYS ended.
pub const EXIT_VIOLATION: u8 = 128 + 31;
/// `si_code` of a call that a filter trapped (`asm-generic/siginfo.h`).
const SYS_SECCOMP: libc::c_int = 1;
/// Names of the system calls by their numbers.
const NAMES: &str = include_str!("../../../resources/seccomp/x86_64.txt");
/// What the report of a panic looks for: where it is, and symbols. It does without.
const LOOK_UPS: [libc::c_long; 7] = [
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getcwd,
];

thread_local! {
    /// The name and the policy of this thread.
    static SELF: Cell<(Text<64>, &'static str)> = const { Cell::new((Text::new(), "")) };
}

/// Remembers what the calling thread is called. The kernel knows as well, but only tells those who may ask.
pub fn name_thread(name: &str, policy: &'static str) {
    let mut text = Text::new();
    let _ = text.write_str(name);
    SELF.set((text, policy));
}

/// Handles SIGSYS from now on.
///
/// # Errors
/// What the kernel answered.
pub fn handle_violations() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, violated).map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// The start of a `siginfo_t` of SIGSYS (`asm-generic/siginfo.h`).
#[repr(C)]
struct SigSys {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    call_address: *const libc::c_void,
    call: libc::c_int,
    arch: libc::c_uint,
}

/// Only does what a signal handler may: nothing here allocates, locks or waits for anybody but who reads standard error.
extern "C" fn violated(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t, which has this form for SIGSYS, ...
    let info = unsafe { &*info.cast::<SigSys>() };
    // SAFETY: ... and the ucontext_t that the thread goes on with, which nobody else refers to.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let call = libc::c_long::from(info.call);
    if info.code == SYS_SECCOMP && std::thread::panicking() && LOOK_UPS.contains(&call) {
        if let Some(result) = registers.get_mut(libc::REG_RAX as usize) {
            *result = -i64::from(libc::EACCES);
        }
        return;
    }
    let argument = |register: libc::c_int| registers.get(register as usize).copied().unwrap_or(0);
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(argument);
    let line = describe(info.code == SYS_SECCOMP, call, arguments);
    let text = line.as_str();
    // SAFETY: the pointer and the length are those of the text. Both calls may be made by a signal handler.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(libc::c_int::from(EXIT_VIOLATION))
    }
}

fn describe(by_filter: bool, call: libc::c_long, [a, b, c]: [i64; 3]) -> Text<512> {
    let (name, policy) = SELF.get();
    let mut line = Text::new();
    // What does not fit is left out.
    let _ = if by_filter {
        writeln!(
            line,
            "rackvisor: thread {} made system call {call} ({}) with {a:#x}, {b:#x}, {c:#x}, which resources/seccomp/{policy}.json \
             does not allow: the VM ends here. If the thread should make it, report this; `--seccomp log` lets it",
            name.as_str(),
            call_name(call),
        )
    } else {
        writeln!(line, "rackvisor: somebody sent SIGSYS to thread {}: the VM ends here", name.as_str())
    };
    line
}

pub(super) fn call_name(call: libc::c_long) -> &'static str {
    let named = NAMES.lines().filter_map(|line| line.split_once(' '));
    named.filter(|(number, _)| number.parse() == Ok(call)).map(|(_, name)| name).next().unwrap_or("unknown")
}

/// Text in place.
#[derive(Clone, Copy)]
struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    const fn new() -> Self {
        Self { bytes: [0; N], length: 0 }
    }

    fn as_str(&self) -> &str {
        str::from_utf8(self.bytes.get(..self.length).unwrap_or_default()).unwrap_or_default()
    }
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let room = self.bytes.get_mut(self.length..).unwrap_or_default();
            if room.len() < character.len_utf8() {
                return Err(fmt::Error);
            }
            self.length = self.length.saturating_add(character.encode_utf8(room).len());
        }
        Ok(())
    }
}
