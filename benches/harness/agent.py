"""Commands in a guest whose agent listens on its serial port (rv.mode=agent)."""

import os
import re
import select
import time

from process import Silent

READY = re.compile(rb"@@RV-READY@@\r?\n")
BEGIN = re.compile(rb"@@RV-BEGIN@@\r?\n")
END = re.compile(rb"@@RV-END status=(\d+)@@\r?\n")


class Agent:
    """The agent of a running guest."""

    def __init__(self, running, timeout):
        """Waits until the agent listens, at most `timeout` seconds for this and each command."""
        self.running = running
        self.timeout = timeout
        self.unread = b""
        self.wait(READY)

    def start(self, command):
        """Starts a shell command of one line; returns when the guest has begun with it."""
        self.running.type(command.encode() + b"\n")
        self.wait(BEGIN)

    def finish(self):
        """Waits for the end of what was started; gives its output."""
        output, end = self.wait(END)
        if end[1] != b"0":
            raise Silent(f"a command in the guest ended with status {end[1].decode()}\n{output.decode(errors='replace')}")
        return output.decode()

    def run(self, command):
        """Runs a shell command of one line that must succeed; gives its output."""
        self.start(command)
        return self.finish()

    def wait(self, marker):
        deadline = time.monotonic() + self.timeout
        while True:
            found = marker.search(self.unread)
            if found:
                before = self.unread[: found.start()]
                self.unread = self.unread[found.end() :]
                return before, found
            left = deadline - time.monotonic()
            if left <= 0:
                raise Silent(f"the guest was silent for {self.timeout} s\n{self.said()}")
            if not select.select([self.running.serial], [], [], left)[0]:
                continue
            data = os.read(self.running.serial, 65536)
            if not data:
                raise Silent(f"the process ended\n{self.said()}")
            self.unread += data

    def said(self):
        return self.unread[-2000:].decode(errors="replace") + self.running.said()
