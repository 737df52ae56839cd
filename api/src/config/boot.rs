//! What the guest starts from.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmConfig;
use super::check::check_path;
use crate::problem::{Code, Pointer, Problem};

/// The most bytes a kernel command line can have.
pub const MAX_CMDLINE: usize = 4095;

/// What the guest starts from: UEFI firmware, or a Linux kernel that is loaded directly.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The kernel: an ELF `vmlinux` with a PVH entry, or a bzImage (`vmlinuz`). This or `firmware`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub kernel: Option<PathBuf>,
    /// The firmware, which finds the operating system on a disk or in the network, instead of `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<FirmwareConfig>,
    /// The initial RAM disk of the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, as it is; at most 4095 bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schema(max_length = 4095, default = "")]
    pub cmdline: String,
}

/// UEFI firmware in flash memory: a build of OVMF for Q35 machines, as distributions have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FirmwareConfig {
    /// The firmware itself, such as `OVMF_CODE_4M.fd`. It is only read; VMs may share it.
    #[schema(value_type = String)]
    pub code: PathBuf,
    /// The variables of this VM: a copy of the `OVMF_VARS` file that belongs to `code`, or a block device with its content.
    /// The guest writes it.
    #[schema(value_type = String)]
    pub vars: PathBuf,
    /// Whether `code` is a build for system management mode (SMM), such as `OVMF_CODE_4M.secboot.fd`: the guest can change the
    /// variables by way of the firmware only. A build with SMM does not start without this, one without SMM keeps no
    /// variables with it. The host's KVM must have SMM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    #[schema(default = false)]
    pub smm: bool,
}

impl BootConfig {
    /// A direct boot of a kernel, without initrd and command line.
    pub fn with_kernel(kernel: impl Into<PathBuf>) -> Self {
        Self { kernel: Some(kernel.into()), ..Self::default() }
    }

    /// A boot by firmware.
    pub fn with_firmware(code: impl Into<PathBuf>, vars: impl Into<PathBuf>) -> Self {
        let firmware = FirmwareConfig { code: code.into(), vars: vars.into(), smm: false };
        Self { firmware: Some(firmware), ..Self::default() }
    }

    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        match (&self.kernel, &self.firmware) {
            (Some(kernel), None) => check_path(kernel, &at.key("kernel"))?,
            (None, Some(firmware)) => firmware.check(&at.key("firmware"))?,
            (Some(_), Some(_)) => {
                let detail = "the guest starts from a kernel or from firmware, not from both";
                return Err(Problem::invalid(&at.key("firmware"), detail, "leave boot.kernel or boot.firmware out"));
            }
            (None, None) => return Err(Self::missing().at(at)),
        }
        if self.firmware.is_some() {
            self.check_nothing_of_a_kernel(at)?;
        }
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

    /// Firmware loads no kernel of the host's.
    fn check_nothing_of_a_kernel(&self, at: &Pointer) -> Result<(), Problem> {
        let stray = [("initrd", self.initrd.is_some()), ("cmdline", !self.cmdline.is_empty())];
        match stray.into_iter().find(|(_, given)| *given) {
            Some((field, _)) => {
                let detail = format!("{field} belongs to boot.kernel, and the guest starts from firmware");
                Err(Problem::invalid(&at.key(field), detail, "leave it out: the boot loader on the disk has its own"))
            }
            None => Ok(()),
        }
    }

    /// What a configuration lacks that names nothing to boot from.
    pub fn missing() -> Problem {
        let detail = "the configuration names nothing to boot from";
        Problem::new(Code::BootSourceMissing, detail, "give boot.kernel or boot.firmware")
    }
}

impl FirmwareConfig {
    fn check(&self, at: &Pointer) -> Result<(), Problem> {
        check_path(&self.code, &at.key("code"))?;
        check_path(&self.vars, &at.key("vars"))?;
        if self.code == self.vars {
            let detail = "code and vars are the same file";
            return Err(Problem::invalid(
                &at.key("vars"),
                detail,
                "give the VM a copy of the OVMF_VARS file of its own",
            ));
        }
        Ok(())
    }
}

/// The devices that the firmware is to try, first to last.
pub fn boot_order(config: &VmConfig) -> Vec<&str> {
    let disks = config.disks.iter().map(|disk| (disk.boot_index, disk.id.as_str()));
    let nics = config.nics.iter().map(|nic| (nic.boot_index, nic.id.as_str()));
    let mut order: Vec<_> = disks.chain(nics).filter_map(|(index, id)| Some((index?, id))).collect();
    order.sort_unstable();
    order.into_iter().map(|(_, id)| id).collect()
}
