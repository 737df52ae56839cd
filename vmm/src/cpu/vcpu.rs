//! A vCPU: a thread that runs the guest, and parks when it is told to.
//!
//! Commands go through a channel and a signal. The signal's handler makes KVM_RUN return at once even where it arrives
//! just before it, so no command waits for the guest.
#![allow(unsafe_code)] // The signal handler reaches into the `kvm_run` of its own thread.

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};

use kvm_bindings::{
    KVM_EXIT_HYPERV_HCALL, KVM_RUN_X86_SMM, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rackvisor_devices::bus::{Bus, VmRequest};
use rackvisor_devices::chipset::IoApic;
use rackvisor_devices::pci::Root;

use super::hyperv::CRASH_PARAMETERS;
use super::metrics::{Exit, VcpuMetrics};
use super::state::{self, PowerOnState};
use super::stop::Moving;
use crate::boot::Entry;
use crate::kvm::KvmError;
use crate::kvm::smm::KvmSmis;

/// What a vCPU is told to do.
#[derive(Debug)]
pub enum Command {
    /// Run the guest.
    Run,
    /// Stop running the guest, then let go of this.
    Park(Moving),
    /// Back to power-on; the boot vCPU gets the entry point. Only while parked.
    Reset(Option<Entry>, SyncSender<Result<(), KvmError>>),
    /// Deliver a non-maskable interrupt.
    Nmi,
    /// End the thread.
    Exit,
}

/// What a vCPU tells the control thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest asked for something that concerns the whole VM. The vCPU is parked until it is told to go on.
    Request(VmRequest),
    /// All vCPUs that were told to stop stand still.
    Stopped,
    /// The guest or KVM failed. The vCPU is parked.
    Crashed(String),
    /// The guest told the parameters of its crash by Hyper-V's MSRs. It goes on: it may want to write a dump.
    GuestPanicked(Vec<u64>),
}

/// Where a vCPU sends its events. Never blocks.
pub type EventSink = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

/// What a vCPU's accesses reach.
#[derive(Clone)]
pub struct Platform {
    /// Ports.
    pub pio: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// Memory-mapped registers as seen from system management mode.
    pub smm_mmio: Arc<Bus>,
    /// Moves BARs.
    pub pci: Arc<Root>,
    /// Raises system management interrupts.
    pub smis: KvmSmis,
    /// Our I/O APIC, if KVM's is not used: it is told when interrupts have been served.
    pub io_apic: Option<Arc<IoApic>>,
}

impl Platform {
    /// What memory accesses of the vCPU reach that `run` belongs to.
    fn mmio_of(&self, run: *mut kvm_run) -> &Bus {
        // SAFETY: the mapping is alive, as the VcpuFd that owns it is; KVM writes the field at each exit.
        let flags = unsafe { (*run).flags };
        if u32::from(flags) & KVM_RUN_X86_SMM != 0 { &self.smm_mmio } else { &self.mmio }
    }
}

thread_local! {
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The real-time signal that kicks vCPU threads.
#[must_use]
pub fn kick_signal() -> i32 {
    vmm_sys_util::signal::SIGRTMIN()
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is set only while this thread's VcpuFd, which owns the mapping, is alive in
        // `VcpuThread::run`, and this handler runs on the same thread. The field is one byte that KVM reads.
        unsafe { ptr::write_volatile(ptr::addr_of_mut!((*run).immediate_exit), 1) };
    }
}

/// Installs the handler of the signal that kicks vCPUs, once for the process.
///
/// # Errors
/// What the kernel answered.
pub fn install_kick_handler() -> Result<(), vmm_sys_util::errno::Error> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), kicked)
}

/// A vCPU before its thread runs it.
pub struct VcpuThread {
    /// Index of the vCPU.
    pub index: u16,
    /// KVM's vCPU.
    pub fd: VcpuFd,
    /// The state that a reset returns to.
    pub power_on: PowerOnState,
    /// What accesses reach.
    pub platform: Platform,
    /// What to do.
    pub commands: Receiver<Command>,
    /// Where events go.
    pub events: EventSink,
    /// Counters.
    pub metrics: Arc<VcpuMetrics>,
    /// Whether the guest has told of its crash since power-on: that it tells more than once helps nobody.
    pub panic_told: bool,
}

/// What a parked or running vCPU does next.
enum Next {
    Run,
    Park,
    Exit,
}

/// Clears the handler's pointer before the mapping goes away, also when the thread panics.
struct HandlerPointer;

impl Drop for HandlerPointer {
    fn drop(&mut self) {
        KVM_RUN.set(ptr::null_mut());
    }
}

impl VcpuThread {
    /// The body of the thread: parked at first.
    pub fn run(mut self) {
        KVM_RUN.set(self.fd.get_kvm_run());
        let _pointer = HandlerPointer;
        let mut next = Next::Park;
        loop {
            next = match next {
                Next::Park => match self.commands.recv() {
                    Ok(command) => self.obey(command, Next::Park),
                    Err(_) => return,
                },
                Next::Run => {
                    self.metrics.set_running(true);
                    let next = self.run_guest();
                    self.metrics.set_running(false);
                    next
                }
                Next::Exit => return,
            };
        }
    }

    fn obey(&mut self, command: Command, now: Next) -> Next {
        match command {
            Command::Run => Next::Run,
            Command::Park(moving) => {
                // Spares the guest the soft-lockup warning for the time it stands still. Refused if it has no kvmclock.
                let _ = self.fd.kvmclock_ctrl();
                drop(moving);
                Next::Park
            }
            Command::Reset(entry, done) => {
                self.panic_told = false;
                let reset = self.power_on.restore(&self.fd).and_then(|()| match &entry {
                    Some(entry) => state::set_entry(&self.fd, entry),
                    None => Ok(()),
                });
                let _ = done.try_send(reset);
                now
            }
            Command::Nmi => {
                if let Err(error) = self.fd.nmi() {
                    tracing::warn!(vcpu = self.index, %error, "KVM refused an NMI");
                }
                now
            }
            Command::Exit => Next::Exit,
        }
    }

    /// Runs the guest until there is a command or the guest asks for something.
    fn run_guest(&mut self) -> Next {
        loop {
            self.fd.set_kvm_immediate_exit(0);
            loop {
                match self.commands.try_recv() {
                    Ok(command) => match self.obey(command, Next::Run) {
                        Next::Run => {}
                        other => return other,
                    },
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Next::Exit,
                }
            }
            if let Some(event) = self.run_until_interrupted() {
                self.finish_access();
                (self.events)(event);
                return Next::Park;
            }
        }
    }

    /// Runs the guest until a signal (`None`) or an event.
    fn run_until_interrupted(&mut self) -> Option<VcpuEvent> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        loop {
            let request = match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    self.metrics.count_at(Exit::PortRead, u64::from(port));
                    for item in data.chunks_mut(port_width(run)) {
                        self.platform.pio.read(u64::from(port), item);
                    }
                    None
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    self.metrics.count_at(Exit::PortWrite, u64::from(port));
                    let items = data.chunks(port_width(run));
                    items.fold(None, |last, item| self.platform.pio.write(u64::from(port), item).or(last))
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    self.metrics.count_at(Exit::MmioRead, address);
                    self.platform.mmio_of(run).read(address, data);
                    None
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    self.metrics.count_at(Exit::MmioWrite, address);
                    self.platform.mmio_of(run).write(address, data)
                }
                Ok(VcpuExit::IoapicEoi(vector)) => {
                    self.metrics.count(Exit::EndOfInterrupt);
                    if let Some(io_apic) = &self.platform.io_apic {
                        io_apic.end_of_interrupt(vector);
                    }
                    None
                }
                Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {
                    self.metrics.count(Exit::Other);
                    None
                }
                Ok(VcpuExit::Hyperv) => {
                    self.metrics.count(Exit::Hyperv);
                    answer_hyperv(run);
                    None
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                    self.metrics.count(Exit::Hyperv);
                    self.tell_of_panic();
                    None
                }
                Ok(other) => {
                    self.metrics.count(Exit::Other);
                    let event = describe(&other, run);
                    return Some(event.unwrap_or_else(|cause| VcpuEvent::Crashed(self.with_position(&cause))));
                }
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        self.metrics.count(Exit::Signal);
                        return None;
                    }
                    libc::EAGAIN => None,
                    _ => {
                        let cause = format!("KVM_RUN failed: {error}");
                        return Some(VcpuEvent::Crashed(self.with_position(&cause)));
                    }
                },
            };
            if let Some(request) = self.settle(request) {
                return Some(VcpuEvent::Request(request));
            }
        }
    }

    /// Applies what this vCPU must see done before its next instruction; passes on the rest.
    fn settle(&self, request: Option<VmRequest>) -> Option<VmRequest> {
        match request? {
            VmRequest::BarsChanged(slot) => self.platform.pci.remap(slot),
            VmRequest::Smi { broadcast } => {
                if let Err(error) = self.fd.smi() {
                    tracing::error!(vcpu = self.index, %error, "KVM refused a system management interrupt");
                }
                if broadcast {
                    self.platform.smis.raise_all_but(self.index);
                }
            }
            other => return Some(other),
        }
        None
    }

    fn tell_of_panic(&mut self) {
        if std::mem::replace(&mut self.panic_told, true) {
            return;
        }
        let parameters = state::read_msrs(&self.fd, &CRASH_PARAMETERS.collect::<Vec<_>>()).unwrap_or_default();
        (self.events)(VcpuEvent::GuestPanicked(parameters.iter().map(|parameter| parameter.data).collect()));
    }

    /// Lets KVM finish the instruction whose access was answered, so that the registers are those behind it.
    fn finish_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
    }

    fn with_position(&self, cause: &str) -> String {
        match self.fd.get_regs() {
            Ok(regs) => format!("vCPU {}: {cause} (rip {:#x}, rsp {:#x})", self.index, regs.rip, regs.rsp),
            Err(_) => format!("vCPU {}: {cause}", self.index),
        }
    }
}

/// Bytes of each item of a port access, which may be a string of them.
fn port_width(run: *mut kvm_run) -> usize {
    // SAFETY: the mapping is alive, as the VcpuFd that owns it is, and `io` is the valid member of the union after a
    // port exit.
    let width = unsafe { (*run).__bindgen_anon_1.io.size };
    usize::from(width).max(1)
}

/// Answers what KVM passes on of the Hyper-V interface. There is no VMBus: changes of the synthetic interrupt controller's
/// pages concern nobody, and hypercalls that need one do not exist.
fn answer_hyperv(run: *mut kvm_run) {
    /// HV_STATUS_INVALID_HYPERCALL_CODE.
    const NO_SUCH_HYPERCALL: u64 = 2;
    // SAFETY: as in `port_width`; `hyperv` is the valid member after this exit, and `hcall` with this type.
    unsafe {
        let exit = &mut (*run).__bindgen_anon_1.hyperv;
        if exit.type_ == KVM_EXIT_HYPERV_HCALL {
            exit.u.hcall.result = NO_SUCH_HYPERCALL;
        }
    }
}

/// The event that an unusual exit means, or the cause of a crash.
fn describe(exit: &VcpuExit<'_>, run: *mut kvm_run) -> Result<VcpuEvent, String> {
    match exit {
        VcpuExit::Shutdown => Err("triple fault".into()),
        VcpuExit::FailEntry(reason, _) => Err(format!("the CPU refused to enter the guest, reason {reason:#x}")),
        VcpuExit::InternalError => {
            // SAFETY: as in `port_width`; `internal` is the valid member after this exit.
            let kind = unsafe { (*run).__bindgen_anon_1.internal.suberror };
            let kind = match kind {
                1 => "cannot emulate an instruction".into(),
                2 => "an exception while delivering an exception".into(),
                3 => "an exit while delivering an event".into(),
                other => format!("suberror {other}"),
            };
            Err(format!("KVM internal error: {kind}"))
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Ok(VcpuEvent::Request(VmRequest::Reset)),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Ok(VcpuEvent::Request(VmRequest::PowerOff)),
        other => Err(format!("unexpected exit from the guest: {other:?}")),
    }
}
