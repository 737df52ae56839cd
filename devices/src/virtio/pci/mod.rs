//! The virtio-pci transport (virtio 1.2 §4.1), modern only.
//!
//! [`VirtioPci`] makes a PCI function of a [`VirtioDevice`]: configuration space, one BAR with everything in it, MSI-X with one
//! vector per queue and one for configuration changes, an ioeventfd per queue. It has no thread: all happens on the vCPU
//! thread that accesses a register, or on the control thread that pauses, resumes and resets.

mod layout;
mod signals;
#[cfg(test)]
mod tests;
mod transport;
mod view;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::layout::{BAR, BAR_KIND, BAR_LENGTH, Layout, MAX_QUEUES, NOTIFY_MULTIPLIER, Region, WindowRegisters};
use self::signals::Signals;
use self::transport::{Transport, Wiring};
use self::view::Place;
pub use self::view::{QueueView, TransportState, TransportView};
use super::{StartError, StillBusy, TransportSignals, VirtioDevice};
use crate::bus::{BusDevice, VmRequest};
use crate::interrupt::{MsiController, Vector};
use crate::metrics::{Counter, MetricSource, Sample, Value};
use crate::pci::config::ConfigSpace;
use crate::pci::msix::MsixTable;
use crate::pci::{BarMapping, ConfigEffect, PciFunction};
use crate::shown::Shown;
use crate::{DeviceNotifier, GuestMemory};

/// Close-on-exec, besides non-blocking: no child process may hold a kick.
const EVENT_FLAGS: i32 = EFD_NONBLOCK | libc::EFD_CLOEXEC;

/// Why a device could not be put on PCI.
#[derive(Debug, Error)]
pub enum TransportError {
    /// More queues than notification registers and vectors.
    #[error("device {id} has {queues} queues, the most are {MAX_QUEUES}: give it fewer")]
    TooManyQueues {
        /// Identifier of the device.
        id: String,
        /// Its queues.
        queues: usize,
    },
    /// The host had no eventfd or interrupt route left.
    #[error("host refused an interrupt or eventfd for device {id}: {source}; raise its limit of open files")]
    Host {
        /// Identifier of the device.
        id: String,
        /// What it answered.
        source: io::Error,
    },
    /// A mistake in the layout of configuration space.
    #[error("configuration space of device {id}: {source}")]
    Config {
        /// Identifier of the device.
        id: String,
        /// What does not fit.
        source: crate::pci::config::ConfigError,
    },
}

/// What the driver has made of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverState {
    /// It has not started the device, or has reset it.
    Idle,
    /// It uses the device.
    Active,
    /// It has broken the device and has to reset it.
    NeedsReset,
}

/// A virtio device as a PCI function. Clones are handles to the same device.
#[derive(Clone)]
pub struct VirtioPci {
    shared: Arc<Shared>,
}

struct Shared {
    signals: Arc<Signals>,
    msix: Arc<MsixTable>,
    kicks: Vec<Arc<EventFd>>,
    state: Mutex<State>,
    metrics: Arc<TransportMetrics>,
}

struct State {
    config: ConfigSpace,
    msix_control: u16,
    window: WindowRegisters,
    transport: Transport,
}

impl VirtioPci {
    /// Puts `device`, called `id` in logs, events and metrics, on PCI. Its BAR is unassigned and its interrupts, made by
    /// `msi`, are masked. `notifier` hears of a driver that broke the device.
    ///
    /// # Errors
    /// [`TransportError`] if the device has too many queues or the host is out of descriptors.
    pub fn new(
        id: String,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        msi: &dyn MsiController,
        notifier: Arc<dyn DeviceNotifier>,
    ) -> Result<Self, TransportError> {
        let queues = device.queue_sizes().len();
        let Some(count) = u16::try_from(queues).ok().filter(|count| *count <= MAX_QUEUES) else {
            return Err(TransportError::TooManyQueues { id, queues });
        };
        let layout = match Layout::new(device.device_type(), count + 1) {
            Ok(layout) => layout,
            Err(source) => return Err(TransportError::Config { id, source }),
        };
        let (vectors, kicks) = match make_vectors(msi, count).and_then(|vectors| Ok((vectors, make_kicks(count)?))) {
            Ok(made) => made,
            Err(source) => return Err(TransportError::Host { id, source }),
        };
        let signals = Arc::new(Signals::new(id, notifier, Arc::clone(&vectors)));
        let msix = Arc::new(MsixTable::new(vectors));
        let Layout { config, msix_control, window } = layout;
        let metrics = Arc::new(TransportMetrics {
            signals: Arc::clone(&signals),
            msix: Arc::clone(&msix),
            place: Place::of(&config),
            device: device.metrics(),
            trapped_kicks: Counter::default(),
            resets: Counter::default(),
            shown: Shown::default(),
        });
        let wiring = Wiring { signals: Arc::clone(&signals), msix: Arc::clone(&msix), metrics: Arc::clone(&metrics) };
        let transport = Transport::new(device, memory, wiring, &kicks);
        let state = Mutex::new(State { config, msix_control, window, transport });
        Ok(Self { shared: Arc::new(Shared { signals, msix, kicks, state, metrics }) })
    }

    /// The identifier given to [`VirtioPci::new`].
    #[must_use]
    pub fn id(&self) -> &str {
        self.shared.signals.id()
    }

    /// What the driver has made of the device so far.
    #[must_use]
    pub fn driver_state(&self) -> DriverState {
        // Without the lock: a vCPU holds it while the kernel changes its routes.
        let signals = &self.shared.signals;
        match (signals.is_broken(), signals.is_driven()) {
            (true, _) => DriverState::NeedsReset,
            (false, true) => DriverState::Active,
            (false, false) => DriverState::Idle,
        }
    }

    /// Stops the device and keeps its queue positions, until [`VirtioPci::resume`]. Pausing twice is harmless.
    ///
    /// # Errors
    /// [`StillBusy`] while requests are in flight: the device takes no new ones, ask again (or resume it).
    pub fn pause(&self) -> Result<(), StillBusy> {
        self.shared.lock().transport.pause()
    }

    /// Lets a paused device go on where it was, with a kick for all queues, as the driver may have kicked meanwhile.
    ///
    /// # Errors
    /// [`StartError::Running`] after a pause that has not drained: ask again. Any other [`StartError`]: the device is stopped
    /// and its driver sees DEVICE_NEEDS_RESET.
    pub fn resume(&self) -> Result<(), StartError> {
        self.shared.lock().transport.resume()
    }

    /// Back to power-on, PCI configuration included, as at a machine reset. Map its BAR anew afterwards. A paused device stays
    /// paused. Resetting twice is harmless.
    ///
    /// # Errors
    /// [`StillBusy`] while requests are in flight: nothing is reset yet, ask again.
    pub fn reset(&self) -> Result<(), StillBusy> {
        let mut state = self.shared.lock();
        state.transport.try_reset()?;
        state.config.reset();
        self.shared.metrics.place.follow(&state.config);
        self.shared.msix.reset();
        Ok(())
    }

    /// The way to the driver that the device is started with, for who changes the device's configuration from outside.
    #[must_use]
    pub fn signals(&self) -> Arc<dyn TransportSignals> {
        Arc::clone(&self.shared.signals) as Arc<dyn TransportSignals>
    }

    /// A look at the device for whoever must not wait for it.
    #[must_use]
    pub fn view(&self) -> TransportView {
        TransportView(Arc::clone(&self.shared.metrics))
    }

    /// The counters of the transport and of the device behind it.
    #[must_use]
    pub fn metrics(&self) -> Arc<dyn MetricSource> {
        Arc::clone(&self.shared.metrics) as Arc<dyn MetricSource>
    }
}

fn make_vectors(msi: &dyn MsiController, queues: u16) -> io::Result<Arc<[Arc<Vector>]>> {
    (0..=queues).map(|_| Ok(Arc::new(Vector::new(msi.create()?)))).collect()
}

fn make_kicks(queues: u16) -> io::Result<Vec<Arc<EventFd>>> {
    (0..queues).map(|_| EventFd::new(EVENT_FLAGS).map(Arc::new)).collect()
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.shared.lock();
        let state = &mut *state;
        if overlaps(offset, data.len(), state.window.data)
            && let Some((target, length)) = state.window_target()
        {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..length) {
                self.shared.read_locked(&mut state.transport, target, value);
                state.config.set(state.window.data, value);
            }
        }
        state.config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        let mut state = self.shared.lock();
        let state = &mut *state;
        let moved = state.config.write(offset, data);
        self.shared.metrics.place.follow(&state.config);
        self.shared.msix.set_control(state.config.word(state.msix_control));
        if overlaps(offset, data.len(), state.window.data)
            && let Some((target, length)) = state.window_target()
        {
            let value = state.config.dword(state.window.data).to_le_bytes();
            if let Some(value) = value.get(..length) {
                self.shared.write_locked(&mut state.transport, target, value);
            }
        }
        moved.into()
    }

    fn bars(&self) -> Vec<BarMapping> {
        let address = self.shared.lock().config.bar_address(BAR);
        let kicks = (0u16..).zip(&self.shared.kicks);
        vec![BarMapping {
            index: BAR,
            address,
            length: BAR_LENGTH,
            kind: BAR_KIND,
            device: Arc::clone(&self.shared) as Arc<dyn BusDevice>,
            ioevents: kicks.map(|(queue, kick)| (layout::notify_offset(queue), Arc::clone(kick))).collect(),
        }]
    }

    fn reset(&self) -> Result<(), StillBusy> {
        VirtioPci::reset(self)
    }
}

impl State {
    /// Where the PCI configuration access capability points, and how many bytes it moves: 1, 2 or 4 aligned ones, so
    /// that they lie in one region or in none; `None` for anything else (§4.1.4.9.1).
    fn window_target(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        self.config.read(self.window.bar, &mut bar);
        let offset = u64::from(self.config.dword(self.window.offset));
        let length = self.config.dword(self.window.length);
        let whole = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(u64::from(length));
        (bar == [BAR] && whole).then_some((offset, usize::try_from(length).ok()?))
    }
}

/// Whether an access touches the four bytes at `register`.
fn overlaps(offset: u16, length: usize, register: u16) -> bool {
    let (offset, register) = (usize::from(offset), usize::from(register));
    offset < register + 4 && register < offset.saturating_add(length)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_locked(&self, transport: &mut Transport, offset: u64, data: &mut [u8]) {
        match Region::of(offset) {
            Region::Common(offset) => transport.read_common(offset, data),
            Region::Device(offset) => transport.read_device(offset, data),
            other => self.read_free(other, data),
        }
    }

    fn write_locked(&self, transport: &mut Transport, offset: u64, data: &[u8]) {
        match Region::of(offset) {
            Region::Common(offset) => transport.write_common(offset, data),
            Region::Device(offset) => transport.write_device(offset, data),
            other => self.write_free(other, data),
        }
    }

    /// Regions that need no lock.
    fn read_free(&self, region: Region, data: &mut [u8]) {
        data.fill(0);
        match region {
            Region::Isr(0) => {
                if let Some(first) = data.first_mut() {
                    *first = self.signals.take_isr();
                }
            }
            Region::MsixTable(offset) => self.msix.read_table(offset, data),
            Region::MsixPending(offset) => self.msix.read_pending(offset, data),
            _ => {}
        }
    }

    /// Regions that need no lock.
    fn write_free(&self, region: Region, data: &[u8]) {
        match region {
            Region::Notify(offset) => {
                let queue = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
                if let Some(kick) = self.kicks.get(queue) {
                    self.metrics.trapped_kicks.increment();
                    // It fails only when the counter is full: then the kick is on its way already.
                    let _ = kick.write(1);
                }
            }
            Region::MsixTable(offset) => self.msix.write_table(offset, data),
            _ => {}
        }
    }
}

impl BusDevice for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Region::of(offset) {
            Region::Common(_) | Region::Device(_) => self.read_locked(&mut self.lock().transport, offset, data),
            other => self.read_free(other, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<VmRequest> {
        match Region::of(offset) {
            Region::Common(_) | Region::Device(_) => self.write_locked(&mut self.lock().transport, offset, data),
            other => self.write_free(other, data),
        }
        None
    }
}

/// What the transport counts.
struct TransportMetrics {
    signals: Arc<Signals>,
    msix: Arc<MsixTable>,
    place: Place,
    device: Arc<dyn MetricSource>,
    trapped_kicks: Counter,
    resets: Counter,
    shown: Shown<TransportState>,
}

impl MetricSource for TransportMetrics {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        let labels = || vec![("device", self.signals.id().to_owned())];
        for (name, help, counter) in [
            ("virtio_trapped_kicks", "Kicks that left the guest for want of an ioeventfd.", &self.trapped_kicks),
            ("virtio_resets", "Resets of the device, by its driver or with the machine.", &self.resets),
            ("virtio_needs_resets", "Times that the driver broke the device.", &self.signals.needs_resets),
        ] {
            visit(Sample { name, help, labels: labels(), value: Value::Counter(counter.value()) });
        }
        for (vector, source) in self.signals.vectors().iter().enumerate() {
            let mut labels = labels();
            labels.push(("vector", vector.to_string()));
            let help = "Interrupts that the device raised, masked ones included.";
            visit(Sample { name: "virtio_interrupts", help, labels, value: Value::Counter(source.fired()) });
        }
        self.device.collect(visit);
    }
}
