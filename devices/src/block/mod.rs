//! Disks: what virtio-blk requests mean, and what stores the bytes.
