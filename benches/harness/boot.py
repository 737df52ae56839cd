"""Times from the start of the process to the first line of the guest's init, machine after machine in turn."""

import argparse
import os
import statistics
import sys

import footprint
import machines
import report
import staging
from process import Running, Silent

LIMIT_RATIO = 0.33
TIMEOUT = 120


def arguments():
    parser = argparse.ArgumentParser(prog="benches/boot")
    parser.add_argument("--rackvisor", required=True)
    parser.add_argument("--guest", required=True, help="folder with vmlinux, vmlinuz and initrd.img")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", default="vmlinux,vmlinuz")
    parser.add_argument("--what", choices=("all", "time", "memory"), default="all")
    return parser.parse_args()


def time_boots(compared, kernels, rounds, files):
    """Times by kernel and machine. One round before the first is not counted: it fills caches."""
    times = {}
    for number in range(rounds + 1):
        for kernel in kernels:
            for machine in compared:
                if kernel not in machine.kernels or (kernel, machine.name) not in times and number > 0:
                    continue
                path = os.path.join(files, kernel)
                guest = machines.Guest(path, f"{files}/initrd.img", f"{files}/disk", "init-only")
                try:
                    with Running(machine, guest) as running:
                        took = running.wait_for(machines.MARKER, TIMEOUT)
                except Silent as problem:
                    print(f"{machine.name} with {kernel}: {problem}", file=sys.stderr)
                    times.pop((kernel, machine.name), None)
                    continue
                seen = times.setdefault((kernel, machine.name), [])
                if number > 0:
                    seen.append(took)
                    print(f"  round {number}: {kernel} {machine.name} {report.ms(took)} ms", file=sys.stderr)
    return times


def print_times(compared, kernels, times):
    """Prints the table; says whether Rackvisor is as fast as promised with any kernel."""
    rows, fast = [], []
    for kernel in kernels:
        ours = times.get((kernel, "rackvisor"))
        for machine in compared:
            seen = times.get((kernel, machine.name))
            if not seen:
                rows.append([f"{kernel} {machine.name}", "-", "-", "-", "-"])
                continue
            ratio = statistics.median(ours) / statistics.median(seen) if ours else None
            shown = f"{ratio:.3f}" if ratio else "-"
            rows.append([f"{kernel} {machine.name}", *report.spread(seen), shown])
            if machine.name.startswith("qemu-microvm") and ratio:
                fast.append((kernel, machine.name, ratio))
    print("\nprocess start to the guest's init, ms")
    report.table(["", "median", "min", "max", "rackvisor/this"], rows)
    for kernel, name, ratio in fast:
        verdict = "holds" if ratio <= LIMIT_RATIO else "does not hold"
        print(f"at most {LIMIT_RATIO} of {name} with {kernel}: {verdict} ({ratio:.3f})")
    return any(ratio <= LIMIT_RATIO for _, name, ratio in fast if name == "qemu-microvm")


def main():
    options = arguments()
    kernels = options.kernels.split(",")
    with staging.Files(options, ("vmlinux", "vmlinuz", "initrd.img")) as files:
        compared = [machines.Rackvisor(os.path.join(files, "rackvisor")), *machines.peers()]
        report.heading([machines.version(machine.program) for machine in compared])
        good = True
        if options.what != "memory":
            good = print_times(compared, kernels, time_boots(compared, kernels, options.rounds, files))
        if options.what != "time":
            good = footprint.measure(compared, files) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
