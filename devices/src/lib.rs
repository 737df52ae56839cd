//! What the guest sees, and what stands behind it.
//!
//! This crate knows neither KVM nor HTTP, so that every device can be tested on any machine. It meets the rest of the
//! VMM at few seams: [`bus::BusDevice`] (register accesses), [`virtio::VirtioDevice`] (rings), [`interrupt`] (who injects
//! interrupts), [`IoEvents`] (who turns a guest write into an eventfd), [`ThreadSpawner`] (who starts worker threads under
//! their filter), [`DeviceNotifier`] (who is told of what happens) and [`metrics`].
//!
//! Invariant: nothing that a guest does may panic, hang, leak or grow the process, or make a thread spin.

pub mod acpi;
pub mod block;
pub mod bus;
pub mod chipset;
pub mod console;
pub mod firmware;
pub mod generation;
pub mod interrupt;
pub mod limiter;
pub mod metrics;
pub mod net;
mod pace;
pub mod pages;
pub mod pci;
mod scheduling;
mod shown;
pub mod smbios;
mod socket;
mod syscall;
pub mod throttle;
pub mod tpm;
mod uring;
pub mod virtio;

use std::io;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

/// Guest RAM as every device sees it. A snapshot of the map is taken per batch (`memory.memory()`), so that RAM can be
/// added while devices run.
pub type GuestMemory = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap>;

/// Turns a guest write at an address into an eventfd signal without a trip through the VMM (KVM's ioeventfd).
pub trait IoEvents: Send + Sync {
    /// Signals `event` for each guest write of any width and value at guest-physical `address`.
    ///
    /// # Errors
    /// What the kernel answered: `EEXIST` where the address is taken, `ENOSPC` where KVM has no place left.
    fn register(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Undoes [`IoEvents::register`] with the same arguments.
    ///
    /// # Errors
    /// `ENOENT` if there is no such registration.
    fn unregister(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// What a thread does, and so which system calls it may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Runs a vCPU.
    Vcpu,
    /// Serves a queue of a disk.
    Block,
    /// Serves a pair of queues of a NIC.
    Net,
    /// Serves the queue of the entropy device.
    Rng,
    /// Serves the queues of the memory balloon.
    Balloon,
    /// Looks after the reservation of a disk.
    Reservation,
    /// Speaks with those who read and type on the console.
    Console,
    /// Speaks with swtpm.
    Tpm,
    /// Waits for interrupts of the clock.
    Rtc,
    /// Writes variables of firmware.
    Flash,
    /// Loads kernel and initrd.
    Images,
    /// Does what may wait, and starts all others of a machine.
    Jobs,
    /// Writes reports of panics.
    Crash,
    /// Writes the log.
    Log,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: [Self; 14] = [
        Self::Vcpu,
        Self::Block,
        Self::Net,
        Self::Rng,
        Self::Balloon,
        Self::Reservation,
        Self::Console,
        Self::Tpm,
        Self::Rtc,
        Self::Flash,
        Self::Images,
        Self::Jobs,
        Self::Crash,
        Self::Log,
    ];

    /// Its name, which is that of its policy in `resources/seccomp`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu",
            Self::Block => "block",
            Self::Net => "net",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Reservation => "reservation",
            Self::Console => "console",
            Self::Tpm => "tpm",
            Self::Rtc => "rtc",
            Self::Flash => "flash",
            Self::Images => "images",
            Self::Jobs => "jobs",
            Self::Crash => "crash",
            Self::Log => "log",
        }
    }
}

/// Starts the threads of this VM. The owner names them, puts them under their system-call filter and joins them at the end.
pub trait ThreadSpawner: Send + Sync {
    /// Starts a thread called `name` (at most 15 bytes are shown by the kernel) that runs `body`, which
    /// does what threads of this `kind` do.
    ///
    /// # Errors
    /// What the kernel answered when it refused another thread.
    fn spawn(&self, kind: ThreadKind, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>;
}

/// Starts plain threads, for tests and for embedders without filters.
#[derive(Debug, Default, Clone, Copy)]
pub struct PlainThreads;

impl ThreadSpawner for PlainThreads {
    fn spawn(&self, _kind: ThreadKind, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name.to_owned()).spawn(body)
    }
}

/// What a device tells its VM. Never a way to wait: whoever implements [`DeviceNotifier`] only queues it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceEvent {
    /// A `stop` that answered "still busy" has drained: asking again will succeed.
    Drained,
    /// The host reported an I/O error on a disk.
    IoError {
        /// What was being done: `read`, `write`, `flush`, `discard` or `write_zeroes`.
        operation: &'static str,
        /// First byte on the disk.
        offset: u64,
        /// Number of bytes.
        bytes: u64,
        /// The host's errno.
        errno: i32,
        /// The guest was not told: the request is kept, and the queue stands still until the device is stopped and started.
        held: bool,
    },
    /// A disk shrank under the guest, which goes on with the old size.
    Shrunk {
        /// Size that the guest sees, in bytes.
        from: u64,
        /// Size that the disk has, in bytes.
        to: u64,
    },
    /// The device's capacity changed, to this many bytes.
    Resized {
        /// The new capacity in bytes.
        bytes: u64,
    },
    /// The driver broke the rules of the ring; the device waits for a reset (virtio 1.2 §2.1.1 DEVICE_NEEDS_RESET).
    NeedsReset {
        /// What was wrong, for the operator.
        reason: String,
    },
    /// The host side of the device (tap), which had failed, works again.
    BackendRestored {
        /// What works, for the operator.
        detail: String,
    },
    /// The host side of the device (tap, LUN) failed and the device works on without it.
    BackendLost {
        /// What failed, for the operator.
        reason: String,
    },
    /// The guest said that it panicked.
    GuestPanicked {
        /// A kernel that writes a dump takes over.
        dumping: bool,
    },
    /// Another host took the LUN from this one: nothing is written to it any more, and the guest cannot go on.
    ReservationLost {
        /// The key of the host that has it now, if one has.
        holder: Option<u64>,
    },
}

/// Where devices send what they have to tell. Called from any thread; must neither block nor fail.
pub trait DeviceNotifier: Send + Sync {
    /// Queues `event` of the device with identifier `device`.
    fn notify(&self, device: &str, event: DeviceEvent);
}

/// Forgets all that it is told, for tests.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoNotifier;

impl DeviceNotifier for NoNotifier {
    fn notify(&self, _device: &str, _event: DeviceEvent) {}
}
