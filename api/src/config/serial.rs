//! The serial console.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::{check_path, check_socket_path};
use crate::problem::{Pointer, Problem};

/// Where the first serial port (ttyS0) goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// What is at the other end.
    pub mode: SerialMode,
    /// The file or socket, for the modes that have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub path: Option<PathBuf>,
}

/// What is at the other end of the serial port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SerialMode {
    /// Nothing: output is dropped.
    #[default]
    Off,
    /// Standard input and output of the VMM.
    Stdio,
    /// A file that output is appended to (`path`).
    File,
    /// A pseudo-terminal; its path is in the description of the VM.
    Pty,
    /// A Unix socket that several clients may join (`path`).
    Socket,
}

impl SerialConfig {
    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        let path_at = at.key("path");
        match (self.mode, &self.path) {
            (SerialMode::File, Some(path)) => check_path(path, &path_at),
            (SerialMode::Socket, Some(path)) => check_socket_path(path, &path_at),
            (SerialMode::File | SerialMode::Socket, None) => {
                Err(Problem::invalid(&path_at, "this serial mode needs a path", "give the path of the file or socket"))
            }
            (_, Some(_)) => Err(Problem::invalid(
                &path_at,
                "this serial mode has no path",
                "leave path out, or choose mode file or socket",
            )),
            (_, None) => Ok(()),
        }
    }
}
