//! The filter as a classic BPF program, for taps that somebody else reads.
//!
//! The kernel runs it on each frame before it enters a queue of the tap (`TUNATTACHFILTER`): from the Ethernet header on, without
//! the header of virtio. A VLAN tag may stand in the frame, or beside it where the host's network took it out.

use libc::sock_filter;

use super::{BROADCAST, Filter, Mac, Mode, Table, VLAN_TAG, VLANS};

/// The most instructions that the kernel takes (BPF_MAXINSNS). With both tables and the VLANs at their worst it is some 3100.
#[cfg(test)]
const LONGEST: usize = 4096;

// Instructions (linux/filter.h): load a word, half-word or byte of the frame, a constant or a cell; store to a cell; the rest.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const LOAD_CONSTANT: u16 = 0x00;
const LOAD_CELL: u16 = 0x60;
const STORE_CELL: u16 = 0x02;
const TO_INDEX: u16 = 0x07;
const AND: u16 = 0x54;
const SHIFT_RIGHT: u16 = 0x74;
const SHIFT_RIGHT_BY_INDEX: u16 = 0x7c;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// What is beside the frame (SKF_AD_*): the tag, whether there is one, and the type of tag.
const TAG: u32 = 0xffff_f000 + 44;
const TAG_PRESENT: u32 = 0xffff_f000 + 48;
const TAG_TYPE: u32 = 0xffff_f000 + 60;

const ETHER_TYPE: u32 = 12;
const TAG_IN_FRAME: u32 = 14;
/// No VLAN has this number.
const UNTAGGED: u32 = u32::MAX;
/// Cells: the VLAN, and the word of the table with its bit.
const VLAN: u32 = 0;
const WORD: u32 = 1;

type Code = Vec<sock_filter>;

impl Filter {
    /// The program that lets through what [`Filter::accepts`] does; `None` if that is everything.
    pub(in crate::net) fn program(&self) -> Option<Vec<sock_filter>> {
        if self.has(Mode::Promiscuous) {
            return None;
        }
        let mut code = self.vlans.as_deref().map(vlans).unwrap_or_default();
        let [b0, b1, rest @ ..] = BROADCAST;
        code.push(op(LOAD_HALF, 0));
        let verdict = vec![verdict(!self.has(Mode::NoBroadcast))];
        let broadcast = [vec![op(LOAD_WORD, 2)], when(IF_EQUAL, u32::from_be_bytes(rest), verdict)].concat();
        code.extend(when(IF_EQUAL, u16::from_be_bytes([b0, b1]).into(), broadcast));
        code.push(op(LOAD_BYTE, 0));
        let multicast = self.kind(Mode::NoMulticast, Mode::AllMulticast, &self.multicast, None);
        code.extend(when(IF_ANY_BIT, 1, multicast));
        code.extend(self.kind(Mode::NoUnicast, Mode::AllUnicast, &self.unicast, Some(self.mac)));
        Some(code)
    }

    /// The end of the program for addresses of one kind.
    fn kind(&self, none: Mode, all: Mode, table: &Table, own: Option<Mac>) -> Code {
        match table {
            _ if self.has(none) => vec![verdict(false)],
            Some(table) if !self.has(all) => {
                let mut addresses: Vec<Mac> = table.iter().copied().chain(own).collect();
                addresses.sort_unstable();
                one_of(&addresses)
            }
            _ => vec![verdict(true)],
        }
    }
}

fn op(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

fn verdict(through: bool) -> sock_filter {
    op(RETURN, if through { u32::MAX } else { 0 })
}

fn length(code: &Code) -> u32 {
    u32::try_from(code.len()).unwrap_or(u32::MAX)
}

/// Runs `body` only if the accumulator passes `test` with `k`.
fn when(test: u16, k: u32, mut body: Code) -> Code {
    let start = match u8::try_from(body.len()) {
        Ok(length) => vec![sock_filter { code: test, jt: 0, jf: length, k }],
        // Farther than a conditional jump goes.
        Err(_) => vec![sock_filter { code: test, jt: 1, jf: 0, k }, op(JUMP, length(&body))],
    };
    body.splice(0..0, start);
    body
}

/// Runs `yes` if the accumulator is `k`, else `no`.
fn either(k: u32, mut yes: Code, no: Code) -> Code {
    yes.push(op(JUMP, length(&no)));
    [when(IF_EQUAL, k, yes), no].concat()
}

/// Drops a frame of a VLAN that is not among `wanted`.
fn vlans(wanted: &[u64; VLANS / 64]) -> Code {
    let tag_type = u16::from_be_bytes(VLAN_TAG).into();
    let number = |type_at, from| {
        let tagged = vec![from, op(AND, 0xfff)];
        [vec![type_at], either(tag_type, tagged, vec![op(LOAD_CONSTANT, UNTAGGED)])].concat()
    };
    let in_frame = number(op(LOAD_HALF, ETHER_TYPE), op(LOAD_HALF, TAG_IN_FRAME));
    let beside = number(op(LOAD_WORD, TAG_TYPE), op(LOAD_WORD, TAG));
    let mut code = vec![op(LOAD_WORD, TAG_PRESENT)];
    code.extend(either(0, in_frame, beside));
    // Words of 32 bits, looked for by their position: a program has no tables.
    let mut check = vec![op(STORE_CELL, VLAN), op(LOAD_CONSTANT, 0), op(STORE_CELL, WORD)];
    check.extend([op(LOAD_CELL, VLAN), op(SHIFT_RIGHT, 5)]);
    let words = wanted.iter().flat_map(|word| [word & 0xffff_ffff, word >> 32]);
    for (position, word) in (0u32..).zip(words).filter(|(_, word)| *word != 0) {
        let word = u32::try_from(word).unwrap_or(0);
        // No position is UNTAGGED: the others are passed by.
        let found = vec![op(LOAD_CONSTANT, word), op(STORE_CELL, WORD), op(LOAD_CONSTANT, UNTAGGED)];
        check.extend(when(IF_EQUAL, position, found));
    }
    check.extend([op(LOAD_CELL, VLAN), op(AND, 31), op(TO_INDEX, 0), op(LOAD_CELL, WORD)]);
    check.extend([op(SHIFT_RIGHT_BY_INDEX, 0), op(AND, 1)]);
    check.extend(when(IF_EQUAL, 0, vec![verdict(false)]));
    code.extend(either(UNTAGGED, Vec::new(), check));
    code
}

/// Lets through what is for one of `addresses`, which are sorted, and nothing else.
fn one_of(addresses: &[Mac]) -> Code {
    let mut code = vec![op(LOAD_HALF, 0)];
    for group in addresses.chunk_by(|[a0, a1, ..], [b0, b1, ..]| (a0, a1) == (b0, b1)) {
        let Some([b0, b1, ..]) = group.first() else { continue };
        let mut body = vec![op(LOAD_WORD, 2)];
        for [_, _, rest @ ..] in group {
            body.extend(when(IF_EQUAL, u32::from_be_bytes(*rest), vec![verdict(true)]));
        }
        body.push(verdict(false));
        code.extend(when(IF_EQUAL, u16::from_be_bytes([*b0, *b1]).into(), body));
    }
    code.push(verdict(false));
    code
}

#[cfg(test)]
mod tests {
    use super::super::LOOKED_AT;
    use super::*;

    const MAC: Mac = [0x52, 0x54, 0, 0, 0, 1];

    /// Runs a program as the kernel does (linux/net/core/filter.c): `frame`, and the type and value of a tag beside it.
    fn run(program: &[sock_filter], frame: &[u8], beside: Option<(u16, u16)>) -> bool {
        let (mut a, mut x, mut cells) = (0u32, 0u32, [None; 16]);
        let mut at = 0;
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let bytes = |count: usize| frame.get(k as usize..k as usize + count);
            let jump = |yes: bool| usize::from(if yes { jt } else { jf });
            match code {
                LOAD_WORD if k == TAG_PRESENT => a = u32::from(beside.is_some()),
                LOAD_WORD if k == TAG_TYPE => a = beside.map_or(0, |(kind, _)| kind.into()),
                LOAD_WORD if k == TAG => a = beside.map_or(0, |(_, tag)| tag.into()),
                LOAD_WORD | LOAD_HALF | LOAD_BYTE => {
                    let Some(bytes) = bytes([4, 2, 1][usize::from(code - LOAD_WORD) / 8]) else { return false };
                    a = bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte));
                }
                LOAD_CONSTANT => a = k,
                LOAD_CELL => a = cells[k as usize].expect("the kernel refuses to load what was not stored"),
                STORE_CELL => cells[k as usize] = Some(a),
                TO_INDEX => x = a,
                AND => a &= k,
                SHIFT_RIGHT => a >>= k,
                SHIFT_RIGHT_BY_INDEX => a >>= x,
                JUMP => at += k as usize,
                IF_EQUAL => at += jump(a == k),
                IF_ANY_BIT => at += jump(a & k != 0),
                RETURN => return k != 0,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    /// A generator of numbers that are the same each time (xorshift).
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }

        /// One of few addresses, so that they meet.
        fn address(&mut self) -> Mac {
            match self.below(8) {
                0 => MAC,
                1 => BROADCAST,
                2 => [0xff, 0xff, 0xff, 0xff, 0xff, self.below(2) as u8],
                _ => [self.below(4) as u8, 0, 0x5e, 0, self.below(3) as u8, self.below(3) as u8],
            }
        }

        fn addresses(&mut self) -> Vec<Mac> {
            let count = [0, 1, 3, 20, 400][self.below(5) as usize];
            // With the largest count they differ, so that there are too many.
            (0..count)
                .map(|n: u32| if count < 400 { self.address() } else { [3, 9, 9, 9, (n >> 8) as u8, n as u8] })
                .collect()
        }
    }

    /// The frame as the driver would get it.
    fn on_the_wire(frame: &[u8], beside: Option<(u16, u16)>) -> [u8; LOOKED_AT] {
        let mut wire = frame.to_vec();
        if let Some((kind, tag)) = beside {
            wire.splice(12..12, [kind.to_be_bytes(), tag.to_be_bytes()].concat());
        }
        *wire.first_chunk().unwrap()
    }

    #[test]
    fn the_program_lets_through_what_the_filter_accepts_and_nothing_else() {
        let mut numbers = Numbers(88_172_645_463_325_252);
        let mut seen = [0; 2];
        for _ in 0..400 {
            let mut filter = Filter::new(MAC, numbers.below(2) == 0);
            filter.set_mode(Mode::Promiscuous, false);
            for mode in Mode::ALL.into_iter().skip(1) {
                filter.set_mode(mode, numbers.below(5) == 0);
            }
            filter.set_tables(numbers.addresses(), numbers.addresses());
            for _ in 0..[0, 5, 3000][numbers.below(3) as usize] {
                filter.set_vlan(numbers.below(VLANS as u64) as u16, true);
            }
            filter.set_vlan(7, numbers.below(2) == 0);
            let program = filter.program().unwrap();
            for _ in 0..100 {
                let kind = [0x0800, 0x8100, 0x88a8][numbers.below(3) as usize];
                let vlan = if numbers.below(2) == 0 { 7 } else { numbers.below(0x1_0000) as u16 };
                let mut frame = [0; 64];
                frame[..6].copy_from_slice(&numbers.address());
                frame[12..14].copy_from_slice(&u16::to_be_bytes(kind));
                frame[14..16].copy_from_slice(&vlan.to_be_bytes());
                let kind = [0x8100, 0x88a8][numbers.below(2) as usize];
                let beside = (numbers.below(2) == 0).then(|| (kind, numbers.below(0x1_0000) as u16 & !0x40));
                let accepted = filter.accepts(&on_the_wire(&frame, beside));
                assert_eq!(run(&program, &frame, beside), accepted, "{filter:?} {frame:x?} {beside:x?}");
                seen[usize::from(accepted)] += 1;
            }
        }
        assert!(seen.iter().all(|count| *count > 5000), "{seen:?}");
    }

    #[test]
    fn who_wants_everything_needs_no_program() {
        assert_eq!(Filter::new(MAC, true).program().map(|program| program.len()), None);
    }

    #[test]
    fn the_longest_program_is_not_too_long_for_the_kernel() {
        let mut filter = Filter::new(MAC, true);
        filter.set_mode(Mode::Promiscuous, false);
        let table = |first: u8| (0..=255).map(|n| [first | (n & 0xfc), n, 0, 0, 0, 0]).collect();
        filter.set_tables(table(2), table(1));
        (0..VLANS).for_each(|id| filter.set_vlan(id as u16, id % 2 == 0));
        let length = filter.program().unwrap().len();
        assert!((3000..LONGEST).contains(&length), "{length}");
    }
}
