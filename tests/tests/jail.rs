//! The jail: what a jailed VMM has, what it is kept from, and what is left when it ends.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rackvisor_api::client::Client;
use rackvisor_api::config::{DiskConfig, SerialConfig, SerialMode, TapFds};
use rackvisor_api::state::VmState;
use rackvisor_tests::{
    Guest, Jail, NullBlk, Rackvisor, Tap, eventually, guest_folder, linux, needs_jail, needs_kvm, output,
    rackvisor_binary, skip, taps_are_missing,
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

fn lines(pid: u32, file: &str) -> Vec<String> {
    fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap().lines().map(str::to_owned).collect()
}

/// What a line of /proc/PID/status says.
fn status(pid: u32, name: &str) -> String {
    let lines = lines(pid, "status");
    let line = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn is_alive(pid: u32) -> bool {
    test_kill_process(Pid::from_raw(pid.cast_signed()).unwrap()).is_ok()
}

/// Everything below `folder` of a jail but its processes, with what is in folders of the host left out.
fn walk(root: &Path, folder: &Path, found: &mut BTreeSet<String>, leave: &[&str]) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let inside = format!("/{}", path.strip_prefix(root).unwrap().display());
        let is_folder = fs::symlink_metadata(&path).unwrap().is_dir();
        if !is_folder || leave.contains(&inside.as_str()) {
            found.insert(inside);
        } else {
            walk(root, &path, found, leave);
        }
    }
}

/// That the process has no privilege, no namespace of ours, and the user that it should have.
fn assert_jailed(pid: u32, jail: &Jail) {
    let uid = [jail.uid.to_string().as_str(); 4].join(" ");
    for (name, wanted) in [("Uid", uid.as_str()), ("Gid", &uid), ("Groups", ""), ("NoNewPrivs", "1")] {
        println!("{name}: {}", status(pid, name));
        assert_eq!(status(pid, name), wanted, "{name}");
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        println!("{set}: {}", status(pid, set));
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    for space in ["net", "mnt", "pid", "ipc", "uts", "cgroup", "user"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}")).unwrap();
        println!("{}", of(&pid.to_string()).display());
        assert_ne!(of(&pid.to_string()), of("self"), "{space}");
    }
    let only = format!("{0} {0} 1", jail.uid);
    for (file, wanted) in [("uid_map", only.as_str()), ("gid_map", &only), ("setgroups", "deny")] {
        let found = lines(pid, file).concat().split_whitespace().collect::<Vec<_>>().join(" ");
        println!("{file}: {found}");
        assert_eq!(found, wanted, "{file}");
    }
    assert_eq!(status(pid, "NSpid").split(' ').next_back(), Some("1"), "it is alone");
    let network = lines(pid, "net/dev");
    assert!(network[2..].iter().all(|line| line.trim().starts_with("lo:")), "{network:?}");
    let core = lines(pid, "limits").into_iter().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}

#[test]
fn a_jailed_vm_has_its_disks_and_its_nic_and_nothing_else() {
    needs_kvm!();
    needs_jail!();
    if let Some(why) = taps_are_missing() {
        return skip(&why);
    }
    let (tap, jail, guest) = (Tap::new(), Jail::new(), guest_folder());
    let lun = NullBlk::new(64);
    let tap_option = format!("{}=3", tap.name);
    let mut options = vec!["--share-ro", guest.to_str().unwrap(), "--tap", &tap_option];
    options.extend(lun.iter().flat_map(|lun| ["--device", lun.path.to_str().unwrap()]));
    let mut vmm = Rackvisor::start_jailed(jail, &options, &[]);
    let pid = vmm.pid();
    assert_jailed(pid, vmm.jail());

    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let mut found = BTreeSet::new();
    let own = vmm.path("").to_str().unwrap().trim_end_matches('/').to_owned();
    walk(&root, &root, &mut found, &["/proc", "/run", "/sys", own.as_str(), guest.to_str().unwrap()]);
    println!("its root: {found:#?}");
    println!("its mounts: {:#?}", lines(pid, "mountinfo"));
    println!("its descriptors: {:#?}", vmm.census().descriptors);
    let library = |path: &str| path.starts_with("/lib") || path.starts_with("/usr/lib");
    let others: Vec<_> = found.iter().filter(|path| !library(path)).map(String::as_str).collect();
    let mut wanted = vec!["/dev/kvm", "/proc", "/rackvisor", "/run", "/sys", own.as_str(), guest.to_str().unwrap()];
    wanted.extend(lun.iter().map(|lun| lun.path.to_str().unwrap()));
    wanted.sort_unstable();
    assert_eq!(others, wanted);
    assert!(!root.join("proc/sys").exists() && !root.join("proc/kallsyms").exists());
    let read_only = |at: &str| lines(pid, "mountinfo").iter().any(|line| line.contains(&format!(" {at} ro,")));
    assert!(read_only("/") && read_only("/rackvisor") && read_only("/proc") && read_only(guest.to_str().unwrap()));

    let mut config = linux();
    config.boot.as_mut().unwrap().cmdline += &tap.cmdline();
    config.nics = vec![tap.nic_with(TapFds::Inherited(vec![3]))];
    config.disks = vec![vmm.image("file", &vec![0; 8 << 20])];
    config.disks.extend(lun.iter().map(|lun| DiskConfig::new("lun", lun.path.clone())));
    let mut guest = vmm.boot_linux(&config);
    guest.ok(&format!("ping -c 1 {}", tap.host()));
    guest.ok("echo jailed | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null");
    assert_eq!(&fs::read(vmm.path("file")).unwrap()[..6], b"jailed");
    if lun.is_some() {
        guest.ok("dd if=/dev/zero of=/dev/vdb bs=1M count=4 conv=fsync 2>/dev/null");
        let lun = vmm.client.disks().unwrap().into_iter().find(|disk| disk.config.id == "lun").unwrap();
        println!("the LUN, as the jailed VMM sees it: {lun:?}");
    }
    assert!(vmm.counted(&["process_", "memory"]) > 0, "it finds its own /proc");
    // As a host agent ends it.
    let jailer = Pid::from_child(vmm.process());
    kill_process(jailer, Signal::TERM).unwrap();
    let ended = eventually("the jailer ends", || vmm.process().try_wait().unwrap());
    assert!(ended.success(), "{ended}: {}", vmm.log());
    assert!(!vmm.jail().folder().exists(), "something is left in the base folder");
}

/// Enters network, host name and user namespace of process `argv[1]` and becomes user `argv[2]` there, with all capabilities of it; then
/// says what they are and what the kernel answers to what takes one of them.
const POWERLESS: &str = r#"
import ctypes, errno, os, socket, stat, sys
libc = ctypes.CDLL(None, use_errno=True)
pid, uid = map(int, sys.argv[1:])
for space in ["net", "uts", "user"]:
    assert libc.setns(os.open(f"/proc/{pid}/ns/{space}", os.O_RDONLY), 0) == 0, os.strerror(ctypes.get_errno())
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
print("CapEff", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")))
def answer(name, call):
    try:
        done = call()
        code = ctypes.get_errno() if done == -1 else 0
    except OSError as error:
        code = error.errno
    print(name, errno.errorcode.get(code, "done"))
answer("mount", lambda: libc.mount(b"none", b"/mnt", b"tmpfs", 0, None))
answer("sethostname", lambda: socket.sethostname("free"))
answer("mknod", lambda: os.mknod(f"/dev/shm/rackvisor-{os.getpid()}", 0o600 | stat.S_IFBLK, os.makedev(8, 0)))
answer("packets", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
answer("setuid", lambda: os.setresuid(0, 0, 0))
answer("setgroups", lambda: os.setgroups([uid]))
answer("kill", lambda: os.kill(1, 0))
"#;

#[test]
fn all_capabilities_that_there_are_in_the_jail_are_none_on_the_host() {
    needs_jail!();
    let vmm = Rackvisor::start_jailed(Jail::new(), &[], &[]);
    let (pid, uid) = (vmm.pid().to_string(), vmm.jail().uid.to_string());
    let (code, answers, err) = output(Command::new("python3").args(["-c", POWERLESS, &pid, &uid]));
    println!("{answers}");
    assert_eq!(code, 0, "{err}");
    let (capabilities, answers) = answers.split_once('\n').unwrap();
    let capabilities = u64::from_str_radix(capabilities.strip_prefix("CapEff ").unwrap(), 16).unwrap();
    assert!(capabilities.trailing_ones() > 36, "it has all of them: {capabilities:x}");
    let wanted =
        "mount EPERM\nsethostname EPERM\nmknod EPERM\npackets EPERM\nsetuid EINVAL\nsetgroups EPERM\nkill EPERM";
    assert_eq!(answers.trim(), wanted);
}

#[test]
fn the_api_is_kept_for_users_only_where_the_kernel_can_tell_them_apart() {
    needs_jail!();
    let jail = Jail::new();
    let (code, _, err) = output(jail.command(&[]).args(["--api-socket", "/run/api.sock", "--api-allow-uid", "65534"]));
    assert!(code == 1 && err.contains("--userns host"), "{code}: {err}");
    let vmm = Rackvisor::start_jailed(jail, &["--userns", "host"], &["--api-allow-uid", "0"]);
    let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(of(&vmm.pid().to_string()), of("self"));
    assert_eq!(status(vmm.pid(), "CapEff"), "0000000000000000");
}

#[test]
fn the_api_socket_is_roots_and_works_through_the_descriptor() {
    needs_jail!();
    let (jail, folder) = (Jail::new(), tempfile::tempdir().unwrap());
    let (socket, pid_file) = (folder.path().join("api.sock"), folder.path().join("pid"));
    let log = folder.path().join("log");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let options =
        ["--api-socket", &text(&socket), "--daemon", "--pid-file", &text(&pid_file), "--log-file", &text(&log)];
    let (code, out, err) = output(&mut jail.command(&options));
    assert_eq!((code, out.as_str(), err.as_str()), (0, "", ""), "a daemon is started when this ends");
    let jailer: u32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o600);
    let client = Client::new(&socket).with_timeout(Duration::from_secs(30));
    assert_eq!(client.state().unwrap(), VmState::Undefined);
    assert_jailed(jail.vmm().unwrap(), &jail);

    // A second one of the same name, and one of another name with the same socket.
    let (code, _, err) = output(&mut jail.command(&["--api-socket", &text(&folder.path().join("other.sock"))]));
    assert!(code == 122 && err.contains(&jail.id), "{code}: {err}");
    let other = Jail::new();
    let (code, _, err) = output(&mut other.command(&["--api-socket", &text(&socket)]));
    assert!(code == 125 && err.contains("listening there"), "{code}: {err}");
    assert!(!other.folder().exists());
    assert_eq!(client.state().unwrap(), VmState::Undefined, "the first one does not notice");

    kill_process(Pid::from_raw(jailer.cast_signed()).unwrap(), Signal::TERM).unwrap();
    eventually("all is gone", || (!socket.exists() && !pid_file.exists() && !jail.folder().exists()).then_some(()));
    let log = fs::read_to_string(&log).unwrap();
    assert!(!log.contains("rackvisor-jailer:"), "{log}");
}

#[test]
fn exit_codes_are_those_of_the_vmm_or_tell_what_was_wrong_with_the_jail() {
    needs_jail!();
    let jail = Jail::new();
    let run = |options: &[&str], arguments: &[&str]| output(jail.command(options).args(arguments));
    let (code, out, err) = run(&[], &["doctor"]);
    assert!(matches!(code, 0 | 4) && out.contains("/dev/kvm opens"), "{code}: {out}{err}");
    let (code, _, err) = run(&[], &["explode"]);
    assert!(code == 2 && err.contains("explode"), "{code}: {err}");
    let (code, _, err) = run(&[], &["run", "/absent.toml"]);
    assert!(code == 1 && err.contains("absent.toml"), "{code}: {err}");
    let wrong: [(&[&str], i32, &str); 8] = [
        (&["--uid", "0"], 2, "--uid"),
        (&["--device", "/dev/absent"], 125, "/dev/absent"),
        (&["--device", "/etc/hostname"], 125, "no device"),
        (&["--tap", "no-such-tap=3"], 125, "no such interface"),
        (&["--keep-fd", "77"], 125, "not open"),
        (&["--cgroup", "nonsense.max=1"], 125, "nonsense"),
        (&["--share-ro", "/etc", "--share-ro", "/etc/hostname"], 125, "/etc/hostname"),
        (&["--vmm", "/etc/hostname"], 125, "no ELF program"),
    ];
    for (options, status, told) in wrong {
        let (code, _, err) = run(options, &["doctor"]);
        assert!(code == status && err.contains(told), "{options:?}: {code}: {err}");
        assert!(!jail.folder().exists(), "{options:?} leaves something behind");
    }
}

#[test]
fn what_an_attacker_could_exchange_is_refused_and_nothing_is_changed() {
    needs_jail!();
    let (jail, folder) = (Jail::new(), tempfile::tempdir().unwrap());
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let refused = |options: &[&str]| {
        let (code, _, err) = output(jail.command(options).arg("doctor"));
        assert_eq!(code, 121, "{options:?}: {err}");
        err
    };
    fs::create_dir_all(at("precious/run")).unwrap();
    fs::write(at("precious/run/data"), "x").unwrap();
    symlink(at("precious"), jail.folder()).unwrap();
    assert!(refused(&[]).contains("a link or a file"));
    fs::remove_file(jail.folder()).unwrap();
    fs::create_dir(jail.folder()).unwrap();
    chown(jail.folder(), Some(jail.uid), None).unwrap();
    symlink(at("precious"), jail.folder().join("run")).unwrap();
    assert!(refused(&[]).contains("belongs to uid"));
    assert!(jail.folder().join("run").exists(), "it was not touched");
    chown(jail.folder(), Some(0), Some(0)).unwrap();
    assert!(matches!(output(jail.command(&[]).arg("doctor")).0, 0 | 4), "a link in place of what it makes is removed");

    // Folders and links of somebody else on the way to what it is to hand over, write to or execute.
    fs::create_dir(at("theirs")).unwrap();
    chown(at("theirs"), Some(jail.uid), None).unwrap();
    fs::write(at("theirs/file"), "x").unwrap();
    fs::copy(rackvisor_binary(), at("theirs/rackvisor")).unwrap();
    symlink(at("precious"), at("link")).unwrap();
    std::os::unix::fs::lchown(at("link"), Some(jail.uid), None).unwrap();
    let (pid, log) = (at("theirs/pid"), at("theirs/log"));
    for options in [
        ["--share", &at("theirs/file")].as_slice(),
        &["--share-ro", &at("link/run")],
        &["--vmm", &at("theirs/rackvisor")],
        &["--base", &at("theirs")],
        &["--api-socket", &at("theirs/api.sock")],
        &["--daemon", "--pid-file", &pid, "--log-file", &log],
    ] {
        assert!(refused(options).contains("nobody but root"), "{options:?}");
    }
    let left: BTreeSet<_> = fs::read_dir(at("theirs")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["file", "rackvisor"].map(Into::into).into());
    assert_eq!(fs::read(at("precious/run/data")).unwrap(), b"x");
    fs::set_permissions(at("precious"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::copy(rackvisor_binary(), at("precious/rackvisor")).unwrap();
    assert!(refused(&["--vmm", &at("precious/rackvisor")]).contains("writable by others"));
}

#[test]
fn a_jailer_that_is_killed_takes_its_vm_along_and_the_next_run_cleans_up() {
    needs_jail!();
    let jail = Jail::new();
    let options = ["--cgroup", "pids.max=64", "--cgroup", "memory.max=2G"];
    let mut first = jail.command(&options).args(["--api-socket", "/run/api.sock"]).spawn().unwrap();
    let socket = jail.folder().join("run/api.sock");
    eventually("it answers", || UnixStream::connect(&socket).ok());
    let vmm = jail.vmm().unwrap();
    let cgroups = fs::read_to_string(jail.folder().join("cgroups")).unwrap();
    for cgroup in cgroups.lines() {
        println!("{cgroup}");
        assert_eq!(fs::read_to_string(Path::new(cgroup).join("cgroup.procs")).unwrap().trim(), vmm.to_string());
    }
    let has = |file: &str, value: &str| {
        cgroups
            .lines()
            .any(|cgroup| fs::read_to_string(Path::new(cgroup).join(file)).is_ok_and(|is| is.trim() == value))
    };
    assert!(has("pids.max", "64"), "{cgroups}");
    assert!(has("memory.max", "2147483648") || has("memory.limit_in_bytes", "2147483648"), "{cgroups}");

    first.kill().unwrap();
    first.wait().unwrap();
    eventually("the VMM ends with its jailer", || (!is_alive(vmm)).then_some(()));
    assert!(socket.exists() && jail.folder().join("cgroups").exists(), "nobody was there to clean up");
    // What a run that was killed while it wrote its notes leaves.
    fs::write(jail.folder().join("vmm"), "").unwrap();

    let mut second = jail.command(&options).args(["--api-socket", "/run/api.sock"]).spawn().unwrap();
    eventually("it answers", || UnixStream::connect(&socket).ok());
    kill_process(Pid::from_child(&second), Signal::TERM).unwrap();
    assert!(second.wait().unwrap().success());
    assert!(!jail.folder().exists());
    for cgroup in cgroups.lines() {
        assert!(!Path::new(cgroup).exists(), "{cgroup} is left");
    }
}

#[test]
fn a_signal_before_the_vmm_can_handle_it_ends_it_too() {
    needs_jail!();
    for delay in [0, 2, 5, 10, 20, 40] {
        let jail = Jail::new();
        let mut jailer =
            jail.command(&[]).args(["--api-socket", "/run/api.sock"]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        kill_process(Pid::from_child(&jailer), Signal::TERM).unwrap();
        let ended = jailer.wait().unwrap();
        println!("SIGTERM after {delay} ms: {ended}");
        assert!(!jail.folder().exists(), "after {delay} ms");
    }
}

/// Until the API answers.
fn start(command: &mut Command, socket: &Path) -> (Duration, std::process::Child) {
    let began = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while UnixStream::connect(socket).is_err() {
        std::thread::sleep(Duration::from_micros(200));
        assert!(began.elapsed() < Duration::from_secs(60), "no answer");
    }
    (began.elapsed(), child)
}

#[test]
fn what_the_jail_costs_at_the_start_is_told() {
    needs_jail!();
    let folder = tempfile::tempdir().unwrap();
    let (mut plain, mut jailed) = (Vec::new(), Vec::new());
    for _ in 0..11 {
        let socket = folder.path().join("api.sock");
        let (time, child) = start(Command::new(rackvisor_binary()).arg("--api-socket").arg(&socket), &socket);
        plain.push(time);
        end(child);
        let jail = Jail::new();
        let socket = jail.folder().join("run/api.sock");
        let (time, child) = start(jail.command(&[]).args(["--api-socket", "/run/api.sock"]), &socket);
        jailed.push(time);
        end(child);
    }
    plain.sort();
    jailed.sort();
    let (plain, jailed) = (plain[5], jailed[5]);
    println!(
        "process start to API, medians of 11: plain {plain:?}, jailed {jailed:?}, more {:?}",
        jailed.saturating_sub(plain)
    );
}

fn end(mut child: std::process::Child) {
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_console_in_the_jails_run_is_reached_from_the_host() {
    needs_kvm!();
    needs_jail!();
    let (jail, guest) = (Jail::new(), guest_folder());
    let vmm = Rackvisor::start_jailed(jail, &["--share-ro", guest.to_str().unwrap()], &[]);
    let mut config = linux();
    config.serial = SerialConfig { mode: SerialMode::Socket, path: Some("/run/console.sock".into()) };
    vmm.boot(&config);
    let mut guest = Guest::connect(&vmm.jail().folder().join("run/console.sock"));
    guest.wait_ready();
    assert_eq!(guest.ok("echo hello"), "hello");
}
