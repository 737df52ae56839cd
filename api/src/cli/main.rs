//! `rackctl`: drives a Rackvisor virtual machine from the command line.

mod args;
mod device;
mod output;
mod progress;
mod run;
mod tables;

use std::process::ExitCode;

use clap::Parser;
use rackvisor_api::client::ClientError;

use self::output::{Failure, Output};

/// The server refused, or something local went wrong.
const REFUSED: u8 = 1;
/// Nobody answers on the socket, or the answer cannot be understood.
const UNREACHABLE: u8 = 3;
/// Not within the time given.
const TIMED_OUT: u8 = 4;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let output = Output { json: cli.json };
    match run::run(&cli, &output) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has had enough.
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(match failure {
                Failure::Client(ClientError::Timeout(_)) => TIMED_OUT,
                Failure::Client(ClientError::Problem(_)) | Failure::Problem(_) | Failure::Output(_) => REFUSED,
                Failure::Client(_) => UNREACHABLE,
            })
        }
    }
}
