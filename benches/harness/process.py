"""Starting a machine, and waiting for what its guest says on the serial port."""

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager


class Silent(Exception):
    """The guest did not say what was waited for."""


class Running:
    """A process whose standard output is a guest's serial port. Ended, with its folder, on leaving the `with`."""

    def __init__(self, machine, guest):
        self.machine = machine
        self.folder = tempfile.TemporaryDirectory(prefix="rackvisor-bench.")
        command = machine.command(guest, self.folder.name)
        self.output = b""
        self.errors = tempfile.TemporaryFile()
        # a pipe that stays open: an end of input would make some of them leave
        stdin, self.keyboard = os.pipe()
        self.serial, stdout = os.pipe()
        self.started = time.clock_gettime(time.CLOCK_MONOTONIC)
        self.process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=self.errors)
        os.close(stdin)
        os.close(stdout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # One that has to clean up is asked to end.
        self.process.send_signal(getattr(self.machine, "ended_by", signal.SIGKILL))
        self.process.wait()
        for descriptor in (self.keyboard, self.serial):
            os.close(descriptor)
        self.errors.close()
        self.folder.cleanup()

    def wait_for(self, marker, timeout):
        """Seconds from just before the process was started until `marker` arrived."""
        deadline = self.started + timeout
        while True:
            left = deadline - time.clock_gettime(time.CLOCK_MONOTONIC)
            if left <= 0:
                raise Silent(f"{marker.decode()} did not come within {timeout} s\n{self.said()}")
            if not select.select([self.serial], [], [], left)[0]:
                continue
            data = os.read(self.serial, 65536)
            now = time.clock_gettime(time.CLOCK_MONOTONIC)
            if not data:
                raise Silent(f"the process ended\n{self.said()}")
            # a boot has a few lines with `quiet`; without it, some 30 KiB
            self.output += data
            if marker in self.output:
                return now - self.started

    def wait_for_answer(self, path, request, timeout):
        """Seconds from just before the process was started until it answered `request` on the Unix socket at `path`."""
        while self.process.poll() is None:
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(path)
                    client.sendall(request)
                    answer = client.recv(4096)
                    now = time.clock_gettime(time.CLOCK_MONOTONIC)
                    if b" 200 " not in answer:
                        raise Silent(f"{path} answered {answer!r}")
                    return now - self.started
                except (FileNotFoundError, ConnectionRefusedError):
                    pass
            if time.clock_gettime(time.CLOCK_MONOTONIC) > self.started + timeout:
                break
            time.sleep(0.0001)
        raise Silent(f"no answer on {path} within {timeout} s\n{self.said()}")

    def halt(self):
        """Stops the whole process, but for the time of `going`."""
        self.process.send_signal(signal.SIGSTOP)

    @contextmanager
    def going(self):
        """Lets it go on for a while."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.halt()

    def type(self, text):
        """Types `text` on the serial port."""
        os.write(self.keyboard, text)

    def said(self):
        """The last of what guest and process said, for an error message."""
        while select.select([self.serial], [], [], 0)[0] and (unread := os.read(self.serial, 65536)):
            self.output += unread
        self.errors.seek(0)
        return (self.output[-2000:] + self.errors.read()[-2000:]).decode(errors="replace")
