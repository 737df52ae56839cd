"""The command line that benchmarks with rows and rounds have in common."""

import argparse


def parser(name, initrd, seconds):
    """`seconds` is the type of the time that a row takes."""
    made = argparse.ArgumentParser(prog=f"benches/{name}")
    made.add_argument("--rackvisor", required=True)
    made.add_argument("--guest", required=True, help=f"folder with vmlinux and {initrd}")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--seconds", type=seconds, default=3)
    made.add_argument("--rows", default="", help="regular expression; such rows only")
    return made
