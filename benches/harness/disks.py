"""The disks of the host that are measured, one for each machine."""

import os
import subprocess
import time


class NullBlk:
    """Devices of the kernel that do nothing, at once: what is left is the cost of the way to them."""

    name = "null"

    def paths(self, count, queues):
        """Makes `count` of them anew, with as many hardware queues as the guests' disks have."""
        if os.path.exists("/sys/module/null_blk"):
            subprocess.run(["rmmod", "null_blk"], check=True)
        # queue_mode 2: blk-mq; irqmode 1: completed by a softirq
        settings = f"nr_devices={count} gb=16 queue_mode=2 irqmode=1 submit_queues={queues} hw_queue_depth=256 max_sectors=2560"
        subprocess.run(["modprobe", "null_blk", *settings.split()], check=True)
        made = [f"/dev/nullb{index}" for index in range(count)]
        deadline = time.monotonic() + 10
        while not all(map(os.path.exists, made)):
            if time.monotonic() > deadline:
                raise FileNotFoundError(", ".join(made))
            time.sleep(0.01)
        return made


class Named:
    """Block devices that are there already. What is on them is lost."""

    def __init__(self, name, paths):
        self.name = name
        self.known = paths

    def paths(self, count, queues):
        """The first `count` of them."""
        del queues
        if len(self.known) < count:
            raise FileNotFoundError(f"{self.name}: {count} disks are needed, one for each VMM, not {len(self.known)}")
        return self.known[:count]


def found(named):
    """null_blk, the laboratory's LUNs, and those that the command line names, separated by commas."""
    disks = [NullBlk()]
    luns = os.environ.get("LAB_SAN_LUNS")
    if luns:
        disks.append(Named("iscsi", luns.split()))
    if named:
        paths = named.split(",")
        disks.append(Named(os.path.basename(paths[0]), paths))
    return disks
