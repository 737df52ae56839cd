//! The firmware's side of fw_cfg.

use std::sync::atomic::{AtomicU8, Ordering};

use super::*;

const RAM: u64 = 1 << 20;
const COMMAND: u64 = 0x1000;

struct Bench {
    device: FwCfg,
    memory: GuestMemory,
    built: Arc<AtomicU8>,
    /// What was written to the file for an address.
    addresses: Arc<Mutex<Vec<u64>>>,
}

impl Bench {
    fn new() -> Self {
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let memory = GuestMemory::new(map);
        let built = Arc::<AtomicU8>::default();
        let count = Arc::clone(&built);
        let source = move || {
            let number = count.fetch_add(1, Ordering::Relaxed) + 1;
            if number == 4 {
                return Err(AcpiError::Ecam(0));
            }
            Ok(vec![
                FwCfgFile::new("etc/first", vec![number]),
                FwCfgFile::new("etc/built", vec![number; number.into()]),
            ])
        };
        let files = vec![FwCfgFile::new("etc/fixed", b"content".to_vec())];
        let addresses = Arc::<Mutex<Vec<u64>>>::default();
        let told = Arc::clone(&addresses);
        let take = move |address| told.lock().unwrap().push(address);
        let device = FwCfg::new(memory.clone(), 3, files, Box::new(source));
        let device = device.with_live_files(vec![("etc/address", Arc::new(AddressFile(Box::new(take))) as _)]);
        Self { device, memory, built, addresses }
    }

    fn select(&self, key: u16) {
        assert_eq!(self.device.write(0, &key.to_le_bytes()), None);
    }

    fn bytes(&self, count: usize) -> Vec<u8> {
        let byte = |_| {
            let mut data = [0];
            self.device.read(DATA, &mut data);
            data[0]
        };
        (0..count).map(byte).collect()
    }

    fn item(&self, key: u16, count: usize) -> Vec<u8> {
        self.select(key);
        self.bytes(count)
    }

    /// Number and size of a file, by the directory.
    fn find(&self, name: &str) -> (u16, usize) {
        let count = u32::from_be_bytes(self.item(key::DIRECTORY, 4).try_into().unwrap());
        let entries: Vec<_> = (0..count).map(|_| self.bytes(64)).collect();
        let entry = entries.iter().find(|entry| entry[8..].starts_with(format!("{name}\0").as_bytes())).unwrap();
        let size = u32::from_be_bytes(entry[..4].try_into().unwrap());
        (u16::from_be_bytes(entry[4..6].try_into().unwrap()), size as usize)
    }

    fn dma(&self, control: u32, length: u32, address: u64) -> u32 {
        let mut request = control.to_be_bytes().to_vec();
        request.extend(length.to_be_bytes());
        request.extend(address.to_be_bytes());
        let memory = self.memory.memory();
        memory.write_slice(&request, GuestAddress(COMMAND)).unwrap();
        self.device.write(DMA, &0u32.to_be_bytes());
        self.device.write(DMA_LOW, &(COMMAND as u32).to_be_bytes());
        u32::from_be_bytes(memory.read_obj(GuestAddress(COMMAND)).unwrap())
    }

    fn ram(&self, address: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

#[test]
fn the_firmware_finds_fw_cfg_with_dma_and_the_number_of_processors() {
    let bench = Bench::new();
    assert_eq!(bench.item(key::SIGNATURE, 4), b"QEMU");
    assert_eq!(bench.item(key::ID, 4), [3, 0, 0, 0]);
    assert_eq!(bench.item(key::CPU_COUNT, 2), [3, 0]);
    let mut signature = [0; 4];
    bench.device.read(DMA, &mut signature);
    assert_eq!(&signature, b"QEMU");
    bench.device.read(DMA_LOW, &mut signature);
    assert_eq!(&signature, b" CFG");
}

#[test]
fn files_are_found_by_name_and_read_with_zeroes_beyond_their_end() {
    let bench = Bench::new();
    let (key, size) = bench.find("etc/fixed");
    assert_eq!((key, size), (0x20, 7));
    assert_eq!(bench.item(key, 9), b"content\0\0");
    assert_eq!(bench.item(key, 3), b"con", "selecting starts anew");
    assert_eq!(bench.item(key | key::IGNORED, 3), b"con");
    assert_eq!(bench.item(0x7000, 2), [0, 0], "what there is not is empty");
}

#[test]
fn files_are_made_anew_when_the_first_of_them_is_selected_and_only_then() {
    let bench = Bench::new();
    let (first, built) = (bench.find("etc/first").0, bench.find("etc/built"));
    assert_eq!(built, (first + 1, 1));
    assert_eq!(bench.item(first, 1), [2]);
    assert_eq!(bench.find("etc/built"), (built.0, 2));
    assert_eq!(bench.item(built.0, 3), [2, 2, 0]);
    bench.device.reset();
    assert_eq!(bench.item(built.0, 4), [3, 3, 3, 0], "who knows the number needs no directory");
    assert_eq!(bench.item(first, 1), [3], "what cannot be made stays as it was");
    assert_eq!(bench.built.load(Ordering::Relaxed), 4);
}

#[test]
fn dma_selects_skips_reads_and_answers_with_zero() {
    let bench = Bench::new();
    let select = 0x20 << 16 | command::SELECT;
    assert_eq!(bench.dma(select | command::READ, 7, 0x2000), 0);
    assert_eq!(bench.ram(0x2000, 8), b"content\0");
    assert_eq!(bench.dma(select | command::SKIP, 3, 0), 0);
    assert_eq!(bench.dma(command::READ, 6, 0x3000), 0);
    assert_eq!(bench.ram(0x3000, 6), b"tent\0\0");
    assert_eq!(bench.dma(select, 0, 0), 0);
    assert_eq!(bench.bytes(3), b"con");
}

#[test]
fn the_firmware_answers_with_an_address_as_a_whole() {
    let bench = Bench::new();
    let (key, size) = bench.find("etc/address");
    assert_eq!((key, size), (0x21, 8));
    let write = u32::from(key) << 16 | command::SELECT | command::WRITE;
    bench.memory.memory().write_obj(0x1234_5678_9abc_u64.to_le_bytes(), GuestAddress(0x2000)).unwrap();
    for (control, length, address) in
        [(write, 4, 0x2000), (write, 9, 0x2000), (write, 8, RAM - 7), (write - (1 << 16), 8, 0)]
    {
        assert_eq!(bench.dma(control, length, address), command::ERROR, "{control:#x} {length} {address:#x}");
    }
    assert_eq!(bench.dma((write - command::WRITE) | command::SKIP, 1, 0), 0);
    assert_eq!(bench.dma(command::WRITE, 8, 0x2000), command::ERROR, "not from its second byte on");
    assert_eq!(*bench.addresses.lock().unwrap(), [0; 0]);
    assert_eq!(bench.dma(write, 8, 0x2000), 0);
    assert_eq!(*bench.addresses.lock().unwrap(), [0x1234_5678_9abc]);
}

#[test]
fn dma_that_writes_leaves_ram_or_is_too_long_is_an_error() {
    let bench = Bench::new();
    let read = 0x20 << 16 | command::SELECT | command::READ;
    for (control, length, address) in [
        (command::WRITE, 4, 0x2000),
        (read, 7, RAM - 3),
        (read, 7, u64::MAX - 3),
        (read, u32::MAX, 0x2000),
        (read, RAM as u32, 0x2000),
    ] {
        assert_eq!(bench.dma(control, length, address), command::ERROR, "{control:#x} {length} {address:#x}");
    }
    // A command outside of RAM can have no answer.
    bench.device.write(DMA, &u32::MAX.to_be_bytes());
    bench.device.write(DMA_LOW, &u32::MAX.to_be_bytes());
}

/// Counts how often it was selected, and keeps what was written.
#[derive(Default)]
struct Slate(Mutex<(u8, Vec<u8>)>);

impl LiveFile for Slate {
    fn size(&self) -> usize {
        2
    }

    fn select(&self) -> Vec<u8> {
        let mut state = self.0.lock().unwrap();
        state.0 += 1;
        vec![state.0; 2]
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        self.0.lock().unwrap().1.extend([&[offset as u8], bytes].concat());
        offset + bytes.len() <= 2
    }
}

#[test]
fn live_files_are_asked_whenever_they_are_selected_and_take_writes() {
    let slate = Arc::<Slate>::default();
    let bench = Bench::new();
    let bench = Bench { device: bench.device.with_live_files(vec![("etc/live", Arc::clone(&slate) as _)]), ..bench };
    let (key, size) = bench.find("etc/live");
    assert_eq!((size, bench.item(key, 3), bench.item(key, 1)), (2, vec![1, 1, 0], vec![2]));
    assert_eq!(bench.find("etc/fixed"), (0x20, 7), "the others are where they were");
    assert_eq!(bench.find("etc/first").0, key + 1);
    bench.memory.memory().write_slice(b"abc", GuestAddress(0x2000)).unwrap();
    let select = u32::from(key) << 16 | command::SELECT | command::WRITE;
    assert_eq!(bench.dma(select, 1, 0x2000), 0);
    assert_eq!(bench.dma(command::WRITE, 1, 0x2001), 0);
    assert_eq!(bench.dma(command::WRITE, 1, 0x2002), command::ERROR, "beyond its end");
    assert_eq!(bench.dma(select, 3, 0x2000), command::ERROR, "never more than the file has");
    assert_eq!(bench.dma(select, 1, RAM), command::ERROR);
    assert_eq!(slate.0.lock().unwrap().1, b"\0a\x01b\x02c");
    assert_eq!(bench.item(0x20, 7), b"content");
    assert_eq!(bench.dma(command::WRITE, 1, 0x2000), command::ERROR, "other files take none");
}

#[test]
fn registers_that_are_not_there_and_odd_widths_do_nothing() {
    let bench = Bench::new();
    let mut data = [0; 4];
    bench.device.read(0, &mut data);
    assert_eq!(data, [0xff; 4]);
    bench.device.read(9, &mut data);
    assert_eq!(data, *b"CFG\xff");
    for (offset, data) in [(0, &[0x20][..]), (1, &[0]), (2, &[0; 8]), (4, &[0; 8]), (8, &[0; 2]), (11, &[0; 4])] {
        assert_eq!(bench.device.write(offset, data), None);
    }
    assert_eq!(bench.bytes(1), [0]);
}
