//! `rackvisor`: one process, one VM.

mod cli;
mod log;
mod serve;
mod swtpm;

use std::process::ExitCode;

use clap::Parser;
use rackvisor::assembly::InheritedTaps;
use rackvisor::seccomp::Filters;

use crate::cli::{Cli, Command};
use crate::log::Log;

fn main() -> ExitCode {
    // Before anything is opened that could be taken for inherited.
    let inherited_taps = InheritedTaps::find();
    let cli = Cli::parse();
    let (filters, log) = match prepare(&cli) {
        Ok(prepared) => prepared,
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
        Some(Command::Run { file, tpm }) => serve::run(&file, tpm.as_deref(), &filters, inherited_taps),
        None => serve::serve(&cli.serve, &filters, inherited_taps, log.reopen()),
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

/// The filters, and the log, whose thread is the first to have one.
fn prepare(cli: &Cli) -> std::io::Result<(Filters, Log)> {
    let filters = Filters::new(cli.seccomp.into())?;
    let log = cli.start_log(&filters)?;
    Ok((filters, log))
}
