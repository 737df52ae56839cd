"""Times of a guest's work on its memory, kind of guest RAM after kind of guest RAM in turn."""

import argparse
import base64
import statistics
import sys

import machines
import report
import staging
from process import Running, Silent

TIMEOUT = 120
FILE_MIB = 192
NR_HUGEPAGES = "/proc/sys/vm/nr_hugepages"
# Name, and `memory` of the configuration. The first is the default.
KINDS = (
    ("anonymous, thp (default)", {}),
    ("anonymous, off", {"hugepages": "off"}),
    ("anonymous, 2M", {"hugepages": "2M"}),
    ("shared, thp", {"shared": True}),
    ("shared, off", {"shared": True, "hugepages": "off"}),
    ("shared, 2M", {"shared": True, "hugepages": "2M"}),
)
# Each mark ends what stands before it: memory that is touched for the first time; then written again; then many small
# processes, which is page tables and page faults of the guest.
WORK = f"""
echo @@MARK0@@
dd if=/dev/zero of=/tmp/file bs=1M count={FILE_MIB} 2>/dev/null; echo @@MARK1@@
dd if=/dev/zero of=/tmp/file bs=1M count={FILE_MIB} conv=notrunc 2>/dev/null; echo @@MARK2@@
for i in $(seq 200); do /bin/true; done; echo @@MARK3@@
"""
STEPS = ("to init", "first touch", "written again", "200 processes")


def arguments():
    parser = argparse.ArgumentParser(prog="benches/memory")
    parser.add_argument("--rackvisor", required=True)
    parser.add_argument("--guest", required=True, help="folder with vmlinux and initrd.img")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def run(machine, files, memory):
    """The time of each step, in seconds."""
    script = base64.b64encode(WORK.encode()).decode()
    guest = machines.Guest(
        f"{files}/vmlinux", f"{files}/initrd.img", f"{files}/disk", "exec", cmdline=f"rv.exec={script}", memory=memory
    )
    with Running(machine, guest) as running:
        marks = [running.wait_for(b"@@MARK%d@@" % number, TIMEOUT) for number in range(len(STEPS))]
    return [mark - before for before, mark in zip([0, *marks], marks)]


def measure(machine, files, rounds):
    """Times of each step by kind. One round before the first is not counted: it fills caches."""
    times = {name: [] for name, _ in KINDS}
    for number in range(rounds + 1):
        for name, memory in KINDS:
            try:
                steps = run(machine, files, memory)
            except Silent as problem:
                print(f"{name}: {problem}", file=sys.stderr)
                continue
            if number > 0:
                times[name].append(steps)
                print(f"  round {number}: {name}: {', '.join(report.ms(step) for step in steps)} ms", file=sys.stderr)
    return times


def print_times(times):
    """Medians, and how they compare with the default."""
    default = times[KINDS[0][0]]
    rows = []
    for name, runs in times.items():
        cells = []
        for step in range(len(STEPS)):
            if not runs or not default:
                cells += ["-", "-"]
                continue
            median = statistics.median(run[step] for run in runs)
            ratio = median / statistics.median(run[step] for run in default)
            cells += [report.ms(median), f"{ratio:.2f}"]
        rows.append([name, *cells])
    print(f"\nguest of {machines.RAM_MIB} MiB: medians in ms, and their ratio to the default ({FILE_MIB} MiB are touched)")
    report.table(["", *(cell for step in STEPS for cell in (step, "ratio"))], rows)


def reserve_huge_pages(count):
    with open(NR_HUGEPAGES, "w", encoding="ascii") as file:
        file.write(str(count))


def main():
    options = arguments()
    with open(NR_HUGEPAGES, encoding="ascii") as file:
        before = file.read()
    with staging.Files(options, ("vmlinux", "initrd.img")) as files:
        machine = machines.Rackvisor(f"{files}/rackvisor")
        report.heading([machines.version(machine.program)])
        reserve_huge_pages(int(before) + machines.RAM_MIB // 2)
        try:
            print_times(measure(machine, files, options.rounds))
        finally:
            reserve_huge_pages(before)


if __name__ == "__main__":
    main()
