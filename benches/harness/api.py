"""fio in a guest, without and with clients that hammer the API, in turn."""

import json
import os
import re
import statistics
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import block
import disks
import machines
import report
import staging
from options import parser as common_parser
from process import Silent
from report import show

CONNECTIONS = 100
# Milliseconds that the guest's longest request may take because of them.
LIMIT = 100
QUIET = "no clients"
HAMMERED = "100 connections"
# What the nice value of the API thread is good for.
EAGER = "100 connections, API not nice"
ROWS = (QUIET, HAMMERED, EAGER)
LOAD = block.Load("randrw", "4k", 4)


@dataclass(frozen=True)
class Sample:
    """One run."""

    iops: float
    p99: float
    longest: float
    answers: float
    answer: float


def api_thread(pid):
    """The id of the thread that serves the API."""
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/comm", encoding="ascii") as file:
            if file.read().strip() == "api":
                return int(task)
    raise Silent("no thread serves the API")


@contextmanager
def clients(path):
    """Clients at work; what they say at their end is in the list that this gives."""
    said = []
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "clients.py"), path, str(CONNECTIONS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            yield said
        finally:
            process.terminate()
            rest = process.communicate()[0]
    if process.returncode:
        raise Silent("the API did not answer as it should")
    said.append(json.loads(rest))


class Machine(block.Machine):
    """The machine, whose API can be hammered."""

    def __init__(self, kind, path, files):
        super().__init__(kind, path, 1, files)
        self.socket = kind.socket(self.running.folder.name)
        self.thread = api_thread(self.running.process.pid)
        self.nice = os.getpriority(os.PRIO_PROCESS, self.thread)

    def measure(self, row, seconds):
        with self.running.going():
            if row == QUIET:
                return Sample(*self.fio(seconds), None, None)
            os.setpriority(os.PRIO_PROCESS, self.thread, 0 if row == EAGER else self.nice)
            with clients(self.socket) as said:
                seen = self.fio(seconds)
            [asked] = said
            return Sample(*seen, asked["per_second"], asked["longest"] * 1000)

    def fio(self, seconds):
        """Runs fio once; gives operations per second, 99th percentile and longest request in ms."""
        self.agent.run(block.fio(LOAD, 1, seconds))
        job = json.loads(self.agent.run(f"cat {block.METRICS}"))["jobs"][0]
        both = [job["read"], job["write"]]
        p99 = max(side["clat_ns"]["percentile"]["99.000000"] for side in both) / 1e6
        return sum(side["iops"] for side in both), p99, max(side["clat_ns"]["max"] for side in both) / 1e6


def measure_all(machine, rows, options):
    """Samples by row. Every round begins with another row."""
    samples = {row: [] for row in rows}
    for number in range(options.rounds):
        for row in rows[number % len(rows) :] + rows[: number % len(rows)]:
            sample = machine.measure(row, options.seconds)
            samples[row].append(sample)
            print(f"  round {number + 1}: {row}: {sample.iops:.0f} IOPS, longest {sample.longest:.1f} ms", file=sys.stderr, flush=True)
    return samples


def median(seen, name):
    values = [getattr(sample, name) for sample in seen if getattr(sample, name) is not None]
    return statistics.median(values) if values else None


def print_rows(samples, nice):
    table = []
    for row, seen in samples.items():
        cells = [show(median(seen, "iops")), show(block.ratio(seen, samples.get(QUIET)), 2)]
        cells += [show(median(seen, name), 1) for name in ("p99", "longest")]
        cells += [show(max(sample.longest for sample in seen), 1), show(median(seen, "answers")), show(median(seen, "answer"))]
        table.append([row, *cells])
    print(f"\nfio in the guest ({LOAD}, {block.CPUS} vCPUs, null_blk); the API thread's nice value is {nice}")
    header = ["medians", "IOPS", "of quiet", "p99 ms", "longest ms", "of all rounds", "answers/s", "longest answer ms"]
    report.table(header, table)


def judge(samples):
    """Whether the promise holds: for the medians of the longest requests, as one round may meet somebody else's work."""
    quiet, hammered = (median(samples.get(row, []), "longest") for row in (QUIET, HAMMERED))
    if quiet is None or hammered is None:
        return True
    holds = hammered <= max(LIMIT, quiet)
    said = "holds" if holds else "does not hold"
    print(f"no request of the guest takes more than {LIMIT} ms because of the API: {said} ({hammered:.1f} ms, without clients {quiet:.1f} ms)")
    return holds


def main():
    options = common_parser("api", "initrd-fio.img", float).parse_args()
    rows = [row for row in ROWS if re.search(options.rows, row)]
    with staging.Files(options, ("vmlinux", "initrd-fio.img")) as files:
        kind = machines.Rackvisor(os.path.join(files, "rackvisor"))
        report.heading([machines.version(kind.program)])
        machine = Machine(kind, disks.NullBlk().paths(1, 1)[0], files)
        try:
            samples = measure_all(machine, rows, options)
        finally:
            machine.close()
        print_rows(samples, machine.nice)
        return 0 if judge(samples) else 1


if __name__ == "__main__":
    sys.exit(main())
