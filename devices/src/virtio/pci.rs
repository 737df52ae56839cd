//! The virtio-pci transport (virtio 1.2 §4.1), modern only.
