//! The serial console in all its modes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};

use rackvisor_api::VmConfig;
use rackvisor_api::config::{SerialConfig, SerialMode, TpmConfig};
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{
    Guest, Rackvisor, Terminal, Tiny, eventually, impossible_in_a_jail, linux, linux_with_tpm, needs_kvm,
    rackvisor_binary, skip, swtpm_is_missing,
};

/// Boots with a console of this mode.
fn boot(vmm: &Rackvisor, program: &Tiny, mode: SerialMode, path: Option<&str>) {
    let mut config = program.config(&vmm.path(""));
    config.serial = SerialConfig { mode, path: path.map(|name| vmm.path(name)) };
    vmm.boot(&config);
}

#[test]
fn all_clients_of_the_socket_see_all_output_and_may_type() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    boot(&vmm, &Tiny::echoes(), SerialMode::Socket, Some("console.sock"));
    let mut first = Guest::connect(&vmm.path("console.sock"));
    first.type_keys(b"said before you came;");
    first.read_until("came;");
    let mut second = Guest::connect(&vmm.path("console.sock"));
    second.read_until("said before you came;");
    second.type_keys(b"typed by the second;");
    for client in [&mut first, &mut second] {
        client.read_until("typed by the second;");
    }
    // One that leaves in the middle of its typing takes nobody along.
    UnixStream::connect(vmm.path("console.sock")).unwrap().write_all(b"gone").unwrap();
    first.read_until("gone");
    second.type_keys(b"!");
    first.read_until("!");
    vmm.client.act(Action::Shutdown).unwrap();
    assert_eq!(second.read_to_end(), "said before you came;typed by the second;gone!");
    assert!(!vmm.path("console.sock").exists(), "the socket is left behind");
}

#[test]
fn a_file_gets_the_whole_output_of_boot_after_boot() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let text: Vec<u8> = (0..200).flat_map(|n| format!("line {n}\n").into_bytes()).collect();
    for boots in 1..=2 {
        boot(&vmm, &Tiny::says(&text), SerialMode::File, Some("log.txt"));
        let read = || fs::read(vmm.path("log.txt")).unwrap();
        eventually("the file has it all", || (read().len() >= boots * text.len()).then_some(()));
        vmm.client.act(Action::Shutdown).unwrap();
        assert_eq!(read(), text.repeat(boots));
    }
}

#[test]
fn a_pseudo_terminal_is_named_in_the_description_and_talks_to_the_guest() {
    needs_kvm!();
    impossible_in_a_jail!(
        "a pseudo-terminal would be one of the jail, where nobody of the host could open it by its path"
    );
    let vmm = Rackvisor::start();
    boot(&vmm, &Tiny::echoes(), SerialMode::Pty, None);
    let path = vmm.client.describe().unwrap().serial_path.unwrap();
    for visit in 0..2 {
        let mut terminal = File::options().read(true).write(true).open(&path).unwrap();
        let text = format!("visit {visit}\n");
        terminal.write_all(text.as_bytes()).unwrap();
        let mut heard = Vec::new();
        while !String::from_utf8_lossy(&heard).contains(&text) {
            let mut byte = [0];
            terminal.read_exact(&mut byte).unwrap();
            heard.push(byte[0]);
        }
    }
}

/// The sum of a metric over its labels.
fn metric(vmm: &Rackvisor, name: &str) -> u64 {
    let metrics = vmm.client.metrics().unwrap();
    let values = metrics.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit(' ').next());
    values.map(|value| value.parse::<f64>().unwrap() as u64).sum()
}

#[test]
fn a_guest_that_talks_to_nobody_goes_on_and_takes_no_more_memory() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let text = b"0123456789abcdef".repeat(480);
    boot(&vmm, &Tiny::chatters(&text), SerialMode::Socket, Some("console.sock"));
    // A client that never reads, and none that does.
    let _deaf = UnixStream::connect(vmm.path("console.sock")).unwrap();
    let said = || metric(&vmm, "rackvisor_vcpu_exits_total{vcpu=\"0\",reason=\"port-write\"}");
    let resident = || metric(&vmm, "rackvisor_process_resident_memory_bytes") >> 20;
    eventually("the guest talks", || (said() > 1000).then_some(()));
    let before = resident();
    // More than all buffers together; but an exit for each byte takes the lab a third of a millisecond.
    let bytes = if std::env::var_os("LAB").is_some() { 20_000 } else { 4 << 20 };
    eventually("the guest goes on", || (said() > bytes).then_some(()));
    // A mebibyte is what the backlog may take.
    assert!(resident() <= before + 2, "from {before} to {} MiB", resident());
    vmm.client.act(Action::Shutdown).unwrap();
}

/// A `rackvisor run`, killed when dropped.
struct Run(Child);

impl Run {
    /// Waits for the end; gives the exit code.
    fn code(mut self) -> Option<i32> {
        eventually("rackvisor run ends", || self.0.try_wait().unwrap()).code()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `rackvisor run` on this terminal.
fn run(terminal: &Terminal, config: &VmConfig, folder: &Path) -> Run {
    run_with(terminal, config, folder, &[])
}

/// The same with more options.
fn run_with(terminal: &Terminal, config: &VmConfig, folder: &Path, options: &[&str]) -> Run {
    let file = folder.join("vm.json");
    fs::write(&file, serde_json::to_vec(config).unwrap()).unwrap();
    let process = Command::new(rackvisor_binary())
        .args(["--log", "warn", "run"])
        .arg(file)
        .args(options)
        .current_dir(folder)
        .stdin(terminal.stdio())
        .stdout(terminal.stdio())
        .stderr(terminal.stdio())
        .spawn()
        .unwrap();
    Run(process)
}

#[test]
fn run_gives_a_login_on_the_terminal_and_control_a_x_leaves_it_as_it_was() {
    needs_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let mut terminal = Terminal::new();
    let before = format!("{:?}", terminal.settings());
    let mut config = linux();
    let cmdline = &mut config.boot.as_mut().unwrap().cmdline;
    *cmdline = cmdline.replace("rv.mode=agent", "rv.mode=login");
    let process = run(&terminal, &config, folder.path());
    terminal.wait_for("rackvisor-guest login: ");
    assert_ne!(format!("{:?}", terminal.settings()), before, "the terminal is not raw");
    terminal.type_keys(b"root\r");
    terminal.wait_for(":/root# ");
    terminal.type_keys(b"echo 6 times 7 is $((6 * 7))\r");
    terminal.wait_for("6 times 7 is 42");
    terminal.type_keys(b"\x01x");
    assert_eq!(process.code(), Some(0));
    assert_eq!(format!("{:?}", terminal.settings()), before);
}

#[test]
fn run_starts_a_tpm_which_keeps_its_state_and_ends_with_the_vm() {
    needs_kvm!();
    if let Some(why) = swtpm_is_missing() {
        return skip(why);
    }
    let folder = tempfile::tempdir().unwrap();
    let mut config = linux_with_tpm();
    let cmdline = &mut config.boot.as_mut().unwrap().cmdline;
    *cmdline = cmdline.replace("rv.mode=agent", "rv.mode=login");
    let socket = folder.path().join("tpm/swtpm.sock");
    for (keys, answer) in [
        (
            "tpm2 nvdefine -Q 0x1500016 -C o -s 8; printf 12345678 | tpm2 nvwrite 0x1500016 -C o -i - && echo $((6 * 7)) is kept",
            "42 is kept",
        ),
        ("tpm2 nvread 0x1500016 -C o -s 8", "12345678"),
    ] {
        let mut terminal = Terminal::new();
        let process = run_with(&terminal, &config, folder.path(), &["--tpm", "tpm"]);
        terminal.wait_for("rackvisor-guest login: ");
        terminal.type_keys(b"root\r");
        terminal.wait_for(":/root# ");
        terminal.type_keys(keys.as_bytes());
        terminal.type_keys(b"\r");
        terminal.wait_for(answer);
        assert!(UnixStream::connect(&socket).is_ok());
        terminal.type_keys(b"\x01x");
        assert_eq!(process.code(), Some(0));
        eventually("swtpm ends", || UnixStream::connect(&socket).is_err().then_some(()));
    }
    config.tpm = Some(TpmConfig { socket: "other.sock".into() });
    let mut terminal = Terminal::new();
    assert_eq!(run_with(&terminal, &config, folder.path(), &["--tpm", "tpm"]).code(), Some(1));
    terminal.wait_for("leave one of the two out");
}

#[test]
fn run_ends_with_its_guest_and_its_exit_code_tells_a_crash() {
    needs_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let mut terminal = Terminal::new();
    let before = format!("{:?}", terminal.settings());
    let process = run(&terminal, &Tiny::power_off().config(folder.path()), folder.path());
    assert_eq!(process.code(), Some(0));
    let process = run(&terminal, &Tiny::triple_fault().config(folder.path()), folder.path());
    assert_eq!(process.code(), Some(3));
    terminal.wait_for("the guest crashed: ");
    let mut config = Tiny::idle().config(folder.path());
    config.boot.as_mut().unwrap().kernel = Some("absent".into());
    let process = run(&terminal, &config, folder.path());
    assert_eq!(process.code(), Some(1));
    terminal.wait_for("kernel absent: ");
    assert_eq!(format!("{:?}", terminal.settings()), before);
}

#[test]
fn without_a_console_the_guest_talks_into_the_void() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let vm = vmm.boot(&Tiny::chatters(b"anybody?").config(&vmm.path("")));
    assert_eq!((vm.state, vm.serial_path), (VmState::Running, None));
    let said = || metric(&vmm, "rackvisor_vcpu_exits_total{vcpu=\"0\",reason=\"port-write\"}");
    eventually("it does", || (said() > 100).then_some(()));
}
