//! Guests of a few bytes, for what would take a Linux seconds: they boot in the time that KVM needs.

use std::path::{Path, PathBuf};

use rackvisor_api::VmConfig;
use rackvisor_api::config::BootConfig;
use rackvisor_api::size::ByteSize;

/// Where the image is loaded: descriptor tables and text first, the code at [`CODE`].
const BASE: u32 = 0x10_0000;
const GDT: u32 = BASE;
const IDT: u32 = BASE + 0x40;
const GDTR: u32 = BASE + 0x60;
const IDTR: u32 = BASE + 0x68;
const NMI_HANDLER: u32 = BASE + 0x70;
const TEXT: u32 = BASE + 0x100;
const CODE: u32 = BASE + 0x2000;
const STACK: u32 = BASE + 0x8000;
/// The most text.
const TEXT_LIMIT: usize = (CODE - TEXT) as usize;

/// A program for 32-bit protected mode, which survives NMIs.
#[derive(Clone, Debug)]
pub struct Tiny {
    text: Vec<u8>,
    body: Vec<u8>,
}

impl Tiny {
    fn new(text: &[u8], body: &[u8]) -> Self {
        assert!(text.len() <= TEXT_LIMIT);
        Self { text: text.to_vec(), body: body.to_vec() }
    }

    /// Does nothing.
    pub fn idle() -> Self {
        Self::new(b"", &[])
    }

    /// Powers off by ACPI.
    pub fn power_off() -> Self {
        // mov dx, 0x604; mov ax, 0x2000; out dx, ax: sleep type 0 is S5, sleep enable
        Self::new(b"", &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef])
    }

    /// Resets by port 0xCF9, for ever.
    pub fn reset() -> Self {
        // mov dx, 0xcf9; mov al, 6; out dx, al
        Self::new(b"", &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee])
    }

    /// Faults without a handler for it, nor for the double fault that follows.
    pub fn triple_fault() -> Self {
        // ud2
        Self::new(b"", &[0x0f, 0x0b])
    }

    /// Says `text` over the serial port, once, then does nothing.
    pub fn says(text: &[u8]) -> Self {
        Self::new(text, &say(text))
    }

    /// Writes model-specific registers, numbers and values, then says `text`.
    pub fn writes_msrs(msrs: &[(u32, u64)], text: &[u8]) -> Self {
        let mut body = Vec::new();
        for (number, value) in msrs {
            for (opcode, immediate) in [(0xb9, *number), (0xb8, *value as u32), (0xba, (value >> 32) as u32)] {
                // mov ecx, …; mov eax, …; mov edx, …
                body.push(opcode);
                body.extend(immediate.to_le_bytes());
            }
            body.extend([0x0f, 0x30]); // wrmsr
        }
        body.extend(say(text));
        Self::new(text, &body)
    }

    /// Says `text` again and again.
    pub fn chatters(text: &[u8]) -> Self {
        let mut body = say(text);
        // jmp to the start: its two bytes count too
        let back = -(i8::try_from(body.len()).unwrap() + 2);
        body.extend([0xeb, back.to_le_bytes()[0]]);
        Self::new(text, &body)
    }

    /// Abuses the machine on all processors for ever (`guests/abuse.c`), by random numbers that follow from `seed`.
    pub fn abuses(seed: u64) -> Self {
        Self::new(&seed.to_le_bytes(), include_bytes!(concat!(env!("OUT_DIR"), "/abuse.bin")))
    }

    /// Says what it hears.
    pub fn echoes() -> Self {
        #[rustfmt::skip]
        let body = [
            0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
            0xec,                   // in al, dx
            0xa8, 0x01,             // test al, 1: is there a byte?
            0x74, 0xf7,             // jz to the start
            0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
            0xec,                   // in al, dx
            0xee,                   // out dx, al
            0xeb, 0xef,             // jmp to the start
        ];
        Self::new(b"", &body)
    }

    /// The configuration of a VM with 128 MiB that runs it; its kernel is written into `folder`.
    pub fn config(&self, folder: &Path) -> VmConfig {
        let mut config = VmConfig::new("tiny", ByteSize::mib(128));
        config.boot = Some(BootConfig::with_kernel(self.write(folder)));
        config
    }

    fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("tiny.elf");
        std::fs::write(&path, self.elf()).unwrap();
        path
    }

    /// What is loaded at [`BASE`].
    fn image(&self) -> Vec<u8> {
        let mut image = Vec::new();
        let mut put = |at: u32, bytes: &[u8]| {
            let at = (at - BASE) as usize;
            image.resize(image.len().max(at + bytes.len()), 0);
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        // Null, unused, flat code (0x10), flat data (0x18).
        let descriptors: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
        put(GDT, &descriptors.map(u64::to_le_bytes).concat());
        // A gate for vector 2 only.
        let gate = u64::from(NMI_HANDLER & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u64::from(NMI_HANDLER >> 16) << 48;
        put(IDT, &[0, 0, gate].map(u64::to_le_bytes).concat());
        put(GDTR, &table_register(31, GDT));
        put(IDTR, &table_register(23, IDT));
        put(NMI_HANDLER, &[0xcf]); // iret
        put(TEXT, &self.text);
        let mut code = vec![0xfa, 0xbc]; // cli; mov esp, …
        code.extend(STACK.to_le_bytes());
        code.extend([0x0f, 0x01, 0x15]); // lgdt
        code.extend(GDTR.to_le_bytes());
        code.extend([0x0f, 0x01, 0x1d]); // lidt
        code.extend(IDTR.to_le_bytes());
        code.extend(&self.body);
        code.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp to it
        put(CODE, &code);
        image
    }

    /// An ELF image with a PVH entry note (Xen's `elfnote.h`: 18, `XEN_ELFNOTE_PHYS32_ENTRY`).
    fn elf(&self) -> Vec<u8> {
        let image = self.image();
        let length = image.len() as u64;
        let header = |kind: u32, offset: u64, address: u64, size: u64| {
            let mut bytes = [kind, 7].map(u32::to_le_bytes).concat();
            bytes.extend([offset, address, address, size, size, 0x1000].map(u64::to_le_bytes).concat());
            bytes
        };
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        elf.extend([2_u16, 62].map(u16::to_le_bytes).concat()); // executable, x86-64
        elf.extend(1_u32.to_le_bytes());
        elf.extend([u64::from(CODE), 64, 0].map(u64::to_le_bytes).concat());
        elf.extend(0_u32.to_le_bytes());
        elf.extend([64_u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
        elf.extend(header(1, 0x1000, u64::from(BASE), length));
        elf.extend(header(4, 0x200, 0, 20));
        elf.resize(0x200, 0);
        elf.extend([4_u32, 4, 18].map(u32::to_le_bytes).concat());
        elf.extend(b"Xen\0");
        elf.extend(CODE.to_le_bytes());
        elf.resize(0x1000, 0);
        elf.extend(image);
        elf
    }
}

/// cld; mov esi, text; mov ecx, length; mov dx, 0x3f8; rep outsb
fn say(text: &[u8]) -> Vec<u8> {
    let mut body = vec![0xfc, 0xbe];
    body.extend(TEXT.to_le_bytes());
    body.push(0xb9);
    body.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    body.extend([0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e]);
    body
}

/// What lgdt and lidt read.
fn table_register(limit: u16, base: u32) -> Vec<u8> {
    let mut bytes = limit.to_le_bytes().to_vec();
    bytes.extend(base.to_le_bytes());
    bytes
}
