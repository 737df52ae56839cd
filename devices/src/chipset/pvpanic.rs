//! pvpanic: a port by which a guest says that it panicked (QEMU's docs/specs/pvpanic; the ACPI device `QEMU0001`). Linux and
//! virtio-win have drivers for it. The one on the ISA bus takes no PCI slot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::{BusDevice, VmRequest};
use crate::{DeviceEvent, DeviceNotifier};

/// What events of the device are of.
pub const PVPANIC_ID: &str = "pvpanic";

const PANICKED: u8 = 1 << 0;
/// It panicked, and a kernel that writes a dump takes over.
const DUMPING: u8 = 1 << 1;

/// The port. It tells of the first panic since power-on.
pub struct Pvpanic {
    notifier: Arc<dyn DeviceNotifier>,
    told: AtomicBool,
}

impl Pvpanic {
    /// A port whose news go to `notifier`.
    #[must_use]
    pub fn new(notifier: Arc<dyn DeviceNotifier>) -> Self {
        Self { notifier, told: AtomicBool::new(false) }
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.told.store(false, Ordering::Relaxed);
    }
}

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | DUMPING);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<VmRequest> {
        let events = data.first()? & (PANICKED | DUMPING);
        if events != 0 && !self.told.swap(true, Ordering::Relaxed) {
            self.notifier.notify(PVPANIC_ID, DeviceEvent::GuestPanicked { dumping: events & DUMPING != 0 });
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::tests::{read8, write8};
    use super::*;

    #[derive(Default)]
    struct News(Mutex<Vec<DeviceEvent>>);

    impl DeviceNotifier for News {
        fn notify(&self, device: &str, event: DeviceEvent) {
            assert_eq!(device, PVPANIC_ID);
            self.0.lock().unwrap().push(event);
        }
    }

    #[test]
    fn the_first_panic_since_power_on_is_told_and_what_is_no_panic_is_not() {
        let news = Arc::<News>::default();
        let port = Pvpanic::new(Arc::clone(&news) as _);
        assert_eq!(read8(&port, 0), 3);
        write8(&port, 0, 0xfc);
        assert!(news.0.lock().unwrap().is_empty());
        for _ in 0..3 {
            assert_eq!(write8(&port, 0, PANICKED), None);
        }
        port.reset();
        write8(&port, 0, PANICKED | DUMPING);
        let told = [false, true].map(|dumping| DeviceEvent::GuestPanicked { dumping });
        assert_eq!(*news.0.lock().unwrap(), told);
    }
}
