//! PCI: configuration space, capabilities, the root of bus 0, MSI-X.
