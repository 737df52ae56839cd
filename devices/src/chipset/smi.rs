//! System management interrupts: SMI_EN and its lock (ICH9 datasheet §13.8.1, §13.8.3), the APM command that raises one, and
//! how firmware agrees on who takes it (the fw_cfg files of QEMU's ICH9 LPC bridge).
//!
//! | file | bytes | |
//! |---|---|---|
//! | `etc/smi/supported-features` | 8, little-endian | read only; bit 0: an SMI reaches all vCPUs, not only the one that raises it |
//! | `etc/smi/requested-features` | 8 | the firmware writes what of it it wants |
//! | `etc/smi/features-ok` | 1 | reads as 1 once that was found possible, which cannot be changed before a reset then |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::VmRequest;
use crate::firmware::fw_cfg::LiveFile;

/// SMI_EN: SMIs as such.
const GBL_SMI_EN: u32 = 1 << 0;
/// SMI_EN: an SMI for each write of the APM control port.
const APMC_EN: u32 = 1 << 5;

/// Every SMI reaches all vCPUs.
const BROADCAST: u64 = 1 << 0;
const SUPPORTED: u64 = BROADCAST;

#[derive(Debug, Default)]
struct State {
    enable: u32,
    locked: bool,
    requested: [u8; 8],
    agreed: Option<u64>,
}

/// Who raises system management interrupts, and for whom. The default is a machine without them.
#[derive(Debug, Default)]
pub struct SmiControl {
    smm: bool,
    state: Mutex<State>,
}

impl SmiControl {
    /// The control of a machine with or without system management mode, at power-on.
    #[must_use]
    pub fn new(smm: bool) -> Self {
        Self { smm, state: Mutex::default() }
    }

    /// SMI_EN stays on, if it is, until a reset (GEN_PMCON_1.SMI_LOCK).
    pub fn lock_enable(&self) {
        self.lock().locked = true;
    }

    /// The register SMI_EN. Without SMM the APM write SMI reads as set up already, so that firmware leaves it alone.
    pub(super) fn enable(&self) -> u32 {
        self.lock().enable | if self.smm { 0 } else { APMC_EN }
    }

    /// Writes to SMI_EN.
    pub(super) fn set_enable(&self, value: u32) {
        let mut state = self.lock();
        let kept = if state.locked { GBL_SMI_EN } else { 0 };
        state.enable = state.enable & kept | value & !kept;
    }

    /// What a command on the APM control port asks for.
    pub(super) fn command(&self) -> Option<VmRequest> {
        let state = self.lock();
        let wanted = GBL_SMI_EN | APMC_EN;
        let broadcast = state.agreed.is_some_and(|features| features & BROADCAST != 0);
        (self.smm && state.enable & wanted == wanted).then_some(VmRequest::Smi { broadcast })
    }

    /// The files by which firmware agrees on features, with their names.
    #[must_use]
    pub fn files(self: &Arc<Self>) -> Vec<(&'static str, Arc<dyn LiveFile>)> {
        vec![
            ("etc/smi/supported-features", Arc::new(Supported)),
            ("etc/smi/requested-features", Arc::new(Requested(Arc::clone(self)))),
            ("etc/smi/features-ok", Arc::new(FeaturesOk(Arc::clone(self)))),
        ]
    }

    /// Back to power-on.
    pub fn reset(&self) {
        *self.lock() = State::default();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Supported;

impl LiveFile for Supported {
    fn size(&self) -> usize {
        8
    }

    fn select(&self) -> Vec<u8> {
        SUPPORTED.to_le_bytes().to_vec()
    }
}

struct Requested(Arc<SmiControl>);

impl LiveFile for Requested {
    fn size(&self) -> usize {
        8
    }

    fn select(&self) -> Vec<u8> {
        self.0.lock().requested.to_vec()
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        let mut state = self.0.lock();
        let end = offset.checked_add(bytes.len());
        match end.and_then(|end| state.requested.get_mut(offset..end)) {
            Some(part) => {
                part.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }
}

struct FeaturesOk(Arc<SmiControl>);

impl LiveFile for FeaturesOk {
    fn size(&self) -> usize {
        1
    }

    fn select(&self) -> Vec<u8> {
        let mut state = self.0.lock();
        let requested = u64::from_le_bytes(state.requested);
        if state.agreed.is_none() && requested & !SUPPORTED == 0 {
            state.agreed = Some(requested);
        }
        vec![state.agreed.is_some().into()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(smi: &Arc<SmiControl>, name: &str) -> Arc<dyn LiveFile> {
        smi.files().into_iter().find(|(other, _)| *other == name).unwrap().1
    }

    fn on(smi: &SmiControl) {
        smi.set_enable(GBL_SMI_EN | APMC_EN);
    }

    #[test]
    fn a_command_raises_an_smi_while_both_switches_are_on() {
        let smi = SmiControl::new(true);
        for (enable, raised) in [(0, false), (GBL_SMI_EN, false), (APMC_EN, false), (GBL_SMI_EN | APMC_EN, true)] {
            smi.set_enable(enable);
            assert_eq!((smi.enable(), smi.command().is_some()), (enable, raised));
        }
        smi.reset();
        assert_eq!((smi.enable(), smi.command()), (0, None));
    }

    #[test]
    fn locked_smis_stay_on_until_a_reset() {
        let smi = SmiControl::new(true);
        on(&smi);
        smi.lock_enable();
        smi.set_enable(APMC_EN);
        assert_eq!(smi.command(), Some(VmRequest::Smi { broadcast: false }));
        smi.reset();
        on(&smi);
        smi.set_enable(APMC_EN);
        assert_eq!(smi.command(), None);
    }

    #[test]
    fn without_smm_the_firmware_finds_the_command_set_up_and_raises_nothing() {
        let smi = SmiControl::default();
        assert_eq!(smi.enable(), APMC_EN);
        on(&smi);
        assert_eq!(smi.command(), None);
    }

    #[test]
    fn all_vcpus_take_an_smi_once_the_firmware_has_asked_for_that_and_looked_at_the_answer() {
        let smi = Arc::new(SmiControl::new(true));
        on(&smi);
        assert_eq!(file(&smi, "etc/smi/supported-features").select(), 1u64.to_le_bytes());
        let requested = file(&smi, "etc/smi/requested-features");
        assert!(requested.write(0, &1u64.to_le_bytes()));
        assert_eq!(requested.select(), 1u64.to_le_bytes());
        assert_eq!(smi.command(), Some(VmRequest::Smi { broadcast: false }));
        assert_eq!(file(&smi, "etc/smi/features-ok").select(), [1]);
        assert_eq!(smi.command(), Some(VmRequest::Smi { broadcast: true }));
        // From then on it is fixed.
        assert!(requested.write(0, &[0; 8]));
        assert_eq!(file(&smi, "etc/smi/features-ok").select(), [1]);
        assert_eq!(smi.command(), Some(VmRequest::Smi { broadcast: true }));
    }

    #[test]
    fn features_that_there_are_not_are_refused_and_others_may_be_asked_for() {
        let smi = Arc::new(SmiControl::new(true));
        let (requested, ok) = (file(&smi, "etc/smi/requested-features"), file(&smi, "etc/smi/features-ok"));
        assert!(requested.write(1, &[1]));
        assert_eq!(ok.select(), [0]);
        assert!(requested.write(0, &[0; 8]));
        assert_eq!(ok.select(), [1]);
        for (offset, bytes) in [(0, &[0; 9][..]), (8, &[0]), (usize::MAX, &[0])] {
            assert!(!requested.write(offset, bytes));
        }
        assert!(!ok.write(0, &[1]));
    }
}
