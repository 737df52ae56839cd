"""What a VMM has cost its host so far."""

import glob
import os
import time

TICKS = os.sysconf("SC_CLK_TCK")


class Usage:
    """Counters of a process that runs a VM, at one moment. `folder` is KVM's own of that VM."""

    def __init__(self, pid, folder):
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        # proc(5): 14 utime, 15 stime, 43 guest_time, which is part of utime; all threads, also the kernel's for io_uring
        user, system, guest = (int(fields[number - 3]) / TICKS for number in (14, 15, 43))
        self.at = time.monotonic()
        self.cpu = user + system - guest
        self.exits = None
        if folder:
            with open(os.path.join(folder, "exits"), encoding="ascii") as file:
                self.exits = int(file.read())


def kvm_folders():
    """KVM's statistics of all VMs; none where debugfs cannot be read."""
    return set(glob.glob("/sys/kernel/debug/kvm/*-*"))
