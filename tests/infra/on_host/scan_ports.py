"""Knocks at many ports of many hosts and prints those that a firewall lets through.

    stdin   {"ports": {"192.0.2.12": [1, 2, 22, 9092]}}
    stdout  {"192.0.2.12": [22, 9092]}

A port is let through if it answers at all: that nothing listens there is an answer too. Connections
are only begun and never used, as many a second as a small host bears.
"""

import errno
import json
import resource
import selectors
import socket
import sys
import time
from collections import deque

A_SECOND = 12_000
AT_ONCE = 120
# What is lost on the way is sent again after a second.
PATIENCE_SECONDS = 2.0

Door = tuple[str, int]


class Scan:
    """Connections that were begun, and what came of them."""

    def __init__(self) -> None:
        self.let_through: list[Door] = []
        self._selector = selectors.DefaultSelector()
        self._waiting: deque[tuple[float, socket.socket]] = deque()

    def knock(self, door: Door) -> None:
        family = socket.AF_INET6 if ":" in door[0] else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.connect_ex(door)
        self._selector.register(connection, selectors.EVENT_WRITE, door)
        self._waiting.append((time.monotonic() + PATIENCE_SECONDS, connection))

    def listen(self, seconds: float) -> None:
        """Take the answers of this time, and give up those who had time enough."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                failed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if failed in (0, errno.ECONNREFUSED):
                    self.let_through.append(key.data)
                self._close(connection)
            if not self._selector.get_map():
                time.sleep(max(0.0, until - time.monotonic()))
        while self._waiting and self._waiting[0][0] < time.monotonic():
            self._close(self._waiting.popleft()[1])

    def _close(self, connection: socket.socket) -> None:
        if connection.fileno() >= 0:
            self._selector.unregister(connection)
            connection.close()


def main(ports: dict[str, list[int]]) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    doors = [(address, port) for address, asked in ports.items() for port in asked]
    scan = Scan()
    for start in range(0, len(doors), AT_ONCE):
        for door in doors[start : start + AT_ONCE]:
            scan.knock(door)
        scan.listen(AT_ONCE / A_SECOND)
    scan.listen(PATIENCE_SECONDS)
    found = {
        address: sorted(port for name, port in scan.let_through if name == address)
        for address in ports
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.load(sys.stdin)["ports"])
