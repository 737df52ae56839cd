mod needed;
mod sockets;

use std::collections::HashMap;
use std::net::TcpListener;
use std::process::{Command, Output};
use std::sync::{Barrier, Mutex, mpsc};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::*;

/// What [`child`] is to do: the mode, the policy and the task.
const TASK: &str = "RACKVISOR_SECCOMP_TASK";

fn policies() -> impl Iterator<Item = (Policy, Vec<Value>)> {
    Policy::all().map(|policy| (policy, policy.rules().unwrap()))
}

#[test]
fn every_kind_of_thread_has_a_policy_that_compiles() {
    let programs = policy::compile(&SeccompAction::Trap, TargetArch::x86_64).unwrap();
    for (policy, _) in policies() {
        let length = programs[policy.name()].len();
        assert!((10..4096).contains(&length), "{}: {length} instructions", policy.name());
    }
}

#[test]
fn sockets_threads_and_rings_are_made_where_the_readme_says_and_nobody_runs_programs() {
    for (policy, rules) in policies() {
        let calls: Vec<_> = rules.iter().map(policy::call).collect();
        let jobs = policy == Policy::Of(ThreadKind::Jobs);
        let (tpm, reservation) = (ThreadKind::Tpm, ThreadKind::Reservation);
        for (call, kinds) in
            [("socketpair", &[tpm][..]), ("socket", &[tpm, reservation]), ("connect", &[tpm, reservation])]
        {
            let makes = jobs || kinds.iter().any(|kind| policy == Policy::Of(*kind));
            assert_eq!(calls.iter().any(|c| c == call), makes, "{}: {call}", policy.name());
        }
        for call in ["bind", "listen", "clone3", "io_uring_setup", "bpf", "seccomp"] {
            assert_eq!(calls.iter().any(|c| c == call), jobs, "{}: {call}", policy.name());
        }
        for call in
            ["execve", "execveat", "fork", "vfork", "ptrace", "process_vm_writev", "kill", "mount", "setns", "ioperm"]
        {
            assert!(!calls.iter().any(|c| c == call), "{}: {call}", policy.name());
        }
    }
}

#[test]
fn ioctls_sockets_and_what_could_give_memory_to_execute_are_allowed_with_conditions_only() {
    for (policy, rules) in policies() {
        for call in ["ioctl", "socket", "mmap", "mprotect", "prctl", "tgkill", "rt_sigaction", "bpf", "sendto"] {
            let mut of_call = rules.iter().filter(|rule| policy::call(rule) == call);
            assert!(of_call.all(|rule| rule["args"].is_array()), "{}: {call}", policy.name());
        }
    }
}

#[test]
fn no_rule_is_given_twice_to_one_kind_of_thread() {
    for (policy, _) in policies().filter(|(policy, _)| *policy != Policy::Of(ThreadKind::Jobs)) {
        let mut seen = HashMap::new();
        for rule in policy.rules().unwrap() {
            let key = (policy::call(&rule), rule["args"].to_string());
            assert!(seen.insert(key.clone(), ()).is_none(), "{}: {key:?}", policy.name());
        }
    }
}

#[test]
fn a_call_that_is_not_allowed_is_not_made_and_the_process_tells_thread_and_call_and_ends() {
    for policy in Policy::all() {
        let Output { status, stderr, .. } = child(Mode::On, policy, "connects");
        let told = String::from_utf8_lossy(&stderr);
        assert_eq!(status.code(), Some(i32::from(EXIT_VIOLATION)), "{}: {told}", policy.name());
        let name = policy.name();
        let wanted = format!(
            "thread a-thread made system call 41 (socket) with 0x2, 0x80001, 0x0, which resources/seccomp/{name}.json"
        );
        assert!(told.contains(&wanted), "{name}: {told}");
    }
}

#[test]
fn a_filtered_thread_allocates_locks_sleeps_logs_and_panics_like_any_other() {
    for policy in Policy::all() {
        let Output { status, stderr, stdout } = child(Mode::On, policy, "works");
        let told = String::from_utf8_lossy(&stderr);
        assert!(status.success(), "{}: {status}: {told}", policy.name());
        assert!(told.contains("thread 'a-thread'") && told.contains("for a test"), "{}: {told}", policy.name());
        assert!(told.contains("stack backtrace"), "{}: {told}", policy.name());
        assert!(String::from_utf8_lossy(&stdout).contains("joined"), "{}", policy.name());
    }
}

#[test]
fn many_filtered_threads_have_heaps_of_their_own() {
    let Output { status, stdout, stderr } = child(Mode::On, Policy::Of(ThreadKind::Jobs), "starts-many");
    assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&stderr));
    assert!(String::from_utf8_lossy(&stdout).contains("all did"));
}

#[test]
fn the_heap_of_a_filtered_thread_shrinks() {
    for policy in Policy::all() {
        let Output { status, stdout, stderr } = child(Mode::On, policy, "shrinks");
        assert!(status.success(), "{}: {status}: {}", policy.name(), String::from_utf8_lossy(&stderr));
        assert!(String::from_utf8_lossy(&stdout).contains("joined"), "{}", policy.name());
    }
}

#[test]
fn in_the_mode_log_the_call_is_made_and_with_no_filters_too() {
    for mode in [Mode::Log, Mode::Off] {
        let Output { status, stdout, stderr } = child(mode, Policy::Of(ThreadKind::Vcpu), "connects");
        assert!(status.success(), "{mode:?}: {}", String::from_utf8_lossy(&stderr));
        assert!(String::from_utf8_lossy(&stdout).contains("connected"), "{mode:?}");
    }
}

/// Runs [`child_process`] in a process of its own.
fn child(mode: Mode, policy: Policy, task: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "seccomp::tests::child_process", "--nocapture"]).env("RUST_BACKTRACE", "1");
    command.env(TASK, format!("{mode:?} {} {task}", policy.name())).output().unwrap()
}

/// Does nothing but in the processes that the other tests start.
#[test]
fn child_process() {
    let Ok(task) = std::env::var(TASK) else { return };
    let [mode, policy, task] = task.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let mode = [Mode::On, Mode::Log, Mode::Off].into_iter().find(|m| format!("{m:?}") == mode).unwrap();
    let policy = Policy::all().find(|p| p.name() == policy).unwrap();
    let filters = if task == "shrinks" { with_heaps_that_did_not_shrink() } else { Filters::new(mode).unwrap() };
    let body: Box<dyn FnOnce() + Send> = match task {
        "works" => Box::new(works),
        "connects" => Box::new(connects),
        "shrinks" => Box::new(heaps::grow_and_shrink),
        _ => Box::new({
            let filters = filters.clone();
            move || starts_many(&filters)
        }),
    };
    let thread = match policy {
        Policy::Of(kind) => filters.spawn(kind, "a-thread", body).unwrap(),
        _ => std::thread::Builder::new()
            .name("a-thread".into())
            .spawn(move || {
                filters.enter(policy, "a-thread").unwrap();
                body();
            })
            .unwrap(),
    };
    assert_eq!(thread.join().is_err(), task == "works");
    println!("joined");
}

/// As in the program, whose first thread prepares the filters: its heap is not one of those that threads have.
fn with_heaps_that_did_not_shrink() -> Filters {
    heaps::keep(i32::MAX);
    let programs = policy::compile(&SeccompAction::Trap, TargetArch::x86_64).unwrap();
    heaps::keep(128 << 10);
    Filters::with(programs, Mode::On).unwrap()
}

fn connects() {
    drop(TcpListener::bind("127.0.0.1:0").unwrap());
    println!("connected");
}

/// More threads than glibc makes heaps for before it wants to know how many processors there are.
fn starts_many(filters: &Filters) {
    let barrier = Arc::new(Barrier::new(40));
    let body = |barrier: Arc<Barrier>| move || drop((vec![1_u8; 100], barrier.wait()));
    let start = |_| filters.spawn(ThreadKind::Vcpu, "one-of-many", Box::new(body(Arc::clone(&barrier)))).unwrap();
    let threads: Vec<_> = (0..40).map(start).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    println!("all did");
}

fn works() {
    let mut bytes = Vec::new();
    (0..21).for_each(|power| bytes.resize(1 << power, 1_u8));
    drop(bytes);
    let map: HashMap<_, _> = (0..1000).map(|n| (n, n.to_string())).collect();
    let (sender, receiver) = mpsc::channel();
    let locked = Mutex::new(map);
    sender.send(locked.lock().unwrap().len()).unwrap();
    assert_eq!(receiver.recv_timeout(Duration::from_millis(1)), Ok(1000));
    assert!(receiver.recv_timeout(Duration::from_millis(1)).is_err());
    let before = Instant::now();
    std::thread::sleep(Duration::from_millis(1));
    eprintln!("slept {:?}", before.elapsed());
    panic!("for a test");
}
