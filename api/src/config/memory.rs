//! Guest memory.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::{Pointer, Problem};
use crate::size::ByteSize;

/// The least memory a VM can have: 128 MiB.
pub const MIN_MEMORY: ByteSize = ByteSize::mib(128);
/// The most memory a VM can have: 16 TiB.
pub const MAX_MEMORY: ByteSize = ByteSize::gib(16 << 10);

/// The memory of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// How much: 128 MiB to 16 TiB, a multiple of 2 MiB (of 1 GiB with `hugepages` `1G`).
    pub size: ByteSize,
    /// Back it by a memory file that other processes (vhost-user) can map.
    #[serde(default)]
    #[schema(default = false)]
    pub shared: bool,
    /// The page size that backs it.
    #[serde(default)]
    pub hugepages: HugePages,
    /// Take all of it from the host before the guest starts, so that it cannot run short later.
    #[serde(default)]
    #[schema(default = false)]
    pub prefault: bool,
}

/// The pages that back guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HugePages {
    /// 4 KiB pages only.
    #[serde(rename = "off")]
    Off,
    /// Transparent huge pages where the host has them to give.
    #[default]
    #[serde(rename = "thp")]
    Thp,
    /// 2 MiB pages of the host's reserved pool.
    #[serde(rename = "2M")]
    Size2M,
    /// 1 GiB pages of the host's reserved pool.
    #[serde(rename = "1G")]
    Size1G,
}

impl MemoryConfig {
    /// Private memory of this size, with the defaults for everything else.
    pub fn new(size: ByteSize) -> Self {
        Self { size, shared: false, hugepages: HugePages::default(), prefault: false }
    }

    /// What the size is a multiple of.
    pub(super) fn page(&self) -> ByteSize {
        if self.hugepages == HugePages::Size1G { ByteSize::gib(1) } else { ByteSize::mib(2) }
    }

    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        let at = at.key("size");
        let size = self.size;
        if size < MIN_MEMORY || size > MAX_MEMORY {
            return Err(Problem::invalid(
                &at,
                format!("{size} of memory is not possible"),
                format!("choose {MIN_MEMORY} to {MAX_MEMORY}"),
            ));
        }
        let page = self.page();
        if !size.bytes().is_multiple_of(page.bytes()) {
            return Err(Problem::invalid(
                &at,
                format!("memory of {size} is not a multiple of {page}"),
                format!("choose a multiple of {page}"),
            ));
        }
        Ok(())
    }
}
