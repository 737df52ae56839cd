//! Memory of system management mode (SMM), which the host bridge hides from all else (Intel 3 Series datasheet §5.1;
//! the size of TSEG as QEMU's Q35 tells it).
//!
//! | register | bits | |
//! |---|---|---|
//! | EXT_TSEG_MBYTES | all | reads as the megabytes of TSEG once all ones were written |
//! | SMRAM | D_OPEN 6, D_LCK 4, G_SMRAME 3 | 0xA0000–0xBFFFF is hidden while enabled and not open |
//! | ESMRAMC | T_EN 0 | TSEG, the end of RAM below 4 GiB, is hidden |
//!
//! Firmware chooses neither place nor size of TSEG: what it writes to TSEG_SZ and TSEGMB is kept, no more. D_LCK closes D_OPEN
//! and locks SMRAM, ESMRAMC, TSEGMB and TOLUD until a reset.

use std::io;
use std::sync::{Mutex, PoisonError};

use super::bridge::mch;
use super::config::ConfigSpace;
use crate::throttle::Throttle;

const D_OPEN: u8 = 1 << 6;
const D_LCK: u8 = 1 << 4;
const G_SMRAME: u8 = 1 << 3;
const T_EN: u8 = 1;
const QUERY: u16 = 0xffff;

static HIDE_LOG: Throttle = Throttle::new();

/// What is hidden from all but system management mode.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Hidden {
    /// 128 KiB at 0xA0000.
    pub compatible: bool,
    /// The end of RAM below 4 GiB.
    pub tseg: bool,
}

/// Hides memory from vCPUs outside of system management mode, and from devices.
pub trait SmramMapping: Send + Sync {
    /// Brings about that exactly this is hidden.
    ///
    /// # Errors
    /// What the kernel answered; what is hidden may be some of the old and some of the new then.
    fn hide(&self, hidden: Hidden) -> io::Result<()>;
}

/// The unit of the host bridge that does it.
pub struct Smram {
    mapping: Box<dyn SmramMapping>,
    tseg_mib: u16,
    /// What is hidden now; none if that is not known.
    hidden: Mutex<Option<Hidden>>,
}

impl Smram {
    /// `tseg_mib` MiB of TSEG, and nothing hidden yet.
    #[must_use]
    pub fn new(mapping: Box<dyn SmramMapping>, tseg_mib: u16) -> Self {
        Self { mapping, tseg_mib, hidden: Mutex::new(Some(Hidden::default())) }
    }

    /// Does what the registers say, after they were written or reset. Firmware that does not get what it wants to be hidden
    /// finds the bit clear with which it asked for that.
    pub(super) fn follow(&self, config: &mut ConfigSpace) {
        let byte = |config: &ConfigSpace, at| config.word(at).to_le_bytes()[0];
        if config.word(mch::EXT_TSEG_MBYTES) == QUERY {
            config.set(mch::EXT_TSEG_MBYTES, &self.tseg_mib.to_le_bytes());
        }
        let mut smram = byte(config, mch::SMRAM);
        if smram & D_LCK != 0 {
            smram &= !D_OPEN;
            config.set(mch::SMRAM, &[smram]);
            config.lock(mch::SMRAM, &[0xff]);
            config.lock(mch::ESMRAMC, &[0xff]);
            config.lock(mch::TSEGMB, &[0xff; 4]);
            config.lock(mch::TOLUD, &[0xff; 2]);
        }
        let wanted = Hidden {
            compatible: smram & (G_SMRAME | D_OPEN) == G_SMRAME,
            tseg: byte(config, mch::ESMRAMC) & T_EN != 0,
        };
        let mut hidden = self.hidden.lock().unwrap_or_else(PoisonError::into_inner);
        if *hidden == Some(wanted) {
            return;
        }
        let done = self.mapping.hide(wanted);
        *hidden = done.is_ok().then_some(wanted);
        if let Err(error) = done {
            config.set(mch::SMRAM, &[smram & !G_SMRAME]);
            config.set(mch::ESMRAMC, &[byte(config, mch::ESMRAMC) & !T_EN]);
            if let Some(held_back) = HIDE_LOG.pass() {
                tracing::error!(held_back, ?wanted, "memory of system management mode cannot be hidden: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::PciFunction;
    use super::super::bridge::HostBridge;
    use super::*;
    use crate::bus::BusDevice;

    const NOTHING: Hidden = Hidden { compatible: false, tseg: false };
    const TSEG: Hidden = Hidden { compatible: false, tseg: true };
    const COMPATIBLE: Hidden = Hidden { compatible: true, tseg: false };

    #[derive(Default)]
    struct Curtain {
        hidden: Mutex<Hidden>,
        stuck: AtomicBool,
    }

    struct Handle(Arc<Curtain>);

    impl SmramMapping for Handle {
        fn hide(&self, hidden: Hidden) -> io::Result<()> {
            if self.0.stuck.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            *self.0.hidden.lock().unwrap() = hidden;
            Ok(())
        }
    }

    struct Nothing;

    impl BusDevice for Nothing {
        fn read(&self, _offset: u64, _data: &mut [u8]) {}

        fn write(&self, _offset: u64, _data: &[u8]) -> Option<crate::bus::VmRequest> {
            None
        }
    }

    struct Bench {
        bridge: HostBridge,
        curtain: Arc<Curtain>,
    }

    impl Bench {
        fn new() -> Self {
            let curtain = Arc::<Curtain>::default();
            let smram = Smram::new(Box::new(Handle(Arc::clone(&curtain))), 16);
            Self { bridge: HostBridge::new(None, Arc::new(Nothing)).with_smram(smram), curtain }
        }

        fn write(&self, register: u16, data: &[u8]) {
            assert_eq!(self.bridge.config_write(register, data), super::super::ConfigEffect::None);
        }

        fn read(&self, register: u16) -> u8 {
            let mut data = [0];
            self.bridge.config_read(register, &mut data);
            data[0]
        }

        fn hidden(&self) -> Hidden {
            *self.curtain.hidden.lock().unwrap()
        }
    }

    #[test]
    fn the_size_of_tseg_is_told_when_it_is_asked_for() {
        let bench = Bench::new();
        assert_eq!(bench.read(mch::EXT_TSEG_MBYTES), 0);
        bench.write(mch::EXT_TSEG_MBYTES, &[0xff; 2]);
        let mut size = [0; 2];
        bench.bridge.config_read(mch::EXT_TSEG_MBYTES, &mut size);
        assert_eq!(u16::from_le_bytes(size), 16);
        // Without memory for it, what was written comes back: no answer.
        let without = HostBridge::new(None, Arc::new(Nothing));
        let _ = without.config_write(mch::EXT_TSEG_MBYTES, &[0xff; 2]);
        without.config_read(mch::EXT_TSEG_MBYTES, &mut size);
        assert_eq!(size, [0xff; 2]);
    }

    #[test]
    fn memory_is_hidden_while_it_is_enabled_and_not_open() {
        let bench = Bench::new();
        assert_eq!(bench.hidden(), NOTHING);
        bench.write(mch::ESMRAMC, &[T_EN]);
        assert_eq!(bench.hidden(), TSEG);
        bench.write(mch::ESMRAMC, &[0]);
        assert_eq!(bench.hidden(), NOTHING);
        bench.write(mch::SMRAM, &[G_SMRAME]);
        assert_eq!(bench.hidden(), COMPATIBLE);
        bench.write(mch::SMRAM, &[G_SMRAME | D_OPEN]);
        assert_eq!(bench.hidden(), NOTHING);
    }

    #[test]
    fn what_is_locked_stays_hidden_until_a_reset() {
        let bench = Bench::new();
        bench.write(mch::ESMRAMC, &[T_EN]);
        bench.write(mch::SMRAM, &[G_SMRAME | D_OPEN | D_LCK]);
        let both = Hidden { compatible: true, tseg: true };
        assert_eq!((bench.hidden(), bench.read(mch::SMRAM) & D_OPEN), (both, 0), "the lock closes it");
        for (register, data) in [(mch::SMRAM, D_OPEN), (mch::SMRAM, 0), (mch::ESMRAMC, 0), (mch::TSEGMB + 3, 0xff)] {
            let before = bench.read(register);
            bench.write(register, &[data]);
            assert_eq!((bench.hidden(), bench.read(register)), (both, before), "{register:#x}");
        }
        bench.bridge.reset().unwrap();
        assert_eq!(bench.hidden(), NOTHING);
        bench.write(mch::ESMRAMC, &[T_EN]);
        assert_eq!(bench.hidden(), TSEG);
    }

    #[test]
    fn firmware_sees_that_its_memory_could_not_be_hidden_and_may_try_again() {
        let bench = Bench::new();
        bench.curtain.stuck.store(true, Ordering::Relaxed);
        bench.write(mch::ESMRAMC, &[T_EN]);
        assert_eq!((bench.read(mch::ESMRAMC) & T_EN, bench.hidden()), (0, NOTHING));
        bench.curtain.stuck.store(false, Ordering::Relaxed);
        bench.write(mch::ESMRAMC, &[T_EN]);
        assert_eq!((bench.read(mch::ESMRAMC) & T_EN, bench.hidden()), (T_EN, TSEG));
    }
}
