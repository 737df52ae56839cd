"""Private resident memory of the processes, without the RAM of their guests."""

import os
import re
import subprocess
import sys
import time

import machines
import report
from process import Running, Silent

LIMIT_KIB = 6 << 10
IDLE_SECONDS = 5
TIMEOUT = 180
TAP = "rvbench0"
HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)$")


class Mapping:
    """One mapping of /proc/PID/smaps; sizes in KiB."""

    def __init__(self, match):
        self.start, self.end = int(match[1], 16), int(match[2], 16)
        self.access, self.path = match[3], match[4]
        self.fields = {}

    @property
    def size(self):
        return self.end - self.start

    @property
    def private(self):
        return self.fields.get("Private_Clean", 0) + self.fields.get("Private_Dirty", 0)

    @property
    def dirty(self):
        return self.fields.get("Private_Dirty", 0)


def mappings(pid):
    """All mappings of a process."""
    found = []
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            match = HEADER.match(line)
            if match:
                found.append(Mapping(match))
            elif line.rstrip().endswith(" kB"):
                name, value = line.split(":", 1)
                found[-1].fields[name] = int(value.split()[0])
    return found


def is_ram(mapping, ram):
    """Guest RAM is one mapping, of just its size, or of a little more where the kernel merged a neighbour with it."""
    return mapping.access.startswith("rw") and ram <= mapping.size < ram + (64 << 20)


def classify(found, program, ram):
    """Pairs of class and mapping. Thread stacks are known by the guard page below them."""
    guard_end = None
    for mapping in found:
        name = mapping.path
        if is_ram(mapping, ram):
            kind = "guest RAM"
        elif name == program:
            kind = {"r-x": "program: code", "r--": "program: constants"}.get(mapping.access[:3], "program: data")
        elif "/" in name and not name.startswith(("anon_inode", "/dev/", "/memfd")):
            kind = "shared libraries" if ".so" in name else f"file {os.path.basename(name)}"
        elif name:
            kind = name
        elif guard_end == mapping.start and mapping.access.startswith("rw"):
            kind = "thread stacks"
        elif mapping.start % (64 << 20) == 0 and mapping.access.startswith("rw"):
            kind = "malloc arenas of threads"
        else:
            kind = "other anonymous"
        guard = mapping.access.startswith("---") and not name and mapping.size <= 64 << 10
        guard_end = mapping.end if guard else None
        yield kind, mapping


def weigh(machine, files):
    """Private KiB, private dirty KiB and threads of an idle machine, and private KiB by class of mapping."""
    guest = machines.Guest(f"{files}/vmlinux", f"{files}/initrd.img", f"{files}/disk", "login", tap=TAP)
    with Running(machine, guest) as running:
        running.wait_for(machines.LOGIN, TIMEOUT)
        time.sleep(IDLE_SECONDS)
        pid = running.process.pid
        found = mappings(pid)
        threads = len(os.listdir(f"/proc/{pid}/task"))
        program = os.path.realpath(f"/proc/{pid}/exe")
    classes, has_ram = {}, False
    for kind, mapping in classify(found, program, guest.ram_mib << 20):
        if kind == "guest RAM":
            has_ram = True
            continue
        private, dirty = classes.get(kind, (0, 0))
        classes[kind] = (private + mapping.private, dirty + mapping.dirty)
    if not has_ram:
        raise Silent("no mapping looks like the guest's RAM")
    total = sum(private for private, _ in classes.values())
    return total, sum(dirty for _, dirty in classes.values()), threads, classes


def measure(compared, files):
    """Prints the tables; says whether Rackvisor keeps its promise."""
    subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap"], check=True)
    subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
    weights = {}
    try:
        for machine in compared:
            if machine.name.startswith("qemu-microvm-"):
                continue  # the same program as qemu-microvm
            try:
                weights[machine.name] = weigh(machine, files)
            except Silent as problem:
                print(f"{machine.name}: {problem}", file=sys.stderr)
    finally:
        subprocess.run(["ip", "link", "del", TAP], check=False)
    print(f"\nprivate resident memory beyond guest RAM, KiB (1 vCPU, one disk, one NIC, idle {IDLE_SECONDS} s after login)")
    rows = [[name, str(w[0]), str(w[1]), str(w[2])] for name, w in weights.items()]
    report.table(["", "private", "of it dirty", "threads"], rows)
    if "rackvisor" not in weights:
        return False
    total, _, _, classes = weights["rackvisor"]
    print("\nrackvisor's, by mapping")
    rows = [[kind, str(p), str(d)] for kind, (p, d) in sorted(classes.items(), key=lambda c: -c[1][0]) if p]
    report.table(["", "private", "of it dirty"], rows)
    good = total <= LIMIT_KIB
    print(f"at most {LIMIT_KIB} KiB: {'holds' if good else 'DOES NOT HOLD'} ({total})")
    if "firecracker" in weights:
        less = total <= weights["firecracker"][0]
        print(f"no more than Firecracker: {'holds' if less else 'DOES NOT HOLD'} ({weights['firecracker'][0]})")
        good = good and less
    return good
