//! From files of rules to filters.

use std::collections::HashSet;

use rackvisor_devices::ThreadKind;
use seccompiler::{BpfMap, SeccompAction, TargetArch};
use serde_json::{Value, json};

use super::SeccompError;

/// Whose policy it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The thread that serves the API.
    Api,
    /// The thread that owns the VM.
    Control,
    /// The threads of this kind.
    Of(ThreadKind),
}

impl Policy {
    /// The name of its file in `resources/seccomp`, without `.json`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Control => "control",
            Self::Of(kind) => kind.name(),
        }
    }

    /// Every one there is.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        [Self::Api, Self::Control].into_iter().chain(ThreadKind::ALL.map(Self::Of))
    }

    /// The files that it is made of. What a guest's exits need comes first: rules of one call are looked at in order.
    fn files(self) -> impl Iterator<Item = &'static str> {
        // Those who write down what happened are started before the others, by nobody with a filter.
        let started = |kind: &ThreadKind| !matches!(kind, ThreadKind::Crash | ThreadKind::Log);
        let others = ThreadKind::ALL.into_iter().filter(started).filter(move |_| self == Self::Of(ThreadKind::Jobs));
        others.map(ThreadKind::name).chain([self.name(), "common"])
    }

    /// Its rules, in seccompiler's form.
    ///
    /// # Errors
    /// [`SeccompError::Policy`] for a file that is no list of rules.
    pub(super) fn rules(self) -> Result<Vec<Value>, SeccompError> {
        let mut rules = Vec::new();
        for name in self.files() {
            rules.extend(of_file(name)?);
        }
        // A rule without conditions is no rule to seccompiler where there is another with some.
        let free: HashSet<String> = rules.iter().filter(|rule| rule.get("args").is_none()).map(call).collect();
        rules.retain(|rule| rule.get("args").is_none() || !free.contains(&call(rule)));
        Ok(rules)
    }
}

/// The rules of the file `name`.
///
/// # Errors
/// [`SeccompError::Policy`] for a file that is no list of rules.
pub(super) fn of_file(name: &str) -> Result<Vec<Value>, SeccompError> {
    serde_json::from_str(source(name)).map_err(|error| SeccompError::Policy(format!("{name}.json: {error}")))
}

/// The name of the system call that a rule is about.
pub(super) fn call(rule: &Value) -> String {
    rule.get("syscall").and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn source(name: &str) -> &'static str {
    macro_rules! policies {
        ($($name:literal),*) => {
            match name {
                $($name => include_str!(concat!("../../../resources/seccomp/", $name, ".json")),)*
                _ => "",
            }
        };
    }
    policies!(
        "common",
        "api",
        "control",
        "jobs",
        "vcpu",
        "block",
        "net",
        "rng",
        "balloon",
        "reservation",
        "console",
        "tpm",
        "rtc",
        "flash",
        "images",
        "crash",
        "log"
    )
}

/// Compiles all policies, which do `mismatch` with what they do not allow.
///
/// # Errors
/// [`SeccompError::Policy`].
pub(super) fn compile(mismatch: &SeccompAction, arch: TargetArch) -> Result<BpfMap, SeccompError> {
    let mismatch = if *mismatch == SeccompAction::Log { "log" } else { "trap" };
    let mut policies = serde_json::Map::new();
    for policy in Policy::all() {
        let filter = json!({ "mismatch_action": mismatch, "match_action": "allow", "filter": policy.rules()? });
        policies.insert(policy.name().to_owned(), filter);
    }
    let document = Value::Object(policies).to_string();
    seccompiler::compile_from_json(document.as_bytes(), arch).map_err(|error| SeccompError::Policy(error.to_string()))
}
