//! ioeventfds: guest writes that signal an eventfd without leaving the kernel.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use rackvisor_devices::IoEvents;
use vmm_sys_util::eventfd::EventFd;

/// ioeventfds of one VM. A registration has no length, which lets KVM take its fast path for any width of write.
pub struct KvmIoEvents(pub Arc<VmFd>);

impl IoEvents for KvmIoEvents {
    fn register(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(io::Error::from)
    }

    fn unregister(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(io::Error::from)
    }
}
