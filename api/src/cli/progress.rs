//! A sign of life on the terminal while a call takes its time.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Calls that are faster than this leave no trace.
const PATIENCE: Duration = Duration::from_millis(300);
const FRAME: Duration = Duration::from_millis(100);
const FRAMES: [char; 4] = ['|', '/', '-', '\\'];

/// Runs `work`; meanwhile, if `show` is set and standard error is a terminal, shows `what` and the seconds.
pub fn with_spinner<T>(show: bool, what: &str, work: impl FnOnce() -> T) -> T {
    if !show || !std::io::stderr().is_terminal() {
        return work();
    }
    thread::scope(|scope| {
        let (done, wait) = channel::<()>();
        scope.spawn(move || {
            let begin = Instant::now();
            let mut pause = PATIENCE;
            let mut shown = false;
            for frame in FRAMES.iter().cycle() {
                if wait.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
                (pause, shown) = (FRAME, true);
                // A terminal that takes no output is no reason to stop.
                let _ = write!(std::io::stderr(), "\r\x1b[K{frame} {what} {:.1} s", begin.elapsed().as_secs_f32());
            }
            if shown {
                let _ = write!(std::io::stderr(), "\r\x1b[K");
            }
        });
        let result = work();
        drop(done);
        result
    })
}
