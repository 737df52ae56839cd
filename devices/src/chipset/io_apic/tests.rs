//! The I/O APIC as a guest programs it.

use super::*;

/// What pins were routed to and sent.
#[derive(Default)]
struct Sent {
    routes: Mutex<Vec<(u8, MsiMessage)>>,
    sent: Mutex<Vec<u8>>,
}

/// Data that no route is to be had for.
const REFUSED: u32 = LEVEL as u32 | 1 << 14 | 0x66;

impl PinMessages for Arc<Sent> {
    fn route(&self, pin: u8, message: MsiMessage) -> io::Result<()> {
        if message.data == REFUSED {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.routes.lock().unwrap().push((pin, message));
        Ok(())
    }

    fn send(&self, pin: u8) {
        self.sent.lock().unwrap().push(pin);
    }
}

struct Bench {
    io_apic: Arc<IoApic>,
    sent: Arc<Sent>,
}

impl Bench {
    fn new() -> Self {
        let sent = Arc::<Sent>::default();
        Self { io_apic: Arc::new(IoApic::new(Box::new(Arc::clone(&sent)))), sent }
    }

    fn read(&self, register: u8) -> u32 {
        assert_eq!(self.io_apic.write(INDEX, &[register]), None);
        let mut data = [0; 4];
        self.io_apic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u8, value: u32) {
        self.io_apic.write(INDEX, &u32::from(register).to_le_bytes());
        self.io_apic.write(WINDOW, &value.to_le_bytes());
    }

    /// Writes both halves of an entry, the high one first, as Linux does.
    fn program(&self, pin: u8, entry: u64) {
        self.write(TABLE + 2 * pin + 1, (entry >> 32) as u32);
        self.write(TABLE + 2 * pin, entry as u32);
    }

    fn entry(&self, pin: u8) -> u64 {
        u64::from(self.read(TABLE + 2 * pin + 1)) << 32 | u64::from(self.read(TABLE + 2 * pin))
    }

    fn set(&self, pin: u8, asserted: bool) {
        self.io_apic.line(pin).set(asserted);
    }

    /// The pins that have sent since this was last asked.
    fn sent(&self) -> Vec<u8> {
        std::mem::take(&mut self.sent.sent.lock().unwrap())
    }

    fn routes(&self) -> Vec<(u8, MsiMessage)> {
        std::mem::take(&mut self.sent.routes.lock().unwrap())
    }
}

#[test]
fn it_introduces_itself_as_one_with_24_pins_and_an_eoi_register_whatever_is_written_there() {
    let bench = Bench::new();
    bench.write(VERSION, 0);
    assert_eq!(bench.read(VERSION), 0x0017_0020);
    bench.write(ID, u32::MAX);
    assert_eq!((bench.read(ID), bench.read(ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
    for pin in 0..24 {
        assert_eq!(bench.entry(pin), MASKED, "pin {pin}");
    }
    for register in [3, 0xf, 0x40, 0xff] {
        bench.write(register, u32::MAX);
        assert_eq!(bench.read(register), 0, "register {register:#x}");
    }
}

#[test]
fn an_access_of_any_width_anywhere_is_harmless() {
    let bench = Bench::new();
    for offset in 0..LENGTH {
        for width in [1, 2, 4, 8] {
            bench.io_apic.write(offset, &[0xff; 8][..width]);
            let mut data = [0x55; 8];
            bench.io_apic.read(offset, &mut data[..width]);
            assert!(data[width..].iter().all(|byte| *byte == 0x55));
        }
    }
    bench.io_apic.write(INDEX, &[VERSION]);
    let mut data = [0xff; 8];
    bench.io_apic.read(WINDOW, &mut data);
    assert_eq!(data, [0x20, 0, 0x17, 0, 0, 0, 0, 0]);
    bench.set(24, true);
    bench.set(255, true);
    assert_eq!(bench.sent(), []);
}

#[test]
fn an_entry_keeps_what_the_guest_may_set_and_nothing_else() {
    let bench = Bench::new();
    bench.program(3, u64::MAX);
    assert_eq!(bench.entry(3), 0xfffe_0000_0001_afff);
    bench.program(3, 0);
    assert_eq!(bench.entry(3), 0);
}

#[test]
fn a_message_carries_vector_mode_and_fifteen_bits_of_destination() {
    let bench = Bench::new();
    // Logical, lowest priority, vector 0x31, edge: APIC ID 0x1234.
    bench.program(4, 0x34 << 56 | 0x12 << 49 | 1 << 11 | 1 << 8 | 0x31);
    let message = MsiMessage { address: 0xfee3_4000 | 0x12 << 5 | 1 << 2, data: 0x131 };
    assert_eq!(bench.routes().last(), Some(&(4, message)));
    // Physical, fixed, vector 0x52, level.
    bench.program(9, 0xff << 56 | 0x7f << 49 | LEVEL | 0x52);
    let message = MsiMessage { address: 0xfeef_f000 | 0x7f << 5, data: 0xc052 };
    assert_eq!(bench.routes().last(), Some(&(9, message)));
}

#[test]
fn an_edge_interrupts_once_and_one_at_a_masked_pin_is_lost() {
    let bench = Bench::new();
    bench.set(4, true);
    bench.program(4, 0x31);
    assert_eq!(bench.sent(), [], "the edge was before");
    bench.set(4, true);
    bench.set(4, false);
    assert_eq!(bench.sent(), []);
    bench.io_apic.line(4).pulse();
    bench.io_apic.line(4).pulse();
    assert_eq!((bench.sent(), bench.entry(4)), (vec![4, 4], 0x31));
}

#[test]
fn a_level_interrupts_again_after_each_end_of_interrupt_until_it_is_gone() {
    let by_register = |io_apic: &IoApic, vector| assert_eq!(io_apic.write(EOI, &[vector]), None);
    for end in [IoApic::end_of_interrupt, by_register] {
        let bench = Bench::new();
        bench.program(9, LEVEL | 0x52);
        bench.set(9, true);
        assert_eq!((bench.sent(), bench.entry(9)), (vec![9], LEVEL | REMOTE_IRR | 0x52));
        bench.set(9, false);
        bench.set(9, true);
        assert_eq!(bench.sent(), [], "the one before has not been served");
        end(&bench.io_apic, 0x51);
        assert_eq!(bench.sent(), [], "another one was");
        end(&bench.io_apic, 0x52);
        assert_eq!(bench.sent(), [9]);
        bench.set(9, false);
        end(&bench.io_apic, 0x52);
        assert_eq!((bench.sent(), bench.entry(9)), (vec![], LEVEL | 0x52));
    }
}

#[test]
fn a_level_at_a_masked_pin_waits_for_the_unmasking() {
    let bench = Bench::new();
    bench.program(9, MASKED | LEVEL | 0x52);
    bench.set(9, true);
    assert_eq!((bench.sent(), bench.routes()), (vec![], vec![]));
    bench.program(9, LEVEL | 0x52);
    assert_eq!(bench.sent(), [9]);
    // Masked while it is served: its end is waited for all the same.
    bench.program(9, MASKED | LEVEL | 0x52);
    bench.program(9, LEVEL | 0x52);
    assert_eq!((bench.sent(), bench.routes().len()), (vec![], 1));
    bench.program(9, MASKED | LEVEL | 0x52);
    bench.io_apic.end_of_interrupt(0x52);
    assert_eq!((bench.sent(), bench.entry(9)), (vec![], MASKED | LEVEL | 0x52));
}

#[test]
fn an_entry_that_becomes_edge_triggered_waits_for_no_end() {
    let bench = Bench::new();
    bench.program(9, LEVEL | 0x52);
    bench.set(9, true);
    bench.program(9, MASKED | 0x52);
    assert_eq!(bench.entry(9), MASKED | 0x52);
    bench.program(9, LEVEL | 0x52);
    assert_eq!(bench.sent(), [9, 9]);
}

#[test]
fn the_guest_chooses_which_level_is_active() {
    let bench = Bench::new();
    bench.program(9, ACTIVE_LOW | LEVEL | 0x52);
    assert_eq!(bench.sent(), [9], "the line is low");
    bench.set(9, true);
    bench.io_apic.end_of_interrupt(0x52);
    assert_eq!(bench.sent(), []);
    bench.program(4, ACTIVE_LOW | 0x31);
    bench.set(4, true);
    assert_eq!(bench.sent(), []);
    bench.set(4, false);
    assert_eq!(bench.sent(), [4]);
}

#[test]
fn a_pin_without_a_route_is_silent_and_a_masked_one_needs_none() {
    let bench = Bench::new();
    bench.program(4, 0x31);
    bench.program(4, LEVEL | 0x66);
    bench.set(4, true);
    assert_eq!((bench.sent(), bench.entry(4)), (vec![], LEVEL | 0x66), "the former message is not sent");
    bench.program(4, LEVEL | 0x32);
    assert_eq!((bench.sent(), bench.routes().len()), (vec![4], 2));
}

#[test]
fn a_reset_masks_every_pin_and_leaves_the_lines_to_their_owners() {
    let bench = Bench::new();
    bench.program(9, LEVEL | 0x52);
    bench.set(9, true);
    bench.write(ID, 1 << 24);
    bench.io_apic.reset();
    assert_eq!((bench.entry(9), bench.read(ID)), (MASKED, 0));
    bench.io_apic.end_of_interrupt(0x52);
    bench.io_apic.end_of_interrupt(0);
    assert_eq!(bench.sent(), [9]);
    bench.program(9, LEVEL | 0x52);
    assert_eq!(bench.sent(), [9], "it was asserted all the time");
}

#[test]
fn whatever_a_guest_does_a_pin_sends_only_the_message_of_its_entry_and_a_masked_one_nothing() {
    let bench = Bench::new();
    let mut random = 1u64;
    let mut next = || {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (random >> 33) as u32
    };
    let mut routed = [None; PINS];
    for _ in 0..50_000 {
        let (pin, value) = (next() as u8 % 24, next());
        match next() % 4 {
            0 => bench.write(next() as u8, value),
            1 => bench.write(TABLE + next() as u8 % 48, value & 0xfe00_aff3),
            2 => bench.set(pin, value & 1 == 0),
            _ => bench.io_apic.end_of_interrupt(value as u8 & 0xf3),
        }
        for (pin, message) in bench.routes() {
            routed[usize::from(pin)] = Some(message);
        }
        for pin in bench.sent() {
            let state = bench.io_apic.state().pins[usize::from(pin)];
            assert!(!state.has(MASKED), "pin {pin}");
            assert_eq!(routed[usize::from(pin)], Some(state.message()), "pin {pin}");
        }
        for pin in bench.io_apic.state().pins {
            assert!(pin.has(LEVEL) || !pin.has(REMOTE_IRR), "{:#x}", pin.entry);
        }
    }
}
