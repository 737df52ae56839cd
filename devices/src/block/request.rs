//! From a descriptor chain to a request (virtio 1.2 §5.2.6): all that a guest can get wrong is found here.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::virtio::ring::{Chain, RingError, Segment};

use super::backend::{Geometry, Operation};
use super::config::{MAX_RANGES, SECTOR};

/// The request was done.
pub const STATUS_OK: u8 = 0;
/// The request failed.
pub const STATUS_IOERR: u8 = 1;
/// The device does not do such requests.
pub const STATUS_UNSUPP: u8 = 2;

/// The status that tells the guest of an errno (§5.2.6): the one place where they are mapped.
pub(super) fn status_of(errno: i32, operation: Operation) -> u8 {
    match (errno, operation) {
        (libc::EOPNOTSUPP, Operation::Discard | Operation::WriteZeroes { .. }) => STATUS_UNSUPP,
        _ => STATUS_IOERR,
    }
}

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

const HEADER: usize = 16;
const RANGE: usize = 16;
const RANGE_UNMAP: u32 = 1;
/// Bytes of the answer to GET_ID (§5.2.6).
pub const ID_BYTES: usize = 20;

/// Why a chain cannot even be answered: the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChainError {
    /// The ring or the chain breaks the rules.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// There is no place for the status.
    #[error("the chain at head {head} has no writable byte for the status")]
    NoStatus {
        /// First descriptor of the chain.
        head: u16,
    },
}

/// What requests are measured by.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// The shape of the disk.
    pub geometry: &'a Geometry,
    /// Its present size in bytes.
    pub capacity: u64,
    /// Whether writes have to be stable when they complete.
    pub stable: bool,
    /// The answer to GET_ID.
    pub identity: &'a [u8; ID_BYTES],
}

/// A part of the disk that a discard or write-zeroes names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes, never 0.
    pub length: u64,
    /// What to do with it.
    pub operation: Operation,
}

/// What a chain asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A read, write or flush, with [`Parser::buffers`].
    Transfer {
        /// What to do.
        operation: Operation,
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// All of [`Parser::ranges`], at least one.
    Ranges,
    /// Nothing: it is answered already.
    Answered {
        /// The status.
        status: u8,
        /// Bytes that were written to the guest besides the status.
        written: u32,
    },
}

const REFUSED: Asked = Asked::Answered { status: STATUS_IOERR, written: 0 };
const UNSUPPORTED: Asked = Asked::Answered { status: STATUS_UNSUPP, written: 0 };
const NOTHING_TO_DO: Asked = Asked::Answered { status: STATUS_OK, written: 0 };

/// Makes requests of chains. Its memory is reused from chain to chain.
#[derive(Debug)]
pub struct Parser {
    /// The chain to parse.
    pub chain: Chain,
    /// Host addresses of the data of the last request.
    pub buffers: Vec<libc::iovec>,
    /// Ranges of the last request.
    pub ranges: Vec<Range>,
}

/// A position in the bytes of segments.
struct Cursor<'a> {
    segments: &'a [Segment],
    skip: u32,
    /// Bytes to come.
    left: u64,
}

impl<'a> Cursor<'a> {
    fn new(segments: &'a [Segment], left: u64) -> Self {
        Self { segments, skip: 0, left }
    }

    /// Takes a contiguous piece of at most `limit` bytes.
    fn piece(&mut self, limit: usize) -> Option<(u64, usize)> {
        let (first, rest) = self.segments.split_first()?;
        let limit = u32::try_from(self.left.min(limit as u64)).unwrap_or(u32::MAX);
        let length = (first.length - self.skip).min(limit);
        if length == 0 {
            return None;
        }
        let address = first.address.wrapping_add(u64::from(self.skip));
        self.skip += length;
        self.left -= u64::from(length);
        if self.skip == first.length {
            (self.segments, self.skip) = (rest, 0);
        }
        Some((address, length as usize))
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.length)).sum()
}

impl Parser {
    /// For chains of at most `limit` descriptors.
    #[must_use]
    pub fn new(limit: u16) -> Self {
        let limit = usize::from(limit);
        Self {
            chain: Chain::with_capacity(limit),
            // A buffer may lie across the border of two regions of RAM.
            buffers: Vec::with_capacity(2 * limit),
            ranges: Vec::with_capacity(MAX_RANGES),
        }
    }

    /// The address of the status byte of the chain: the last that is writable.
    ///
    /// # Errors
    /// [`ChainError`] if there is none, or none in RAM.
    pub fn status_address(&self, memory: &GuestMemoryMmap, head: u16) -> Result<u64, ChainError> {
        let last = self.chain.writable().last().ok_or(ChainError::NoStatus { head })?;
        let address = last.address.wrapping_add(u64::from(last.length - 1));
        if memory.address_in_range(GuestAddress(address)) {
            return Ok(address);
        }
        Err(RingError::Unmapped { head, address }.into())
    }

    /// Parses the chain, and answers at once what needs no disk.
    ///
    /// # Errors
    /// [`ChainError`] if the chain points to what is not RAM.
    pub fn parse(&mut self, memory: &GuestMemoryMmap, head: u16, rules: &Rules<'_>) -> Result<Asked, ChainError> {
        self.buffers.clear();
        self.ranges.clear();
        let Self { chain, buffers, ranges } = self;
        let mut input = Cursor::new(chain.readable(), total(chain.readable()));
        let output = Cursor::new(chain.writable(), total(chain.writable()).saturating_sub(1));
        let mut guest = Guest { memory, head };
        let mut header = [0; HEADER];
        if !guest.read(&mut input, &mut header)? {
            return Ok(REFUSED);
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (kind, read_only) = (u32::from_le_bytes([k0, k1, k2, k3]), rules.geometry.read_only);
        match kind {
            TYPE_IN => guest.transfer(Operation::Read, sector, output, buffers, rules),
            TYPE_OUT | TYPE_DISCARD | TYPE_WRITE_ZEROES if read_only => Ok(REFUSED),
            TYPE_OUT => guest.transfer(Operation::Write { stable: rules.stable }, sector, input, buffers, rules),
            TYPE_FLUSH => Ok(Asked::Transfer { operation: Operation::Flush, offset: 0, length: 0 }),
            TYPE_GET_ID => guest.identify(output, rules.identity),
            TYPE_DISCARD if rules.geometry.discard.is_some() => guest.ranges(false, input, ranges, rules),
            TYPE_WRITE_ZEROES if rules.geometry.write_zeroes.is_some() => guest.ranges(true, input, ranges, rules),
            _ => Ok(UNSUPPORTED),
        }
    }
}

/// Where bytes of sectors lie on the disk, if they do.
fn place(sector: u64, length: u64, rules: &Rules<'_>) -> Option<u64> {
    let block = u64::from(rules.geometry.logical_block_size);
    let offset = sector.checked_mul(SECTOR)?;
    let inside = offset.checked_add(length)? <= rules.capacity;
    (inside && offset.is_multiple_of(block) && length.is_multiple_of(block)).then_some(offset)
}

struct Guest<'a> {
    memory: &'a GuestMemoryMmap,
    head: u16,
}

impl Guest<'_> {
    fn unmapped(&self, address: u64) -> ChainError {
        RingError::Unmapped { head: self.head, address }.into()
    }

    /// Fills `data`; false if there is not enough.
    fn read(&mut self, input: &mut Cursor<'_>, mut data: &mut [u8]) -> Result<bool, ChainError> {
        while !data.is_empty() {
            let Some((address, length)) = input.piece(data.len()) else { return Ok(false) };
            let (now, later) = data.split_at_mut(length);
            self.memory.read_slice(now, GuestAddress(address)).map_err(|_| self.unmapped(address))?;
            data = later;
        }
        Ok(true)
    }

    fn transfer(
        &mut self,
        operation: Operation,
        sector: u64,
        mut data: Cursor<'_>,
        buffers: &mut Vec<libc::iovec>,
        rules: &Rules<'_>,
    ) -> Result<Asked, ChainError> {
        let length = data.left;
        let (Some(offset), Ok(length)) = (place(sector, length, rules), u32::try_from(length)) else {
            return Ok(REFUSED);
        };
        while let Some((address, length)) = data.piece(usize::MAX) {
            for slice in self.memory.get_slices(GuestAddress(address), length) {
                let slice = slice.map_err(|_| self.unmapped(address))?;
                push(buffers, slice.ptr_guard_mut().as_ptr(), slice.len());
            }
        }
        Ok(if length == 0 { NOTHING_TO_DO } else { Asked::Transfer { operation, offset, length } })
    }

    fn identify(&mut self, mut output: Cursor<'_>, identity: &[u8; ID_BYTES]) -> Result<Asked, ChainError> {
        let mut left = identity.as_slice();
        while let Some((address, length)) = output.piece(left.len()) {
            let (now, later) = left.split_at(length);
            self.memory.write_slice(now, GuestAddress(address)).map_err(|_| self.unmapped(address))?;
            left = later;
        }
        let written = u32::try_from(ID_BYTES - left.len()).unwrap_or(0);
        Ok(Asked::Answered { status: STATUS_OK, written })
    }

    fn ranges(
        &mut self,
        zeroes: bool,
        mut input: Cursor<'_>,
        ranges: &mut Vec<Range>,
        rules: &Rules<'_>,
    ) -> Result<Asked, ChainError> {
        if input.left == 0 || !input.left.is_multiple_of(RANGE as u64) || input.left > (MAX_RANGES * RANGE) as u64 {
            return Ok(REFUSED);
        }
        let mut raw = [0; RANGE];
        while self.read(&mut input, &mut raw)? {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = raw;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let length = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR;
            let operation = match (zeroes, u32::from_le_bytes(flags)) {
                (false, 0) => Operation::Discard,
                (true, flags @ (0 | RANGE_UNMAP)) => {
                    Operation::WriteZeroes { unmap: flags == RANGE_UNMAP, stable: rules.stable }
                }
                _ => return Ok(UNSUPPORTED),
            };
            let Some(offset) = place(sector, length, rules) else { return Ok(REFUSED) };
            if length > 0 {
                ranges.push(Range { offset, length, operation });
            }
        }
        Ok(if ranges.is_empty() { NOTHING_TO_DO } else { Asked::Ranges })
    }
}

/// Adds a piece of host memory, to the last one where it goes on there.
fn push(buffers: &mut Vec<libc::iovec>, base: *mut u8, length: usize) {
    if let Some(last) = buffers.last_mut()
        && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base
    {
        last.iov_len += length;
        return;
    }
    buffers.push(libc::iovec { iov_base: base.cast(), iov_len: length });
}
