//! The Debian guest of `resources/guest/build`.

use std::path::{Path, PathBuf};

use rackvisor_api::VmConfig;
use rackvisor_api::config::BootConfig;
use rackvisor_api::size::ByteSize;

/// `reboot -f` by any means other than a triple fault, and nothing on the console but what the tests ask for.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// The two forms of Debian's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The bzImage, as the package has it.
    Vmlinuz,
    /// The ELF image out of it, started by PVH.
    Vmlinux,
}

impl Kernel {
    /// The file.
    pub fn path(self) -> PathBuf {
        guest_folder().join(match self {
            Self::Vmlinuz => "vmlinuz",
            Self::Vmlinux => "vmlinux",
        })
    }
}

/// RACKVISOR_GUEST, or where `resources/guest/build` puts it.
pub fn guest_folder() -> PathBuf {
    let path = std::env::var_os("RACKVISOR_GUEST").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("out").join("guest/cloud-amd64"),
        PathBuf::from,
    );
    assert!(path.join("initrd.img").exists(), "no guest in {}: run resources/guest/build", path.display());
    path
}

/// Debian's kernel for any machine, where this one has it: with drivers that the guest's own leaves out.
pub fn stock_kernel() -> Option<PathBuf> {
    let names = std::fs::read_dir("/boot").ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let stock = |name: &String| {
        let version = name.strip_prefix("vmlinuz-").and_then(|name| name.strip_suffix("-amd64"));
        version.is_some_and(|version| !version.ends_with("-cloud") && !version.ends_with("-rt"))
    };
    names.filter(stock).max().map(|name| Path::new("/boot").join(name))
}

/// A Linux of one vCPU and 256 MiB with an agent on its console.
pub fn linux() -> VmConfig {
    with_cmdline(&format!("{CMDLINE} rv.mode=agent"))
}

/// As [`linux`] with fio and resize2fs.
///
/// # Panics
/// If the guest was built without them.
pub fn linux_with_fio() -> VmConfig {
    linux_with("fio")
}

/// As [`linux`] with ethtool, iperf3, socat and VLANs.
///
/// # Panics
/// If the guest was built without them.
pub fn linux_with_net() -> VmConfig {
    linux_with("net")
}

/// As [`linux`] with tpm2-tools.
///
/// # Panics
/// If the guest was built without them.
pub fn linux_with_tpm() -> VmConfig {
    linux_with("tpm")
}

fn linux_with(set: &str) -> VmConfig {
    let initrd = guest_folder().join(format!("initrd-{set}.img"));
    assert!(initrd.exists(), "no {}: run resources/guest/build --{set}", initrd.display());
    let mut config = linux();
    config.boot = config.boot.map(|boot| BootConfig { initrd: Some(initrd), ..boot });
    config
}

/// A Linux that runs `script`, then does `then` (`poweroff`, `reboot` or `hang`).
pub fn linux_that_runs(script: &str, then: &str) -> VmConfig {
    with_cmdline(&format!("{CMDLINE} rv.mode=exec rv.then={then} rv.exec={}", base64(script.as_bytes())))
}

fn with_cmdline(cmdline: &str) -> VmConfig {
    let mut config = VmConfig::new("guest", ByteSize::mib(256));
    config.boot = Some(BootConfig {
        initrd: Some(guest_folder().join("initrd.img")),
        cmdline: cmdline.into(),
        ..BootConfig::with_kernel(Kernel::Vmlinux.path())
    });
    config
}

/// RFC 4648 §4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = (0..3).fold(0_usize, |word, i| word << 8 | usize::from(chunk.get(i).copied().unwrap_or(0)));
        for digit in 0..4 {
            let shown = digit <= chunk.len();
            text.push(if shown { char::from(DIGITS[word >> (18 - 6 * digit) & 63]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_pads_as_the_rfc_says() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
