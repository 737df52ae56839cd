//! `rackvisor`: one process, one VM.

mod cli;
mod log;
mod serve;
mod swtpm;

use std::process::ExitCode;

use clap::Parser;
use rackvisor::assembly::{HostOptions, InheritedTaps};
use rackvisor::confinement::Confinement;
use rackvisor::seccomp::Filters;

use crate::cli::{Cli, Command};
use crate::log::Log;

fn main() -> ExitCode {
    // Before anything is opened that could be taken for inherited.
    let inherited_taps = InheritedTaps::find();
    let cli = Cli::parse();
    let (confinement, filters, log) = match prepare(&cli) {
        Ok(prepared) => prepared,
        Err(error) => {
            eprintln!("rackvisor: {error}");
            return ExitCode::FAILURE;
        }
    };
    let host = HostOptions { inherited_taps, confinement, ..HostOptions::default() };
    let outcome = match cli.command {
        Some(Command::Doctor) => {
            let report = rackvisor::doctor::examine();
            print!("{report}");
            return if report.fit { ExitCode::SUCCESS } else { ExitCode::from(serve::EXIT_UNFIT) };
        }
        Some(Command::Run { file, tpm }) => serve::run(&file, tpm.as_deref(), &filters, host),
        None => serve::serve(&cli.serve, &filters, host, log.reopen()),
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

/// What all threads have to keep to, of which that of the log is the first.
fn prepare(cli: &Cli) -> Result<(Option<Confinement>, Filters, Log), Box<dyn std::error::Error>> {
    let confinement = cli.allowed().as_ref().map(Confinement::enter).transpose()?;
    let filters = Filters::new(cli.seccomp.into())?;
    let log = cli.start_log(&filters)?;
    Ok((confinement, filters, log))
}
