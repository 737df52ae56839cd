//! The memory balloon.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::patch::{Patch, set};
use super::{HugePages, MemoryConfig};
use crate::problem::{Pointer, Problem};
use crate::size::ByteSize;

/// The id of the balloon.
pub const BALLOON_ID: &str = "balloon";
/// What its size is a multiple of.
const PAGE: u64 = 4096;

/// A balloon that takes memory from the guest and gives it to the host (virtio-balloon). It needs a driver in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much it is to take: a multiple of 4 KiB, less than the memory there is. May change while the guest runs. What the guest has
    /// given up so far is in `GET /v1/vm`.
    #[serde(default = "nothing")]
    #[schema(default = "0B")]
    pub size: ByteSize,
    /// Whether the guest may take memory back before it runs out of it.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub deflate_on_oom: bool,
    /// Whether the guest also gives memory back that it does not use at the time.
    #[serde(default)]
    #[schema(default = false)]
    pub free_page_reporting: bool,
}

fn nothing() -> ByteSize {
    ByteSize(0)
}

fn yes() -> bool {
    true
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { size: nothing(), deflate_on_oom: yes(), free_page_reporting: false }
    }
}

impl BalloonConfig {
    pub(super) fn check(&self, memory: &MemoryConfig, at: &Pointer) -> Result<(), Problem> {
        if matches!(memory.hugepages, HugePages::Size2M | HugePages::Size1G) {
            let detail = "a balloon gives back pages of 4 KiB, and the memory consists of huge pages";
            return Err(Problem::invalid(at, detail, "set memory.hugepages to \"thp\" or \"off\", or leave it out"));
        }
        let size = self.size;
        if size >= memory.size || !size.bytes().is_multiple_of(PAGE) {
            let detail = format!("a balloon of {size} is not possible in a guest with {}", memory.size);
            let remedy = format!("choose a multiple of 4KiB that is less than {}", memory.size);
            return Err(Problem::invalid(&at.key("size"), detail, remedy));
        }
        Ok(())
    }
}

/// Changes to a balloon, as a JSON merge patch: a field that is absent stays, `null` goes back to its default.
///
/// While the guest exists only `size` may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// Another `size`; null takes nothing from the guest any more.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<ByteSize>)]
    pub size: Patch<ByteSize>,
    /// Another `deflate_on_oom`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<bool>)]
    pub deflate_on_oom: Patch<bool>,
    /// Another `free_page_reporting`; null goes back to the default.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<bool>)]
    pub free_page_reporting: Patch<bool>,
}

impl BalloonPatch {
    /// A patch of the size alone.
    #[must_use]
    pub fn size(size: ByteSize) -> Self {
        Self { size: Patch::Set(size), ..Self::default() }
    }

    /// What becomes of `old`, or of a balloon with the defaults.
    pub(super) fn apply_to(patch: &Patch<Self>, old: &Option<BalloonConfig>) -> Option<BalloonConfig> {
        let patch = match patch {
            Patch::Keep => return old.clone(),
            Patch::Clear => return None,
            Patch::Set(patch) => patch,
        };
        let (old, fresh) = (old.clone().unwrap_or_default(), BalloonConfig::default());
        Some(BalloonConfig {
            size: set(patch.size, old.size, fresh.size),
            deflate_on_oom: set(patch.deflate_on_oom, old.deflate_on_oom, fresh.deflate_on_oom),
            free_page_reporting: set(patch.free_page_reporting, old.free_page_reporting, fresh.free_page_reporting),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{VmConfig, VmPatch, json};
    use crate::problem::Code;
    use crate::testing::small_config;

    fn patched(config: &VmConfig, patch: &[u8], guest_exists: bool) -> Result<VmConfig, Problem> {
        json::<VmPatch>(patch).unwrap().apply(config, guest_exists)
    }

    #[test]
    fn the_size_changes_at_any_time_and_the_rest_while_there_is_no_guest() {
        let config = patched(&small_config(), br#"{"balloon":{}}"#, false).unwrap();
        assert_eq!(config.balloon, Some(BalloonConfig::default()));
        let config = patched(&config, br#"{"balloon":{"size":"64MiB"}}"#, true).unwrap();
        assert_eq!(config.balloon.as_ref().unwrap().size, ByteSize::mib(64));
        for patch in [&br#"{"balloon":null}"#[..], br#"{"balloon":{"deflate_on_oom":false}}"#] {
            let problem = patched(&config, patch, true).unwrap_err();
            assert_eq!((problem.code, problem.pointer.as_deref()), (Code::HotplugUnsupported, Some("/balloon")));
            patched(&config, patch, false).unwrap();
        }
        assert_eq!(patched(&config, br#"{"balloon":{"size":null}}"#, true).unwrap().balloon.unwrap().size, ByteSize(0));
    }

    #[test]
    fn a_balloon_leaves_the_guest_some_memory_and_takes_small_pages() {
        for size in ["128MiB", "1TiB", "4097B"] {
            let patch = format!(r#"{{"balloon":{{"size":"{size}"}}}}"#);
            let problem = patched(&small_config(), patch.as_bytes(), false).unwrap_err();
            assert_eq!(problem.pointer.as_deref(), Some("/balloon/size"), "{size}");
        }
        let mut config = small_config();
        config.memory.hugepages = HugePages::Size2M;
        assert_eq!(patched(&config, br#"{"balloon":{}}"#, false).unwrap_err().pointer.as_deref(), Some("/balloon"));
    }
}
