"""Studies of many runs, made from the stored ones."""

import json
import os
import shutil
from pathlib import Path

from tests.golden.reading import unpacked


def study_of_runs(root: Path, count: int) -> Path:
    """Return a directory of `count` runs that train an organism: stored ones with other learning rates.

    Three seeds make a cell, so that cells grow with the runs.
    """
    stored = unpacked("study", root / "stored") / "runs"
    runs = root / "runs"
    runs.mkdir()
    for name in ("base", "red-s0", "red-s1", "red-s2"):
        shutil.copytree(stored / name, runs / name)
    for number in range(count):
        copy, seed = number // 3, number % 3
        source, target = stored / f"hhh-s{seed}", runs / f"hhh-{copy}-s{seed}"
        shutil.copytree(source, target, copy_function=os.link, ignore=shutil.ignore_patterns("run.json"))
        record = json.loads((source / "run.json").read_text())
        record["config"]["optimizer"]["lr"] += 1e-5 * copy
        (target / "run.json").write_text(json.dumps(record))
    return runs
