//! The TPM.

use rackvisor_api::config::{TPM_ID, TpmConfig};
use rackvisor_devices::tpm::{Tpm, TpmOptions};

use super::{AssemblyError, Host};

/// Connects to swtpm and makes the TPM, if there is to be one.
///
/// # Errors
/// [`AssemblyError::Tpm`].
pub fn open(config: Option<&TpmConfig>, host: &Host) -> Result<Option<Tpm>, AssemblyError> {
    let Some(config) = config else { return Ok(None) };
    let options = TpmOptions { id: TPM_ID.to_owned(), socket: config.socket.clone() };
    Ok(Some(Tpm::new(options, &*host.spawner, host.notifier.clone())?))
}
