//! Which PCI slot each device gets.

use super::{BALLOON_ID, VmConfig};
use crate::problem::{Code, Pointer, Problem};

/// The id of the entropy device, which the configuration turns on by `rng`.
pub const RNG_ID: &str = "rng";

/// A device as slot assignment sees it: its id, the slot asked for, and where it stands in the document.
struct Wish<'a> {
    id: &'a str,
    slot: Option<u8>,
    at: Pointer,
}

/// The slot on bus 0 of every device, in configuration order: disks, NICs, entropy, balloon.
///
/// Slots that the configuration gives are honoured first; the others follow from 01.0 upwards. 00 (host bridge) and
/// 1F (chipset) are never given out. Pure: the same configuration always gives the same guest.
///
/// # Errors
/// `invalid-value` for a slot outside 1–30, `duplicate` for a slot given twice, `no-free-slot` beyond 30 devices.
pub fn slot_assignment(config: &VmConfig) -> Result<Vec<(String, u8)>, Problem> {
    let wishes = wishes(config);
    let mut taken = (1u32 << 0) | (1 << 31);
    for wish in &wishes {
        let Some(slot) = wish.slot else { continue };
        super::check::check_slot(wish.slot, &wish.at)?;
        if taken & (1 << slot) != 0 {
            return Err(Problem::new(
                Code::Duplicate,
                format!("slot {slot}, asked for by device \"{}\", is already given to another", wish.id),
                "give each device its own slot, or leave slot out",
            )
            .at(&wish.at));
        }
        taken |= 1 << slot;
    }
    let mut assigned = Vec::with_capacity(wishes.len());
    for wish in wishes {
        let slot = match wish.slot {
            Some(slot) => slot,
            None => first_free(taken).ok_or_else(|| {
                Problem::new(
                    Code::NoFreeSlot,
                    format!("there is no PCI slot left for device \"{}\": bus 0 has room for 30", wish.id),
                    "remove a device",
                )
                .at(&wish.at)
            })?,
        };
        taken |= 1 << slot;
        assigned.push((wish.id.to_owned(), slot));
    }
    Ok(assigned)
}

fn first_free(taken: u32) -> Option<u8> {
    (1..=30).find(|slot| taken & (1 << slot) == 0)
}

fn wishes(config: &VmConfig) -> Vec<Wish<'_>> {
    let root = Pointer::root();
    let disks = config.disks.iter().enumerate().map(|(i, disk)| Wish {
        id: &disk.id,
        slot: disk.slot,
        at: root.key("disks").index(i).key("slot"),
    });
    let nics = config.nics.iter().enumerate().map(|(i, nic)| Wish {
        id: &nic.id,
        slot: nic.slot,
        at: root.key("nics").index(i).key("slot"),
    });
    let rng = config.rng.then(|| Wish { id: RNG_ID, slot: None, at: root.key("rng") });
    let balloon = config.balloon.as_ref().map(|_| Wish { id: BALLOON_ID, slot: None, at: root.key("balloon") });
    disks.chain(nics).chain(rng).chain(balloon).collect()
}
