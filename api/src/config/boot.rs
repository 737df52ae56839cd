//! What the guest starts from.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::check_path;
use crate::problem::{Pointer, Problem};

/// The most bytes a kernel command line can have.
pub const MAX_CMDLINE: usize = 4095;

/// What the guest starts from: a Linux kernel, loaded directly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The kernel: an ELF `vmlinux` with a PVH entry, or a bzImage (`vmlinuz`).
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, as it is; at most 4095 bytes.
    #[serde(default)]
    #[schema(max_length = 4095, default = "")]
    pub cmdline: String,
}

impl BootConfig {
    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        check_path(&self.kernel, &at.key("kernel"))?;
        if let Some(initrd) = &self.initrd {
            check_path(initrd, &at.key("initrd"))?;
        }
        let at = at.key("cmdline");
        if self.cmdline.len() > MAX_CMDLINE {
            return Err(Problem::invalid(
                &at,
                format!("the command line has {} bytes", self.cmdline.len()),
                format!("shorten it to {MAX_CMDLINE} bytes"),
            ));
        }
        if self.cmdline.contains(['\0', '\n', '\r']) {
            return Err(Problem::invalid(
                &at,
                "the command line has a NUL or a line break in it",
                "write it on one line",
            ));
        }
        Ok(())
    }
}
