//! How the driver configures hashes and steering (virtio 1.2 §5.1.6.5.6, §5.1.6.5.7).

use super::flow::SUPPORTED;
use super::hash::{Hasher, KEY_LENGTH, Key};

/// Most entries of an indirection table: what drivers want at least.
pub(crate) const TABLE_LENGTH: usize = 128;

/// `struct virtio_net_hash_config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HashConfig {
    types: u32,
    key: Key,
}

impl HashConfig {
    /// Reads the data of HASH_CONFIG. `None` if it breaks a rule.
    pub(crate) fn parse(data: &[u8]) -> Option<Self> {
        let (types, data) = data.split_first_chunk()?;
        let (reserved, data) = data.split_first_chunk::<8>()?;
        Self::new(*types, data).filter(|_| *reserved == [0; 8])
    }

    /// `key` has its length before it. What comes after it is the padding of somebody's structure: Linux 6.15 sends a byte of it.
    fn new(types: [u8; 4], key: &[u8]) -> Option<Self> {
        let types = u32::from_le_bytes(types);
        let (length, data) = key.split_first()?;
        let data = data.get(..usize::from(*length)).filter(|data| data.len() <= KEY_LENGTH)?;
        // Without a key there is no hash.
        if types & !SUPPORTED != 0 || (data.is_empty() && types != 0) {
            return None;
        }
        let mut key = [0; KEY_LENGTH];
        for (to, from) in key.iter_mut().zip(data) {
            *to = *from;
        }
        Some(Self { types, key })
    }

    /// What hashes as it says.
    pub(crate) fn hasher(&self) -> Hasher {
        Hasher::new(self.types, &self.key)
    }
}

/// `struct virtio_net_rss_config`. Queues are numbers of pairs, from 0 on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RssConfig {
    pub(crate) hash: HashConfig,
    /// Where frames without a hash go.
    pub(super) unclassified: u16,
    /// Where frames with a hash go: a power of two of entries, up to [`TABLE_LENGTH`].
    pub(super) table: Vec<u16>,
    /// Transmit queues that the driver may use.
    transmit: u16,
}

impl RssConfig {
    /// Reads the data of RSS_CONFIG for a card with `max_pairs`. `None` if it breaks a rule.
    pub(crate) fn parse(data: &[u8], max_pairs: u16) -> Option<Self> {
        let (types, data) = data.split_first_chunk()?;
        let (mask, data) = number(data)?;
        let (unclassified, mut data) = number(data)?;
        let entries = usize::from(mask) + 1;
        if !entries.is_power_of_two() || entries > TABLE_LENGTH {
            return None;
        }
        let mut table = Vec::with_capacity(entries);
        for _ in 0..entries {
            let (queue, rest) = number(data)?;
            table.push(queue);
            data = rest;
        }
        let (transmit, key) = number(data)?;
        let config = Self { hash: HashConfig::new(*types, key)?, unclassified, table, transmit };
        (transmit > 0 && config.pairs() <= max_pairs).then_some(config)
    }

    /// The pairs that receive.
    pub(crate) fn receivers(&self) -> impl Iterator<Item = u16> {
        self.table.iter().copied().chain([self.unclassified])
    }

    /// Queue pairs that the driver uses, one way or the other.
    pub(crate) fn pairs(&self) -> u16 {
        self.receivers().map(|queue| queue.saturating_add(1)).fold(self.transmit, u16::max)
    }
}

fn number(data: &[u8]) -> Option<(u16, &[u8])> {
    let (bytes, rest) = data.split_first_chunk()?;
    Some((u16::from_le_bytes(*bytes), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_without_hash_or_key_is_one_and_so_is_one_with_padding_behind_its_key() {
        // NetKVM's first, with four transmit queues: everything else is zero.
        let none = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0];
        let config = RssConfig::parse(&none, 4).unwrap();
        assert_eq!((config.pairs(), config.receivers().collect::<Vec<_>>()), (4, vec![0, 0]));
        let with_key = [&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 40][..], &[7; 40]].concat();
        let padded = [&with_key[..], &[0; 3]].concat();
        assert_eq!(RssConfig::parse(&padded, 4), RssConfig::parse(&with_key, 4));
        assert!(RssConfig::parse(&with_key, 4).is_some() && RssConfig::parse(&with_key[..52], 4).is_none());
    }
}
