//! The feature bits of virtio-net (virtio 1.2 §5.1.3), and what they mean for the tap.

/// Device handles frames with partial checksum.
pub const CSUM: u32 = 0;
/// Driver handles frames with partial checksum.
pub const GUEST_CSUM: u32 = 1;
/// The driver can change its offloads at run time.
pub const CTRL_GUEST_OFFLOADS: u32 = 2;
/// The configuration space holds the MTU.
pub const MTU: u32 = 3;
/// The configuration space holds the MAC address.
pub const MAC: u32 = 5;
/// Driver takes TSOv4.
pub const GUEST_TSO4: u32 = 7;
/// Driver takes TSOv6.
pub const GUEST_TSO6: u32 = 8;
/// Driver takes TSO with ECN.
pub const GUEST_ECN: u32 = 9;
/// Driver takes UFO; never offered, but a valid offload bit.
pub const GUEST_UFO: u32 = 10;
/// Device takes TSOv4.
pub const HOST_TSO4: u32 = 11;
/// Device takes TSOv6.
pub const HOST_TSO6: u32 = 12;
/// Device takes TSO with ECN.
pub const HOST_ECN: u32 = 13;
/// A received frame may span several buffers.
pub const MRG_RXBUF: u32 = 15;
/// The configuration space holds the link status.
pub const STATUS: u32 = 16;
/// There is a control queue.
pub const CTRL_VQ: u32 = 17;
/// The driver says which frames it wants to receive.
pub const CTRL_RX: u32 = 18;
/// The driver says which VLANs it wants to receive.
pub const CTRL_VLAN: u32 = 19;
/// The driver says more exactly which frames it wants to receive.
pub const CTRL_RX_EXTRA: u32 = 20;
/// The driver tells the network where it is when it is asked to.
pub const GUEST_ANNOUNCE: u32 = 21;
/// There are several queue pairs.
pub const MQ: u32 = 22;
/// The driver may change the MAC address.
pub const CTRL_MAC_ADDR: u32 = 23;
/// The driver says for each queue how long its interrupts are held back (virtio 1.3).
pub const VQ_NOTF_COAL: u32 = 52;
/// The driver says how long interrupts are held back (virtio 1.3).
pub const NOTF_COAL: u32 = 53;
/// Driver takes USOv4.
pub const GUEST_USO4: u32 = 54;
/// Driver takes USOv6.
pub const GUEST_USO6: u32 = 55;
/// Device takes USO.
pub const HOST_USO: u32 = 56;
/// A received frame has its hash in its header, which is longer then.
pub const HASH_REPORT: u32 = 57;
/// The driver says which queue receives a frame.
pub const RSS: u32 = 60;
/// The configuration space holds speed and duplex.
pub const SPEED_DUPLEX: u32 = 63;

/// Frames to be sent with the checksum still to fill in.
pub(super) const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
/// Both directions of IP: the kernel takes these two together or not at all.
pub(super) const TUN_F_USO: u32 = 0x60;
/// What every kernel that we run on takes.
pub(super) const TUN_F_BASE: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;

/// The value of a feature bit.
#[must_use]
pub const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// All offloads that a driver can have, in the bits of CTRL_GUEST_OFFLOADS_SET, which are those of the features (§5.1.6.5.8).
pub(super) const GUEST_OFFLOADS: u64 = bit(GUEST_CSUM)
    | bit(GUEST_TSO4)
    | bit(GUEST_TSO6)
    | bit(GUEST_ECN)
    | bit(GUEST_UFO)
    | bit(GUEST_USO4)
    | bit(GUEST_USO6);

/// The tap's offload flags for the offloads that a driver takes. Nothing without the checksum, ECN only with TSO, USO only
/// for both versions of IP: the kernel refuses the rest, and to leave an offload out is always right.
pub(super) fn tap_offload(offloads: u64) -> u32 {
    let has = |feature| offloads & bit(feature) != 0;
    if !has(GUEST_CSUM) {
        return 0;
    }
    let mut flags = TUN_F_CSUM;
    for (feature, flag) in [(GUEST_TSO4, TUN_F_TSO4), (GUEST_TSO6, TUN_F_TSO6)] {
        if has(feature) {
            flags |= flag;
        }
    }
    if has(GUEST_ECN) && flags & (TUN_F_TSO4 | TUN_F_TSO6) != 0 {
        flags |= TUN_F_TSO_ECN;
    }
    if has(GUEST_USO4) && has(GUEST_USO6) {
        flags |= TUN_F_USO;
    }
    flags
}

/// Whether a driver with these offloads takes a frame with this header (`flags`, `gso_type`; §5.1.6.4). Frames that the tap
/// queued before the offloads changed may not fit them any more.
pub(super) fn takes(offloads: u64, flags: u8, gso_type: u8) -> bool {
    const NEEDS_CSUM: u8 = 1;
    const ECN: u8 = 0x80;
    let has = |feature| offloads & bit(feature) != 0;
    if flags & NEEDS_CSUM != 0 && !has(GUEST_CSUM) {
        return false;
    }
    if gso_type & ECN != 0 && !has(GUEST_ECN) {
        return false;
    }
    match gso_type & !ECN {
        0 => true,
        1 => has(GUEST_TSO4),
        4 => has(GUEST_TSO6),
        5 => has(GUEST_USO4) && has(GUEST_USO6),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_gets_no_offload_without_the_checksum_and_uso_only_for_both_versions_of_ip() {
        assert_eq!(tap_offload(bit(GUEST_TSO4) | bit(GUEST_USO4) | bit(GUEST_USO6)), 0);
        assert_eq!(tap_offload(bit(GUEST_CSUM) | bit(GUEST_USO4)), TUN_F_CSUM);
        assert_eq!(tap_offload(bit(GUEST_CSUM) | bit(GUEST_ECN)), TUN_F_CSUM);
        assert_eq!(tap_offload(GUEST_OFFLOADS), TUN_F_BASE | TUN_F_USO);
    }

    #[test]
    fn a_frame_that_needs_an_offload_which_the_driver_lacks_is_not_for_it() {
        assert!(takes(0, 0, 0));
        assert!(takes(0, 2, 0), "a valid checksum is no offload");
        assert!(!takes(0, 1, 0));
        let offloads = bit(GUEST_CSUM) | bit(GUEST_TSO4);
        assert!(takes(offloads, 1, 1));
        for gso_type in [3, 4, 5, 0x81, 0x7f] {
            assert!(!takes(offloads, 1, gso_type), "{gso_type:#x}");
        }
        assert!(takes(GUEST_OFFLOADS, 1, 0x84));
        assert!(takes(GUEST_OFFLOADS, 1, 5));
    }
}
