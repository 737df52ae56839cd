//! Network cards: virtio-net, and the taps behind it.
