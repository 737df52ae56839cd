//! The user namespace of a jail, which has one user and one group.
//!
//! A process in it that got capabilities, by whatever fault of the kernel's, would have them in this namespace alone, to which nothing
//! belongs: the mounts, the network and all else of the jail were made before and are the initial namespace's, so they allow not even to
//! mount, to make a device node or to raise an interface. The namespace is root's, as it is root who enters it: were it made by the
//! VM's user, each process of that user on the host would have all capabilities in it.
//!
//! What it costs: the kernel tells a process in it of each user but the one that it has as 65534, also who is on the other end of a
//! Unix socket. And a program cannot enter a user namespace that it is to write the map of itself, so the jailer does (user_namespaces(7)).

use std::fs;
use std::path::PathBuf;

use rustix::process::Pid;
use rustix::thread::UnshareFlags;

use crate::error::{JailError, refused, refused_at};
use crate::sys;

/// Moves this process, as root, into a namespace that has nobody yet.
///
/// # Errors
/// What the kernel refused.
pub fn enter() -> Result<(), JailError> {
    let what = "make a user namespace (see user.max_user_namespaces, or do without by --userns host)";
    sys::unshare(UnshareFlags::NEWUSER).map_err(refused(what))
}

/// Gives the namespace of a process its user and its group, with the numbers that they have here, and its groups can never be changed.
///
/// # Errors
/// What the kernel refused.
pub fn map(pid: Pid, (uid, gid): (u32, u32)) -> Result<(), JailError> {
    let settings = [
        ("setgroups", "deny".to_owned()),
        ("gid_map", format!("{gid} {gid} 1")),
        ("uid_map", format!("{uid} {uid} 1")),
    ];
    for (file, value) in settings {
        let path = PathBuf::from(format!("/proc/{}/{file}", pid.as_raw_nonzero()));
        fs::write(&path, &value).map_err(refused_at(&format!("write \"{value}\" to"), &path))?;
    }
    Ok(())
}
