"""fio in guests on disks of the host. All machines are started, and measured one after the other, in turn; the others are stopped meanwhile."""

import base64
import gzip
import json
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass

import disks
import machines
import report
import staging
from agent import Agent
from options import parser as common_parser
from process import Running, Silent
from report import show
from usage import Usage, kvm_folders

# What must hold of the operations per second, compared with QEMU.
LIMIT = 1.0
DEEP = 32
LIMIT_DEEP = 1.3
REFERENCE = "qemu-q35"
CPUS = 2
TIMEOUT = 90
# Seconds of fio before and after what is measured: it starts, and all machines' caches and polling settle.
LEAD = 1.5
TRAIL = 0.5
METRICS = "/root/fio.json"


@dataclass(frozen=True)
class Load:
    """What fio does."""

    kind: str
    block: str
    depth: int

    def __str__(self):
        return f"{self.kind} {self.block} depth {self.depth}"


LOADS = (
    Load("randread", "4k", 1),
    Load("randwrite", "4k", 1),
    Load("randread", "4k", 32),
    Load("randwrite", "4k", 32),
    Load("read", "128k", 8),
    Load("write", "128k", 8),
)


@dataclass(frozen=True)
class Row:
    """A load on a disk with a number of queues, each of which has a job of its own."""

    disk: object
    queues: int
    load: Load

    def __str__(self):
        return f"{self.disk.name} {self.queues}q {self.load}"

    @property
    def limit(self):
        return LIMIT_DEEP if self.load.depth == DEEP else LIMIT


@dataclass(frozen=True)
class Sample:
    """One run."""

    iops: float
    p50: float
    p99: float
    cpu: float
    exits: float


def arguments():
    parser = common_parser("block", "initrd-fio.img", float)
    parser.add_argument("--disks", help="more block devices, one for each VMM, separated by commas; their content is lost")
    return parser.parse_args()


def ms(seconds):
    return f"{seconds * 1000:.0f}ms"


def fio(load, queues, seconds):
    """The command line in the guest."""
    words = f"fio --name=bench --filename=/dev/vda --direct=1 --ioengine=libaio --rw={load.kind} --bs={load.block}"
    words += f" --iodepth={load.depth} --numjobs={queues} --thread --group_reporting --norandommap --clocksource=clock_gettime"
    words += f" --cpus_allowed=0-{queues - 1} --cpus_allowed_policy=split"
    if load.kind in ("read", "write"):
        words += " --offset_increment=256m"
    words += f" --time_based --ramp_time={ms(LEAD)} --runtime={ms(seconds)} --percentile_list=50:99"
    return words + f" --output-format=json --eta=never --output={METRICS}"


class Machine:
    """A machine with its guest and disk, ready to be measured until it is closed. It runs only while it is measured: what some
    cost when idle (QEMU's HPET ticks 250 times a second) would fall on the others."""

    def __init__(self, kind, path, queues, files):
        self.name = kind.name
        initrd = f"{files}/initrd-fio.img"
        # a guest that was stopped has missed its watchdog's time
        guest = machines.Guest(f"{files}/vmlinux", initrd, path, "agent", cmdline="nosoftlockup", cpus=CPUS, queues=queues)
        others = kvm_folders()
        self.running = Running(kind, guest)
        try:
            self.agent = Agent(self.running, TIMEOUT)
            self.agent.run("echo none >/sys/block/vda/queue/scheduler")
        except Silent:
            self.close()
            raise
        self.folder = next(iter(kvm_folders() - others), None)
        self.running.halt()

    def close(self):
        self.running.__exit__()

    def usage(self):
        return Usage(self.running.process.pid, self.folder)

    def measure(self, row, seconds):
        """Runs the load of a row once. fio tells operations and latencies, the host what they cost in the middle of the run."""
        with self.running.going():
            return self.load(row, seconds)

    def load(self, row, seconds):
        self.agent.start(fio(row.load, row.queues, seconds + TRAIL))
        time.sleep(LEAD + TRAIL)
        before = self.usage()
        time.sleep(seconds - TRAIL)
        after = self.usage()
        self.agent.finish()
        # as few bytes as can be: a serial port is slow
        said = json.loads(gzip.decompress(base64.b64decode(self.agent.run(f"gzip -c {METRICS} | base64"))))
        job = said["jobs"][0]
        if job["error"]:
            raise Silent(f"{row}: fio ended with error {job['error']}")
        result = job["write" if "write" in row.load.kind else "read"]
        done = result["iops"] * (after.at - before.at)
        p50, p99 = (result["clat_ns"]["percentile"][which] / 1e3 for which in ("50.000000", "99.000000"))
        exits = (after.exits - before.exits) / done if self.folder else None
        return Sample(result["iops"], p50, p99, (after.cpu - before.cpu) / done * 1e6, exits)


def measure_disk(kinds, disk, queues, rows, options, files):
    """Samples by row and machine of one disk and number of queues. Every round begins with another machine."""
    samples, ready = {}, []
    try:
        for kind, path in zip(kinds, disk.paths(len(kinds), queues)):
            ready.append(Machine(kind, path, queues, files))
        for number in range(options.rounds):
            for row in rows:
                for machine in ready[number % len(ready) :] + ready[: number % len(ready)]:
                    sample = machine.measure(row, options.seconds)
                    samples.setdefault((row, machine.name), []).append(sample)
                    print(f"  round {number + 1}: {row}: {machine.name} {sample.iops:.0f} IOPS", file=sys.stderr, flush=True)
    except (Silent, FileNotFoundError) as problem:
        # what was measured before counts
        print(f"{disk.name} {queues}q: ended early: {problem}", file=sys.stderr, flush=True)
    finally:
        for machine in ready:
            machine.close()
    return samples


def measure_all(kinds, rows, options, files):
    samples = {}
    for disk, queues in dict.fromkeys((row.disk, row.queues) for row in rows):
        mine = [row for row in rows if (row.disk, row.queues) == (disk, queues)]
        samples |= measure_disk(kinds, disk, queues, mine, options, files)
    return samples


def median(seen, name):
    values = [getattr(sample, name) for sample in seen or [] if getattr(sample, name) is not None]
    return statistics.median(values) if values else None


def ratio(ours, theirs):
    """The median of what the rounds say: both were measured one after the other in each."""
    rounds = [mine.iops / other.iops for mine, other in zip(ours or [], theirs or []) if other.iops]
    return statistics.median(rounds) if rounds else None


def print_rows(kinds, rows, samples):
    """Prints the table; gives the ratios to the reference by row, None where there is none."""
    table, ratios = [], {}
    for row in rows:
        ours = samples.get((row, kinds[0].name))
        for kind in kinds:
            seen = samples.get((row, kind.name))
            compared = ratio(ours, seen)
            if kind.name == REFERENCE:
                ratios[row] = compared
            cells = [show(median(seen, name)) for name in ("iops", "p50", "p99")]
            cells += [show(median(seen, name), 1) for name in ("cpu", "exits")]
            table.append([f"{row}: {kind.name}", *cells, show(compared, 2)])
    report.table(["medians", "IOPS", "p50 µs", "p99 µs", "CPU µs/IO", "exits/IO", "rackvisor/this"], table)
    return ratios


def judge(ratios):
    """Whether the promise holds."""
    missed = [row for row, ratio in ratios.items() if ratio is None or ratio < row.limit]
    for row in missed:
        print(f"{row}: {show(ratios[row], 2)} of {REFERENCE}, not {row.limit}")
    said = "does not hold" if missed else "holds"
    print(f"at least {LIMIT} × {REFERENCE} in operations per second, {LIMIT_DEEP} × at depth {DEEP}: {said} "
          f"({len(ratios) - len(missed)} of {len(ratios)} rows)")
    return not missed


def kinds_compared(files):
    """Rackvisor first, then the others; RACKVISOR_BASE names another build of Rackvisor."""
    compared = [machines.Rackvisor(os.path.join(files, "rackvisor")), machines.QemuQ35(machines.qemu())]
    base = os.environ.get("RACKVISOR_BASE")
    if base:
        compared.append(machines.Rackvisor(base, "rackvisor-base"))
    return compared + machines.others()


def main():
    options = arguments()
    chosen = re.compile(options.rows)
    every = [Row(disk, queues, load) for disk in disks.found(options.disks) for queues in (1, 2) for load in LOADS]
    rows = [row for row in every if chosen.search(str(row))]
    if not rows:
        print(f"benches/block: no row matches {options.rows!r}; there are:", *every, sep="\n  ", file=sys.stderr)
        return 2
    with staging.Files(options, ("vmlinux", "initrd-fio.img")) as files:
        kinds = kinds_compared(files)
        report.heading([machines.version(kind.program) for kind in kinds])
        samples = measure_all(kinds, rows, options, files)
        print(f"\nfio in the guest ({CPUS} vCPUs, libaio, a job for each queue); CPU: of the VMM without its guest; "
              f"{options.rounds} rounds of {options.seconds} s")
        return 0 if judge(print_rows(kinds, rows, samples)) else 1


if __name__ == "__main__":
    sys.exit(main())
