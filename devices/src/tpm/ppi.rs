//! The memory through which the guest asks firmware for changes of the TPM (TCG PC Client Physical Presence Interface 1.30), laid out as
//! stock OVMF expects it (QEMU docs/specs/tpm.rst, "ACPI PPI Interface"): the guest's ACPI code writes a request, firmware acts on it
//! at the next boot. Bytes and nothing else; they live as long as the machine, over its resets.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::PPI_LENGTH;
use crate::bus::{BusDevice, VmRequest};

/// Offset of the memory overwrite request (TCG Platform Reset Attack Mitigation 1.10 §3).
const MEMORY_OVERWRITE: usize = 0x15a;

/// Physical presence memory.
pub struct Ppi(Mutex<[u8; PPI_LENGTH as usize]>);

impl Default for Ppi {
    fn default() -> Self {
        Self::new()
    }
}

impl Ppi {
    /// No request, and no operation that firmware supports.
    #[must_use]
    pub fn new() -> Self {
        Self(Mutex::new([0; PPI_LENGTH as usize]))
    }

    /// Whether the guest wants its RAM to be cleared at the next reset, as it holds secrets.
    #[must_use]
    pub fn wants_memory_overwrite(&self) -> bool {
        self.lock().get(MEMORY_OVERWRITE).is_some_and(|byte| byte & 1 != 0)
    }

    fn lock(&self) -> MutexGuard<'_, [u8; PPI_LENGTH as usize]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Ppi {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let memory = self.lock();
        let bytes = usize::try_from(offset).ok().and_then(|at| memory.get(at..)).unwrap_or_default();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(index).copied().unwrap_or(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        let mut memory = self.lock();
        let bytes = usize::try_from(offset).ok().and_then(|at| memory.get_mut(at..)).unwrap_or_default();
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        None
    }
}
