//! The Toeplitz hash (virtio 1.2 §5.1.6.4.3, and Microsoft's "RSS hashing functions").

use super::flow::{Flow, LONGEST};
use super::layout::{NIBBLES, VALUES};

/// Bytes of the longest key: what the hash of the longest input takes.
pub(crate) const KEY_LENGTH: usize = LONGEST + size_of::<u32>();

/// A key, filled up with zeros.
pub(crate) type Key = [u8; KEY_LENGTH];

/// What an input's nibble adds to the hash, by its place and value.
type Tables = [[u32; VALUES]; NIBBLES];

/// Which frames have a hash, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hasher {
    types: u32,
    tables: Box<Tables>,
}

impl Hasher {
    /// Hashes of these types (`VIRTIO_NET_HASH_TYPE_*`) with this key.
    pub(crate) fn new(types: u32, key: &Key) -> Self {
        let mut tables = Box::new([[0; VALUES]; NIBBLES]);
        for (nibble, table) in tables.iter_mut().enumerate() {
            let windows: [u32; 4] = std::array::from_fn(|bit| window(key, 4 * nibble + bit));
            for (value, sum) in table.iter_mut().enumerate() {
                // The first bit of the key is the first of the input, which is the highest of its nibble.
                let bits = windows.iter().zip([8, 4, 2, 1]).filter(|(_, bit)| value & bit != 0);
                *sum = bits.fold(0, |sum, (window, _)| sum ^ window);
            }
        }
        Self { types, tables }
    }

    pub(super) fn types(&self) -> u32 {
        self.types
    }

    pub(super) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The hash of at most [`LONGEST`] bytes.
    pub(super) fn hash(&self, input: &[u8]) -> u32 {
        let nibbles = input.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let sums = self.tables.iter().zip(nibbles).filter_map(|(table, value)| table.get(usize::from(value)));
        sums.fold(0, |sum, part| sum ^ part)
    }

    /// The hash of the frame that begins like this and its type, as the driver is told them (`hash_value`, `hash_report`;
    /// §5.1.6.4.4): both 0 if it has none.
    pub(crate) fn report(&self, frame: &[u8]) -> (u32, u16) {
        let flow = Flow::of(frame, self.types);
        flow.map_or((0, 0), |flow| (self.hash(flow.input()), flow.report()))
    }
}

/// The 32 bits of the key from `bit` on.
fn window(key: &Key, bit: usize) -> u32 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(key.iter().skip(bit / 8)) {
        *to = *from;
    }
    let [b0, b1, b2, b3, ..] = (u64::from_be_bytes(bytes) << (bit % 8)).to_be_bytes();
    u32::from_be_bytes([b0, b1, b2, b3])
}
