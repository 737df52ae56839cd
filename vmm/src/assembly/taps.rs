//! Taps that come as descriptors: who had them before the VM was defined, and who has them between two boots.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rackvisor_api::config::{INHERITED_FDS, NicConfig, TapFds as Source};
use rackvisor_api::descriptors::OwnDescriptors;
use rackvisor_api::problem::{Code, Pointer, Problem};
use rackvisor_devices::net::{Tap, TapError, TapFds, is_tap};

use super::AssemblyError;

/// The taps that this process was started with, by the numbers of their descriptors. They stay open as long as it runs.
#[derive(Clone, Debug, Default)]
pub struct InheritedTaps(Arc<BTreeMap<u32, OwnedFd>>);

impl InheritedTaps {
    /// Finds them. Call this before the program opens anything, so that nothing else can be taken for inherited. Finds none
    /// before Linux 5.6.
    #[must_use]
    pub fn find() -> Self {
        let Ok(own) = OwnDescriptors::new() else { return Self::default() };
        // Without /proc each number is tried.
        let mut numbers = OwnDescriptors::numbers().unwrap_or_else(|_| INHERITED_FDS.collect());
        let is_tap = |number: u32| own.copy(number).is_ok_and(|fd| is_tap(fd.as_fd()));
        // In two steps, so that no copy is found as well.
        numbers.retain(|number| INHERITED_FDS.contains(number) && is_tap(*number));
        Self(Arc::new(numbers.into_iter().filter_map(|number| Some((number, own.copy(number).ok()?))).collect()))
    }

    fn copy(&self, number: u32) -> Result<OwnedFd, Problem> {
        let Some(fd) = self.0.get(&number) else {
            let known: Vec<_> = self.0.keys().map(ToString::to_string).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let detail = format!("descriptor {number} is no tap that the VMM was started with; it has {known}");
            let remedy = "start it with /dev/net/tun open there, after TUNSETIFF, or pass the descriptor";
            return Err(Problem::new(Code::Unusable, detail, remedy));
        };
        fd.try_clone().map_err(|error| {
            let remedy = "raise the limit of descriptors of the VMM (ulimit -n)";
            Problem::new(Code::OutOfResources, format!("descriptor {number} cannot be copied: {error}"), remedy)
        })
    }
}

/// The descriptors that a NIC wants.
#[derive(Debug)]
pub struct Claim {
    nic: String,
    /// The field that says so.
    at: Pointer,
    inherited: Vec<u32>,
    passed: Vec<OwnedFd>,
}

impl Claim {
    /// What the NIC at `at` of the document wants, with what was passed for it; `None` for one that names its tap.
    #[must_use]
    pub fn of(nic: &NicConfig, at: &Pointer, passed: Vec<OwnedFd>) -> Option<Self> {
        let inherited = nic.tap_fds.as_ref().map(Source::inherited)?.to_vec();
        Some(Self { nic: nic.id.clone(), at: at.key("tap_fds"), inherited, passed })
    }
}

/// The taps of NICs that have descriptors instead of a name, by the NICs' ids. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Taps(HashMap<String, Arc<TapFds>>);

impl Taps {
    /// The name of a NIC's tap.
    #[must_use]
    pub fn name(&self, nic: &str) -> Option<&str> {
        self.0.get(nic).map(|fds| fds.name())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// These but for that of one NIC.
    #[must_use]
    pub fn without(&self, nic: &str) -> Self {
        let mut others = self.clone();
        others.0.remove(nic);
        others
    }

    /// These and those that are claimed, each checked. May wait for the locks of the kernel's network: not for the control thread.
    ///
    /// # Errors
    /// The [`Problem`] with the first that cannot be used. Those that were passed are closed then.
    pub fn with(mut self, claims: Vec<Claim>, inherited: &InheritedTaps) -> Result<Self, Problem> {
        for Claim { nic, at, inherited: numbers, passed } in claims {
            let of_nic = |mut problem: Problem| {
                problem.detail = format!("NIC \"{nic}\": {}", problem.detail);
                problem.at(&at)
            };
            let copies: Result<Vec<_>, _> = numbers.iter().map(|number| inherited.copy(*number)).collect();
            let fds = passed.into_iter().chain(copies.map_err(of_nic)?).collect();
            let tap = TapFds::new(fds)
                .map_err(|source| Problem::from(AssemblyError::Tap { id: nic.clone(), source }).at(&at))?;
            if let Some((other, _)) = self.0.iter().find(|(_, theirs)| theirs.is_same_tap(&tap)) {
                let detail = format!("NIC \"{nic}\": tap {} is also that of NIC \"{other}\"", tap.name());
                return Err(Problem::new(Code::Duplicate, detail, "give each NIC a tap of its own").at(&at));
            }
            self.0.insert(nic, Arc::new(tap));
        }
        Ok(self)
    }

    /// Opens a NIC's tap for one boot.
    ///
    /// # Errors
    /// [`TapError`] if it was deleted, or the NIC has none.
    pub fn open(&self, nic: &str) -> Result<Tap, TapError> {
        self.0.get(nic).map_or_else(|| Tap::from_fds(Vec::new()), |fds| fds.open())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rackvisor_devices::net::open_queues;

    use super::*;

    fn nic(id: &str, source: Source) -> NicConfig {
        NicConfig { tap: None, tap_fds: Some(source), ..NicConfig::new(id, "", "52:54:00:00:00:01".parse().unwrap()) }
    }

    #[test]
    fn taps_are_found_among_the_descriptors_of_a_process_and_copied_as_often_as_they_are_wanted() {
        let name = format!("rvi{}", std::process::id());
        let Ok(queue) = open_queues(&name, 1) else {
            return eprintln!("SKIPPED: this test needs taps and CAP_NET_ADMIN");
        };
        let null = std::fs::File::open("/dev/null").unwrap();
        let number = |fd: i32| u32::try_from(fd).unwrap();
        let (tap, no_tap) = (number(queue[0].as_raw_fd()), number(null.as_raw_fd()));
        let inherited = InheritedTaps::find();
        let claim =
            |number| Claim::of(&nic("net0", Source::Inherited(vec![number])), &Pointer::root(), Vec::new()).unwrap();
        for _ in 0..2 {
            let taps = Taps::default().with(vec![claim(tap)], &inherited).unwrap();
            assert_eq!(taps.name("net0"), Some(name.as_str()));
        }
        for absent in [no_tap, 1023, 3_000_000] {
            let problem = Taps::default().with(vec![claim(absent)], &inherited).unwrap_err();
            assert_eq!((problem.code, problem.pointer.as_deref()), (Code::Unusable, Some("/tap_fds")));
            assert!(problem.detail.contains("\"net0\"") && problem.detail.contains(&absent.to_string()), "{problem}");
            assert!(problem.detail.contains(&tap.to_string()), "it tells those there are: {problem}");
        }
    }
}
