//! A driver-side double: lays out rings in guest memory and plays the driver, for ring-level tests.
