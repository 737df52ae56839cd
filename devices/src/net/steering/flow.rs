//! What of a frame goes into its hash (virtio 1.2 §5.1.6.4.3).
//!
//! [`super::program`] finds the same in the kernel; a test holds the two together.

/// Bytes of the longest input: two IPv6 addresses and two ports.
pub(super) const LONGEST: usize = 36;
/// As much of the start of a frame is looked at: headers behind it are not found.
pub(crate) const LOOKED_AT: usize = 256;

/// Hash types (`VIRTIO_NET_HASH_TYPE_*`). Those with the addresses of Mobile IPv6 (IP_EX, TCP_EX, UDP_EX) are not offered.
pub(super) const IPV4: u32 = 1 << 0;
pub(super) const TCPV4: u32 = 1 << 1;
pub(super) const UDPV4: u32 = 1 << 2;
pub(super) const IPV6: u32 = 1 << 3;
pub(super) const TCPV6: u32 = 1 << 4;
pub(super) const UDPV6: u32 = 1 << 5;
/// All that there are.
pub(crate) const SUPPORTED: u32 = IPV4 | TCPV4 | UDPV4 | IPV6 | TCPV6 | UDPV6;

/// Where the type of an Ethernet frame stands.
pub(super) const ETHERTYPE: usize = 12;
pub(super) const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
pub(super) const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// What says that the type follows a VLAN tag.
pub(super) const VLAN_TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
/// VLAN tags that are skipped.
pub(super) const MOST_TAGS: usize = 2;
pub(super) const TAG: usize = 4;

pub(super) const IPV4_HEADER: usize = 20;
pub(super) const IPV6_HEADER: usize = 40;
/// More fragments, or a place that is not the start.
pub(super) const IPV4_FRAGMENT: [u8; 2] = [0x3f, 0xff];
pub(super) const IPV6_FRAGMENT: [u8; 2] = [0xff, 0xf9];
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const FRAGMENT: u8 = 44;
/// Extension headers that give their own length: hop-by-hop options, routing, destination options.
pub(super) const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// Extension headers that are skipped.
pub(super) const MOST_EXTENSIONS: usize = 4;
/// The shortest extension header, and the unit of their lengths.
pub(super) const EXTENSION: usize = 8;
/// The ports at the start of TCP's and UDP's headers.
pub(super) const PORTS: usize = 4;

/// A frame's addresses and ports, as far as its hash is made of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flow {
    kind: u32,
    bytes: [u8; LONGEST],
    length: usize,
}

impl Flow {
    /// That of the frame that begins like this, for these types of hashes. `None`: it has none.
    pub(super) fn of(frame: &[u8], types: u32) -> Option<Self> {
        let frame = frame.get(..LOOKED_AT).unwrap_or(frame);
        let mut at = ETHERTYPE;
        for _ in 0..MOST_TAGS {
            if VLAN_TAGS.contains(&read(frame, at)?) {
                at += TAG;
            }
        }
        match read(frame, at)? {
            ETHERTYPE_IPV4 => Self::of_ipv4(frame, at + 2, types),
            ETHERTYPE_IPV6 => Self::of_ipv6(frame, at + 2, types),
            _ => None,
        }
    }

    fn of_ipv4(frame: &[u8], at: usize, types: u32) -> Option<Self> {
        let header: [u8; IPV4_HEADER] = read(frame, at)?;
        let [start, _, _, _, _, _, f0, f1, _, protocol, _, _, addresses @ ..] = header;
        let length = usize::from(start & 15) * 4;
        if start >> 4 != 4 || length < IPV4_HEADER {
            return None;
        }
        let [m0, m1] = IPV4_FRAGMENT;
        let whole = f0 & m0 == 0 && f1 & m1 == 0;
        let kind = match protocol {
            TCP if whole => types & TCPV4,
            UDP if whole => types & UDPV4,
            _ => 0,
        };
        Self::with_ports(kind, &addresses, read(frame, at + length)).or_else(|| Self::plain(types & IPV4, &addresses))
    }

    fn of_ipv6(frame: &[u8], at: usize, types: u32) -> Option<Self> {
        let header: [u8; IPV6_HEADER] = read(frame, at)?;
        let [start, _, _, _, _, _, next, _, addresses @ ..] = header;
        if start >> 4 != 6 {
            return None;
        }
        let (protocol, at) = skip_extensions(frame, next, at + IPV6_HEADER);
        let kind = match protocol {
            TCP => types & TCPV6,
            UDP => types & UDPV6,
            _ => 0,
        };
        Self::with_ports(kind, &addresses, read(frame, at)).or_else(|| Self::plain(types & IPV6, &addresses))
    }

    fn with_ports(kind: u32, addresses: &[u8], ports: Option<[u8; PORTS]>) -> Option<Self> {
        Self::new(kind, addresses.iter().copied().chain(ports?))
    }

    fn plain(kind: u32, addresses: &[u8]) -> Option<Self> {
        Self::new(kind, addresses.iter().copied())
    }

    fn new(kind: u32, input: impl Iterator<Item = u8>) -> Option<Self> {
        let (mut bytes, mut length) = ([0; LONGEST], 0);
        for (to, from) in bytes.iter_mut().zip(input) {
            *to = from;
            length += 1;
        }
        (kind != 0).then_some(Self { kind, bytes, length })
    }

    /// What is hashed.
    pub(super) fn input(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// The type of the hash, as the driver is told it (`VIRTIO_NET_HASH_REPORT_*`).
    pub(super) fn report(&self) -> u16 {
        u16::try_from(self.kind.trailing_zeros() + 1).unwrap_or(0)
    }
}

/// The protocol behind IPv6 extension headers, and where its header begins. It is still that of an extension header where the
/// search ends before: in a fragment, as only the first one of a packet has ports and all are to have one hash.
fn skip_extensions(frame: &[u8], mut next: u8, mut at: usize) -> (u8, usize) {
    for _ in 0..MOST_EXTENSIONS {
        if next != FRAGMENT && !EXTENSIONS.contains(&next) {
            break;
        }
        let Some([following, length, f0, f1, ..]) = read::<EXTENSION>(frame, at) else { break };
        if next == FRAGMENT {
            let [m0, m1] = IPV6_FRAGMENT;
            if f0 & m0 != 0 || f1 & m1 != 0 {
                break;
            }
            at += EXTENSION;
        } else {
            at += EXTENSION * (usize::from(length) + 1);
        }
        next = following;
    }
    (next, at)
}

fn read<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..)?.first_chunk().copied()
}
