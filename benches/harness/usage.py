"""What a VMM has cost its host so far."""

import glob
import os
import re
import time

TICKS = os.sysconf("SC_CLK_TCK")
COUNTED = "hist:keys=common_pid:size=4096"
HIT = re.compile(r"common_pid:\s*(\d+).*hitcount:\s*(\d+)")


class Usage:
    """Counters of a process that runs a VM, at one moment. `folder` is KVM's own of that VM, `helpers` are the kernel's
    threads that work for it and belong to no process."""

    def __init__(self, pid, folder, helpers=()):
        self.at = time.monotonic()
        self.cpu = sum(cpu(task) for task in (pid, *helpers))
        self.exits = None
        if folder:
            with open(os.path.join(folder, "exits"), encoding="ascii") as file:
                self.exits = int(file.read())


def cpu(pid):
    """Seconds that a process or a thread of the kernel has run, without what a guest ran."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    # proc(5): 14 utime, 15 stime, 43 guest_time, which is part of utime; all threads, also the kernel's for io_uring
    user, system, guest = (int(fields[number - 3]) / TICKS for number in (14, 15, 43))
    return user + system - guest


def kvm_folders():
    """KVM's statistics of all VMs; none where debugfs cannot be read."""
    return set(glob.glob("/sys/kernel/debug/kvm/*-*"))


def vhost_threads():
    """The kernel's threads for vhost, which until Linux 6.4 are none of the process that they work for."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/comm"):
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                if file.read().startswith("vhost-"):
                    found.add(int(path.split("/")[2]))
        except FileNotFoundError:
            # it ended meanwhile
            pass
    return found


class SystemCalls:
    """The system calls of a process while this is entered, in `count`; None where the kernel does not count them. Counting makes
    them dearer, for everyone."""

    trigger = "/sys/kernel/tracing/events/raw_syscalls/sys_enter/trigger"

    def __init__(self, pid):
        self.pid = pid
        self.count = None

    def __enter__(self):
        self.possible = os.access(self.trigger, os.W_OK)
        if self.possible:
            self.set(COUNTED)
        return self

    def __exit__(self, *_):
        if not self.possible:
            return
        with open(os.path.join(os.path.dirname(self.trigger), "hist"), encoding="ascii") as file:
            hits = {int(thread): int(count) for thread, count in HIT.findall(file.read())}
        self.set(f"!{COUNTED}")
        self.count = sum(hits.get(int(thread), 0) for thread in os.listdir(f"/proc/{self.pid}/task"))

    def set(self, trigger):
        with open(self.trigger, "w", encoding="ascii") as file:
            file.write(trigger)
