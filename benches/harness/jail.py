"""Times from the start of the process to the API's first answer and to the guest's first byte, in a jail and without, in turn."""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile

import machines
import report
import tiny
from process import Running, Silent

USER = 54321
TIMEOUT = 30
LIMIT_RATIO = 1.0


class Plain:
    """Rackvisor as a host agent starts it without a jail."""

    name = "rackvisor"
    request = b"GET /v1/version HTTP/1.1\r\nHost: vm\r\n\r\n"
    ended_by = signal.SIGTERM

    def __init__(self, program, guest):
        self.program = program
        self.guest = guest

    def socket(self, folder):
        return os.path.join(folder, "api.sock")

    def command(self, boots, folder):
        return [self.program, "--log", "warn", "--api-socket", self.socket(folder), *self.arguments(boots)]

    def arguments(self, boots):
        return ["--config", os.path.join(self.guest, "vm.json"), "--boot"] if boots else []


class Jailed(Plain):
    """The same behind rackvisor-jailer, with limits of a cgroup or without."""

    def __init__(self, program, guest, name, options=()):
        super().__init__(program, guest)
        self.name = name
        self.options = options
        self.jailer = os.path.join(os.path.dirname(program), "rackvisor-jailer")

    def socket(self, folder):
        return os.path.join(folder, "base/bench/run/api.sock")

    def command(self, boots, folder):
        user = ["--id", "bench", "--uid", str(USER), "--gid", str(USER), "--base", os.path.join(folder, "base")]
        options = [*user, "--vmm", self.program, "--share-ro", self.guest, *self.options]
        return [self.jailer, *options, "--", "--log", "warn", "--api-socket", "/run/api.sock", *self.arguments(boots)]


class Firecracker:
    """Given by FIRECRACKER=; its API alone."""

    name = "firecracker"
    request = b"GET /version HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"

    def __init__(self, program):
        self.program = os.path.realpath(program)

    def socket(self, folder):
        return os.path.join(folder, "api.sock")

    def command(self, boots, folder):
        return None if boots else [self.program, "--api-sock", self.socket(folder)]


class JailedFirecracker(Firecracker):
    """The same behind its own jailer, which becomes the VMM."""

    name = "firecracker, jailed"

    def __init__(self, program, jailer):
        super().__init__(program)
        self.jailer = os.path.realpath(jailer)

    def socket(self, folder):
        return os.path.join(folder, os.path.basename(self.program), "bench/root/run/api.sock")

    def command(self, boots, folder):
        if boots:
            return None
        user = ["--id", "bench", "--uid", str(USER), "--gid", str(USER), "--chroot-base-dir", folder]
        return [self.jailer, *user, "--exec-file", self.program, "--", "--api-sock", "/run/api.sock"]


def peers():
    """Firecracker without and with its jailer, as far as they are there."""
    program = os.environ.get("FIRECRACKER")
    if not program:
        return []
    beside = os.path.join(os.path.dirname(os.path.realpath(program)), "jailer")
    jailer = os.environ.get("FIRECRACKER_JAILER") or beside
    if not os.path.exists(jailer):
        print(f"there is no {jailer}: FIRECRACKER_JAILER= names Firecracker's jailer", file=sys.stderr)
        return [Firecracker(program)]
    return [Firecracker(program), JailedFirecracker(program, jailer)]


def time_start(machine, boots):
    """Seconds to the first byte of the guest, or to the first answer of the API; None where the machine cannot."""
    if machine.command(boots, "") is None:
        return None
    with Running(machine, boots) as running:
        if boots:
            return running.wait_for(tiny.SAYS, TIMEOUT)
        return running.wait_for_answer(machine.socket(running.folder.name), machine.request, TIMEOUT)


def time_all(compared, rounds):
    """Times by machine and what is waited for. One round before the first is not counted: it fills caches."""
    times = {}
    for number in range(rounds + 1):
        for machine in compared:
            for boots in (False, True):
                try:
                    took = time_start(machine, boots)
                except Silent as problem:
                    print(f"{machine.name}: {problem}", file=sys.stderr)
                    continue
                if number > 0 and took is not None:
                    times.setdefault((machine.name, boots), []).append(took)
    return times


def print_times(compared, times):
    """Prints the tables; says whether the promise holds."""

    def median(name, boots):
        return statistics.median(times[name, boots]) if (name, boots) in times else None

    for boots, title in ((False, "the API's first answer"), (True, "the guest's first byte")):
        plain, jailed = median("rackvisor", boots), median("rackvisor, jailed", boots)
        rows = []
        for machine in compared:
            seen = times.get((machine.name, boots))
            if not seen:
                rows.append([machine.name, "-", "-", "-", "-", "-"])
                continue
            middle = statistics.median(seen)
            ratios = [f"{ours / middle:.2f}" if ours else "-" for ours in (plain, jailed)]
            rows.append([machine.name, *(f"{1000 * value:.2f}" for value in (middle, min(seen), max(seen))), *ratios])
        print(f"\nprocess start to {title}, ms")
        report.table(["", "median", "min", "max", "rackvisor/this", "jailed/this"], rows)
        if plain and jailed:
            print(f"the jail costs {1000 * (jailed - plain):.2f} ms: jailed / plain {jailed / plain:.2f}")
    theirs, ours = median(JailedFirecracker.name, False), median("rackvisor, jailed", False)
    if not theirs or not ours:
        print("Firecracker's jailer was not given or did not start: no promise to check")
        return not os.environ.get("FIRECRACKER")
    verdict = "holds" if ours / theirs <= LIMIT_RATIO else "does not hold"
    print(f"at most {LIMIT_RATIO} of Firecracker with its jailer: {verdict} ({ours / theirs:.3f})")
    return ours / theirs <= LIMIT_RATIO


def prepare(folder, program):
    """Puts a guest, its configuration, and the programs where no file system of the host is part of what is measured."""
    # for the jail's user
    os.chmod(folder, 0o755)
    for name in ("rackvisor", "rackvisor-jailer"):
        shutil.copy(os.path.join(os.path.dirname(program), name), folder)
    guest = os.path.join(folder, "guest")
    os.mkdir(guest, 0o755)
    kernel = os.path.join(guest, "tiny.elf")
    tiny.write(kernel)
    config = {"name": "bench", "memory": {"size": "128MiB"}, "boot": {"kernel": kernel}, "serial": {"mode": "stdio"}}
    machines.write(guest, "vm.json", config)
    return guest


def main():
    parser = argparse.ArgumentParser(prog="benches/jail")
    parser.add_argument("--rackvisor", required=True, help="with rackvisor-jailer beside it")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    # Sockets and the jailer's folder as well: those of a host are below /run.
    tempfile.tempdir = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="rackvisor-bench-files.") as folder:
        guest = prepare(folder, options.rackvisor)
        program = os.path.join(folder, "rackvisor")
        ours = [
            Plain(program, guest),
            Jailed(program, guest, "rackvisor, jailed"),
            Jailed(program, guest, "  with --userns host", ["--userns", "host"]),
            Jailed(program, guest, "  with a cgroup", ["--cgroup", "pids.max=64", "--cgroup", "memory.max=2G"]),
        ]
        compared = [*ours, *peers()]
        report.heading([machines.version(machine.program) for machine in compared])
        good = print_times(compared, time_all(compared, options.rounds))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
