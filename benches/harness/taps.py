"""The taps of the host that are measured, one for each machine, with a network of its own between host and guest."""

import subprocess


class Tap:
    """A tap, up, with the host's address. Gone with everything on it on leaving the `with`."""

    def __init__(self, number, pairs):
        self.name = f"rvbench{number}"
        self.host = f"10.231.{number}.1"
        self.guest = f"10.231.{number}.2"
        ip("tuntap", "add", "mode", "tap", self.name, *(["multi_queue"] if pairs > 1 else []))
        ip("address", "add", f"{self.host}/24", "dev", self.name)
        ip("link", "set", self.name, "up")

    def remove(self):
        ip("link", "delete", self.name)

    def passed(self):
        """Frames and bytes that went through so far, both ways; what was segmented for the other side counts once."""
        return sum(map(self.counter, ("rx_packets", "tx_packets"))), sum(map(self.counter, ("rx_bytes", "tx_bytes")))

    def counter(self, name):
        with open(f"/sys/class/net/{self.name}/statistics/{name}", encoding="ascii") as file:
            return int(file.read())


def ip(*words):
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)
