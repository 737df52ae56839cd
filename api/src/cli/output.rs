//! What the user sees.

use std::io::{self, Write};

use rackvisor_api::client::ClientError;
use rackvisor_api::problem::Problem;
use serde::Serialize;
use serde_json::json;

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// The server, or the way to it.
    Client(ClientError),
    /// Found here, before the server was asked.
    Problem(Box<Problem>),
    /// Standard output takes no more.
    Output(io::Error),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Problem(Box::new(problem))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// How to print.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON instead of text for people.
    pub json: bool,
}

impl Output {
    /// Prints a value: as JSON, or as the text that `human` makes of it.
    pub fn value<T: Serialize>(&self, value: &T, human: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
            writeln!(out)?;
        } else {
            writeln!(out, "{}", human(value).trim_end())?;
        }
        Ok(())
    }

    /// Prints a value on one line: for streams.
    pub fn line<T: Serialize>(&self, value: &T, human: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        if self.json {
            serde_json::to_writer(&mut out, value).map_err(io::Error::from)?;
            writeln!(out)?;
        } else {
            writeln!(out, "{}", human(value))?;
        }
        out.flush()?;
        Ok(())
    }

    /// Says that something is done, where there is nothing to show.
    pub fn done(&self, text: &str) -> Result<(), Failure> {
        if !self.json {
            writeln!(io::stdout(), "{text}")?;
        }
        Ok(())
    }

    /// Prints text as it is.
    pub fn text(&self, text: &str) -> Result<(), Failure> {
        io::stdout().write_all(text.as_bytes())?;
        Ok(())
    }

    /// Tells a failure on standard error: what, where, what to do.
    pub fn failure(&self, failure: &Failure) {
        let problem = match failure {
            Failure::Client(ClientError::Problem(problem)) | Failure::Problem(problem) => Some(problem),
            _ => None,
        };
        let mut error = io::stderr().lock();
        // If standard error takes no more, there is nobody left to tell.
        let _ = match (self.json, problem) {
            (true, Some(problem)) => writeln!(error, "{}", json!(problem)),
            (true, None) => writeln!(error, "{}", json!({ "detail": text(failure) })),
            (false, Some(problem)) => writeln!(error, "{}", human(problem)),
            (false, None) => writeln!(error, "rackctl: {}", text(failure)),
        };
    }
}

fn text(failure: &Failure) -> String {
    match failure {
        Failure::Client(error) => error.to_string(),
        Failure::Problem(problem) => problem.to_string(),
        Failure::Output(error) => format!("cannot write the output: {error}"),
    }
}

fn human(problem: &Problem) -> String {
    let mut text = format!("rackctl: {}\n", printable(&problem.detail));
    if let Some(pointer) = problem.pointer.as_deref().filter(|pointer| !pointer.is_empty()) {
        text += &format!("  field:   {}\n", printable(pointer));
    }
    if !problem.remedy.is_empty() {
        text += &format!("  remedy:  {}\n", printable(&problem.remedy));
    }
    text + &format!("  code:    {} ({})", problem.kind.rsplit(':').next().unwrap_or_default(), problem.status)
}

/// Text from elsewhere, without what a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
