//! The order in which firmware tries devices, as it is told by the fw_cfg file `bootorder`.

/// A device that can be booted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootDevice {
    /// The virtio-blk disk in this slot of bus 0.
    Disk(u8),
    /// The virtio-net interface in this slot of bus 0.
    Nic(u8),
}

impl BootDevice {
    /// Its OpenFirmware device path, as OVMF's QemuBootOrderLib translates them (IEEE 1275; PCI bus binding §2.2.1.1).
    fn path(self) -> String {
        match self {
            Self::Disk(slot) => format!("/pci@i0cf8/scsi@{slot:x}/disk@0,0"),
            Self::Nic(slot) => format!("/pci@i0cf8/ethernet@{slot:x}/ethernet-phy@0"),
        }
    }
}

/// The content of `bootorder`: a path on each line, the first to be tried first, and a NUL at the end.
#[must_use]
pub fn boot_order(devices: &[BootDevice]) -> Vec<u8> {
    let mut content = devices.iter().map(|device| device.path()).collect::<Vec<_>>().join("\n").into_bytes();
    content.push(0);
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_openfirmware_does() {
        let order = boot_order(&[BootDevice::Disk(0x1e), BootDevice::Nic(2)]);
        assert_eq!(order, b"/pci@i0cf8/scsi@1e/disk@0,0\n/pci@i0cf8/ethernet@2/ethernet-phy@0\0");
    }
}
