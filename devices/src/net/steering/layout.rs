//! What the program and we share: an array of 32-bit words with a generation and two slots, the generation's lowest bit
//! telling which one is in force.

use std::sync::atomic::{AtomicU32, Ordering};

use super::config::{RssConfig, TABLE_LENGTH};
use super::flow::LONGEST;
use super::hash::Hasher;

/// Nibbles of the longest input, each with a table of its own.
pub(super) const NIBBLES: usize = 2 * LONGEST;
/// Entries of the table of a nibble.
pub(super) const VALUES: usize = 16;

/// Words of a slot, in this order.
pub(super) const TYPES: usize = 0;
pub(super) const MASK: usize = 1;
pub(super) const UNCLASSIFIED: usize = 2;
pub(super) const TABLE: usize = 3;
pub(super) const TABLES: usize = TABLE + TABLE_LENGTH;
/// Words of a slot.
pub(super) const SLOT: usize = TABLES + NIBBLES * VALUES;

/// The word that counts configurations.
pub(super) const GENERATION: usize = 0;
/// Where the slots begin.
pub(super) const SLOTS: usize = 1;
/// All words.
pub(super) const WORDS: usize = SLOTS + 2 * SLOT;

/// Bytes per word.
pub(super) const WORD: usize = size_of::<u32>();

/// What a slot is filled with.
pub(super) struct Slot<'a> {
    pub(super) config: &'a RssConfig,
    pub(super) hasher: &'a Hasher,
}

impl Slot<'_> {
    fn values(&self) -> impl Iterator<Item = u32> {
        let Self { config, hasher } = self;
        let mask = u32::try_from(config.table.len().saturating_sub(1)).unwrap_or(0);
        let table = config.table.iter().copied().map(u32::from);
        [hasher.types(), mask, config.unclassified.into()]
            .into_iter()
            .chain(table.chain(std::iter::repeat(0)).take(TABLE_LENGTH))
            .chain(hasher.tables().iter().flatten().copied())
    }
}

/// Fills the slot that is not in force and then puts it into force.
///
/// The program looks at the generation before and after it has worked with a slot. It sees our stores in their order, as
/// x86 keeps it: when a slot is written that it works with, the generation has changed before.
pub(super) fn write(words: &[AtomicU32], slot: Slot<'_>) {
    let Some(generation) = words.get(GENERATION) else { return };
    let next = generation.load(Ordering::SeqCst).wrapping_add(1);
    let start = SLOTS + if next & 1 == 0 { 0 } else { SLOT };
    for (word, value) in words.iter().skip(start).zip(slot.values()) {
        word.store(value, Ordering::Release);
    }
    generation.store(next, Ordering::SeqCst);
}
