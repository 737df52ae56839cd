//! As much of an assembler for eBPF (RFC 9669) as the program needs. Jumps go forward only: there are no loops.

/// An instruction, as the kernel reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u8,
    /// The destination in the low half, the source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A register. What they are for: R0 holds results, R1 to R5 the arguments of calls, which destroy them; R6 to R9 survive
/// calls, and R10 is the end of the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    R0 = 0,
    R1 = 1,
    R2 = 2,
    R3 = 3,
    R4 = 4,
    R6 = 6,
    R7 = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
}

/// What is loaded or stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    Byte = 0x10,
    Half = 0x08,
    Word = 0x00,
}

/// What is done to a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Add = 0x00,
    Multiply = 0x20,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Xor = 0xa0,
    Move = 0xb0,
}

/// When to jump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum If {
    Equal = 0x10,
    Above = 0x20,
    /// Some of the bits of the value are set.
    AnyOf = 0x40,
    Differs = 0x50,
    Below = 0xa0,
}

/// A jump whose aim is not known yet.
#[must_use = "a jump has to land"]
pub(super) struct Jump(usize);

const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const LOAD_64: u8 = 0x18;
const ALU_64: u8 = 0x07;
const JUMP: u8 = 0x05;
/// The second operand is a register.
const SOURCE: u8 = 0x08;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// The 64-bit value is the address of a byte of a map's first value.
const MAP_VALUE: u8 = 2;

/// A program in the making. Offsets and values out of range are the maker's mistakes, which the kernel's verifier finds.
#[derive(Default)]
pub(super) struct Assembler(Vec<Instruction>);

impl Assembler {
    fn push(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        self.0.push(Instruction { code, registers: to | from << 4, offset, immediate });
    }

    /// `to = *(from + offset)`, zero-extended, in the host's byte order.
    pub(super) fn load(&mut self, size: Size, to: Register, from: Register, offset: i16) {
        self.push(LOAD | size as u8, to as u8, from as u8, offset, 0);
    }

    /// `*(to + offset) = from`, 32 bits.
    pub(super) fn store(&mut self, to: Register, offset: i16, from: Register) {
        self.push(STORE, to as u8, from as u8, offset, 0);
    }

    /// `to = to operation from`.
    pub(super) fn with(&mut self, operation: Operation, to: Register, from: Register) {
        self.push(ALU_64 | SOURCE | operation as u8, to as u8, from as u8, 0, 0);
    }

    /// `to = to operation value`.
    pub(super) fn with_value(&mut self, operation: Operation, to: Register, value: i32) {
        self.push(ALU_64 | operation as u8, to as u8, 0, 0, value);
    }

    /// `to =` the address of the first value of the map behind the descriptor `map`.
    pub(super) fn map_value(&mut self, to: Register, map: i32) {
        self.push(LOAD_64, to as u8, MAP_VALUE, 0, map);
        // The second half: where in the value.
        self.push(0, 0, 0, 0, 0);
    }

    /// Calls a function of the kernel.
    pub(super) fn call(&mut self, function: i32) {
        self.push(CALL, 0, 0, 0, function);
    }

    /// Ends the program; R0 is its result.
    pub(super) fn exit(&mut self) {
        self.push(EXIT, 0, 0, 0, 0);
    }

    /// Jumps in any case.
    pub(super) fn jump(&mut self) -> Jump {
        self.push(JUMP, 0, 0, 0, 0);
        Jump(self.0.len())
    }

    /// Jumps if `register` compares so to `value`, without signs.
    pub(super) fn jump_if(&mut self, condition: If, register: Register, value: i32) -> Jump {
        self.push(JUMP | condition as u8, register as u8, 0, 0, value);
        Jump(self.0.len())
    }

    /// Jumps if two registers compare so.
    pub(super) fn jump_if_register(&mut self, condition: If, register: Register, other: Register) -> Jump {
        self.push(JUMP | SOURCE | condition as u8, register as u8, other as u8, 0, 0);
        Jump(self.0.len())
    }

    /// Jumps go on from here.
    pub(super) fn land(&mut self, jumps: impl IntoIterator<Item = Jump>) {
        let here = self.0.len();
        for Jump(after) in jumps {
            if let Some(jump) = after.checked_sub(1).and_then(|at| self.0.get_mut(at)) {
                jump.offset = i16::try_from(here - after).unwrap_or(i16::MAX);
            }
        }
    }

    pub(super) fn finish(self) -> Vec<Instruction> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        let mut code = Assembler::default();
        code.load(Size::Half, Register::R1, Register::R10, -8);
        code.store(Register::R10, -4, Register::R9);
        code.with(Operation::Xor, Register::R0, Register::R2);
        code.with_value(Operation::Move, Register::R7, -2);
        let out = code.jump_if(If::Above, Register::R7, 100);
        code.map_value(Register::R9, 5);
        code.land([out]);
        code.exit();
        let bytes: Vec<u8> = code
            .finish()
            .into_iter()
            .flat_map(|Instruction { code, registers, offset, immediate }| {
                [&[code, registers][..], &offset.to_le_bytes(), &immediate.to_le_bytes()].concat()
            })
            .collect();
        let expected = [
            [0x69, 0xa1, 0xf8, 0xff, 0, 0, 0, 0],
            [0x63, 0x9a, 0xfc, 0xff, 0, 0, 0, 0],
            [0xaf, 0x20, 0, 0, 0, 0, 0, 0],
            [0xb7, 0x07, 0, 0, 0xfe, 0xff, 0xff, 0xff],
            [0x25, 0x07, 2, 0, 100, 0, 0, 0],
            [0x18, 0x29, 0, 0, 5, 0, 0, 0],
            [0; 8],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(bytes, expected.concat());
    }
}
