//! Which frames the driver wants to receive (virtio 1.2 §5.1.6.5.1, §5.1.6.5.2, §5.1.6.5.4).

mod program;

/// Addresses that are kept of each table; with more, all frames of that kind are let through (§5.1.6.5.2).
const TABLE: usize = 256;
/// What the filter looks at: an Ethernet header with a VLAN tag.
pub(super) const LOOKED_AT: usize = 18;
const VLAN_TAG: [u8; 2] = [0x81, 0x00];
const VLANS: usize = 4096;
const BROADCAST: Mac = [0xff; 6];

pub(super) type Mac = [u8; 6];

/// A switch of the receive filter (§5.1.6.5.1), by its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

impl Mode {
    /// All of them, at the numbers of their commands. Those from `AllUnicast` on need CTRL_RX_EXTRA.
    pub(super) const ALL: [Self; 6] = [
        Self::Promiscuous,
        Self::AllMulticast,
        Self::AllUnicast,
        Self::NoMulticast,
        Self::NoUnicast,
        Self::NoBroadcast,
    ];

    fn bit(self) -> u8 {
        1 << (self as u8)
    }
}

/// What a driver changes of its filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// Switch a mode.
    Mode(Mode, bool),
    /// Receive what is for these addresses, and no others but the card's own.
    Tables { unicast: Vec<Mac>, multicast: Vec<Mac> },
    /// Have another address.
    Mac(Mac),
    /// Receive a VLAN (0..=4095), or receive it no more.
    Vlan { id: u16, wanted: bool },
}

/// Addresses that are let through; `None`: there are too many, so all are.
type Table = Option<Vec<Mac>>;

/// What the driver asked to receive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    mac: Mac,
    modes: u8,
    unicast: Table,
    multicast: Table,
    /// A bit for each VLAN; `None` if the driver filters none.
    vlans: Option<Box<[u64; VLANS / 64]>>,
}

impl Filter {
    /// As after a reset: everything is let through until the driver says what it wants. `vlans`: whether it filters them.
    pub(super) fn new(mac: Mac, vlans: bool) -> Self {
        Self {
            mac,
            modes: Mode::Promiscuous.bit(),
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans: vlans.then(|| Box::new([0; VLANS / 64])),
        }
    }

    pub(super) fn mac(&self) -> Mac {
        self.mac
    }

    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            &Change::Mode(mode, on) => self.set_mode(mode, on),
            Change::Tables { unicast, multicast } => self.set_tables(unicast.clone(), multicast.clone()),
            &Change::Mac(mac) => self.set_mac(mac),
            &Change::Vlan { id, wanted } => self.set_vlan(id, wanted),
        }
    }

    fn set_mac(&mut self, mac: Mac) {
        self.mac = mac;
    }

    fn set_mode(&mut self, mode: Mode, on: bool) {
        self.modes = if on { self.modes | mode.bit() } else { self.modes & !mode.bit() };
    }

    fn set_tables(&mut self, unicast: Vec<Mac>, multicast: Vec<Mac>) {
        (self.unicast, self.multicast) = (table(unicast), table(multicast));
    }

    /// `id` is 0..=4095.
    fn set_vlan(&mut self, id: u16, wanted: bool) {
        let place = self.vlans.as_mut().and_then(|vlans| vlans.get_mut(usize::from(id / 64)));
        if let Some(word) = place {
            let bit = 1 << (id % 64);
            *word = if wanted { *word | bit } else { *word & !bit };
        }
    }

    fn has(&self, mode: Mode) -> bool {
        self.modes & mode.bit() != 0
    }

    /// Whether the driver wants the frame that begins like this.
    pub(super) fn accepts(&self, frame: &[u8; LOOKED_AT]) -> bool {
        if self.has(Mode::Promiscuous) {
            return true;
        }
        let [d0, d1, d2, d3, d4, d5, _, _, _, _, _, _, t0, t1, v0, v1, ..] = *frame;
        if [t0, t1] == VLAN_TAG && !self.wants_vlan(u16::from_be_bytes([v0, v1]) & 0xfff) {
            return false;
        }
        let destination = [d0, d1, d2, d3, d4, d5];
        if destination == BROADCAST {
            return !self.has(Mode::NoBroadcast);
        }
        if d0 & 1 == 1 {
            return !self.has(Mode::NoMulticast)
                && (self.has(Mode::AllMulticast) || contains(&self.multicast, destination));
        }
        !self.has(Mode::NoUnicast)
            && (self.has(Mode::AllUnicast) || destination == self.mac || contains(&self.unicast, destination))
    }

    fn wants_vlan(&self, id: u16) -> bool {
        let Some(vlans) = &self.vlans else { return true };
        vlans.get(usize::from(id / 64)).is_some_and(|word| word & 1 << (id % 64) != 0)
    }
}

fn table(mut addresses: Vec<Mac>) -> Table {
    addresses.sort_unstable();
    addresses.dedup();
    (addresses.len() <= TABLE).then_some(addresses)
}

fn contains(table: &Table, address: Mac) -> bool {
    table.as_ref().is_none_or(|table| table.binary_search(&address).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [0x52, 0x54, 0, 0, 0, 1];
    const OTHER: Mac = [0x52, 0x54, 0, 0, 0, 2];
    const GROUP: Mac = [0x01, 0, 0x5e, 0, 0, 1];
    const GROUP2: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn frame(destination: Mac, vlan: Option<u16>) -> [u8; LOOKED_AT] {
        let mut frame = [0; LOOKED_AT];
        frame[..6].copy_from_slice(&destination);
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        if let Some(vlan) = vlan {
            frame[12..14].copy_from_slice(&VLAN_TAG);
            frame[14..16].copy_from_slice(&vlan.to_be_bytes());
        }
        frame
    }

    /// Which of own, other, a group, another group and broadcast come through.
    fn through(filter: &Filter) -> [bool; 5] {
        [MAC, OTHER, GROUP, GROUP2, BROADCAST].map(|to| filter.accepts(&frame(to, None)))
    }

    fn plain() -> Filter {
        let mut filter = Filter::new(MAC, true);
        filter.set_mode(Mode::Promiscuous, false);
        filter
    }

    #[test]
    fn everything_comes_through_until_the_driver_says_what_it_wants() {
        assert_eq!(through(&Filter::new(MAC, true)), [true; 5]);
        assert!(Filter::new(MAC, true).accepts(&frame(OTHER, Some(7))));
        assert_eq!(through(&plain()), [true, false, false, false, true]);
    }

    #[test]
    fn each_mode_does_what_its_name_says() {
        for (mode, expected) in [
            (Mode::Promiscuous, [true, true, true, true, true]),
            (Mode::AllMulticast, [true, false, true, true, true]),
            (Mode::AllUnicast, [true, true, false, false, true]),
            (Mode::NoMulticast, [true, false, false, false, true]),
            (Mode::NoUnicast, [false, false, false, false, true]),
            (Mode::NoBroadcast, [true, false, false, false, false]),
        ] {
            let mut filter = plain();
            filter.set_mode(mode, true);
            assert_eq!(through(&filter), expected, "{mode:?}");
            filter.set_mode(mode, false);
            assert_eq!(through(&filter), through(&plain()), "{mode:?} off again");
        }
        let mut filter = plain();
        filter.set_mode(Mode::AllMulticast, true);
        filter.set_mode(Mode::NoMulticast, true);
        assert_eq!(through(&filter), [true, false, false, false, true], "no wins over all");
    }

    #[test]
    fn tables_let_their_addresses_through_and_all_of_a_kind_when_there_are_too_many() {
        let mut filter = plain();
        filter.set_tables(vec![OTHER], vec![GROUP]);
        assert_eq!(through(&filter), [true, true, true, false, true]);
        let many = |first: u8| (0..=TABLE as u32).map(|n| [first, 0, 0, 9, (n >> 8) as u8, n as u8]).collect();
        filter.set_tables(vec![], many(1));
        assert_eq!(through(&filter), [true, false, true, true, true]);
        filter.set_tables(many(2), vec![]);
        assert_eq!(through(&filter), [true, true, false, false, true]);
        filter.set_tables(vec![OTHER; 1000], vec![]);
        assert_eq!(through(&filter), [true, true, false, false, true], "the same one counts once");
    }

    #[test]
    fn tagged_frames_come_through_only_on_vlans_that_were_added() {
        let mut filter = plain();
        let accepts = |filter: &Filter| [0, 7, 4095].map(|id| filter.accepts(&frame(MAC, Some(id))));
        assert_eq!(accepts(&filter), [false; 3]);
        filter.set_vlan(7, true);
        filter.set_vlan(4095, true);
        assert_eq!(accepts(&filter), [false, true, true]);
        assert!(filter.accepts(&frame(MAC, Some(7 | 0xe000))), "the priority does not matter");
        assert!(!filter.accepts(&frame(OTHER, Some(7))));
        filter.set_vlan(7, false);
        assert_eq!(accepts(&filter), [false, false, true]);
        filter.set_vlan(u16::MAX, true);
        let mut without = Filter::new(MAC, false);
        without.set_mode(Mode::Promiscuous, false);
        assert_eq!(accepts(&without), [true; 3], "a driver that does not filter VLANs has them all");
    }

    #[test]
    fn the_address_may_change() {
        let mut filter = plain();
        filter.set_mac(OTHER);
        assert_eq!(through(&filter), [false, true, false, false, true]);
        assert_eq!(filter.mac(), OTHER);
    }
}
