//! What the VMM may not do: resource limits, user, capabilities.

use std::str::FromStr;

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::error::{JailError, refused};

/// A resource limit.
#[derive(Debug, Clone)]
pub struct Limit {
    name: String,
    resource: Resource,
    limit: Rlimit,
}

const RESOURCES: [(&str, Resource); 13] = [
    ("as", Resource::As),
    ("core", Resource::Core),
    ("cpu", Resource::Cpu),
    ("data", Resource::Data),
    ("fsize", Resource::Fsize),
    ("memlock", Resource::Memlock),
    ("msgqueue", Resource::Msgqueue),
    ("nice", Resource::Nice),
    ("nofile", Resource::Nofile),
    ("nproc", Resource::Nproc),
    ("rtprio", Resource::Rtprio),
    ("sigpending", Resource::Sigpending),
    ("stack", Resource::Stack),
];

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<_> = RESOURCES.iter().map(|(name, _)| *name).collect();
        let why = || format!("NAME=SOFT[:HARD] with a number or `unlimited`; names are {}", names.join(", "));
        let (name, values) = text.split_once('=').ok_or_else(why)?;
        let (_, resource) = RESOURCES.iter().find(|(known, _)| *known == name).ok_or_else(why)?;
        let number = |text: &str| match text {
            "unlimited" => Ok(None),
            number => number.parse().map(Some).map_err(|_| why()),
        };
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let limit = Rlimit { current: number(soft)?, maximum: number(hard)? };
        Ok(Self { name: name.to_owned(), resource: *resource, limit })
    }
}

/// Sets resource limits. No core is dumped unless one of them says so: it would have the guest's memory in it.
///
/// # Errors
/// What the kernel refused.
pub fn set_limits(limits: &[Limit]) -> Result<(), JailError> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if !limits.iter().any(|limit| limit.resource == Resource::Core) {
        setrlimit(Resource::Core, none).map_err(refused("forbid core dumps"))?;
    }
    for Limit { name, resource, limit } in limits {
        setrlimit(*resource, *limit).map_err(refused(format!("set the resource limit {name}")))?;
    }
    Ok(())
}

/// Leaves all supplementary groups, which a process cannot in the user namespace of a jail.
///
/// # Errors
/// What the kernel refused.
pub fn give_up_groups() -> Result<(), JailError> {
    set_thread_groups(&[]).map_err(refused("give up groups"))
}

/// Becomes a user without any capability, who can never get one.
///
/// # Errors
/// What the kernel refused, or that it did not do what it was asked for.
pub fn give_up(uid: u32, gid: u32) -> Result<(), JailError> {
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let locked = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(locked).map_err(refused("lock the secure bits"))?;
    for capability in (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        match remove_capability_from_bounding_set(capability) {
            // Past the last one that this kernel has.
            Err(rustix::io::Errno::INVAL) => break,
            done => done.map_err(refused("give up the bounding set"))?,
        }
    }
    clear_ambient_capability_set().map_err(refused("give up ambient capabilities"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_res_gid(gid, gid, gid).map_err(refused("change the group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(refused("change the user"))?;
    let empty = CapabilitySet::empty();
    let none = CapabilitySets { effective: empty, permitted: empty, inheritable: empty };
    set_capabilities(None, none).map_err(refused("give up capabilities"))?;
    set_no_new_privs(true).map_err(refused("forbid new privileges"))?;
    match capabilities(None).map_err(refused("examine capabilities"))? {
        now if now == none => Ok(()),
        now => Err(JailError::Unusable(format!("the kernel left capabilities behind: {now:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_names_and_one_or_two_values() {
        let limit = Limit::from_str("nofile=1024:4096").unwrap();
        assert_eq!((limit.limit.current, limit.limit.maximum), (Some(1024), Some(4096)));
        let limit = Limit::from_str("memlock=unlimited").unwrap();
        assert_eq!((limit.limit.current, limit.limit.maximum), (None, None));
        for bad in ["nofile", "nofile=", "nofile=a", "nofile=1:", "files=1", "nofile=-1", "=1"] {
            assert!(Limit::from_str(bad).unwrap_err().contains("nofile"), "{bad}");
        }
    }
}
