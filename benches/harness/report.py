"""Tables, and what is said above them."""

import os
import platform
import statistics
import sys
import time


def heading(versions):
    """Where and when this was measured, for whoever reads the figures later."""
    with open("/proc/loadavg", encoding="ascii") as file:
        load = file.read().split()[0]
    with open("/proc/cpuinfo", encoding="ascii") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    where = "in the laboratory (nested KVM under TCG: only ratios mean anything)" if os.environ.get("LAB") else "on KVM"
    host = os.environ.get("RACKVISOR_BENCH_HOST", "")
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {where}; {len(os.sched_getaffinity(0))} CPUs, {model}; Linux {platform.release()}; load {load}")
    if host:
        print(f"host: {host}")
    for version in dict.fromkeys(versions):
        print(version)
    sys.stdout.flush()


def table(header, rows):
    """Prints rows of text in columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join(cells).rstrip())


def ms(seconds):
    """Seconds as milliseconds."""
    return f"{seconds * 1000:.0f}"


def spread(times):
    """Median, least and most, as text in milliseconds."""
    return [ms(statistics.median(times)), ms(min(times)), ms(max(times))]


def show(value, digits=0):
    """A number, or that there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
