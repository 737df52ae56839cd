//! The program that the kernel runs for each frame to a tap: the counterpart of [`super::flow`] and [`super::hash`].
//!
//! It is written out without loops, some 700 instructions, of which a TCP segment of IPv4 takes 200. What it reads of a frame
//! goes to the stack first, so that the input of the hash, addresses and then ports, lies there in one piece.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::assembler::Operation::{Add, And, Move, Multiply, ShiftLeft, ShiftRight, Xor};
use super::assembler::Register::{R0, R1, R2, R3, R4, R6, R7, R8, R9, R10};
use super::assembler::Size::{Byte, Half, Word};
use super::assembler::{Assembler, If, Instruction, Jump};
use super::config::TABLE_LENGTH;
use super::flow::*;
use super::layout::{GENERATION, MASK, SLOT, SLOTS, TABLE, TABLES, TYPES, UNCLASSIFIED, VALUES, WORD};

/// The kernel's function that copies bytes of the frame (R1: frame, R2: offset, R3: to, R4: length); not 0 if there are none.
const SKB_LOAD_BYTES: i32 = 26;

// Places on the stack, from its end.
/// The input of the hash.
const INPUT: i16 = -40;
/// Headers lie so that their addresses are the start of the input.
const IPV4_AT: i16 = INPUT - 12;
const IPV6_AT: i16 = INPUT - 8;
/// The generation that was seen at the start.
const SEEN: i16 = -56;
/// The type of the next header.
const NEXT: i16 = -60;
/// What is looked at and forgotten.
const SCRATCH: i16 = -72;

/// The program over the state in `map`.
pub(super) fn build(map: BorrowedFd<'_>) -> Vec<Instruction> {
    let mut program = Program { code: Assembler::default(), map: map.as_raw_fd(), unclassified: Vec::new() };
    program.begin();
    let (ipv4, ipv6) = program.ethernet();
    program.code.land([ipv4]);
    let [long4, short4] = program.ipv4();
    program.code.land([ipv6]);
    let [long6, short6] = program.ipv6();
    program.hash([(36, long6), (32, short6), (12, long4), (8, short4)]);
    program.end();
    program.code.finish()
}

/// R6: the frame. R7: an offset in it. R8: the types of hashes. R9: the slot in force.
struct Program {
    code: Assembler,
    map: i32,
    /// Jumps for frames without a hash.
    unclassified: Vec<Jump>,
}

impl Program {
    fn begin(&mut self) {
        let code = &mut self.code;
        code.with(Move, R6, R1);
        code.map_value(R9, self.map);
        code.load(Word, R1, R9, words(GENERATION));
        code.store(R10, SEEN, R1);
        code.with_value(And, R1, 1);
        code.with_value(Multiply, R1, bytes(SLOT * WORD));
        code.with_value(Add, R1, bytes(SLOTS * WORD));
        code.with(Add, R9, R1);
        code.load(Word, R8, R9, words(TYPES));
        code.with_value(Move, R7, bytes(ETHERTYPE));
    }

    /// Copies `length` bytes at R7 to the stack. The jump is for frames that end before.
    fn copy(&mut self, to: i16, length: usize) -> Jump {
        let code = &mut self.code;
        code.with(Move, R1, R6);
        code.with(Move, R2, R7);
        code.with(Move, R3, R10);
        code.with_value(Add, R3, to.into());
        code.with_value(Move, R4, bytes(length));
        code.call(SKB_LOAD_BYTES);
        code.jump_if(If::Differs, R0, 0)
    }

    /// As [`Self::copy`], where R7 depends on the frame: the jumps are also for what is too far in it.
    fn copy_near(&mut self, to: i16, length: usize) -> [Jump; 2] {
        let far = self.code.jump_if(If::Above, R7, bytes(LOOKED_AT - length));
        [far, self.copy(to, length)]
    }

    /// Finds the type behind VLAN tags; jumps with R7 at the header of IPv4, or of IPv6.
    fn ethernet(&mut self) -> (Jump, Jump) {
        for _ in 0..MOST_TAGS {
            let short = self.copy(SCRATCH, 2);
            self.unclassified.push(short);
            self.code.load(Half, R1, R10, SCRATCH);
            let tagged = VLAN_TAGS.map(|tag| self.code.jump_if(If::Equal, R1, half(tag)));
            let plain = self.code.jump();
            self.code.land(tagged);
            self.code.with_value(Add, R7, bytes(TAG));
            self.code.land([plain]);
        }
        let short = self.copy(SCRATCH, 2);
        self.unclassified.push(short);
        let code = &mut self.code;
        code.with_value(Add, R7, 2);
        code.load(Half, R1, R10, SCRATCH);
        let ipv4 = code.jump_if(If::Equal, R1, half(ETHERTYPE_IPV4));
        let ipv6 = code.jump_if(If::Equal, R1, half(ETHERTYPE_IPV6));
        let other = code.jump();
        self.unclassified.push(other);
        (ipv4, ipv6)
    }

    /// Jumps with the input of the hash on the stack, with and without ports.
    fn ipv4(&mut self) -> [Jump; 2] {
        let short = self.copy(IPV4_AT, IPV4_HEADER);
        let code = &mut self.code;
        code.load(Byte, R1, R10, IPV4_AT);
        code.with(Move, R2, R1);
        code.with_value(ShiftRight, R1, 4);
        let version = code.jump_if(If::Differs, R1, 4);
        code.with_value(And, R2, 15);
        let length = code.jump_if(If::Below, R2, bytes(IPV4_HEADER / 4));
        self.unclassified.extend([short, version, length]);
        let code = &mut self.code;
        code.with_value(ShiftLeft, R2, 2);
        code.with(Add, R7, R2);
        code.load(Half, R1, R10, IPV4_AT + 6);
        let fragment = code.jump_if(If::AnyOf, R1, half(IPV4_FRAGMENT));
        code.load(Byte, R1, R10, IPV4_AT + 9);
        let (tcp, udp) = self.protocols(TCPV4, UDPV4);
        let other = self.code.jump();
        self.code.land([tcp, udp]);
        let short = self.copy(INPUT + 8, PORTS);
        let long = self.input();
        self.code.land([fragment, other, short]);
        [long, self.plain(IPV4)]
    }

    /// As [`Self::ipv4`].
    fn ipv6(&mut self) -> [Jump; 2] {
        let short = self.copy(IPV6_AT, IPV6_HEADER);
        let code = &mut self.code;
        code.load(Byte, R1, R10, IPV6_AT);
        code.with_value(ShiftRight, R1, 4);
        let version = code.jump_if(If::Differs, R1, 6);
        self.unclassified.extend([short, version]);
        let code = &mut self.code;
        code.with_value(Add, R7, bytes(IPV6_HEADER));
        code.load(Byte, R1, R10, IPV6_AT + 6);
        let (mut found, mut plain) = (Vec::new(), Vec::new());
        for _ in 0..MOST_EXTENSIONS {
            let (tcp, udp) = self.protocols(TCPV6, UDPV6);
            found.extend([tcp, udp]);
            plain.extend(self.extension());
        }
        let (tcp, udp) = self.protocols(TCPV6, UDPV6);
        found.extend([tcp, udp]);
        plain.push(self.code.jump());
        self.code.land(found);
        plain.extend(self.copy_near(INPUT + 32, PORTS));
        let long = self.input();
        self.code.land(plain);
        [long, self.plain(IPV6)]
    }

    /// Jumps if R1 is a protocol whose ports are to be hashed.
    fn protocols(&mut self, tcp: u32, udp: u32) -> (Jump, Jump) {
        let mut wanted = |protocol: u8, kind: u32| {
            let other = self.code.jump_if(If::Differs, R1, protocol.into());
            let wanted = self.code.jump_if(If::AnyOf, R8, kind.cast_signed());
            self.code.land([other]);
            wanted
        };
        (wanted(TCP, tcp), wanted(UDP, udp))
    }

    /// Steps over the extension header of type R1 at R7; R1 is the type of the next one then. The jumps are for what cannot be
    /// stepped over.
    fn extension(&mut self) -> Vec<Jump> {
        let code = &mut self.code;
        code.store(R10, NEXT, R1);
        let mut known = vec![code.jump_if(If::Equal, R1, FRAGMENT.into())];
        known.extend(EXTENSIONS.map(|kind| code.jump_if(If::Equal, R1, kind.into())));
        let mut out = vec![code.jump()];
        code.land(known);
        out.extend(self.copy_near(SCRATCH, EXTENSION));
        let code = &mut self.code;
        code.load(Word, R1, R10, NEXT);
        let with_length = code.jump_if(If::Differs, R1, FRAGMENT.into());
        code.load(Half, R1, R10, SCRATCH + 2);
        out.push(code.jump_if(If::AnyOf, R1, half(IPV6_FRAGMENT)));
        code.with_value(Move, R1, 0);
        let fragment = code.jump();
        code.land([with_length]);
        code.load(Byte, R1, R10, SCRATCH + 1);
        code.land([fragment]);
        code.with_value(Add, R1, 1);
        code.with_value(Multiply, R1, bytes(EXTENSION));
        code.with(Add, R7, R1);
        code.load(Byte, R1, R10, SCRATCH);
        out
    }

    /// Jumps if addresses alone are to be hashed.
    fn plain(&mut self, kind: u32) -> Jump {
        let wanted = self.code.jump_if(If::AnyOf, R8, kind.cast_signed());
        let unwanted = self.code.jump();
        self.unclassified.push(unwanted);
        self.code.land([wanted]);
        self.input()
    }

    /// Jumps to where the input is hashed, with R0 for an empty sum.
    fn input(&mut self) -> Jump {
        self.code.with_value(Move, R0, 0);
        self.code.jump()
    }

    /// Hashes inputs of these lengths, which fall, into R0, and replaces that by the entry of the indirection table. A sum has no order: the
    /// longest input begins with its last byte, and the others join where they end.
    fn hash(&mut self, inputs: [(usize, Jump); 4]) {
        let mut inputs = inputs.into_iter().peekable();
        let mut length = inputs.peek().map_or(0, |(length, _)| *length);
        while length > 0 {
            if let Some((_, jump)) = inputs.next_if(|(input, _)| *input == length) {
                self.code.land([jump]);
            }
            length -= 1;
            self.hash_byte(length);
        }
        let code = &mut self.code;
        code.load(Word, R1, R9, words(MASK));
        code.with(And, R1, R0);
        // For the verifier, which knows nothing of the mask.
        code.with_value(And, R1, bytes(TABLE_LENGTH - 1));
        code.with_value(ShiftLeft, R1, 2);
        code.with(Add, R1, R9);
        code.load(Word, R0, R1, words(TABLE));
    }

    fn hash_byte(&mut self, index: usize) {
        let code = &mut self.code;
        code.load(Byte, R1, R10, INPUT + i16::try_from(index).unwrap_or(0));
        code.with(Move, R2, R1);
        code.with_value(ShiftRight, R1, 4);
        code.with_value(And, R2, 15);
        for (nibble, value) in [(2 * index, R1), (2 * index + 1, R2)] {
            code.with_value(ShiftLeft, value, 2);
            code.with(Add, value, R9);
            code.load(Word, value, value, words(TABLES + nibble * VALUES));
            code.with(Xor, R0, value);
        }
    }

    /// R0 is the result, if the slot was in force all the time: otherwise it is the first queue.
    fn end(&mut self) {
        let code = &mut self.code;
        let classified = code.jump();
        code.land(self.unclassified.drain(..));
        code.load(Word, R0, R9, words(UNCLASSIFIED));
        code.land([classified]);
        code.map_value(R1, self.map);
        code.load(Word, R1, R1, words(GENERATION));
        code.load(Word, R2, R10, SEEN);
        let same = code.jump_if_register(If::Equal, R1, R2);
        code.with_value(Move, R0, 0);
        code.land([same]);
        code.exit();
    }
}

/// The offset of a word of the state, or of a slot.
fn words(index: usize) -> i16 {
    i16::try_from(index * WORD).unwrap_or(i16::MAX)
}

fn bytes(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// Two bytes of a frame as a load gives them.
fn half(bytes: [u8; 2]) -> i32 {
    u16::from_ne_bytes(bytes).into()
}
