//! Whether each rule is there for something that tests do.

use std::collections::BTreeMap;
use std::fs;

use super::*;

/// The files, one a line, that tests/calls wrote of the guest tests.
const CALLS: &str = "RACKVISOR_SECCOMP_CALLS";
/// What the comment of a rule begins with that no guest test can be made to need, or that threads need before they are under their
/// own filters; the reason follows.
const UNSEEN: &str = "unseen: ";

/// A call that a thread made, with those of its arguments that were written down.
#[derive(Debug)]
struct Made {
    /// Instructions of the thread's filter.
    filter: usize,
    call: String,
    arguments: BTreeMap<u64, u64>,
}

impl Made {
    /// From a line of tests/calls.
    fn parse(line: &str) -> Self {
        let mut words = line.split(' ');
        let filter = words.next().unwrap().parse().unwrap();
        let call = words.next().unwrap();
        let call = call.parse().map_or_else(|_| call.to_owned(), |number| report::call_name(number).to_owned());
        let argument = |word: &str| {
            let (place, value) = word.split_once('=').unwrap();
            (place.parse().unwrap(), value.parse().unwrap())
        };
        Self { filter, call, arguments: words.map(argument).collect() }
    }

    fn fulfils(&self, condition: &Value) -> bool {
        let place = condition["index"].as_u64().unwrap();
        let Some(argument) = self.arguments.get(&place) else {
            panic!("tests/calls does not write down argument {place} of {}: add it to its list", self.call);
        };
        let (argument, mask) = match condition["type"].as_str() {
            Some("dword") => (argument & u64::from(u32::MAX), u64::from(u32::MAX)),
            _ => (*argument, u64::MAX),
        };
        let value = condition["val"].as_u64().unwrap();
        match &condition["op"] {
            Value::String(op) if op == "eq" => argument == value,
            op => argument & op["masked_eq"].as_u64().unwrap() == value & mask,
        }
    }

    /// Whether the rule allows it. A call is written down both with and without its arguments.
    fn is_allowed_by(&self, rule: &Value) -> bool {
        let conditions = rule["args"].as_array().map_or(&[][..], Vec::as_slice);
        self.call == policy::call(rule)
            && self.arguments.is_empty() == conditions.is_empty()
            && conditions.iter().all(|condition| self.fulfils(condition))
    }
}

/// The rules of the file `name` that allow nothing of what was `made` by threads whose policies it belongs to.
fn unneeded(name: &str, made: &[Made], lengths: &HashMap<&str, usize>) -> Vec<String> {
    let own = |policy: &&Policy| name == "common" || policy.name() == name;
    let policies: Vec<_> = Policy::all().collect();
    let filters: Vec<_> = policies.iter().filter(own).map(|policy| lengths[policy.name()]).collect();
    let theirs: Vec<_> = made.iter().filter(|made| filters.contains(&made.filter)).collect();
    let is_unseen = |rule: &Value| rule["comment"].as_str().is_some_and(|comment| comment.starts_with(UNSEEN));
    let rules = policy::of_file(name).unwrap().into_iter().filter(|rule| !is_unseen(rule));
    let unneeded = rules.filter(|rule| !theirs.iter().any(|made| made.is_allowed_by(rule)));
    unneeded.map(|rule| format!("{name}.json: {rule}")).collect()
}

fn all_unneeded(made: &[Made]) -> Vec<String> {
    let programs = policy::compile(&SeccompAction::Trap, TargetArch::x86_64).unwrap();
    let lengths = Policy::all().map(|policy| (policy.name(), programs[policy.name()].len())).collect();
    let names = Policy::all().map(Policy::name).chain(["common"]);
    names.flat_map(|name| unneeded(name, made, &lengths)).collect()
}

/// Does nothing but after the guest tests, when tests/run names what it found out.
#[test]
fn each_rule_allows_something_that_a_guest_test_does() {
    let Ok(files) = std::env::var(CALLS) else { return };
    if files.is_empty() {
        return eprintln!(
            "SKIPPED: whether each rule is needed: no calls were counted: make test-calls, where the kernel can"
        );
    }
    let mut made = Vec::new();
    for file in files.lines() {
        made.extend(fs::read_to_string(file).unwrap().lines().map(Made::parse));
    }
    let unneeded = all_unneeded(&made);
    assert!(unneeded.is_empty(), "{} calls need none of these rules:\n{}", made.len(), unneeded.join("\n"));
}

#[test]
fn a_rule_that_nobody_needs_is_named_with_its_file() {
    let programs = policy::compile(&SeccompAction::Trap, TargetArch::x86_64).unwrap();
    let of = |policy: Policy, rest: &str| Made::parse(&format!("{} {rest}", programs[policy.name()].len()));
    let vcpu = Policy::Of(ThreadKind::Vcpu);
    let run = "ioctl 1=44672";
    let names = |made: &[Made], rule: &str| all_unneeded(made).iter().any(|line| line.contains(rule));
    assert!(names(&[], "vcpu.json: {\"args\":[{\"index\":1,\"op\":\"eq\",\"type\":\"dword\",\"val\":44672}]"));
    assert!(!names(&[of(vcpu, run)], "\"val\":44672}"));
    assert!(names(&[of(vcpu, "ioctl 1=44671"), of(vcpu, "16"), of(Policy::Control, run)], "\"val\":44672}"));
    assert!(names(&[], "common.json: {\"comment\":\"logs") && !names(&[of(Policy::Api, "1")], "{\"comment\":\"logs"));
}
