//! The user's terminal in raw mode, and back.

use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::sys;

struct Saved {
    fd: libc::c_int,
    mode: libc::termios,
}

/// What to restore. `RAW` says whether there is something; whoever takes it down restores.
static SAVED: Mutex<Option<Saved>> = Mutex::new(None);
static RAW: AtomicBool = AtomicBool::new(false);

/// Keeps standard input in raw mode: keys reach the guest one by one, unechoed, Ctrl-C too. Output is left alone, so that
/// log lines still look right. Dropping it restores the terminal, as does the exit of the process.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts standard input into raw mode; `None` if it is no terminal, or is raw already.
    ///
    /// # Errors
    /// What the kernel answered; the terminal is unchanged then.
    pub fn new() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        let Ok(mut saved) = SAVED.lock() else { return Ok(None) };
        if !stdin.is_terminal() || RAW.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let fd = stdin.as_raw_fd();
        let before = sys::terminal_mode(fd)?;
        let mut raw = before;
        raw.c_iflag &= !(libc::BRKINT | libc::ICRNL | libc::INLCR | libc::IGNCR | libc::ISTRIP | libc::IXON);
        raw.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ECHONL | libc::ISIG | libc::IEXTEN);
        if let Some(minimum) = raw.c_cc.get_mut(libc::VMIN) {
            *minimum = 1;
        }
        if let Some(time) = raw.c_cc.get_mut(libc::VTIME) {
            *time = 0;
        }
        sys::set_terminal_mode(fd, &raw)?;
        if saved.is_none() {
            sys::at_exit(restore_at_exit);
        }
        *saved = Some(Saved { fd, mode: before });
        RAW.store(true, Ordering::SeqCst);
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

extern "C" fn restore_at_exit() {
    restore_terminal();
}

/// Restores the terminal if a [`RawTerminal`] holds it. May be called from a signal handler: it takes no lock that it
/// would have to wait for and allocates nothing.
pub fn restore_terminal() {
    if !RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    if let Ok(saved) = SAVED.try_lock()
        && let Some(saved) = saved.as_ref()
    {
        let _ = sys::set_terminal_mode(saved.fd, &saved.mode);
    }
}
