//! Programs run to their end.

use std::process::{Command, Output, Stdio};

use crate::{Rackvisor, rackctl_binary};

/// Runs a program; gives its exit status, standard output and standard error.
pub fn output(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// Runs a program of the host, which must succeed, with the words of `line`; gives its standard output.
pub(crate) fn tool(program: &str, line: &str) -> String {
    let (status, out, err) = output(Command::new(program).args(line.split_whitespace()));
    assert_eq!(status, 0, "{program} {line}: {err}");
    out
}

/// Runs `rackctl` with the arguments of `line`.
pub fn rackctl(vmm: &Rackvisor, line: &str) -> (i32, String, String) {
    let socket = vmm.client.socket();
    output(
        Command::new(rackctl_binary())
            .args(line.split_whitespace())
            .env("RACKVISOR_SOCKET", socket)
            .current_dir(vmm.path("")),
    )
}

/// Runs a `rackctl` that must succeed and complain of nothing; gives its standard output.
pub fn good(vmm: &Rackvisor, line: &str) -> String {
    let (status, out, err) = rackctl(vmm, line);
    assert_eq!((status, err.as_str()), (0, ""), "rackctl {line}: {out}");
    out
}
