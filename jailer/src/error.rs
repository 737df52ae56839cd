//! Why there is no jail.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// What was wrong. Nothing is left behind then.
#[derive(Debug, Error)]
pub enum JailError {
    /// Somebody but root could change what a path leads to.
    #[error("{}: {reason}; nobody but root may be able to change what this path leads to", path.display())]
    Untrusted {
        /// The path, as it was given.
        path: PathBuf,
        /// Which part of it, and why.
        reason: String,
    },
    /// The VM runs.
    #[error("{} is in use: VM {id} runs already; stop it, or choose another id", folder.display())]
    InUse {
        /// The VM.
        id: String,
        /// What is locked.
        folder: PathBuf,
    },
    /// What an earlier run left cannot be cleaned away.
    #[error("what an earlier run of VM {id} left cannot be removed: {reason}")]
    Remains {
        /// The VM.
        id: String,
        /// What, why, and what to do.
        reason: String,
    },
    /// The command line asks for something that is not there or does not fit.
    #[error("{0}")]
    Unusable(String),
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Refused {
        /// What was asked for.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// The jail stands, but the VMM cannot be started in it.
    #[error("cannot start {} in the jail: {source}", vmm.display())]
    Start {
        /// The program.
        vmm: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The process that builds the jail has said why not.
    #[error("{text}")]
    Told {
        /// Its words.
        text: String,
        /// Its exit code.
        code: u8,
    },
}

impl JailError {
    /// The exit code, as the help tells.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Untrusted { .. } => 121,
            Self::InUse { .. } => 122,
            Self::Refused { .. } | Self::Remains { .. } | Self::Unusable(_) => 125,
            Self::Start { .. } => 126,
            Self::Told { code, .. } => *code,
        }
    }
}

/// Names what the kernel was asked for.
pub fn refused<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Refused { what: what.into(), source: source.into() }
}

/// As [`refused`], with a path at the end.
pub fn refused_at<'a, E: Into<io::Error>>(what: &'a str, path: &'a Path) -> impl FnOnce(E) -> JailError + 'a {
    move |source| JailError::Refused { what: format!("{what} {}", path.display()), source: source.into() }
}
