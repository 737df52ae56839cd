//! What a process holds, as /proc tells.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::{PATIENCE, eventually};

/// The threads and descriptors of a process, by what they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    /// How many threads have each name.
    pub threads: BTreeMap<String, usize>,
    /// How many descriptors lead to each thing; numbers of sockets and pipes are left out.
    pub descriptors: BTreeMap<String, usize>,
}

impl Census {
    /// Counts for process `pid`.
    pub fn of(pid: u32) -> Self {
        let mut census = Self { threads: BTreeMap::new(), descriptors: BTreeMap::new() };
        for entry in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            // A thread may end while we look.
            let name = fs::read_to_string(entry.unwrap().path().join("comm")).unwrap_or_default();
            // io_uring's own workers come and go as the kernel likes.
            if !name.is_empty() && !name.starts_with("iou-wrk-") {
                *census.threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
            if let Ok(target) = fs::read_link(entry.unwrap().path()) {
                let target = target.to_string_lossy();
                let kind = target.split_once(":[").map_or(&*target, |(kind, _)| kind);
                // The one that this function reads the folder with.
                if !kind.starts_with(&format!("/proc/{pid}/fd")) {
                    *census.descriptors.entry(kind.to_owned()).or_default() += 1;
                }
            }
        }
        census
    }
}

impl Census {
    /// What there is more of than in `before`. What is on its way out at both times does not count: an API connection
    /// that its server has not closed yet, say.
    pub fn more_than(&self, before: &Self) -> Vec<String> {
        let more = |now: &BTreeMap<String, usize>, then: &BTreeMap<String, usize>| -> Vec<String> {
            let had = |name| then.get(name).copied().unwrap_or(0);
            now.iter().filter(|(name, n)| **n > had(*name)).map(|(name, n)| format!("{n} × {name}")).collect()
        };
        [more(&self.threads, &before.threads), more(&self.descriptors, &before.descriptors)].concat()
    }
}

/// The threads of process `pid`, by name, each with whether it is under a filter of system calls.
pub fn filtered_threads(pid: u32) -> Vec<(String, bool)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // A thread may end while we look.
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let value = |status: &str, name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        value.unwrap_or_default().to_owned()
    };
    statuses.map(|status| (value(&status, "Name"), value(&status, "Seccomp") == "2")).collect()
}

/// Waits until process `pid` holds nothing more than `before`.
///
/// # Panics
/// With what it holds more, after [`crate::PATIENCE`].
pub fn assert_nothing_more(pid: u32, before: &Census) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let more = Census::of(pid).more_than(before);
        if more.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {}", more.join(", "));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The memory mappings of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mappings {
    /// How many there are.
    pub count: usize,
    /// KiB of address space, all together.
    pub virtual_kib: u64,
}

impl Mappings {
    /// Those of process `pid`.
    pub fn of(pid: u32) -> Self {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let size = |line: &str| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            Some(u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(start, 16).ok()?)
        };
        let bytes: u64 = maps.lines().map(|line| size(line).unwrap()).sum();
        Self { count: maps.lines().count(), virtual_kib: bytes >> 10 }
    }
}

impl fmt::Display for Mappings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} mappings, {} MiB", self.count, self.virtual_kib >> 10)
    }
}

/// Waits until somebody listens on a Unix socket, which exists a moment before: the kernel shows that it accepts.
pub(crate) fn await_listener(socket: &Path) {
    let accepts =
        |line: &str| line.ends_with(socket.to_str().unwrap()) && line.split_whitespace().nth(3) == Some("00010000");
    eventually("somebody listens", || fs::read_to_string("/proc/net/unix").unwrap().lines().any(accepts).then_some(()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_thread_descriptor_or_mapping_is_seen() {
        let pid = std::process::id();
        let before = Census::of(pid);
        let _file = fs::File::open("/dev/null").unwrap();
        let (hold, wait) = std::sync::mpsc::channel::<()>();
        let body = move || {
            let _ = wait.recv();
        };
        let thread = std::thread::Builder::new().name("one-more".into()).spawn(body).unwrap();
        let after = crate::eventually("the thread has its name", || {
            Some(Census::of(pid)).filter(|census| census.threads.contains_key("one-more"))
        });
        assert_eq!(after.threads["one-more"], 1);
        assert!(after.more_than(&before).contains(&"1 × one-more".to_owned()));
        let nulls = |census: &Census| census.descriptors.get("/dev/null").copied().unwrap_or(0);
        assert_eq!(nulls(&after), nulls(&before) + 1);
        drop(hold);
        thread.join().unwrap();
    }
}
