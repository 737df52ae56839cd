"""Traffic between guests and their host over taps. All machines are started, and measured one after the other, in turn; the
others are stopped meanwhile. In each guest the second processor serves the NIC's interrupts and runs iperf3, the first one all else;
on the host one half of the processors is for the guests', the other for all else. Where schedulers would put them is chance, which
lasts for seconds, and makes more of a difference than machines do."""

import glob
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace

import machines
import report
import staging
from agent import Agent
from options import parser as common_parser
from process import Running, Silent
from ratios import Ratio
from report import show
from taps import Tap
from usage import SystemCalls, Usage, kvm_folders, vhost_threads

OWN = "rackvisor"
OWN_VHOST = "rackvisor-vhost"
REFERENCE = "qemu-q35"
REFERENCE_VHOST = "qemu-q35-vhost"
CPUS = 2
TIMEOUT = 90
# Seconds of traffic before what is measured, and until the counters are looked at: connections open, and polling settles.
LEAD = 1
SETTLE = 0.5
# Seconds over which system calls are counted.
COUNTING = 1
# Payload as large as iperf3 takes it without a warning, and of the smallest frame that Ethernet has, 64 bytes with the checksum.
LARGEST = 1448
SMALLEST = 18
# The search for what a machine takes without loss (RFC 2544 §26.1, with the loss that two schedulers make at once): datagrams a
# second to begin with, steps after the first that was too much, the share that may be lost, in percent, the share of a rate
# that the host has to reach, and seconds of a step.
FIRST = 4000
STEPS = 4
LOSS = 1
REACHED = 0.9
STEP = 1
# What a socket of a guest holds, in bytes: 450 large datagrams. Linux's own 208 KiB are full after 90, which is 10 ms in which
# the guest's processor had to wait for one of the machine below: that would be measured, of whichever VMM.
RECEIVE_BUFFER = 1 << 20
# the threads that are a guest's processors, as each machine calls them
VCPU = re.compile(r"(fc_)?vcpu *\d+|CPU \d+/KVM")
ROUND_TRIP = re.compile(r"time=([0-9.]+) ms")


@dataclass(frozen=True)
class Traffic:
    """What iperf3 does: a client on the host, its server in the guest."""

    name: str
    words: tuple
    to_host: bool

    unit = "Mbit/s"
    is_tcp = True

    def __str__(self):
        return f"{self.name} {'guest→host' if self.to_host else 'host→guest'}"

    def command(self, tap, seconds):
        reverse = ["-R"] if self.to_host else []
        return ["iperf3", "-c", tap.guest, "-J", *self.time(seconds), *self.words, *reverse]

    def time(self, seconds):
        return ["-O", str(LEAD), "-t", str(seconds)]

    def suited(self, attempt):
        """This load as it is to be measured; `attempt` tries one."""
        del attempt
        return self

    def result(self, said):
        """What came through, and the share of datagrams that did not."""
        return self.received(said)["bits_per_second"] / 1e6, None

    def received(self, said):
        """What iperf3 says of what came through."""
        said = json.loads(said)
        if "sum_received" not in said["end"]:
            raise Silent(f"iperf3 measured nothing: {said.get('error', 'and does not say why')}")
        return said["end"]["sum_received"]


@dataclass(frozen=True)
class Attempt:
    """What became of datagrams: percent that were lost, and how many were sent a second."""

    lost: float
    sent: float


@dataclass(frozen=True)
class Datagrams(Traffic):
    """UDP. A guest sends as fast as it goes, since it waits for its card; to a guest that cannot take more, more would only
    keep it busy with what it throws away, so what counts is what it takes without loss."""

    size: int = LARGEST
    # datagrams a second; 0: as many as go
    rate: int = 0

    is_tcp = False

    @property
    def unit(self):
        return "Mbit/s" if self.size == LARGEST else "frames/s"

    def time(self, seconds):
        # of datagrams that came in the time that is left out, iperf3 counts those that were lost
        return ["-t", str(LEAD + seconds), "-u", "-l", str(self.size), "-b", str(self.rate * self.size * 8)]

    def suited(self, attempt):
        """Looks for the greatest rate of which next to nothing is lost, the second time at least: what only once was too much
        tells of the host. If the host cannot send so many, there is nothing more to look for."""
        if self.to_host:
            return self
        fits, too_much = 0, None
        steps = STEPS
        rate = FIRST
        while steps:
            tried = (attempt(replace(self, rate=rate)) for _ in range(2))
            good = next((attempt for attempt in tried if attempt.lost <= LOSS), None)
            if good:
                fits = rate
                if good.sent < rate * REACHED:
                    break
            else:
                too_much = rate
            steps -= too_much is not None
            rate = fits * 2 if too_much is None else (fits + too_much) // 2
        return replace(self, rate=max(fits, 1))

    def attempted(self, said):
        """What became of what was sent."""
        came = self.received(said)
        return Attempt(came["lost_percent"], came["packets"] / came["seconds"])

    def result(self, said):
        came = self.received(said)
        bits = came["bits_per_second"]
        return bits / 1e6 if self.size == LARGEST else bits / 8 / self.size, came["lost_percent"]


@dataclass(frozen=True)
class Ping:
    """The host asks, the guest's kernel answers, and the next question follows at once."""

    unit = "µs"
    is_tcp = False

    def __str__(self):
        return "ping"

    def command(self, tap, seconds):
        return ["ping", "-n", "-i", "0", "-w", str(LEAD + seconds), tap.guest]

    def suited(self, attempt):
        del attempt
        return self

    def result(self, said):
        times = [float(time) for time in ROUND_TRIP.findall(said)]
        if not times:
            raise Silent(f"no answer to ping:\n{said[-500:]}")
        return statistics.median(times) * 1e3, None


LOADS = (
    Traffic("TCP 1 stream", ("-P", "1"), True),
    Traffic("TCP 1 stream", ("-P", "1"), False),
    Traffic("TCP 4 streams", ("-P", "4"), True),
    Traffic("TCP 4 streams", ("-P", "4"), False),
    Datagrams("UDP", (), True),
    Datagrams("UDP", (), False),
    Datagrams("UDP 64 bytes", (), True, SMALLEST),
    Datagrams("UDP 64 bytes", (), False, SMALLEST),
    Ping(),
)


@dataclass(frozen=True)
class Promise:
    """How many times as much of one machine as of another has to come through, in which rows."""

    ours: str
    theirs: str
    limit: float
    tcp_only: bool = False

    def rows(self, loads):
        return [load for load in loads if load.is_tcp or not self.tcp_only]

    def __str__(self):
        return f"{self.ours} at least {self.limit} × {self.theirs}{' for TCP' if self.tcp_only else ''}"


PROMISES = (
    Promise(OWN, REFERENCE, 1.2),
    Promise(OWN, REFERENCE_VHOST, 0.9, tcp_only=True),
    Promise(OWN_VHOST, REFERENCE_VHOST, 1.0),
)


@dataclass(frozen=True)
class Sample:
    """One run. Costs are the VMM's by the frame through the tap, or the megabyte."""

    result: float
    lost: float
    cpu: float
    cpu_megabyte: float
    exits: float


def arguments():
    parser = common_parser("net", "initrd-net.img", int)
    parser.add_argument("--machines", default="", help="regular expression; such machines only; the promises need all")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of queues of each NIC")
    return parser.parse_args()


def processors():
    """Those for the guests' processors, and those for all else."""
    ours = sorted(os.sched_getaffinity(0))
    half = len(ours) // 2
    # of one processor, both get it
    return set(ours[:half] or ours), set(ours[half:])


def place(pid, helpers):
    """Has the threads of a machine, and the kernel's for it, run where they are to."""
    guests, others = processors()
    for task in glob.glob(f"/proc/{pid}/task/*"):
        with open(f"{task}/comm", encoding="utf-8") as file:
            is_processor = VCPU.match(file.read())
        os.sched_setaffinity(int(os.path.basename(task)), guests if is_processor else others)
    for thread in helpers:
        os.sched_setaffinity(thread, others)


class Machine:
    """A machine with its guest and tap, ready to be measured until it is closed. It runs only while it is measured."""

    def __init__(self, kind, number, pairs, files):
        self.name = kind.name
        self.tap = Tap(number, pairs)
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.running = None
        try:
            folders, threads = kvm_folders(), vhost_threads()
            guest = machines.Guest(
                f"{files}/vmlinux",
                f"{files}/initrd-net.img",
                None,
                "agent",
                tap=self.tap.name,
                # a guest that was stopped has missed its watchdog's time
                cmdline=f"nosoftlockup sysctl.net.core.rmem_default={RECEIVE_BUFFER} rv.ip={self.tap.guest}/24",
                cpus=CPUS,
                pairs=pairs,
            )
            self.running = Running(kind, guest)
            agent = Agent(self.running, TIMEOUT)
            # some interrupts cannot be moved
            agent.run("for i in /proc/irq/*/smp_affinity; do echo 2 >$i; done 2>/dev/null; true")
            # a server that a client's datagrams have flooded ends now and then
            agent.run("(while :; do iperf3 -s -A 1; done >/dev/null 2>&1 &)")
            self.folder = next(iter(kvm_folders() - folders), None)
            self.helpers = vhost_threads() - threads
            place(self.running.process.pid, self.helpers)
            self.running.halt()
        except Silent:
            self.close()
            raise

    def close(self):
        if self.running:
            self.running.__exit__()
        self.said.close()
        self.tap.remove()

    def usage(self):
        try:
            return Usage(self.running.process.pid, self.folder, self.helpers), *self.tap.passed()
        except FileNotFoundError as gone:
            raise Silent(f"{self.name} has ended\n{self.running.said()}") from gone

    def start(self, load, seconds, wait=LEAD + SETTLE):
        command = load.command(self.tap, seconds)
        # not into a pipe, which nobody reads meanwhile: ping would stop when it is full
        self.said.seek(0)
        self.said.truncate()
        _, others = processors()
        command = ["taskset", "--cpu-list", ",".join(map(str, sorted(others))), *command]
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.said, stderr=subprocess.STDOUT, text=True)
        time.sleep(wait)
        return started

    def finish(self, started, seconds):
        """Waits for the end of what was started; gives what it said."""
        try:
            started.wait(timeout=seconds + TIMEOUT)
        except subprocess.TimeoutExpired as late:
            started.kill()
            started.wait()
            raise Silent(f"{' '.join(started.args)} did not end") from late
        self.said.seek(0)
        said = self.said.read()
        if started.returncode:
            raise Silent(f"{' '.join(started.args)} ended with status {started.returncode}\n{said[-1000:]}")
        return said

    def measure(self, load, seconds):
        """Runs a load once. iperf3 and ping tell what came through, the host what it cost in the middle of the run."""
        with self.running.going():
            load = load.suited(self.attempt)
            try:
                return load, self.load(load, seconds)
            except Silent as flooded:
                print(f"  {load}: {self.name}: once more: {str(flooded)[-200:]}", file=sys.stderr, flush=True)
                time.sleep(STEP)
                return load, self.load(load, seconds)

    def attempt(self, load):
        """Sends the datagrams of a load for a moment."""
        try:
            return load.attempted(self.finish(self.start(load, STEP, wait=0), STEP))
        except Silent as flooded:
            # iperf3 could not learn it from the guest, or its server ended
            print(f"  {load}: {self.name}: {str(flooded)[-200:]}", file=sys.stderr, flush=True)
            time.sleep(STEP)
            return Attempt(100, 0)

    def load(self, load, seconds):
        started = self.start(load, seconds)
        before, frames, size = self.usage()
        time.sleep(seconds - SETTLE)
        after, *passed = self.usage()
        result, lost = load.result(self.finish(started, seconds))
        frames, size = passed[0] - frames, passed[1] - size
        cpu = (after.cpu - before.cpu) * 1e6
        exits = (after.exits - before.exits) / max(frames, 1) if self.folder else None
        return Sample(result, lost, cpu / max(frames, 1), cpu / max(size, 1) * 1e6, exits)

    def system_calls(self, load):
        """System calls by the frame, counted in a run of its own."""
        with self.running.going():
            started = self.start(load, COUNTING + 1)
            frames, _ = self.tap.passed()
            with SystemCalls(self.running.process.pid) as calls:
                time.sleep(COUNTING)
            frames = self.tap.passed()[0] - frames
            load.result(self.finish(started, COUNTING + 1))
        return None if calls.count is None else calls.count / max(frames, 1)


class Results:
    """What was measured, by load and machine."""

    def __init__(self):
        self.samples = {}
        # as each was measured last
        self.suited = {}
        self.calls = {}

    def add(self, load, machine, suited, sample):
        self.samples.setdefault((load, machine.name), []).append(sample)
        self.suited[load, machine.name] = suited

    def median(self, load, name, what):
        seen = [getattr(sample, what) for sample in self.samples.get((load, name), [])]
        seen = [value for value in seen if value is not None]
        return statistics.median(seen) if seen else None

    def ratio(self, load, ours, theirs):
        """More is better."""
        pairs = zip(self.samples.get((load, ours), []), self.samples.get((load, theirs), []))
        if isinstance(load, Ping):
            pairs = ((other, mine) for mine, other in pairs)
        return Ratio.of([mine.result / other.result for mine, other in pairs if other.result])

    def is_clear(self, load):
        """Whether it is known what becomes of each promise that this row is of."""
        promised = [promise for promise in PROMISES if promise.rows([load])]
        ratios = ((self.ratio(load, promise.ours, promise.theirs), promise.limit) for promise in promised)
        return all(ratio.is_clear(limit) for ratio, limit in ratios if ratio)


def measure_round(ready, number, loads, seconds, results):
    """Every round begins with another machine."""
    for load in loads:
        for machine in ready[number % len(ready) :] + ready[: number % len(ready)]:
            suited, sample = machine.measure(load, seconds)
            results.add(load, machine, suited, sample)
            print(f"  round {number + 1}: {load}: {machine.name} {sample.result:.0f} {load.unit}", file=sys.stderr, flush=True)


def measure_all(kinds, loads, options, files):
    """As many rounds as were asked for, and up to as many again of rows that do not tell yet what becomes of a promise."""
    results, ready = Results(), []
    try:
        for number, kind in enumerate(kinds):
            ready.append(Machine(kind, number, options.pairs, files))
        for number in range(2 * options.rounds):
            rows = loads if number < options.rounds else [load for load in loads if not results.is_clear(load)]
            measure_round(ready, number, rows, options.seconds, results)
        for load in loads:
            for machine in ready:
                results.calls[load, machine.name] = machine.system_calls(results.suited[load, machine.name])
    except Silent as problem:
        # what was measured before counts
        print(f"ended early: {problem}", file=sys.stderr, flush=True)
    finally:
        for machine in ready:
            machine.close()
    return results


def print_rows(kinds, loads, results):
    table = []
    for load in loads:
        for kind in kinds:
            cells = [f"{show(results.median(load, kind.name, 'result'))} {load.unit}"]
            columns = (("lost", 1), ("cpu_megabyte", 0), ("cpu", 1), ("exits", 2))
            cells += [show(results.median(load, kind.name, what), digits) for what, digits in columns]
            cells.append(show(results.calls.get((load, kind.name)), 2))
            others = (results.ratio(load, ours, kind.name) if ours != kind.name else None for ours in (OWN, OWN_VHOST))
            cells += [str(ratio or "-") for ratio in others]
            table.append([f"{load}: {kind.name}", *cells])
    costs = ["CPU µs/MB", "CPU µs/frame", "exits/frame", "calls/frame"]
    report.table(["medians", "result", "lost %", *costs, f"{OWN}/this", f"{OWN_VHOST}/this"], table)


def judge(kinds, loads, results):
    """Whether the promises hold."""
    known = {kind.name for kind in kinds}
    holds = True
    for promise in PROMISES:
        absent = [name for name in (promise.ours, promise.theirs) if name not in known]
        if absent:
            print(f"{promise}: not judged: {' and '.join(absent)} did not take part")
            continue
        ratios = {load: results.ratio(load, promise.ours, promise.theirs) for load in promise.rows(loads)}
        if not ratios:
            print(f"{promise}: not judged: no such row was measured")
            continue
        missed = {load: ratio for load, ratio in ratios.items() if ratio is None or ratio.median < promise.limit}
        for load, ratio in missed.items():
            unsure = ", though these rounds leave it open" if ratio and not ratio.is_clear(promise.limit) else ""
            print(f"{load}: {promise.ours} {ratio or 'unknown'} of {promise.theirs}, not {promise.limit}{unsure}")
        said = "does not hold" if missed else "holds"
        print(f"{promise}: {said} ({len(ratios) - len(missed)} of {len(ratios)} rows)")
        holds = holds and not missed
    return holds


def kinds_compared(files):
    """Rackvisor first, then the others; RACKVISOR_BASE names another build of Rackvisor."""
    program = os.path.join(files, "rackvisor")
    qemu = machines.qemu()
    compared = [machines.Rackvisor(program, OWN)]
    vhost = machines.Rackvisor(program, OWN_VHOST, nic={"vhost": True})
    if vhost.knows(files):
        compared.append(vhost)
    else:
        print(f"SKIPPED: {OWN_VHOST}: not built: this program has no setting \"vhost\" of a NIC", flush=True)
    compared += [machines.QemuQ35(qemu, REFERENCE), machines.QemuQ35(qemu, REFERENCE_VHOST, vhost=True)]
    base = os.environ.get("RACKVISOR_BASE")
    if base:
        compared.append(machines.Rackvisor(base, "rackvisor-base"))
    return compared + machines.others()


def main():
    options = arguments()
    loads = [load for load in LOADS if re.search(options.rows, str(load))]
    if not loads:
        print(f"benches/net: no row matches {options.rows!r}; there are:", *LOADS, sep="\n  ", file=sys.stderr)
        return 2
    subprocess.run(["modprobe", "-a", "tun", "vhost_net"], check=True)
    with staging.Files(options, ("vmlinux", "initrd-net.img")) as files:
        kinds = [kind for kind in kinds_compared(files) if re.search(options.machines, kind.name)]
        report.heading([machines.version(kind.program) for kind in kinds])
        results = measure_all(kinds, loads, options, files)
        print(f"\niperf3 and ping between host and guest ({CPUS} vCPUs, {options.pairs} pair(s) of queues); CPU: of the VMM and the "
              f"kernel's threads for it, without its guest; {options.rounds} rounds of {options.seconds} s, up to twice as many of rows near a promise; "
              "ratios: median, and what holds the true one in 88 of 100 cases")
        print_rows(kinds, loads, results)
        return 0 if judge(kinds, loads, results) else 1


if __name__ == "__main__":
    sys.exit(main())
