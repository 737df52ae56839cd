//! The TPM.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::check_socket_path;
use crate::problem::{Pointer, Problem};

/// The name of the TPM in events and metrics.
pub const TPM_ID: &str = "tpm";

/// A TPM 2.0 (command response buffer), played by swtpm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TpmConfig {
    /// The control socket of a swtpm that runs: `swtpm socket --tpm2 --tpmstate dir=… --ctrl type=unixio,path=…`. Its state is the
    /// guest's: it has to be kept, and to go with the VM.
    #[schema(value_type = String)]
    pub socket: PathBuf,
}

impl TpmConfig {
    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        check_socket_path(&self.socket, &at.key("socket"))
    }
}
