//! `rackvisor`: one process, one VM.

mod cli;
mod log;
mod serve;
mod swtpm;

use std::process::ExitCode;

use clap::Parser;
use rackvisor::assembly::InheritedTaps;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    // Before anything is opened that could be taken for inherited.
    let inherited_taps = InheritedTaps::find();
    let cli = Cli::parse();
    let log = match cli.start_log() {
        Ok(log) => log,
        Err(error) => {
            eprintln!("rackvisor: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = match cli.command {
        Some(Command::Doctor) => {
            let report = rackvisor::doctor::examine();
            print!("{report}");
            return if report.fit { ExitCode::SUCCESS } else { ExitCode::from(serve::EXIT_UNFIT) };
        }
        Some(Command::Run { file, tpm }) => serve::run(&file, tpm.as_deref(), cli.seccomp.into(), inherited_taps),
        None => serve::serve(&cli.serve, cli.seccomp.into(), inherited_taps, log.reopen()),
    };
    // What was logged comes before the last word.
    drop(log);
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rackvisor: {error}");
            ExitCode::FAILURE
        }
    }
}
