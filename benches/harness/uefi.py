"""Times from the start of the process through UEFI firmware and shim to the first words of GRUB, machine after machine in turn."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import machines
import report
import staging
from process import Running, Silent

LIMIT_RATIO = 0.8
TIMEOUT = 180
MARKER = b"Welcome to GRUB!"
ROWS = ("without TPM", "with TPM")


def arguments():
    parser = argparse.ArgumentParser(prog="benches/uefi")
    parser.add_argument("--rackvisor", required=True)
    parser.add_argument("--guest", required=True, help="folder with efi/ and what build --uefi makes there")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def variables(machine, row, files):
    """A copy for each machine and row, which stays: the round that is not counted makes the boot entries."""
    path = f"{files}/{machine.name} {row}.fd"
    if not os.path.exists(path):
        shutil.copy(f"{files}/OVMF_VARS_4M.fd", path)
    return path


@contextmanager
def swtpm(machine, files):
    """A swtpm for one start of a machine, with state that stays. Gives its socket."""
    folder = f"{files}/{machine.name}.tpm"
    os.makedirs(folder, exist_ok=True)
    path = f"{folder}/socket"
    if os.path.exists(path):
        os.unlink(path)
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--ctrl", f"type=unixio,path={path}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 30
            while not os.path.exists(path):
                if process.poll() is not None or time.monotonic() > until:
                    raise Silent("swtpm does not start")
                time.sleep(0.01)
            # it listens a moment after the socket is there
            time.sleep(0.2)
            yield path
        finally:
            process.kill()


def start(machine, row, files):
    """Seconds that one start took."""
    firmware = (f"{files}/OVMF_CODE_4M.fd", variables(machine, row, files))

    def timed(tpm):
        guest = machines.Guest(None, None, f"{files}/disk.img", "agent", firmware=firmware, tpm=tpm)
        with Running(machine, guest) as running:
            return running.wait_for(MARKER, TIMEOUT)

    if row == "without TPM":
        return timed(None)
    with swtpm(machine, files) as socket:
        return timed(socket)


def time_boots(compared, rows, rounds, files):
    """Times by row and the machine's name."""
    times = {(row, machine.name): [] for row in rows for machine in compared}
    for number in range(rounds + 1):
        for row in rows:
            for machine in compared:
                took = start(machine, row, files)
                if number > 0:
                    times[row, machine.name].append(took)
                    print(f"  round {number}: {machine.name} {row} {report.ms(took)} ms", file=sys.stderr)
    return times


def main():
    options = arguments()
    rows = ROWS if shutil.which("swtpm") else ROWS[:1]
    with staging.Files(options, ("efi/OVMF_CODE_4M.fd", "efi/OVMF_VARS_4M.fd", "efi/disk.img")) as files:
        compared = [machines.Rackvisor(os.path.join(files, "rackvisor")), machines.QemuUefi(machines.qemu())]
        report.heading([machines.version(machine.program) for machine in compared])
        times = time_boots(compared, rows, options.rounds, files)
    medians = {key: statistics.median(seen) for key, seen in times.items()}
    ratios = {(row, name): medians[row, compared[0].name] / median for (row, name), median in medians.items()}
    print("\nprocess start to GRUB, ms")
    shown = [[f"{name} {row}", *report.spread(seen), f"{ratios[row, name]:.3f}"] for (row, name), seen in times.items()]
    report.table(["", "median", "min", "max", "rackvisor/this"], shown)
    for row in rows:
        ratio = ratios[row, compared[1].name]
        verdict = "holds" if ratio <= LIMIT_RATIO else "does not hold"
        print(f"at most {LIMIT_RATIO} of {compared[1].name} {row}: {verdict} ({ratio:.3f})")
    return 0 if all(ratios[row, compared[1].name] <= LIMIT_RATIO for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
