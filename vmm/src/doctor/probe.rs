//! A tiny guest that uses what software KVMs lack: exceptions through an IDT, FXSAVE, SSE and XSAVE in 64-bit mode.
#![allow(unsafe_code)] // The guest's code is assembled into this binary and handed to KVM as memory.

use std::arch::global_asm;
use std::sync::mpsc;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::signal::Killable;

use crate::boot::{Entry, Mode};
use crate::cpu::{state, vcpu};

/// The guest tells each step that it has done at this port.
const REPORT_PORT: u16 = 0xf4;
const MEMORY: usize = 1 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const GDT: u64 = 0x3000;
const DIRECTORY: u64 = 0x5000;
const IDT: u64 = 0x4000;
const CODE: u64 = 0x6000;
/// Real hardware needs microseconds; this is for a KVM that hangs.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the guest does, in order. Its code reports the number of each when it is done, counted from 1.
pub const STEPS: [&str; 5] = [
    "run 64-bit code",
    "take an INT3 breakpoint exception",
    "save and restore the FPU (FXSAVE, FXRSTOR)",
    "compute with SSE2",
    "save and restore extended state (XSAVE, XRSTOR)",
];

global_asm!(
    ".pushsection .rodata.rackvisor_doctor, \"a\"",
    ".global rackvisor_doctor_code",
    ".global rackvisor_doctor_breakpoint",
    ".global rackvisor_doctor_end",
    "rackvisor_doctor_code:",
    "mov rsp, 0xf000",
    "mov al, 1",
    "out 0xf4, al",
    // A breakpoint: its handler leaves 2 in BL.
    "lidt [0x5ff0]",
    "xor ebx, ebx",
    "int3",
    "mov al, bl",
    "out 0xf4, al",
    // The FPU and SSE: CR0.MP on, CR0.EM off, CR4.OSFXSR and OSXMMEXCPT on.
    "mov rax, cr0",
    "and rax, -5",
    "or rax, 2",
    "mov cr0, rax",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "fninit",
    "fld1",
    "fxsave64 [0xa000]",
    "fxrstor64 [0xa000]",
    "mov al, 3",
    "out 0xf4, al",
    "mov eax, 2",
    "movd xmm0, eax",
    "movdqa xmm1, xmm0",
    "paddd xmm0, xmm1",
    "movd eax, xmm0",
    "out 0xf4, al",
    // XSAVE only where CPUID has it (leaf 1, ECX bit 26).
    "mov eax, 1",
    "cpuid",
    "bt ecx, 26",
    "jnc 2f",
    "mov rax, cr4",
    "or rax, 0x40000",
    "mov cr4, rax",
    "xor ecx, ecx",
    "xor edx, edx",
    "mov eax, 3",
    "xsetbv",
    "xsave64 [0xb000]",
    "xrstor64 [0xb000]",
    "2:",
    "mov al, 5",
    "out 0xf4, al",
    "hlt",
    "rackvisor_doctor_breakpoint:",
    "mov ebx, 2",
    "iretq",
    "rackvisor_doctor_end:",
    ".popsection",
);

unsafe extern "C" {
    static rackvisor_doctor_code: u8;
    static rackvisor_doctor_breakpoint: u8;
    static rackvisor_doctor_end: u8;
}

/// How far the guest came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It did everything: a stock kernel can run.
    Complete,
    /// It came to this step (index in [`STEPS`]) and no further, for this reason.
    StoppedAt(usize, String),
}

/// Runs the guest.
///
/// # Errors
/// What KVM refused while the guest was being made.
pub fn run(kvm: &Kvm) -> Result<Outcome, String> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(|e| e.to_string())?;
    lay_out(&memory).map_err(|e| e.to_string())?;
    let vm = kvm.create_vm().map_err(|e| format!("no VM: {e}"))?;
    let region = memory.iter().next().ok_or("no memory")?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: region.get_host_address(vm_memory::MemoryRegionAddress(0)).map_err(|e| e.to_string())? as u64,
    };
    // SAFETY: the memory outlives the VM, which the thread below gives back before this function returns.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|e| format!("no memory for the VM: {e}"))?;
    let vcpu = vm.create_vcpu(0).map_err(|e| format!("no vCPU: {e}"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| format!("no CPUID: {e}"))?;
    vcpu.set_cpuid2(&cpuid).map_err(|e| format!("CPUID refused: {e}"))?;
    let entry = Entry { rip: CODE, info: 0, mode: Mode::Long { page_tables: PML4, gdt: GDT } };
    state::set_entry(&vcpu, &entry).map_err(|e| e.to_string())?;
    vcpu::install_kick_handler().map_err(|e| e.to_string())?;
    run_with_deadline(vcpu)
}

fn run_with_deadline(mut vcpu: VcpuFd) -> Result<Outcome, String> {
    let (done, outcome) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = done.send(run_steps(&mut vcpu));
    });
    let result = outcome.recv_timeout(DEADLINE);
    if result.is_err() {
        let _ = thread.kill(vcpu::kick_signal());
    }
    let result = result.or_else(|_| outcome.recv_timeout(DEADLINE));
    match result {
        Ok(result) => {
            let _ = thread.join();
            Ok(result)
        }
        // The thread hangs in the kernel with the guest's memory: only the end of the process frees it.
        Err(_) => std::process::abort(),
    }
}

fn run_steps(vcpu: &mut VcpuFd) -> Outcome {
    let mut done = 0;
    loop {
        let problem = match vcpu.run() {
            Ok(VcpuExit::IoOut(REPORT_PORT, [step])) if usize::from(*step) == done + 1 => {
                done += 1;
                continue;
            }
            Ok(VcpuExit::Hlt) if done == STEPS.len() => return Outcome::Complete,
            Ok(exit) => format!("{exit:?}"),
            Err(error) if error.errno() == libc::EINTR => format!("no end after {} s", DEADLINE.as_secs()),
            Err(error) => error.to_string(),
        };
        return Outcome::StoppedAt(done.min(STEPS.len() - 1), problem);
    }
}

/// Page tables for 2 MiB, GDT, an IDT whose gates all lead to one handler, and the code.
fn lay_out(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    // SAFETY: the three symbols are in one section of this binary, in this order, and never written.
    let (code, handler) = unsafe {
        let start = &raw const rackvisor_doctor_code;
        let length = (&raw const rackvisor_doctor_end).offset_from(start).unsigned_abs();
        let handler = (&raw const rackvisor_doctor_breakpoint).offset_from(start).unsigned_abs();
        (std::slice::from_raw_parts(start, length), handler as u64)
    };
    memory.write_slice(code, GuestAddress(CODE))?;
    memory.write_obj(PDPT | 3, GuestAddress(PML4))?;
    memory.write_obj(DIRECTORY | 3, GuestAddress(PDPT))?;
    memory.write_obj(0x83u64, GuestAddress(DIRECTORY))?;
    for (index, descriptor) in [0u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
        memory.write_obj(descriptor, GuestAddress(GDT + index as u64 * 8))?;
    }
    for vector in 0..32 {
        let gate = (CODE + handler) & 0xffff | 0x10 << 16 | 0x8e00 << 32 | ((CODE + handler) >> 16) << 48;
        memory.write_obj(gate, GuestAddress(IDT + vector * 16))?;
    }
    memory.write_obj(32u16 * 16 - 1, GuestAddress(0x5ff0))?;
    memory.write_obj(IDT, GuestAddress(0x5ff2))
}
