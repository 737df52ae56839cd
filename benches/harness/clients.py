"""Connections to the API that ask one thing after the other, until SIGTERM; then tells in JSON how they were answered."""

import json
import os
import select
import signal
import socket
import sys
import time

HEAD = " HTTP/1.1\r\nhost: vm\r\n"
# What is asked, and the status that answers it.
ASKED = [
    (("GET /v1/vm" + HEAD + "\r\n").encode(), b"200"),
    (("GET /v1/metrics" + HEAD + "\r\n").encode(), b"200"),
    (("GET /v1/inspect" + HEAD + "\r\n").encode(), b"200"),
    (("GET /v1/vm/disks/disk0" + HEAD + "\r\n").encode(), b"200"),
    (("POST /v1/vm/boot" + HEAD + "\r\n").encode(), b"409"),
    (("PUT /v1/vm" + HEAD + "content-type: application/json\r\ncontent-length: 3\r\n\r\n{ }").encode(), b"422"),
]


class Connection:
    """One of them."""

    def __init__(self, path, first):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.next = first
        self.answers = 0
        self.longest = 0
        self.ask()

    def ask(self):
        request, self.status = ASKED[self.next % len(ASKED)]
        self.next += 1
        self.unread = b""
        self.asked = time.monotonic()
        self.socket.sendall(request)

    def hear(self):
        """Takes what has come. With a whole answer, asks the next."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise SystemExit("the server closed a connection")
        self.unread += data
        head, end, body = self.unread.partition(b"\r\n\r\n")
        if not end:
            return
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        if len(body) < length:
            return
        if head.split(b" ", 2)[1] != self.status:
            raise SystemExit(head.decode(errors="replace"))
        self.answers += 1
        self.longest = max(self.longest, time.monotonic() - self.asked)
        self.ask()


def main():
    path, count = sys.argv[1], int(sys.argv[2])
    # What clients take of the processors is not the VMM's.
    os.nice(19)
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    connections = [Connection(path, number) for number in range(count)]
    poll = select.epoll()
    known = {connection.socket.fileno(): connection for connection in connections}
    for descriptor in known:
        poll.register(descriptor, select.EPOLLIN)
    print("asking", flush=True)
    began = time.monotonic()
    while not ended:
        for descriptor, _ in poll.poll(0.1):
            known[descriptor].hear()
    now = time.monotonic()
    # One that has waited long is no better for not having been answered yet.
    longest = max(max(connection.longest, now - connection.asked) for connection in connections)
    answers = sum(connection.answers for connection in connections)
    print(json.dumps({"answers": answers, "per_second": answers / (now - began), "longest": longest}))


if __name__ == "__main__":
    main()
